//! The engine: a thread of its own that owns the full model, its KV cache and all prompts.
//!
//! A step is one forward pass over chunks of several prompts. As soon as a layer's keys and values are computed they are
//! transformed and handed to the prompts' pushes, while the next layer computes. A prompt that begins like an earlier one
//! shares its blocks and is read from where they end.
//!
//! Where the full model writes the whole answer, each token that it writes is one more of the prompt, read in the next step.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use overfill_kv::{BlockHash, BlockId, BlockPool, Reservation};
use overfill_lifecycle::{Drain, Trace};
use overfill_model::{Chunk, KvCache, Llama, ModelError, Placement, Row, Sampled, Sampler, Workspace};
use overfill_proto::v1::{FirstToken, PrefillEvent, PrefillFinished, Token, TokenLogprob, prefill_event};
use overfill_proto::{convert, status};
use overfill_types::{Code, ServiceError, StopConditions};
use tokio::sync::mpsc;
use tonic::Status;
use tracing::{Span, debug_span};

use crate::handoff::Sender;
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::queue::share;
use crate::rows::Rows;
use crate::{Counted, Counts};

/// Prompt events on their way to the router.
pub(crate) type Events = mpsc::Sender<Result<PrefillEvent, Status>>;

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
    pub(crate) events: Events,
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
    /// Of its thread.
    pub(crate) placement: Placement,
}

pub(crate) struct Engine {
    pub(crate) model: Llama,
    pub(crate) cache: KvCache,
    /// Of each pair.
    pub(crate) rows: Vec<Rows>,
    pub(crate) workspace: Workspace,
    pub(crate) pool: BlockPool,
    pub(crate) settings: Settings,
    pub(crate) counts: Arc<Counts>,
    pub(crate) metrics: Arc<Metrics>,
}

/// A prompt that has its blocks: it is being read, or was and its rows are on their way.
struct Running {
    job: Job,
    reservation: Reservation,
    /// Tokens that are in the cache.
    done: usize,
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
struct Read {
    /// The token of each row of logits, in the order of the prompts: those of the prompt that are reported on, then, where it
    /// was read to its end, the first of the answer.
    tokens: Vec<Sampled>,
    /// When the full model was through.
    computed: Instant,
}

impl Engine {
    /// Starts the thread; it ends when `end` is given, or when all senders of jobs are gone. At most `queue` jobs are on their way to it.
    pub(crate) fn start(self, pace: Pace, queue: usize, end: Drain) -> std::io::Result<(flume::Sender<Job>, JoinHandle<()>)> {
        let (sender, jobs) = flume::bounded(queue);
        let thread = std::thread::Builder::new().name("prefill-engine".into()).spawn(move || {
            self.settings.placement.apply_to_caller();
            Loop { engine: self, waiting: VecDeque::new(), running: Vec::new(), pace }.run(&jobs, &end);
        })?;
        Ok((sender, thread))
    }
}

struct Loop {
    engine: Engine,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
    pace: Pace,
}

impl Loop {
    fn run(mut self, jobs: &flume::Receiver<Job>, end: &Drain) {
        while !end.draining() {
            if self.running.iter().all(|r| r.remaining() == 0) {
                match jobs.recv_timeout(if self.running.is_empty() { SWEEP } else { POLL }) {
                    Ok(job) => self.waiting.push_back(job),
                    Err(flume::RecvTimeoutError::Timeout) => {}
                    Err(flume::RecvTimeoutError::Disconnected) => return,
                }
            }
            while let Ok(job) = jobs.try_recv() {
                self.waiting.push_back(job);
            }
            self.waiting.retain(|job| !job.abandoned());
            self.running.retain(|r| !r.job.abandoned());
            self.let_in();
            let Counts { running, waiting, unread, .. } = &*self.engine.counts;
            running.store(self.running.iter().filter(|r| r.remaining() > 0).count(), Ordering::Release);
            waiting.store(self.waiting.len() + jobs.len(), Ordering::Release);
            let left = self.running.iter().map(Running::remaining).chain(self.waiting.iter().map(|job| job.prompt.len()));
            unread.store(left.sum(), Ordering::Release);
            self.step();
            self.send_owed();
        }
    }

    /// Gives blocks to those who waited longest; a prompt that does not fit yet is not overtaken, so it gets its turn.
    fn let_in(&mut self) {
        let Engine { pool, counts, metrics, .. } = &self.engine;
        while let Some(job) = self.waiting.front() {
            let names = job.names.as_deref().unwrap_or_default();
            // At least the last token is read: its logits are wanted. Or all are, where those of all are.
            let findable = if job.prompt_logprobs.is_some() { 0 } else { (job.prompt.len() - 1) / pool.block_tokens() };
            let Ok(reservation) = pool.reserve(&names[..findable.min(names.len())], job.most_tokens()) else { return };
            let Some(mut job) = self.waiting.pop_front() else { return };
            let done = reservation.shared_tokens();
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
            self.running.push(Running { job, reservation, done, cached: done, wrote: false, begun, logprobs: Vec::new() });
        }
    }

    fn step(&mut self) {
        let remaining: Vec<usize> = self.running.iter().map(Running::due).collect();
        if remaining.iter().all(|r| *r == 0) {
            return;
        }
        let given = share(&remaining, self.engine.settings.chunk_tokens);
        let begun = Instant::now();
        // Whatever a forward pass does wrong ends the prompts of its step, not the node.
        let error = match catch_unwind(AssertUnwindSafe(|| read(&mut self.engine, &mut self.running, &given))) {
            Ok(Ok(read)) => {
                let Metrics { step_seconds, step_tokens, .. } = &*self.engine.metrics;
                let (tokens, took) = (given.iter().sum::<usize>(), read.computed - begun);
                step_seconds.observe(took.as_secs_f64());
                step_tokens.inc_by(tokens as u64);
                if let Some(most) = self.pace.after(tokens, took) {
                    self.engine.counts.unread_most.store(most, Ordering::Release);
                }
                return self.advance(&given, read);
            }
            Ok(Err(error)) => ServiceError::new(Code::Internal, format!("the full model failed: {error}")),
            Err(_) => ServiceError::new(Code::Internal, "the prefill step panicked; the node goes on"),
        };
        tracing::error!(%error, "prefill step failed");
        let failed: Vec<Running> = {
            let mut given = given.iter();
            self.running.extract_if(.., |_| given.next().is_some_and(|n| *n > 0)).collect()
        };
        for running in failed {
            running.job.send(Err(status::to_status(&error)));
        }
    }

    /// After a step: counts what was read, names the blocks that are full, and gives their first token to those that were
    /// read to their end.
    fn advance(&mut self, given: &[usize], read: Read) {
        let (mut given, mut tokens) = (given.iter(), read.tokens.into_iter());
        let Engine { pool, settings, metrics, .. } = &self.engine;
        self.running.retain_mut(|running| {
            let given = given.next().copied().unwrap_or(0);
            let reported = running.reported(given);
            running.logprobs.extend(tokens.by_ref().take(reported).filter_map(|t| t.logprob).map(|l| convert::logprob_to_wire(&l)));
            running.done += given;
            if let Some(names) = &running.job.names {
                running.reservation.keep(&names[..names.len().min(running.done / pool.block_tokens())]);
            }
            if given == 0 || running.remaining() > 0 {
                return true;
            }
            tokens.next().is_some_and(|token| running.wrote(&token, &settings.eos, read.computed, metrics))
        });
    }

    /// Sends what pushes have room for; lets go of prompts whose rows are all sent.
    fn send_owed(&mut self) {
        let Engine { cache, rows, workspace, .. } = &mut self.engine;
        self.running.retain_mut(|running| {
            let Running { job, reservation, .. } = running;
            let (Some(handoff), pair) = (&mut job.handoff, job.pair) else { return true };
            let fetch = |piece| rows[pair].bytes(cache, workspace.pool(), reservation.blocks(), piece);
            let error = match catch_unwind(AssertUnwindSafe(|| handoff.fill(fetch))) {
                Ok(Ok(complete)) => return !complete,
                Ok(Err(error)) => ServiceError::new(Code::Internal, format!("the KV cache could not be read: {error}")),
                Err(_) => ServiceError::new(Code::Internal, "reading the KV cache panicked; the node goes on"),
            };
            tracing::error!(%error, "handoff failed");
            job.send(Err(status::to_status(&error)));
            false
        });
    }
}

/// One forward pass over the given number of tokens of each prompt; every layer's rows leave as soon as they are there, and
/// with them what else pushes have room for by now.
fn read(engine: &mut Engine, running: &mut [Running], given: &[usize]) -> Result<Read, ModelError> {
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
    }
    let Engine { model, cache, rows, workspace, .. } = engine;
    let mut parts: Vec<Part<'_>> = Vec::with_capacity(running.len());
    let mut wanted: Vec<Row<'_>> = Vec::new();
    for (running, &given) in running.iter_mut().zip(given) {
        let reported = running.reported(given);
        let Running { job, reservation, done, .. } = running;
        let Job { prompt, sampler, prompt_logprobs, handoff, pair, .. } = job;
        let (start, end) = (*done, *done + given);
        let last = given > 0 && end == prompt.len();
        let most = prompt_logprobs.unwrap_or(0);
        wanted.extend(prompt[start..].iter().skip(1).take(reported).map(|next| Row::Known(*next, most)));
        if last {
            wanted.push(Row::Choose(sampler, prompt.len()));
        }
        let (tokens, blocks, each) = (&prompt[start..end], reservation.blocks(), prompt_logprobs.is_some());
        parts.push(Part { tokens, start, blocks, last, pair: *pair, each, handoff: handoff.as_mut() });
    }
    let mut rows_wanted = Vec::new();
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
    model.forward_rows(&chunks, &rows_wanted, cache, workspace, &mut |layer, cache, pool| {
        for Part { tokens, start, blocks, pair, handoff, .. } in &mut parts {
            let Some(handoff) = handoff else { continue };
            let rows = &mut rows[*pair];
            handoff.available(rows.targets(layer), *start + tokens.len());
            handoff.fill(|piece| rows.bytes(cache, pool, blocks, piece))?;
        }
        Ok(())
    })?;
    let computed = Instant::now();
    drop(chunks);
    let tokens = if wanted.is_empty() { Vec::new() } else { workspace.tokens(wanted) };
    Ok(Read { tokens, computed })
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
            job.send(Err(status::to_status(error)));
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

    fn send(&self, event: Result<PrefillEvent, Status>) {
        // Closed: the router has gone. Full it cannot be: there is room for all events of a prompt.
        let _ = self.events.try_send(event);
    }

    /// Token positions that are written to the cache in the end. All are taken at once: nothing here is preempted.
    fn most_tokens(&self) -> usize {
        if self.alone { self.prompt_tokens + self.stop.max_tokens } else { self.prompt.len() }
    }
}
