//! The I/O of one request: chooses nodes, asks them, and passes on what they write.

use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_proto::convert;
use overfill_proto::v1::decode_client::DecodeClient;
use overfill_proto::v1::prefill_client::PrefillClient;
use overfill_proto::v1::{self, DecodeEvent, DecodeRequest, PrefillEvent, PrefillRequest, ServedBy, Token, decode_event, prefill_event};
use overfill_schedule::{Order, Ticket};
use overfill_types::{Code, FinishReason, ServiceError};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tonic::{Status, Streaming};

use crate::Router;
use crate::admission::ValidRequest;
use crate::pairing::{Chosen, NoPair};
use crate::relay::flow::{Blame, Failure, Flow};
use crate::relay::text::Text;
use crate::relay::{End, Event, Read};

/// How long the other node gets to say what it knows when one has failed, so that the more telling error is given.
const SECOND_OPINION: Duration = Duration::from_millis(100);

pub(super) struct Driver {
    router: Arc<Router>,
    request: ValidRequest,
    flow: Flow,
    text: Text,
    sender: mpsc::Sender<Result<Event, ServiceError>>,
    ticket: Ticket,
    /// Until when it waits for room as long as no node has taken it on.
    patience: Instant,
    /// It had its turn.
    served: bool,
}

impl Driver {
    pub(super) fn new(router: Arc<Router>, request: ValidRequest, sender: mpsc::Sender<Result<Event, ServiceError>>) -> Self {
        let patience = (Instant::now() + router.config.queue_timeout).min(request.deadline);
        let (text, ticket) = (Text::new(&request), router.pairing.ticket());
        Self { text, flow: Flow::default(), router, request, sender, ticket, patience, served: false }
    }

    /// Makes attempts until the answer is whole.
    ///
    /// # Errors
    /// Why it will not be.
    pub(super) async fn run(&mut self) -> Result<(), ServiceError> {
        loop {
            let chosen = self.choose().await?;
            let epoch = self.flow.attempt();
            let Err(failure) = self.attempt(&chosen, epoch).await else { return Ok(()) };
            if let Blame::Lost(node) = &failure.blame {
                self.router.pairing.suspect(node);
            }
            let Failure { error, .. } = &failure;
            tracing::info!(request = %self.request.id, epoch, written = self.flow.written().len(), code = %error.code, %error, "attempt failed");
            self.flow.set_patient(Instant::now() < self.patience);
            self.flow.failed(failure)?;
        }
    }

    /// Two nodes for the next attempt: the first in its turn, later ones at once; where there are none but those that failed,
    /// after a pause.
    async fn choose(&mut self) -> Result<Chosen, ServiceError> {
        let mut order = self.order();
        loop {
            order.shunned = self.flow.failed_nodes().to_vec();
            let chosen = if self.flow.accepted() {
                self.router.pairing.at_once(&order)
            } else {
                self.router.pairing.turn(order.clone(), self.ticket, std::mem::replace(&mut self.served, true)).await
            };
            match chosen {
                Ok(chosen) if !order.shunned.contains(&chosen.prefill.id) && !order.shunned.contains(&chosen.decode.id) => {
                    return Ok(chosen);
                }
                Ok(_) => {}
                Err(NoPair::Refused(error)) => return Err(error),
                Err(NoPair::Absent) => {
                    let missing = self.router.pairing.missing(&self.request.model.manifest);
                    self.flow.nobody(ServiceError::new(Code::Unavailable, format!("{missing}: start one, or try again later")))?;
                }
            }
            self.flow.set_patient(Instant::now() < self.patience);
            // Of different length, so that those who wait for the same node do not ask it all at once.
            sleep(self.flow.pause()?.mul_f64(rand::random_range(0.5..1.0))).await;
        }
    }

    fn order(&self) -> Order {
        let ValidRequest { model, prompt, stop, share, priority, .. } = &self.request;
        let pair = &model.manifest.fingerprint;
        Order {
            prefill: pair.clone(),
            decode: pair.clone(),
            decodes: stop.max_tokens > 1,
            keys: self.router.pairing.keys(prompt),
            prompt_tokens: prompt.len(),
            answer_tokens: stop.max_tokens,
            share: *share,
            priority: *priority,
            until: self.patience,
            shunned: Vec::new(),
        }
    }

    async fn attempt(&mut self, chosen: &Chosen, epoch: u64) -> Result<(), Failure> {
        let mut decode = match self.request.stop.max_tokens {
            1 => None,
            _ => Some(self.reserve(chosen, epoch).await?),
        };
        let handoff = decode.as_ref().map(|d| v1::Handoff {
            address: chosen.decode.address.clone(),
            ticket: d.ticket.clone(),
            epoch,
            held_tokens: d.held_tokens,
        });
        let mut prefill = self.prefill(chosen, handoff).await?;
        // Tokens of the decode node that came before the first one, over the other connection.
        let mut early: Vec<DecodeEvent> = Vec::new();
        let mut begun = false;
        // Until the handoff is done: nothing that happens to the prefill node matters then.
        let mut reading = true;
        loop {
            tokio::select! {
                event = prefill.message(), if reading => match event {
                    Ok(Some(PrefillEvent { event: Some(prefill_event::Event::FirstToken(first)) })) => {
                        begun = true;
                        chosen.read();
                        let Some(token) = first.token else { return Err(Failure::broken("prefill node", &chosen.prefill.id)) };
                        if self.flow.first(&token).map_err(Failure::of_request)? {
                            let served_by = self.served_by(chosen, decode.is_some());
                            let (cached_tokens, prompt_logprobs) = (first.cached_tokens, first.prompt_logprobs);
                            self.send(Event::Read(Read { cached_tokens, prompt_logprobs, served_by })).await;
                            if self.pass_on(chosen, token).await {
                                return Ok(());
                            }
                        }
                        for event in std::mem::take(&mut early) {
                            if self.decoded(chosen, event).await? {
                                return Ok(());
                            }
                        }
                    }
                    Ok(Some(PrefillEvent { event: Some(prefill_event::Event::HandoffDone(_)) })) => reading = false,
                    Ok(Some(_)) => {}
                    Ok(None) if begun && decode.is_some() => reading = false,
                    Ok(None) => return Err(Failure::broken("prefill node", &chosen.prefill.id)),
                    Err(error) => return Err(prefill_failed(chosen, &error, decode.as_mut().map(|d| &mut d.events)).await),
                },
                event = next(&mut decode), if decode.is_some() => match event {
                    Ok(Some(event)) if begun => if self.decoded(chosen, event).await? {
                        return Ok(());
                    },
                    Ok(Some(event)) => early.push(event),
                    // All of it came before the first token did.
                    Ok(None) if matches!(early.last(), Some(DecodeEvent { event: Some(decode_event::Event::Finished(_)) })) => decode = None,
                    Ok(None) => return Err(Failure::broken("decode node", &chosen.decode.id)),
                    Err(error) => return Err(decode_failed(chosen, &error, &mut prefill).await),
                },
            }
        }
    }

    /// Asks the decode node for a reservation.
    async fn reserve(&self, chosen: &Chosen, epoch: u64) -> Result<Reserved, Failure> {
        let node = &chosen.decode;
        let request = DecodeRequest {
            fingerprint: node.fingerprint.to_string(),
            request_id: self.request.id.to_string(),
            epoch,
            prompt: self.request.prompt.to_vec(),
            sampling: Some(convert::sampling_to_wire(&self.request.sampling)),
            stop: Some(convert::stop_to_wire(&self.request.stop)),
            written: self.flow.written().to_vec(),
        };
        let channel = self.router.peers.channel(node).map_err(Failure::of_request)?;
        let mut client = DecodeClient::new(channel).max_decoding_message_size(overfill_proto::MAX_MESSAGE);
        let refused = |e: Status| Failure::of(&e, "decode node", &node.id);
        let mut events = client.generate(request).await.map_err(refused)?.into_inner();
        match events.message().await.map_err(refused)? {
            Some(DecodeEvent { event: Some(decode_event::Event::Reserved(reserved)) }) => {
                Ok(Reserved { ticket: reserved.ticket, held_tokens: reserved.held_tokens, events })
            }
            _ => Err(Failure::broken("decode node", &node.id)),
        }
    }

    async fn prefill(&self, chosen: &Chosen, handoff: Option<v1::Handoff>) -> Result<Streaming<PrefillEvent>, Failure> {
        let node = &chosen.prefill;
        let mut sampling = convert::sampling_to_wire(&self.request.sampling);
        // The client has them by now.
        sampling.prompt_logprobs = sampling.prompt_logprobs.filter(|_| self.flow.written().is_empty());
        let request = PrefillRequest {
            fingerprint: node.fingerprint.to_string(),
            request_id: self.request.id.to_string(),
            prompt: self.request.prompt.to_vec(),
            sampling: Some(sampling),
            stop: Some(convert::stop_to_wire(&self.request.stop)),
            handoff,
        };
        let channel = self.router.peers.channel(node).map_err(Failure::of_request)?;
        let mut client = PrefillClient::new(channel).max_decoding_message_size(overfill_proto::MAX_MESSAGE);
        let answered = client.prefill(request).await;
        Ok(answered.map_err(|e| Failure::of(&e, "prefill node", &node.id))?.into_inner())
    }

    /// A decode node's event; true at the answer's end.
    async fn decoded(&mut self, chosen: &Chosen, event: DecodeEvent) -> Result<bool, Failure> {
        match event.event {
            Some(decode_event::Event::Token(token)) => {
                self.flow.next(&token).map_err(Failure::of_request)?;
                Ok(self.pass_on(chosen, token).await)
            }
            Some(decode_event::Event::Finished(finished)) => {
                self.finish(chosen, convert::finish(finished.reason()).unwrap_or(FinishReason::Length)).await;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Sends a token on its way to the client; true at the answer's end, which this token may be, whether or not its node
    /// lives to say so.
    async fn pass_on(&mut self, chosen: &Chosen, token: Token) -> bool {
        let eos = &self.request.model.manifest.tokenizer.eos_token_ids;
        let reason = self.request.stop.after(token.id, self.flow.written().len(), eos);
        // A token that ends the answer is no part of its text.
        let (text, matched) = match reason {
            Some(FinishReason::Stop) => (String::new(), None),
            _ => self.text.push(token.id),
        };
        if let Some(place) = &mut self.request.place {
            place.allowance.wrote();
        }
        self.send(Event::Delta { text, tokens: vec![token] }).await;
        match (matched, reason) {
            (Some(stop), _) => self.end(chosen, FinishReason::Stop, Some(stop)).await,
            (None, Some(reason)) => self.finish(chosen, reason).await,
            (None, None) => return false,
        }
        true
    }

    async fn finish(&mut self, chosen: &Chosen, reason: FinishReason) {
        let (text, matched) = self.text.finish();
        if !text.is_empty() {
            self.send(Event::Delta { text, tokens: Vec::new() }).await;
        }
        let reason = if matched.is_some() { FinishReason::Stop } else { reason };
        self.end(chosen, reason, matched).await;
    }

    /// The end. The nodes that are named are those that finished the answer.
    async fn end(&mut self, chosen: &Chosen, reason: FinishReason, matched_stop: Option<String>) {
        let completion_tokens = self.flow.written().len();
        let served_by = self.served_by(chosen, completion_tokens > 1);
        // Before the client knows, so that it finds its place free.
        self.request.place = None;
        self.send(Event::Finished(End { reason, completion_tokens, served_by, matched_stop })).await;
    }

    fn served_by(&self, chosen: &Chosen, decoded: bool) -> ServedBy {
        ServedBy {
            fingerprint: chosen.prefill.fingerprint.to_string(),
            mode: "overfill".into(),
            prefill_node: chosen.prefill.id.to_string(),
            decode_node: if decoded { chosen.decode.id.to_string() } else { String::new() },
        }
    }

    async fn send(&self, event: Event) {
        // Closed: the client has gone, which the task around sees at once.
        let _ = self.sender.send(Ok(event)).await;
    }
}

/// The prefill node failed: what does the decode node say?
async fn prefill_failed(chosen: &Chosen, error: &Status, decode: Option<&mut Streaming<DecodeEvent>>) -> Failure {
    let failure = Failure::of(error, "prefill node", &chosen.prefill.id);
    let Some(events) = decode.filter(|_| !matches!(failure.blame, Blame::Lost(_))) else { return failure };
    if let Some(error) = last_word(events).await {
        let decode = Failure::of(&error, "decode node", &chosen.decode.id);
        if decode.may_pass() {
            return decode;
        }
    }
    // The prefill node could not reach the decode node: that one is the suspect.
    let blame = if failure.error.code == Code::Unavailable { Blame::Lost(chosen.decode.id.clone()) } else { failure.blame };
    Failure { blame, ..failure }
}

/// The decode node failed: what does the prefill node say?
async fn decode_failed(chosen: &Chosen, error: &Status, prefill: &mut Streaming<PrefillEvent>) -> Failure {
    let failure = Failure::of(error, "decode node", &chosen.decode.id);
    if matches!(failure.blame, Blame::Lost(_)) || failure.error.code == Code::Preempted {
        return failure;
    }
    match last_word(prefill).await.map(|error| Failure::of(&error, "prefill node", &chosen.prefill.id)) {
        Some(prefill) if matches!(prefill.blame, Blame::Lost(_)) => prefill,
        _ => failure,
    }
}

/// The error that a stream ends with, if it does soon.
async fn last_word<T>(events: &mut Streaming<T>) -> Option<Status> {
    let asked = async {
        loop {
            match events.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(error) => return Some(error),
            }
        }
    };
    timeout(SECOND_OPINION, asked).await.ok().flatten()
}

/// A reservation and the stream that it writes to.
struct Reserved {
    ticket: String,
    /// Tokens of the prompt that the decode node holds already.
    held_tokens: u32,
    events: Streaming<DecodeEvent>,
}

async fn next(decode: &mut Option<Reserved>) -> Result<Option<DecodeEvent>, Status> {
    match decode {
        Some(decode) => decode.events.message().await,
        None => std::future::pending().await,
    }
}
