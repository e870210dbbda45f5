//! The I/O of one request: chooses nodes, asks them, and passes on what they write.

use std::sync::Arc;
use std::time::Duration;

use overfill_proto::convert;
use overfill_proto::v1::{
    self, DecodeEvent, DecodeRequest, FirstToken, PrefillEvent, PrefillRequest, ServedBy, Token, TokenLogprob, call, decode_event,
    prefill_event, said,
};
use overfill_schedule::{Order, QueueNumber};
use overfill_transport::calls::CallEvents;
use overfill_types::{Blame, Code, Endpoint, FinishReason, NodeId, Quality, Retry, Role, ServiceError};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tracing::{Instrument, Span, debug_span};

use crate::Router;
use crate::admission::ValidRequest;
use crate::metrics::Observed;
use crate::overview::Seen;
use crate::pairing::{Both, Chosen, NoPair, Nodes, RightOfWay};
use crate::relay::flow::{Failure, Flow};
use crate::relay::text::Text;
use crate::relay::{End, Event, PromptRead};

/// What the two kinds of node are called in errors.
pub(super) const PREFILL: &str = "prefill node";
/// See [`PREFILL`].
pub(super) const DECODE: &str = "decode node";
/// How long an answer waits for a router that is cut off to hear its nodes again; then its attempts count as any others.
const LONGEST_CUT: Duration = Duration::from_secs(30);
/// How often it looks whether there is something to hear.
const LISTENS: Duration = Duration::from_millis(100);
/// How long the other node gets to say what it knows when one has failed, so that the more telling error is given.
const SECOND_OPINION: Duration = Duration::from_millis(100);
/// How long after the answer's end a prefill node is listened to for what came of its handoff.
const LATE_REPORT: Duration = Duration::from_secs(1);

pub(super) struct Driver {
    pub(super) router: Arc<Router>,
    pub(super) request: ValidRequest,
    pub(super) flow: Flow,
    text: Text,
    /// Of the attempt.
    served_by: ServedBy,
    pub(super) observed: Observed,
    sender: mpsc::Sender<Result<Event, ServiceError>>,
    number: QueueNumber,
    /// While it looks for nodes after a failure.
    right_of_way: Option<RightOfWay>,
    /// Until when it waits for room as long as no node has taken it on.
    patience: Instant,
    /// It had its turn.
    served: bool,
}

impl Driver {
    pub(super) fn new(router: Arc<Router>, request: ValidRequest, sender: mpsc::Sender<Result<Event, ServiceError>>) -> Self {
        let observed = Observed::new(&router.metrics, request.counters.clone(), request.prompt.len(), request.arrived);
        let patience = (Instant::now() + router.config.queue_timeout).min(request.deadline);
        let (text, number) = (Text::new(&request), router.pairing.number());
        Self {
            text,
            flow: Flow::default(),
            served_by: ServedBy::default(),
            observed,
            router,
            request,
            sender,
            number,
            right_of_way: None,
            patience,
            served: false,
        }
    }

    /// The answer ends with an error.
    pub(super) fn failed(&mut self, error: &ServiceError) {
        self.observed.failed(error);
        if error.code == Code::Quarantined {
            self.router.metrics.quarantined(&self.request.prompt);
        }
    }

    /// Makes attempts until the answer is whole.
    ///
    /// # Errors
    /// Why it will not be.
    pub(super) async fn run(&mut self) -> Result<(), ServiceError> {
        self.router.retries.request();
        loop {
            let chosen = self.choose().instrument(debug_span!("choose")).await?;
            // From here on its nodes are counted as taken.
            self.right_of_way = None;
            self.observed.chosen();
            let epoch = self.flow.attempt();
            self.serve_by(&chosen.nodes);
            let ServedBy { prefill_node, decode_node, .. } = &self.served_by;
            let span = debug_span!("attempt", epoch, prefill_node, decode_node);
            let attempt = async {
                match &chosen.nodes {
                    Nodes::Both(both) => self.attempt(&chosen, both, epoch).await,
                    // Boxed: rare, and every request's task would have to hold it.
                    Nodes::One(node) => Box::pin(self.attempt_alone(&chosen, node, epoch)).await,
                }
            };
            let Err(failure) = attempt.instrument(span).await else { return Ok(()) };
            let (code, retry) = (failure.error.code, failure.error.retry);
            // What is told of a node, or of the way to it, while none is heard is of this router's own way.
            let cut_off = retry == Retry::Elsewhere && self.was_cut_off().await;
            let (written, error) = (self.flow.written().len(), &failure.error);
            tracing::info!(request = %self.request.id, epoch, written, %code, %error, cut_off, "attempt failed");
            self.router.suspicions.failed(&self.request.prompt, code, self.flow.progressed());
            let goes_on = if cut_off {
                self.flow.was_cut_off(failure)
            } else {
                if let Some(node) = &failure.suspect {
                    self.router.pairing.suspect(node);
                }
                self.flow.set_patient(Instant::now() < self.patience);
                self.flow.failed(failure)
            };
            self.observed.attempt_failed(code, goes_on.is_ok());
            goes_on?;
            if self.flow.accepted() {
                // Before `chosen` gives back its room to those who wait.
                self.right_of_way = Some(self.router.pairing.right_of_way(&self.order(), self.number));
            }
            self.observed.waits();
            // Who waits for room adds no load.
            if retry == Retry::Elsewhere && self.router.retries.retry().await {
                self.observed.retry_waited();
            }
        }
    }

    /// Waits while this router hears none of the nodes that are there; tells whether it did, and hears them again.
    async fn was_cut_off(&self) -> bool {
        let until = Instant::now() + LONGEST_CUT;
        let mut waited = false;
        while self.router.pairing.hears_nobody() {
            let ValidRequest { model, quality, .. } = &self.request;
            if Instant::now() > until || !self.router.pairing.missing(&model.manifest, *quality).is_empty() {
                return false;
            }
            waited = true;
            sleep(LISTENS).await;
        }
        waited
    }

    /// The nodes of the next attempt: of the first in its turn, of later ones at once; where there are none but those that failed,
    /// after a pause.
    async fn choose(&mut self) -> Result<Chosen, ServiceError> {
        let mut order = self.order();
        loop {
            order.shunned = self.flow.failed_nodes().to_vec();
            let chosen = if self.flow.accepted() {
                self.router.pairing.at_once(&order)
            } else {
                self.router.pairing.turn(order.clone(), self.number, std::mem::replace(&mut self.served, true)).await
            };
            let asked = match chosen {
                Ok(chosen) if !chosen.nodes.iter().any(|n| order.shunned.contains(&n.id)) => return Ok(chosen),
                Ok(chosen) => chosen.nodes.iter().map(|node| node.id.clone()).collect(),
                Err(NoPair::Refused(error)) => return Err(error),
                Err(NoPair::Absent) => {
                    if let Some(quality) = self.fallback() {
                        tracing::warn!(request = %self.request.id, %quality, "falls back");
                        self.request.quality = quality;
                        order = self.order();
                        continue;
                    }
                    let missing = self.router.pairing.missing(&self.request.model.manifest, self.request.quality);
                    self.flow.nobody(ServiceError::new(Code::Unavailable, format!("{missing}: start one, or try again later")))?;
                    order.shunned.clone()
                }
            };
            self.flow.set_patient(Instant::now() < self.patience);
            // Of different length, so that those who wait for the same node do not ask it all at once.
            sleep(self.flow.pause(&asked)?.mul_f64(rand::random_range(0.5..1.0))).await;
        }
    }

    /// What is given instead where nodes are missing: what the router may fall back to, if that has nodes and nothing has been
    /// written.
    fn fallback(&self) -> Option<Quality> {
        let ValidRequest { quality, sampling, model, .. } = &self.request;
        let fallback = self.router.config.fallback.quality()?;
        let may_fall = *quality == Quality::Overfill && self.flow.written().is_empty();
        let able = fallback != Quality::Decode || sampling.prompt_logprobs.is_none();
        (may_fall && able && self.router.pairing.missing(&model.manifest, fallback).is_empty()).then_some(fallback)
    }

    fn serve_by(&mut self, nodes: &Nodes) {
        let fingerprint = self.request.model.manifest.fingerprint.to_string();
        self.served_by = ServedBy { fingerprint, mode: self.request.quality.to_string(), ..ServedBy::default() };
        for node in nodes.iter() {
            match node.role {
                Role::Prefill => self.served_by.prefill_node = node.id.to_string(),
                Role::Decode => self.served_by.decode_node = node.id.to_string(),
            }
        }
    }

    fn order(&self) -> Order {
        let ValidRequest { model, prompt, quality, stop, share, priority, cache_salt, .. } = &self.request;
        Order {
            pair: model.manifest.fingerprint.clone(),
            quality: *quality,
            decodes: *quality == Quality::Decode || stop.max_tokens > 1,
            keys: self.router.pairing.keys(cache_salt, prompt),
            prompt_tokens: prompt.len(),
            answer_tokens: stop.max_tokens,
            share: *share,
            priority: *priority,
            until: self.patience.into_std(),
            shunned: Vec::new(),
        }
    }

    async fn attempt(&mut self, chosen: &Chosen, both: &Both, epoch: u64) -> Result<(), Failure> {
        let mut decode = match self.request.stop.max_tokens {
            1 => {
                self.served_by.decode_node.clear();
                None
            }
            _ => Some(self.reserve(&both.decode, epoch).instrument(debug_span!("reserve", otel.kind = "client")).await?),
        };
        let handoff = decode.as_ref().map(|d| v1::Handoff {
            address: both.decode.address.to_string(),
            ticket: d.ticket.clone(),
            epoch,
            held_tokens: d.held_tokens,
            nccl: d.nccl,
        });
        let mut stage = debug_span!("first_token");
        let mut prefill = self.prefill(&both.prefill, handoff).await?;
        // Tokens of the decode node that came before the first one, over the other connection.
        let mut early: Vec<DecodeEvent> = Vec::new();
        // The answer's first token is known; of one that is resumed it is from the start.
        let mut begun = !self.flow.written().is_empty();
        // Until the handoff is proved: nothing that happens to the prefill node matters then.
        let mut reading = true;
        // What is told of the handoff then, for whoever looks at the cluster, may come after the first tokens of the decode node.
        let mut untold = decode.as_ref().map(|decode| Seen {
            model: self.request.model.manifest.name.to_string(),
            from: both.prefill.id.clone(),
            to: both.decode.id.clone(),
            attempt: epoch,
            prompt_tokens: self.request.prompt.len(),
            cached_tokens: None,
            held_tokens: decode.held_tokens,
        });
        'answer: loop {
            tokio::select! {
                // What the decode node has said already proves more than what the prefill node may fail at.
                biased;
                event = next(&mut decode), if decode.is_some() => match event {
                    Ok(Some(event)) if begun => {
                        // A token of the decode model's: its KV cache is whole, so the prompt was read.
                        if reading && matches!(event.event, Some(decode_event::Event::Token(_))) {
                            reading = false;
                            chosen.read();
                        }
                        if self.decoded(event).await? {
                            break 'answer;
                        }
                    }
                    Ok(Some(event)) => early.push(event),
                    // All of it came before the first token did.
                    Ok(None) if matches!(early.last(), Some(DecodeEvent { event: Some(decode_event::Event::Finished(_)) })) => decode = None,
                    Ok(None) => return Err(Failure::broken(DECODE, &both.decode.id)),
                    Err(error) => {
                        let failure = Failure::of(error, DECODE, &both.decode.id);
                        let mut told = Vec::new();
                        let failure = judged(failure, &mut prefill, PREFILL, &both.prefill.id, &mut told).await;
                        // Where the first token is the whole answer nothing is handed over, and the decode node may be heard first.
                        let first = told.into_iter().find_map(|told| match told.event {
                            Some(prefill_event::Event::FirstToken(first)) => Some(first),
                            _ => None,
                        });
                        if let Some(first) = first
                            && self.began(first, &both.prefill.id).await?
                        {
                            break 'answer;
                        }
                        return Err(failure);
                    }
                },
                event = prefill.message(), if reading || untold.is_some() => match event {
                    Ok(Some(PrefillEvent { event: Some(prefill_event::Event::HandoffDone(done)) })) => {
                        reading = false;
                        if let Some(seen) = untold.take() {
                            self.router.handoffs.saw(seen, done);
                        }
                    }
                    Ok(Some(_)) if !reading => {}
                    _ if !reading => untold = None,
                    Ok(Some(PrefillEvent { event: Some(prefill_event::Event::FirstToken(first)) })) => {
                        begun = true;
                        if let Some(seen) = &mut untold {
                            seen.cached_tokens = Some(first.cached_tokens);
                        }
                        chosen.read();
                        drop(std::mem::replace(&mut stage, debug_span!("decode")));
                        if self.began(first, &both.prefill.id).await? {
                            break 'answer;
                        }
                        for event in std::mem::take(&mut early) {
                            reading &= !matches!(event.event, Some(decode_event::Event::Token(_)));
                            if self.decoded(event).await? {
                                break 'answer;
                            }
                        }
                    }
                    Ok(Some(_)) => {}
                    Ok(None) if begun && decode.is_some() => reading = false,
                    Ok(None) => return Err(Failure::broken(PREFILL, &both.prefill.id)),
                    Err(error) => {
                        let failure = Failure::of(error, PREFILL, &both.prefill.id);
                        let Some(decode) = &mut decode else { return Err(failure) };
                        return Err(judged(failure, &mut decode.events, DECODE, &both.decode.id, &mut Vec::new()).await);
                    }
                },
                // Both have said all that they will, and the answer is not whole.
                else => return Err(Failure::broken(PREFILL, &both.prefill.id)),
            }
        }
        // A short answer is whole before the prefill node can say what came of a handoff that its tokens have proved.
        if let Some(seen) = untold.filter(|_| !reading) {
            tokio::spawn(timeout(LATE_REPORT, hear_of_handoff(self.router.clone(), seen, prefill)));
        }
        Ok(())
    }

    /// A call to a node, which is a part of the stage that is under way; it is there when the node has taken it on.
    async fn call<E: TryFrom<said::What>>(&self, kind: &str, node: &Endpoint, what: call::What) -> Result<CallEvents<E>, Failure> {
        let calls = self.router.peers.calls(node.address.as_str()).map_err(|e| Failure::of(e, kind, &node.id))?;
        let events = calls.begin(what, self.request.stop.max_tokens, self.request.trace.headers(&Span::current())).await;
        let accepted = events.accepted().await;
        if accepted.is_ok() {
            self.router.pairing.hears();
        }
        accepted.map_err(|e| Failure::of(e, kind, &node.id))
    }

    /// Asks the decode node for a reservation.
    pub(super) async fn reserve(&self, node: &Endpoint, epoch: u64) -> Result<Reserved, Failure> {
        let request = DecodeRequest {
            fingerprint: self.request.model.manifest.fingerprint.to_string(),
            request_id: self.request.id.to_string(),
            epoch,
            prompt: self.request.prompt.to_vec(),
            sampling: Some(convert::sampling_to_wire(&self.request.sampling)),
            stop: Some(convert::stop_to_wire(&self.request.stop)),
            written: self.flow.written().to_vec(),
            alone: self.request.quality == Quality::Decode,
            suspicion: self.router.suspicions.of(&self.request.prompt),
            cache_salt: self.request.cache_salt.clone(),
            age_us: u64::try_from(self.request.arrived.elapsed().as_micros()).unwrap_or(u64::MAX),
        };
        let asked = Instant::now();
        let mut events = self.call(DECODE, node, call::What::Decode(request)).await?;
        match events.message().await.map_err(|e| Failure::of(e, DECODE, &node.id))? {
            Some(DecodeEvent { event: Some(decode_event::Event::Reserved(reserved)) }) => {
                self.observed.reserved(asked);
                let v1::Reserved { ticket, held_tokens, nccl, .. } = reserved;
                Ok(Reserved { ticket, held_tokens, nccl, events })
            }
            _ => Err(Failure::broken(DECODE, &node.id)),
        }
    }

    /// Asks the prefill node to read the prompt, and to write the answer where the full model writes it.
    pub(super) async fn prefill(&self, node: &Endpoint, handoff: Option<v1::Handoff>) -> Result<CallEvents<PrefillEvent>, Failure> {
        let alone = self.request.quality == Quality::Full;
        let mut sampling = convert::sampling_to_wire(&self.request.sampling);
        // The client has them by now.
        sampling.prompt_logprobs = sampling.prompt_logprobs.filter(|_| self.flow.written().is_empty());
        let request = PrefillRequest {
            fingerprint: self.request.model.manifest.fingerprint.to_string(),
            request_id: self.request.id.to_string(),
            prompt: self.request.prompt.to_vec(),
            sampling: Some(sampling),
            stop: Some(convert::stop_to_wire(&self.request.stop)),
            handoff,
            alone,
            written: if alone { self.flow.written().to_vec() } else { Vec::new() },
            suspicion: self.router.suspicions.of(&self.request.prompt),
            cache_salt: self.request.cache_salt.clone(),
        };
        self.call(PREFILL, node, call::What::Prefill(request)).await
    }

    /// The prompt was read, and this is the full model's token; true at the answer's end.
    async fn began(&mut self, first: FirstToken, node: &NodeId) -> Result<bool, Failure> {
        let Some(token) = first.token else { return Err(Failure::broken(PREFILL, node)) };
        if !self.flow.first(&token).map_err(Failure::of_request)? {
            return Ok(false);
        }
        self.begin(first.cached_tokens, first.prompt_logprobs).await;
        Ok(self.pass_on(token).await)
    }

    /// The prompt was read.
    pub(super) async fn begin(&self, cached_tokens: u32, prompt_logprobs: Vec<TokenLogprob>) {
        self.observed.read(cached_tokens);
        self.send(Event::PromptRead(Box::new(PromptRead { cached_tokens, prompt_logprobs, served_by: self.served_by.clone() }))).await;
    }

    /// A decode node's event; true at the answer's end.
    async fn decoded(&mut self, event: DecodeEvent) -> Result<bool, Failure> {
        match event.event {
            Some(decode_event::Event::Token(token)) => {
                self.flow.next(&token).map_err(Failure::of_request)?;
                Ok(self.pass_on(token).await)
            }
            Some(decode_event::Event::Finished(finished)) => {
                self.finish(convert::finish(finished.reason()).unwrap_or(FinishReason::Length), None).await;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Sends a token on its way to the client; true at the answer's end, which this token may be, whether or not its node
    /// lives to say so.
    pub(super) async fn pass_on(&mut self, token: Token) -> bool {
        self.observed.token();
        let eos = &self.request.model.manifest.tokenizer.eos_token_ids;
        let reason = self.request.stop.after(token.id, self.flow.written().len(), eos);
        // A token that ends the answer is no part of its text.
        let (text, matched) = match reason {
            Some(FinishReason::Stop) => (String::new(), None),
            _ => self.text.push(token.id),
        };
        if let Some(permit) = &mut self.request.permit {
            permit.allowance.wrote();
        }
        let token_id = token.id;
        self.send(Event::Delta { text, tokens: vec![token] }).await;
        match (matched, reason) {
            (Some(stop), _) => self.end(FinishReason::Stop, Some(stop)).await,
            (None, Some(FinishReason::Stop)) => {
                let stop = self.request.stop_tokens.iter().find(|(stop, _)| *stop == token_id).map(|(_, text)| text.clone());
                self.finish(FinishReason::Stop, stop).await;
            }
            (None, Some(reason)) => self.finish(reason, None).await,
            (None, None) => return false,
        }
        true
    }

    /// The end, at a stop string that was a token if one is given.
    pub(super) async fn finish(&mut self, reason: FinishReason, stop: Option<String>) {
        let (text, matched) = self.text.finish();
        if !text.is_empty() {
            self.send(Event::Delta { text, tokens: Vec::new() }).await;
        }
        let reason = if matched.is_some() { FinishReason::Stop } else { reason };
        self.end(reason, matched.or(stop)).await;
    }

    /// The end. The nodes that are named are those that finished the answer.
    async fn end(&mut self, reason: FinishReason, matched_stop: Option<String>) {
        self.observed.finished(reason);
        self.router.suspicions.answered(&self.request.prompt);
        let completion_tokens = self.flow.written().len();
        // Before the client knows, so that it finds its place free.
        self.request.permit = None;
        let mut served_by = self.served_by.clone();
        if completion_tokens == 1 && self.request.quality == Quality::Overfill {
            served_by.decode_node.clear();
        }
        self.send(Event::Finished(Box::new(End { reason, completion_tokens, served_by, matched_stop }))).await;
    }

    async fn send(&self, event: Event) {
        // Closed: the client has gone, which the task around sees at once.
        let _ = self.sender.send(Ok(event)).await;
    }
}

/// A failure of one node, which may only be the first to notice that the way to its peer is broken: what does the peer say?
/// What it `told` before that is kept.
async fn judged<T: TryFrom<said::What>>(
    failure: Failure,
    events: &mut CallEvents<T>,
    kind: &str,
    peer: &NodeId,
    told: &mut Vec<T>,
) -> Failure {
    if !failure.is_of_way() {
        return failure;
    }
    let asked = async {
        loop {
            match events.message().await {
                Ok(Some(event)) => told.push(event),
                Ok(None) => return None,
                Err(error) => return Some(error),
            }
        }
    };
    match timeout(SECOND_OPINION, asked).await.ok().flatten() {
        Some(error) if error.blame != Blame::Way => Failure::of(error, kind, peer),
        _ => failure.of_way_to(peer),
    }
}

/// Listens to a prefill node until it says what came of its handoff.
async fn hear_of_handoff(router: Arc<Router>, seen: Seen, mut events: CallEvents<PrefillEvent>) {
    while let Ok(Some(said)) = events.message().await {
        if let Some(prefill_event::Event::HandoffDone(done)) = said.event {
            router.handoffs.saw(seen, done);
            return;
        }
    }
}

/// A reservation and the stream that it writes to.
pub(super) struct Reserved {
    ticket: String,
    /// Tokens of the prompt that the decode node holds already.
    held_tokens: u32,
    /// The decode node takes rows over NCCL too.
    nccl: bool,
    pub(super) events: CallEvents<DecodeEvent>,
}

async fn next(decode: &mut Option<Reserved>) -> Result<Option<DecodeEvent>, ServiceError> {
    match decode {
        Some(decode) => decode.events.message().await,
        None => std::future::pending().await,
    }
}
