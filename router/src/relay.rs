//! One request's way through the cluster: both nodes are asked, their tokens become text, whatever fails is told once.
//!
//! Until the first token has gone to the client a failed attempt is repeated on other nodes, silently; after it, the client
//! gets one clear error. Dropping the answer drops both nodes' streams, which ends everything there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_proto::v1::decode_client::DecodeClient;
use overfill_proto::v1::prefill_client::PrefillClient;
use overfill_proto::v1::{self, DecodeEvent, DecodeRequest, PrefillEvent, PrefillRequest, ServedBy, Token, decode_event, prefill_event};
use overfill_proto::{convert, status};
use overfill_text::{Detokenizer, StopMatcher};
use overfill_types::{Code, FinishReason, NodeId, ServiceError};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tonic::{Status, Streaming};

use crate::Router;
use crate::admission::ValidRequest;
use crate::pairing::Chosen;

/// Attempts at one request: the first and two more.
const ATTEMPTS: u64 = 3;
/// How long the other node gets to say what it knows when one has failed, so that the more telling error is given.
const SECOND_OPINION: Duration = Duration::from_millis(100);
/// Events that wait for a slow client; then its nodes' streams wait.
const EVENTS: usize = 64;

/// What happens to an answer.
#[derive(Debug)]
pub(crate) enum Event {
    /// New text and tokens.
    Delta { text: String, tokens: Vec<Token> },
    /// The end.
    Finished(End),
}

/// How an answer ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) reason: FinishReason,
    pub(crate) completion_tokens: usize,
    pub(crate) served_by: ServedBy,
    pub(crate) matched_stop: Option<String>,
}

/// An answer as it comes.
pub(crate) type Answer = mpsc::Receiver<Result<Event, ServiceError>>;

/// Starts a request. It ends when the answer is dropped.
pub(crate) fn start(router: Arc<Router>, request: ValidRequest) -> Answer {
    let (sender, answer) = mpsc::channel(EVENTS);
    // Owned by the answer.
    tokio::spawn(async move {
        let deadline = request.deadline;
        let gone = sender.clone();
        let mut relay = Relay { text: Text::new(&request), sender, router, request };
        let ended = tokio::select! {
            ended = relay.run() => ended,
            () = gone.closed() => return,
            () = sleep(deadline.saturating_duration_since(Instant::now())) => {
                Err(ServiceError::new(Code::DeadlineExceeded, "the request's time ran out: ask for fewer tokens, or give it a longer deadline"))
            }
        };
        if let Err(error) = ended {
            tracing::info!(request = %relay.request.id, code = %error.code, %error, "request failed");
            // A client that does not read gets its connection closed in the end; nothing is held for it here.
            let _ = timeout(Duration::from_secs(5), gone.send(Err(error))).await;
        }
    });
    answer
}

struct Relay {
    router: Arc<Router>,
    request: ValidRequest,
    text: Text,
    sender: mpsc::Sender<Result<Event, ServiceError>>,
}

/// A failed attempt.
struct Failure {
    error: ServiceError,
    /// The node that is gone, if one is.
    lost: Option<NodeId>,
    /// A node that refused, so that another may take it.
    refused: Option<NodeId>,
}

impl Relay {
    async fn run(&mut self) -> Result<(), ServiceError> {
        let mut excluded = Vec::new();
        for epoch in 1.. {
            let view = self.router.view.borrow().clone();
            let chosen = self.router.pairing.choose(&view, &self.request.model.manifest, &excluded, Instant::now())?;
            let Err(failure) = self.attempt(&chosen, epoch).await else { return Ok(()) };
            if let Some(lost) = &failure.lost {
                self.router.pairing.suspect(lost, Instant::now());
            }
            let another = failure.lost.is_some() || failure.refused.is_some();
            if self.text.written > 0 || !another || epoch == ATTEMPTS {
                return Err(failure.error);
            }
            tracing::info!(request = %self.request.id, epoch, error = %failure.error, "attempt failed: trying other nodes");
            excluded.extend(failure.lost.into_iter().chain(failure.refused));
        }
        Ok(())
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
        let mut reading = true;
        loop {
            tokio::select! {
                event = prefill.message(), if reading => match event {
                    Ok(Some(PrefillEvent { event: Some(prefill_event::Event::FirstToken(first)) })) => {
                        begun = true;
                        let finish = convert::finish(first.finish());
                        if self.take(chosen, first.token, finish).await? {
                            return Ok(());
                        }
                        for event in std::mem::take(&mut early) {
                            if self.decoded(chosen, event).await? {
                                return Ok(());
                            }
                        }
                    }
                    Ok(Some(_)) => {}
                    Ok(None) if begun && decode.is_some() => reading = false,
                    Ok(None) => return Err(broken("prefill", &chosen.prefill.id)),
                    Err(error) => return Err(self.failed(chosen, Some(&error), decode.as_mut().map(|d| &mut d.events)).await),
                },
                event = next(&mut decode), if decode.is_some() => match event {
                    Ok(Some(event)) if begun => if self.decoded(chosen, event).await? {
                        return Ok(());
                    },
                    Ok(Some(event)) => early.push(event),
                    // All of it came before the first token did.
                    Ok(None) if matches!(early.last(), Some(DecodeEvent { event: Some(decode_event::Event::Finished(_)) })) => decode = None,
                    Ok(None) => return Err(broken("decode", &chosen.decode.id)),
                    Err(error) => return Err(self.second(chosen, &error, &mut prefill).await),
                },
            }
        }
    }

    /// Asks the decode node for a reservation.
    async fn reserve(&self, chosen: &Chosen, epoch: u64) -> Result<Reserved, Failure> {
        let node = &chosen.decode;
        let request = DecodeRequest {
            written: Vec::new(),
            fingerprint: node.fingerprint.to_string(),
            request_id: self.request.id.to_string(),
            epoch,
            prompt: self.request.prompt.clone(),
            sampling: Some(convert::sampling_to_wire(&self.request.sampling)),
            stop: Some(convert::stop_to_wire(&self.request.stop)),
        };
        let channel = self.router.peers.channel(node).map_err(Failure::plain)?;
        let mut client = DecodeClient::new(channel).max_decoding_message_size(overfill_proto::MAX_MESSAGE);
        let refused = |e: Status| Failure::of(&e, "decode node", &node.id);
        let mut events = client.generate(request).await.map_err(refused)?.into_inner();
        match events.message().await.map_err(refused)? {
            Some(DecodeEvent { event: Some(decode_event::Event::Reserved(reserved)) }) => {
                Ok(Reserved { ticket: reserved.ticket, held_tokens: reserved.held_tokens, events })
            }
            _ => Err(broken("decode", &node.id)),
        }
    }

    async fn prefill(&self, chosen: &Chosen, handoff: Option<v1::Handoff>) -> Result<Streaming<PrefillEvent>, Failure> {
        let node = &chosen.prefill;
        let request = PrefillRequest {
            fingerprint: node.fingerprint.to_string(),
            request_id: self.request.id.to_string(),
            prompt: self.request.prompt.clone(),
            sampling: Some(convert::sampling_to_wire(&self.request.sampling)),
            stop: Some(convert::stop_to_wire(&self.request.stop)),
            handoff,
        };
        let channel = self.router.peers.channel(node).map_err(Failure::plain)?;
        let mut client = PrefillClient::new(channel).max_decoding_message_size(overfill_proto::MAX_MESSAGE);
        let answered = client.prefill(request).await;
        Ok(answered.map_err(|e| Failure::of(&e, "prefill node", &node.id))?.into_inner())
    }

    /// A decode node's event; true at the answer's end.
    async fn decoded(&mut self, chosen: &Chosen, event: DecodeEvent) -> Result<bool, Failure> {
        match event.event {
            Some(decode_event::Event::Token(token)) => self.take(chosen, Some(token), None).await,
            Some(decode_event::Event::Finished(finished)) => {
                let reason = convert::finish(finished.reason()).unwrap_or(FinishReason::Length);
                self.finish(chosen, reason).await;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// A token, and whether it ended the answer; true at the answer's end.
    async fn take(&mut self, chosen: &Chosen, token: Option<Token>, finish: Option<FinishReason>) -> Result<bool, Failure> {
        let Some(token) = token else { return Err(broken("prefill", &chosen.prefill.id)) };
        if token.index as usize != self.text.written {
            let message = format!("token {} came where token {} was due: send the request again", token.index, self.text.written);
            return Err(Failure::plain(ServiceError::new(Code::DataLoss, message)));
        }
        let ends = self.ends(token.id);
        let (text, matched) = self.text.push(token.id, ends);
        self.send(Event::Delta { text, tokens: vec![token] }).await;
        if let Some(stop) = matched {
            self.end(chosen, FinishReason::Stop, Some(stop)).await;
            return Ok(true);
        }
        if let Some(reason) = finish {
            self.finish(chosen, reason).await;
        }
        Ok(finish.is_some())
    }

    /// Whether a token ends the answer without being part of its text.
    fn ends(&self, token: u32) -> bool {
        let stop = &self.request.stop;
        stop.stop_token_ids.contains(&token) || (!stop.ignore_eos && self.request.model.manifest.tokenizer.eos_token_ids.contains(&token))
    }

    async fn finish(&mut self, chosen: &Chosen, reason: FinishReason) {
        let (text, matched) = self.text.finish();
        if !text.is_empty() {
            self.send(Event::Delta { text, tokens: Vec::new() }).await;
        }
        let reason = if matched.is_some() { FinishReason::Stop } else { reason };
        self.end(chosen, reason, matched).await;
    }

    async fn end(&mut self, chosen: &Chosen, reason: FinishReason, matched_stop: Option<String>) {
        let decoded = self.request.stop.max_tokens > 1 && self.text.written > 1;
        let served_by = ServedBy {
            fingerprint: chosen.prefill.fingerprint.to_string(),
            mode: "overfill".into(),
            prefill_node: chosen.prefill.id.to_string(),
            decode_node: if decoded { chosen.decode.id.to_string() } else { String::new() },
        };
        let end = End { reason, completion_tokens: self.text.written, served_by, matched_stop };
        self.send(Event::Finished(end)).await;
    }

    async fn send(&self, event: Event) {
        // Closed: the client has gone, which the task around sees at once.
        let _ = self.sender.send(Ok(event)).await;
    }

    /// The prefill node failed: what does the decode node say?
    async fn failed(&self, chosen: &Chosen, error: Option<&Status>, decode: Option<&mut Streaming<DecodeEvent>>) -> Failure {
        let mut failure =
            error.map_or_else(|| broken("prefill", &chosen.prefill.id), |e| Failure::of(e, "prefill node", &chosen.prefill.id));
        let Some(events) = decode.filter(|_| failure.lost.is_none()) else { return failure };
        let asked = async {
            loop {
                match events.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return None,
                    Err(error) => return Some(error),
                }
            }
        };
        if let Ok(Some(error)) = timeout(SECOND_OPINION, asked).await {
            let decode = Failure::of(&error, "decode node", &chosen.decode.id);
            if decode.lost.is_some() {
                failure = decode;
            }
        }
        // The prefill node could not reach the decode node: that one is the suspect.
        if failure.lost.is_none() && failure.error.code == Code::Unavailable {
            failure.lost = Some(chosen.decode.id.clone());
        }
        failure
    }

    /// The decode node failed: what does the prefill node say?
    async fn second(&self, chosen: &Chosen, error: &Status, prefill: &mut Streaming<PrefillEvent>) -> Failure {
        let failure = Failure::of(error, "decode node", &chosen.decode.id);
        if failure.lost.is_some() {
            return failure;
        }
        let asked = async {
            loop {
                match prefill.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return None,
                    Err(error) => return Some(error),
                }
            }
        };
        match timeout(SECOND_OPINION, asked).await {
            Ok(Some(error)) => {
                let prefill = Failure::of(&error, "prefill node", &chosen.prefill.id);
                if prefill.lost.is_some() { prefill } else { failure }
            }
            _ => failure,
        }
    }
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

impl Failure {
    fn plain(error: ServiceError) -> Self {
        Self { error, lost: None, refused: None }
    }

    /// What a node's status tells. A status that was made here says that the node is gone.
    fn of(error: &Status, kind: &str, node: &NodeId) -> Self {
        use std::error::Error;
        let gone = error.source().is_some();
        let mut told = status::from_status(error, &format!("the {kind}"));
        if gone {
            told.message = format!("the {kind} {node} was lost: {}; send the request again", told.message);
        }
        let refused = matches!(told.code, Code::ResourceExhausted | Code::Unavailable) && !gone;
        Self { error: told, lost: gone.then(|| node.clone()), refused: refused.then(|| node.clone()) }
    }
}

/// A node that ended its stream in the middle.
fn broken(kind: &str, node: &NodeId) -> Failure {
    let message = format!("the {kind} node {node} broke off in the middle of the answer: send the request again");
    Failure { error: ServiceError::new(Code::Unavailable, message), lost: Some(node.clone()), refused: None }
}

/// Tokens to text, with stop strings cut away.
struct Text {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Tokens so far.
    written: usize,
}

impl Text {
    fn new(request: &ValidRequest) -> Self {
        Self { detokenizer: request.model.detokenizer(), stops: request.stop_strings.clone(), written: 0 }
    }

    /// A token's text, and the stop string that it completed. A token that `ends` the answer has none.
    fn push(&mut self, token: u32, ends: bool) -> (String, Option<String>) {
        self.written += 1;
        if ends {
            return (String::new(), None);
        }
        let matched = self.stops.push(&self.detokenizer.push(token));
        (matched.text, matched.stop)
    }

    /// What was held back.
    fn finish(&mut self) -> (String, Option<String>) {
        let matched = self.stops.push(&self.detokenizer.finish());
        match matched.stop {
            Some(stop) => (matched.text, Some(stop)),
            None => (matched.text + &self.stops.finish(), None),
        }
    }
}
