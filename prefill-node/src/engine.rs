//! The engine: it owns the full model, its KV cache and all prompts. In a node it has a thread of its own; a simulation turns it.
//!
//! A step is one forward pass over chunks of several prompts. As soon as a layer's keys and values are computed they are
//! transformed and handed to the prompts' pushes, while the next layer computes. A prompt that begins like an earlier one
//! shares its blocks and is read from where they end.
//!
//! Where the full model writes the whole answer, each token that it writes is one more of the prompt, read in the next step.
//!
//! What fails in the work on one prompt fails that prompt. A step that fails is done again by halves, so that what is to blame
//! fails alone: what was written to the cache is written again, the same. An engine that fails one prompt after the other is
//! broken: it ends, and its node with it.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use overfill_kv::{BlockHash, BlockId, BlockPool, ReservedBlocks};
use overfill_lifecycle::{Drain, Trace};
use overfill_model::{Chunk, ModelError, Row, Sampled, Sampler};
use overfill_node::{Cores, Faults, Pulse, Streak};
use overfill_proto::convert;
use overfill_proto::v1::{FirstToken, PrefillEvent, PrefillFinished, Token, TokenLogprob, prefill_event};
use overfill_transport::calls::EventSender;
use overfill_types::prompt_digest;
use overfill_types::{Code, ServiceError, StopConditions};
use tokio::time::{Instant, timeout};
use tracing::{Span, debug_span};

use crate::compute::Compute;
use crate::handoff::Sender;
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::queue::share;
use crate::{Counted, Counts};

/// How often an idle engine looks for prompts that nobody waits for, and whether it is to end.
const SWEEP: Duration = Duration::from_millis(20);
/// Most tokens that one step reads of a prompt whose own log-probabilities are wanted: each has a row of logits then, of
/// some 0.5 MB with a large vocabulary.
const LOGPROB_TOKENS: usize = 32;
/// How often it looks, while nothing computes, whether a push has room for what it owes.
const POLL: Duration = Duration::from_millis(1);

/// One prompt that is to be read.
pub(crate) struct Job {
    /// And what was written of the answer, where the full model writes it.
    pub(crate) prompt: Vec<u32>,
    /// Of these, the request's own.
    pub(crate) prompt_tokens: usize,
    /// The full model writes on after its first token.
    pub(crate) alone: bool,
    /// Number of the pair.
    pub(crate) pair: usize,
    /// Names of the blocks that the prompt fills; `None` where no prompt's blocks are kept.
    pub(crate) names: Option<Vec<BlockHash>>,
    /// Chooses the first token.
    pub(crate) sampler: Sampler,
    /// How many most likely tokens are reported with each token of the prompt; `None` where nothing of the prompt is.
    pub(crate) prompt_logprobs: Option<usize>,
    pub(crate) stop: StopConditions,
    pub(crate) events: EventSender<PrefillEvent>,
    /// Where the KV cache goes; `None` if one token is all that is wanted.
    pub(crate) handoff: Option<Sender>,
    /// When it came.
    pub(crate) arrived: Instant,
    pub(crate) trace: Trace,
    /// What is being done with it: waiting, or reading.
    pub(crate) stage: Span,
    /// Shared with the push: the prompt is held until both are over.
    pub(crate) _counted: Arc<Counted>,
}

pub(crate) struct Settings {
    /// Token ids that end an answer.
    pub(crate) eos: Vec<u32>,
    /// Most tokens in one step.
    pub(crate) chunk_tokens: usize,
}

/// A prefill node's engine, which `C` computes for.
pub struct Engine<C> {
    compute: C,
    cores: Cores,
    jobs: flume::Receiver<Job>,
    pool: BlockPool,
    pace: Pace,
    settings: Settings,
    counts: Arc<Counts>,
    metrics: Arc<Metrics>,
    pulse: Pulse,
    faults: Faults,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
    /// Prompts that got blocks, ever.
    let_in: u64,
    failed_steps: Streak,
    failed_handoffs: Streak,
}

/// An engine that failed one prompt after the other: it is to blame, and its node is to end.
#[derive(Debug, thiserror::Error)]
#[error("one prompt failed after the other: the engine is broken")]
pub struct Broken;

/// A prompt that has its blocks: it is being read, or was and its rows are on their way.
struct Running {
    /// Its number among all that were let in.
    number: u64,
    job: Job,
    reserved: ReservedBlocks,
    /// Tokens that are in the cache.
    done: usize,
    /// Tokens that this step reads.
    given: usize,
    /// Of these, found there.
    cached: usize,
    /// A token was written here.
    wrote: bool,
    /// When it got its blocks.
    begun: Instant,
    /// Of the prompt's tokens that were read, as far as they are wanted: from the second on.
    logprobs: Vec<TokenLogprob>,
}

/// What a step gave.
struct StepResult {
    /// The token of each row of logits, in the order of the prompts: those of the prompt that are reported on, then, where it
    /// was read to its end, the first of the answer. `None` where choosing it panicked.
    tokens: Vec<Option<Sampled>>,
    /// When the full model was through.
    computed: Instant,
    /// Prompts whose rows could not be handed over.
    failed: Vec<(u64, ServiceError)>,
}

impl<C: Compute> Engine<C> {
    /// Without prompts; `pulse` beats with each turn.
    pub(crate) fn new(
        (compute, cores): (C, Cores),
        jobs: flume::Receiver<Job>,
        settings: Settings,
        (pool, pace): (BlockPool, Pace),
        (counts, metrics): (Arc<Counts>, Arc<Metrics>),
        (pulse, faults): (Pulse, Faults),
    ) -> Self {
        let (waiting, running, let_in, failed_steps, failed_handoffs) = Default::default();
        Self {
            compute,
            cores,
            jobs,
            pool,
            pace,
            settings,
            counts,
            metrics,
            pulse,
            faults,
            waiting,
            running,
            let_in,
            failed_steps,
            failed_handoffs,
        }
    }

    /// Turns on the calling thread, which it keeps, until `end` is given, nobody can tell it anything more, or it is broken.
    pub fn run(mut self, end: &Drain) {
        while !end.draining() {
            if self.is_idle() {
                self.pulse.beat();
                match self.jobs.recv_timeout(if self.running.is_empty() { SWEEP } else { POLL }) {
                    Ok(job) => self.waiting.push_back(job),
                    Err(flume::RecvTimeoutError::Timeout) => {}
                    Err(flume::RecvTimeoutError::Disconnected) => return,
                }
            }
            if let Err(broken) = self.turn() {
                tracing::error!("{broken}");
                return;
            }
        }
    }

    /// Whether a turn would compute nothing until it is told something, or a push has room.
    pub fn is_idle(&self) -> bool {
        self.running.iter().all(|r| r.remaining() == 0)
    }

    /// What [`Self::run`] does before a turn of an idle engine, for a task that turns it: waits until it is told something,
    /// `limit` at most. False where nobody can tell it anything more.
    pub async fn told(&mut self, limit: Duration) -> bool {
        self.pulse.beat();
        match timeout(limit, self.jobs.recv_async()).await {
            Ok(Ok(job)) => self.waiting.push_back(job),
            Ok(Err(flume::RecvError::Disconnected)) => return false,
            Err(_) => {}
        }
        true
    }

    /// One turn, which waits for nothing: takes what came, lets go of what nobody waits for, does a step, and sends what
    /// pushes have room for.
    ///
    /// # Errors
    /// Where it is broken.
    pub fn turn(&mut self) -> Result<(), Broken> {
        self.faults.at("turn");
        self.waiting.extend(self.jobs.try_iter());
        self.waiting.retain(|job| !job.abandoned());
        self.running.retain(|r| !r.job.abandoned());
        self.let_in();
        let Counts { running, waiting, unread, .. } = &*self.counts;
        running.store(self.running.iter().filter(|r| r.remaining() > 0).count(), Ordering::Release);
        waiting.store(self.waiting.len() + self.jobs.len(), Ordering::Release);
        let left = self.running.iter().map(Running::remaining).chain(self.waiting.iter().map(|job| job.prompt.len()));
        unread.store(left.sum(), Ordering::Release);
        self.step();
        self.send_owed();
        if self.failed_steps.is_broken() || self.failed_handoffs.is_broken() { Err(Broken) } else { Ok(()) }
    }

    /// Gives blocks to those who waited longest; a prompt that does not fit yet is not overtaken, so it gets its turn.
    fn let_in(&mut self) {
        let (pool, counts, metrics) = (&self.pool, &self.counts, &self.metrics);
        while let Some(job) = self.waiting.front() {
            let names = job.names.as_deref().unwrap_or_default();
            // At least the last token is read: its logits are wanted. Or all are, where those of all are.
            let findable = if job.prompt_logprobs.is_some() { 0 } else { (job.prompt.len() - 1) / pool.block_tokens() };
            let Ok(reserved) = pool.reserve(&names[..findable.min(names.len())], job.most_tokens()) else { return };
            let Some(mut job) = self.waiting.pop_front() else { return };
            let done = reserved.shared_tokens();
            if job.names.is_some() {
                counts.prefix_queries.fetch_add(job.prompt.len() as u64, Ordering::Relaxed);
                counts.prefix_hits.fetch_add(done as u64, Ordering::Relaxed);
            }
            if let Some(handoff) = &mut job.handoff {
                handoff.available_in_all(done);
            }
            job.stage = debug_span!(parent: job.trace.span(), "read", tokens = job.prompt.len(), cached = done);
            let begun = Instant::now();
            metrics.queue_time.observe((begun - job.arrived).as_secs_f64());
            self.let_in += 1;
            let (number, logprobs) = (self.let_in, Vec::new());
            self.running.push(Running { number, job, reserved, done, given: 0, cached: done, wrote: false, begun, logprobs });
        }
    }

    fn step(&mut self) {
        let due: Vec<usize> = self.running.iter().map(Running::due).collect();
        if due.iter().all(|r| *r == 0) {
            return;
        }
        for (running, given) in self.running.iter_mut().zip(share(&due, self.cores.chunk(self.settings.chunk_tokens))) {
            running.given = given;
        }
        let readers: Vec<u64> = self.running.iter().filter(|r| r.given > 0).map(|r| r.number).collect();
        self.compute(&readers);
        self.pulse.beat();
    }

    /// The step of these prompts, over what each was given. Where it fails, that of their halves.
    fn compute(&mut self, readers: &[u64]) {
        let given: Vec<usize> = self.running.iter().map(|r| if readers.contains(&r.number) { r.given } else { 0 }).collect();
        let begun = Instant::now();
        let error = match caught("the step", || read(&mut self.compute, (&self.cores, &self.faults), &mut self.running, &given)) {
            Ok(read) => {
                self.failed_steps.end();
                let Metrics { step_seconds, step_tokens, .. } = &*self.metrics;
                let (tokens, took) = (given.iter().sum::<usize>(), read.computed - begun);
                step_seconds.observe(took.as_secs_f64());
                step_tokens.inc_by(tokens as u64);
                if let Some(most) = self.pace.after(tokens, took) {
                    self.counts.unread_most.store(most, Ordering::Release);
                }
                return self.advance(&given, read);
            }
            Err(error) => error,
        };
        if let [number] = readers {
            tracing::error!(%error, "a prompt failed its step");
            return self.fail(*number, &error, |own| &mut own.failed_steps);
        }
        tracing::warn!(%error, prompts = readers.len(), "a step failed: it is done again by halves");
        let (first, rest) = readers.split_at(readers.len() / 2);
        self.compute(first);
        self.compute(rest);
    }

    /// A prompt failed, which is one more of a streak.
    fn fail(&mut self, number: u64, error: &ServiceError, streak: fn(&mut Self) -> &mut Streak) {
        let failed: Vec<Running> = self.running.extract_if(.., |r| r.number == number).collect();
        for Running { job, .. } in failed {
            streak(self).failed(prompt_digest(&job.prompt));
            job.send(Err(error.clone()));
        }
    }

    /// After a step: counts what was read, names the blocks that are full, and gives their first token to those that were
    /// read to their end.
    fn advance(&mut self, given: &[usize], read: StepResult) {
        let (mut given, mut tokens) = (given.iter(), read.tokens.into_iter());
        let (pool, settings, metrics) = (&self.pool, &self.settings, &self.metrics);
        self.running.retain_mut(|running| {
            let given = given.next().copied().unwrap_or(0);
            let reported = running.reported(given);
            let told: Vec<Option<Sampled>> = tokens.by_ref().take(reported).collect();
            running.logprobs.extend(told.iter().flatten().filter_map(|t| t.logprob.as_ref()).map(convert::logprob_to_wire));
            running.done += given;
            let ends = given > 0 && running.remaining() == 0;
            let token = if ends { tokens.next().flatten() } else { None };
            if told.iter().any(Option::is_none) || ends && token.is_none() {
                running.job.send(Err(panicked("choosing a token")));
                return false;
            }
            if let Some(names) = &running.job.names {
                running.reserved.keep(&names[..names.len().min(running.done / pool.block_tokens())]);
            }
            token.is_none_or(|token| running.wrote(&token, &settings.eos, read.computed, metrics))
        });
        for (number, error) in read.failed {
            self.fail(number, &error, |own| &mut own.failed_handoffs);
        }
    }

    /// Sends what pushes have room for; lets go of prompts whose rows are all sent.
    fn send_owed(&mut self) {
        let (mut cached, faults) = (self.compute.cached(), &self.faults);
        let failed = &mut self.failed_handoffs;
        self.running.retain_mut(|running| {
            let Running { job, reserved, .. } = running;
            let Job { handoff, prompt, pair, .. } = job;
            let (Some(handoff), blocks) = (handoff, reserved.blocks()) else { return true };
            let sent = caught(HANDING_OVER, || {
                faults.of("rows", || prompt_digest(prompt));
                handoff.fill(|piece, way| way.rows(&mut cached, *pair, blocks, piece))
            });
            match sent {
                Ok(complete) => {
                    // A prompt that has sent all that it had proves that this can be done.
                    if complete {
                        failed.end();
                    }
                    !complete
                }
                Err(error) => {
                    failed.failed(prompt_digest(prompt));
                    tracing::error!(%error, "handoff failed");
                    job.send(Err(error));
                    false
                }
            }
        });
    }
}

/// Work that is named in an error.
const HANDING_OVER: &str = "handing over its KV cache";

/// What `work` gives; an error that names it where it fails or panics. It concerns one prompt, which may fare better elsewhere.
fn caught<T>(what: &str, work: impl FnOnce() -> Result<T, ModelError>) -> Result<T, ServiceError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => {
            done.map_err(|error| ServiceError::new(Code::Internal, format!("the full model failed at {what}: {error}")).elsewhere())
        }
        Err(_) => Err(panicked(what)),
    }
}

fn panicked(what: &str) -> ServiceError {
    ServiceError::new(Code::Internal, format!("the prefill node panicked at {what}; it goes on")).elsewhere()
}

/// One forward pass over the given number of tokens of each prompt; every layer's rows leave as soon as they are there, and
/// with them what else pushes have room for by now.
fn read(
    compute: &mut impl Compute,
    (cores, faults): (&Cores, &Faults),
    running: &mut [Running],
    given: &[usize],
) -> Result<StepResult, ModelError> {
    /// One prompt's part in the step; without tokens if only its rows are on their way.
    struct Part<'a> {
        tokens: &'a [u32],
        start: usize,
        blocks: &'a [BlockId],
        last: bool,
        pair: usize,
        /// Whether the logits after each token are wanted.
        each: bool,
        handoff: Option<&'a mut Sender>,
        number: u64,
        prompt: &'a [u32],
    }
    let mut parts: Vec<Part<'_>> = Vec::with_capacity(running.len());
    let mut wanted: Vec<Row<'_>> = Vec::new();
    for (running, &given) in running.iter_mut().zip(given) {
        let reported = running.reported(given);
        let Running { number, job, reserved, done, .. } = running;
        if given > 0 {
            faults.of("step", || prompt_digest(&job.prompt));
        }
        let Job { prompt, sampler, prompt_logprobs, handoff, pair, .. } = job;
        let (start, end) = (*done, *done + given);
        let last = given > 0 && end == prompt.len();
        let most = prompt_logprobs.unwrap_or(0);
        wanted.extend(prompt[start..].iter().skip(1).take(reported).map(|next| Row::Known(*next, most)));
        if last {
            wanted.push(Row::Choose(sampler, prompt.len()));
        }
        let (tokens, blocks, each) = (&prompt[start..end], reserved.blocks(), prompt_logprobs.is_some());
        parts.push(Part { tokens, start, blocks, last, pair: *pair, each, handoff: handoff.as_mut(), number: *number, prompt });
    }
    let (mut rows_wanted, mut failed) = (Vec::new(), Vec::new());
    let mut end = 0;
    for part in &parts {
        let first = end;
        end += part.tokens.len();
        rows_wanted.extend(if part.each { first..end } else { end - usize::from(part.last)..end });
    }
    let chunks: Vec<Chunk<'_>> = parts
        .iter()
        .filter(|p| !p.tokens.is_empty())
        .map(|p| Chunk { tokens: p.tokens, start: p.start, blocks: p.blocks, logits: p.last })
        .collect();
    let mut turn = cores.turn(given.iter().sum());
    compute.forward(&chunks, &rows_wanted, &mut |layer, cached| {
        for Part { tokens, start, blocks, pair, handoff, number, prompt, .. } in &mut parts {
            let Some(sender) = handoff else { continue };
            let sent = caught(HANDING_OVER, || {
                faults.of("rows", || prompt_digest(prompt));
                sender.available(cached.targets(*pair, layer), *start + tokens.len());
                sender.fill(|piece, way| way.rows(cached, *pair, blocks, piece))
            });
            if let Err(error) = sent {
                tracing::error!(%error, "handoff failed");
                failed.push((*number, error));
                *handoff = None;
            }
        }
        turn.give_way();
    })?;
    let computed = Instant::now();
    drop(chunks);
    let tokens = if wanted.is_empty() { Vec::new() } else { compute.tokens(wanted) };
    Ok(StepResult { tokens, computed, failed })
}

impl Running {
    /// Tokens that are to be read.
    fn remaining(&self) -> usize {
        self.job.prompt.len() - self.done
    }

    /// Of these, those that one step may read.
    fn due(&self) -> usize {
        if self.job.prompt_logprobs.is_some() { self.remaining().min(LOGPROB_TOKENS) } else { self.remaining() }
    }

    /// Tokens of the prompt that are reported on when the next `given` were read: those that follow one of them.
    fn reported(&self, given: usize) -> usize {
        if self.job.prompt_logprobs.is_some() { given.min(self.remaining().saturating_sub(1)) } else { 0 }
    }

    /// A token, from the full model's logits after all there is. True if more is to be done: the next token, or the end of a handoff.
    fn wrote(&mut self, sampled: &Sampled, eos: &[u32], computed: Instant, metrics: &Metrics) -> bool {
        let job = &mut self.job;
        if let Some(error) = job.sampler.failure() {
            job.send(Err(error.clone()));
            return false;
        }
        let index = job.prompt.len() - job.prompt_tokens;
        let reason = job.stop.after(sampled.token, index + 1, eos);
        let finish = reason.map(|r| convert::finish_to_wire(r).into());
        let token = Token { id: sampled.token, index: index as u32, logprob: sampled.logprob.as_ref().map(convert::logprob_to_wire) };
        metrics.generation_tokens.inc();
        if std::mem::replace(&mut self.wrote, true) {
            job.send(Ok(PrefillEvent { event: Some(prefill_event::Event::Token(token)) }));
            if let Some(reason) = finish {
                job.send(Ok(PrefillEvent { event: Some(prefill_event::Event::Finished(PrefillFinished { reason })) }));
            }
        } else {
            job.stage = Span::none();
            metrics.prompt_tokens.inc_by(job.prompt_tokens as u64);
            metrics.prompt_length.observe(job.prompt_tokens as f64);
            metrics.prefill_time.observe(self.begun.elapsed().as_secs_f64());
            metrics.time_to_first_token.observe(job.arrived.elapsed().as_secs_f64());
            let first = FirstToken {
                token: Some(token),
                finish: finish.unwrap_or(0),
                cached_tokens: self.cached as u32,
                prompt_logprobs: std::mem::take(&mut self.logprobs),
            };
            job.send(Ok(PrefillEvent { event: Some(prefill_event::Event::FirstToken(first)) }));
        }
        if reason.is_some() {
            return false;
        }
        if let Some(handoff) = &mut job.handoff {
            handoff.end(&job.prompt, sampled.token, computed);
        } else if job.alone {
            job.prompt.push(sampled.token);
        }
        job.alone || job.handoff.is_some()
    }
}

impl Job {
    /// Whether nobody waits for it any more: the router has gone, or its push has failed (which has told the router).
    fn abandoned(&self) -> bool {
        self.events.is_closed() || self.handoff.as_ref().is_some_and(Sender::broken)
    }

    fn send(&self, event: Result<PrefillEvent, ServiceError>) {
        // Closed: the router has gone. Full it cannot be: there is room for all events of a prompt.
        let _ = self.events.try_send(event);
    }

    /// Token positions that are written to the cache in the end. All are taken at once: nothing here is preempted.
    fn most_tokens(&self) -> usize {
        if self.alone { self.prompt_tokens + self.stop.max_tokens } else { self.prompt.len() }
    }
}
