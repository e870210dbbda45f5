//! One sequence: what it holds, where it stands, and to whom it writes.

use std::time::{Duration, Instant};

use overfill_model::{Sampled, Sampler};
use overfill_proto::v1::{DecodeEvent, DecodeFinished, Token, decode_event};
use overfill_proto::{convert, status};
use overfill_types::{FinishReason, ServiceError, StopConditions};
use tokio::sync::mpsc;
use tonic::Status;

use crate::admission::{Asked, Place};

/// Tokens of one answer on their way to the router.
pub(crate) type Events = mpsc::Sender<Result<DecodeEvent, Status>>;

pub(crate) struct Sequence {
    pub(crate) place: Place,
    pub(crate) prompt_tokens: usize,
    stop: StopConditions,
    pub(crate) sampler: Sampler,
    /// Has room for the whole answer, so that a slow reader never holds up a step.
    events: Events,
    pub(crate) state: State,
}

pub(crate) enum State {
    /// For the KV cache, until then at the latest.
    Waiting { until: Instant },
    /// Written so far: the last token is the next input.
    Running { last: u32, written: usize },
}

impl Sequence {
    pub(crate) fn new(asked: Asked, place: Place, events: Events, patience: Duration) -> Self {
        let Asked { prompt, sampling, stop, .. } = asked;
        let sampler = Sampler::new(sampling, &prompt);
        Self { place, prompt_tokens: prompt.len(), stop, sampler, events, state: State::Waiting { until: Instant::now() + patience } }
    }

    /// Whether nobody reads the answer any more.
    pub(crate) fn abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// The full model's first token: the decode model goes on from it. Gives why the answer is over, if it is.
    pub(crate) fn begin(&mut self, first: u32, eos: &[u32]) -> Option<FinishReason> {
        self.sampler.observe(first);
        self.state = State::Running { last: first, written: 1 };
        self.stop.after(first, 1, eos)
    }

    /// Sends a token that was chosen after `written` others. Gives why the answer is over, if it is.
    pub(crate) fn wrote(&mut self, sampled: &Sampled, written: usize, eos: &[u32]) -> Option<FinishReason> {
        let token = Token { id: sampled.token, index: written as u32, logprob: sampled.logprob.as_ref().map(convert::logprob_to_wire) };
        self.send(Ok(DecodeEvent { event: Some(decode_event::Event::Token(token)) }));
        self.state = State::Running { last: sampled.token, written: written + 1 };
        self.stop.after(sampled.token, written + 1, eos)
    }

    /// The end, as it should be.
    pub(crate) fn finish(self, reason: FinishReason) {
        let finished = DecodeFinished { reason: convert::finish_to_wire(reason).into() };
        self.send(Ok(DecodeEvent { event: Some(decode_event::Event::Finished(finished)) }));
    }

    /// The end, as it should not be.
    pub(crate) fn fail(self, error: &ServiceError) {
        tracing::info!(ticket = %self.place.ticket, code = %error.code, %error, "sequence failed");
        self.send(Err(status::to_status(error)));
    }

    fn send(&self, event: Result<DecodeEvent, Status>) {
        // Closed: the router has gone, which the next sweep sees. Full it cannot be: there is room for the whole answer.
        let _ = self.events.try_send(event);
    }
}
