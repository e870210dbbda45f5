//! One sequence: what it holds, where it stands, and to whom it writes.

use std::sync::Arc;
use std::time::Duration;

use overfill_guide::Matcher;
use overfill_lifecycle::Trace;
use overfill_model::{Sampled, Sampler};
use overfill_proto::convert;
use overfill_proto::v1::{DecodeEvent, DecodeFinished, Token, decode_event};
use overfill_transport::calls::EventSender;
use overfill_types::{Code, FinishReason, ServiceError, StopConditions};
use tokio::time::Instant;
use tracing::{Span, debug_span};

use crate::admission::{KvReservation, SequenceRequest};
use crate::metrics::Metrics;

pub(crate) struct Sequence {
    pub(crate) reservation: KvReservation,
    prompt_tokens: usize,
    /// No handoff comes.
    pub(crate) alone: bool,
    /// Positions whose keys and values the cache has, once the handoff is whole: the prompt's, then the answer's.
    pub(crate) cached: usize,
    /// Tokens that the decode model has yet to read: the answer's last one or, where it was begun elsewhere, all of it; and
    /// before it the prompt, where no handoff comes.
    unread: Vec<u32>,
    stop: StopConditions,
    pub(crate) sampler: Sampler,
    /// Has room for the whole answer, so that a slow reader never holds up a step.
    events: EventSender<DecodeEvent>,
    /// When the next frame of its KV cache has to be here.
    pub(crate) until: Instant,
    metrics: Arc<Metrics>,
    trace: Trace,
    /// What is being done with it: waiting for its KV cache, or writing.
    stage: Span,
    admitted: Instant,
    /// When its KV cache was whole, or when it came if none comes.
    begun: Option<Instant>,
    /// When it wrote last, or began.
    wrote: Instant,
}

impl Sequence {
    pub(crate) fn new(
        asked: SequenceRequest,
        guide: Option<Matcher>,
        reservation: KvReservation,
        events: EventSender<DecodeEvent>,
        patience: Duration,
        (metrics, trace): (Arc<Metrics>, Trace),
    ) -> Self {
        let SequenceRequest { prompt, written, alone, sampling, stop, .. } = asked;
        let mut sampler = Sampler::new(sampling, &prompt).guided(guide, prompt.len() + stop.max_tokens);
        written.iter().for_each(|token| sampler.observe(*token));
        let (prompt_tokens, now) = (prompt.len(), Instant::now());
        let (cached, unread) = if alone { (0, [prompt, written].concat()) } else { (prompt_tokens, written) };
        Self {
            reservation,
            prompt_tokens,
            alone,
            cached,
            unread,
            stop,
            sampler,
            events,
            until: now + patience,
            metrics,
            stage: if alone { debug_span!(parent: trace.span(), "write") } else { debug_span!(parent: trace.span(), "wait_for_kv") },
            trace,
            admitted: now,
            begun: alone.then_some(now),
            wrote: now,
        }
    }

    /// Whether nobody reads the answer any more.
    pub(crate) fn abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// The full model's first token: the decode model goes on from it. Gives why the answer is over, if it is.
    ///
    /// # Errors
    /// [`Code::DataLoss`] where the answer that is resumed began otherwise.
    pub(crate) fn begin(&mut self, first: u32, eos: &[u32]) -> Result<Option<FinishReason>, ServiceError> {
        self.wrote = Instant::now();
        self.begun = Some(self.wrote);
        self.stage = debug_span!(parent: self.trace.span(), "write");
        self.metrics.reservation_wait.observe((self.wrote - self.admitted).as_secs_f64());
        match self.unread.first() {
            None => {
                self.sampler.observe(first);
                self.unread.push(first);
                Ok(self.stop.after(first, 1, eos))
            }
            Some(written) if *written == first => Ok(None),
            Some(written) => {
                let message = format!("the answer began with token {written}, the full model now gives {first}: another one has answered");
                Err(ServiceError::of_way(Code::DataLoss, message))
            }
        }
    }

    /// Takes the blocks that all tokens up to the last need; false where the pool has none.
    pub(crate) fn grow(&mut self) -> bool {
        self.reservation.blocks.grow(self.cached + self.unread.len()).is_ok()
    }

    /// The tokens that the decode model reads next, of an answer that is resumed at most `replay`.
    pub(crate) fn due(&self, replay: usize) -> &[u32] {
        match self.unread.len() {
            1 => &self.unread,
            several => &self.unread[..several.min(replay)],
        }
    }

    /// Whether a token follows when the next `count` are read.
    pub(crate) fn writes_after(&self, count: usize) -> bool {
        count == self.unread.len()
    }

    /// The position of the token that is written next: all before it are read or due.
    pub(crate) fn next_position(&self) -> usize {
        self.cached + self.unread.len()
    }

    /// The decode model has read `count` tokens, and more are unread.
    pub(crate) fn read(&mut self, count: usize) {
        self.cached += count;
        self.unread.drain(..count);
    }

    /// All was read and a token is written, `now`: sends it. Gives why the answer is over, if it is.
    pub(crate) fn wrote(&mut self, sampled: &Sampled, eos: &[u32], now: Instant) -> Option<FinishReason> {
        self.metrics.generation_tokens.inc();
        self.read(self.unread.len());
        self.unread.push(sampled.token);
        let before = self.cached - self.prompt_tokens;
        if before > 0 {
            self.metrics.inter_token_latency.observe((now - self.wrote).as_secs_f64());
        }
        self.wrote = now;
        let token = Token { id: sampled.token, index: before as u32, logprob: sampled.logprob.as_ref().map(convert::logprob_to_wire) };
        self.send(Ok(DecodeEvent { event: Some(decode_event::Event::Token(token)) }));
        self.stop.after(sampled.token, before + 1, eos)
    }

    /// The end, as it should be.
    pub(crate) fn finish(self, reason: FinishReason) {
        self.metrics.finished(reason, self.begun);
        let finished = DecodeFinished { reason: convert::finish_to_wire(reason).into() };
        self.send(Ok(DecodeEvent { event: Some(decode_event::Event::Finished(finished)) }));
    }

    /// The end, as it should not be.
    pub(crate) fn fail(self, error: &ServiceError) {
        self.metrics.failed(error);
        let _in = self.trace.span().enter();
        tracing::info!(ticket = %self.reservation.ticket, code = %error.code, %error, "sequence failed");
        self.send(Err(error.clone()));
    }

    fn send(&self, event: Result<DecodeEvent, ServiceError>) {
        // Closed: the router has gone, which the next sweep sees. Full it cannot be: there is room for the whole answer.
        let _ = self.events.try_send(event);
    }
}
