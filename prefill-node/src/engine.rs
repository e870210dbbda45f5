//! The engine: a thread of its own that owns the full model, its KV cache and all prompts.
//!
//! A step is one forward pass over chunks of several prompts. As soon as a layer's keys and values are computed they are
//! transformed and handed to the prompts' pushes, while the next layer computes.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use overfill_kv::{BlockId, BlockPool, Reservation};
use overfill_lifecycle::Drain;
use overfill_model::{Chunk, KvCache, Llama, ModelError, Pool, Sampled, Sampler, Transform, Workspace};
use overfill_proto::v1::{FirstToken, PrefillEvent, Token, prefill_event};
use overfill_proto::{convert, status};
use overfill_types::{Code, SamplingParams, ServiceError, StopConditions};
use tokio::sync::mpsc;
use tonic::Status;

use crate::handoff::Sender;
use crate::queue::share;
use crate::{Counted, Counts};

/// Prompt events on their way to the router.
pub(crate) type Events = mpsc::Sender<Result<PrefillEvent, Status>>;

/// How often an idle engine looks for prompts that nobody waits for, and whether it is to end.
const SWEEP: Duration = Duration::from_millis(20);

/// One prompt that is to be read.
pub(crate) struct Job {
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: StopConditions,
    pub(crate) events: Events,
    /// Where the KV cache goes; `None` if one token is all that is wanted.
    pub(crate) handoff: Option<Sender>,
    /// Shared with the push: the prompt is held until both are over.
    pub(crate) _counted: Arc<Counted>,
}

pub(crate) struct Settings {
    /// Token ids that end an answer.
    pub(crate) eos: Vec<u32>,
    /// Most tokens in one step.
    pub(crate) chunk_tokens: usize,
    /// Cores that the threads keep to; none in particular if empty.
    pub(crate) cpus: Vec<usize>,
}

pub(crate) struct Engine {
    pub(crate) model: Llama,
    pub(crate) cache: KvCache,
    pub(crate) transform: Transform,
    pub(crate) workspace: Workspace,
    pub(crate) pool: BlockPool,
    pub(crate) settings: Settings,
}

/// A prompt that has its blocks.
struct Running {
    job: Job,
    reservation: Reservation,
    /// Tokens that were read.
    done: usize,
}

impl Engine {
    /// Starts the thread; it ends when `end` is given, or when all senders of jobs are gone. At most `queue` jobs are on their way to it.
    pub(crate) fn start(self, queue: usize, end: Drain) -> std::io::Result<(flume::Sender<Job>, Arc<Counts>, JoinHandle<()>)> {
        let (sender, jobs) = flume::bounded(queue);
        let counts = Arc::new(Counts::default());
        let shared = counts.clone();
        let thread = std::thread::Builder::new().name("prefill-engine".into()).spawn(move || {
            Pool::pin_caller(&self.settings.cpus);
            Loop { engine: self, counts: shared, waiting: VecDeque::new(), running: Vec::new() }.run(&jobs, &end);
        })?;
        Ok((sender, counts, thread))
    }
}

struct Loop {
    engine: Engine,
    counts: Arc<Counts>,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
}

impl Loop {
    fn run(mut self, jobs: &flume::Receiver<Job>, end: &Drain) {
        while !end.draining() {
            if self.running.is_empty() {
                match jobs.recv_timeout(SWEEP) {
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
            self.counts.running.store(self.running.len(), Ordering::Release);
            self.step();
        }
    }

    /// Gives blocks to those who waited longest; a prompt that does not fit yet is not overtaken, so it gets its turn.
    fn let_in(&mut self) {
        while let Some(job) = self.waiting.front() {
            let Ok(reservation) = self.engine.pool.reserve(&[], job.prompt.len()) else { return };
            let Some(job) = self.waiting.pop_front() else { return };
            self.running.push(Running { job, reservation, done: 0 });
        }
    }

    fn step(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let remaining: Vec<usize> = self.running.iter().map(|r| r.job.prompt.len() - r.done).collect();
        let given = share(&remaining, self.engine.settings.chunk_tokens);
        let Engine { model, cache, transform, workspace, .. } = &mut self.engine;
        // Whatever a forward pass does wrong ends the prompts of its step, not the node.
        let computed = catch_unwind(AssertUnwindSafe(|| read(model, cache, transform, workspace, &mut self.running, &given)));
        let error = match computed {
            Ok(Ok(sampled)) => return self.advance(&given, sampled),
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

    /// After a step: counts what was read, and ends the prompts that were read to their end. `sampled` are their first tokens, in order.
    fn advance(&mut self, given: &[usize], sampled: Vec<Sampled>) {
        let mut sampled = sampled.into_iter();
        let mut rest = Vec::with_capacity(self.running.len());
        for (mut running, given) in self.running.drain(..).zip(given) {
            running.done += given;
            if *given > 0 && running.done == running.job.prompt.len() {
                if let Some(sampled) = sampled.next() {
                    running.job.finish(&sampled, &self.engine.settings.eos);
                }
            } else {
                rest.push(running);
            }
        }
        self.running = rest;
    }
}

/// One forward pass over the given number of tokens of each prompt; every layer's rows leave as soon as they are there.
/// Gives the first tokens of the answers to those prompts that were read to their end.
fn read(
    model: &Llama,
    cache: &mut KvCache,
    transform: &Transform,
    workspace: &mut Workspace,
    running: &mut [Running],
    given: &[usize],
) -> Result<Vec<Sampled>, ModelError> {
    /// One prompt's part in the step.
    struct Part<'a> {
        tokens: &'a [u32],
        blocks: &'a [BlockId],
        start: usize,
        last: bool,
        handoff: Option<&'a mut Sender>,
    }
    let mut parts: Vec<Part<'_>> = running
        .iter_mut()
        .zip(given)
        .filter(|(_, n)| **n > 0)
        .map(|(r, n)| Part {
            tokens: &r.job.prompt[r.done..r.done + n],
            blocks: r.reservation.blocks(),
            start: r.done,
            last: r.done + n == r.job.prompt.len(),
            handoff: r.job.handoff.as_mut(),
        })
        .collect();
    let chunks: Vec<Chunk<'_>> =
        parts.iter().map(|p| Chunk { tokens: p.tokens, start: p.start, blocks: p.blocks, logits: p.last }).collect();
    let (mut k, mut v) = (Vec::new(), Vec::new());
    model.forward(&chunks, cache, workspace, &mut |layer, cache, pool| {
        for &target in transform.targets(layer) {
            for part in &mut parts {
                let Some(handoff) = part.handoff.as_deref_mut().filter(|h| !h.broken()) else { continue };
                cache.read(layer, part.blocks, part.start, part.tokens.len(), &mut k, &mut v)?;
                transform.apply(pool, target, &mut k)?;
                transform.apply(pool, target, &mut v)?;
                handoff.rows(target, part.start, &k, &v);
            }
        }
        Ok(())
    })?;
    let mut samplers: Vec<(Sampler, usize)> = Vec::new();
    for (running, given) in running.iter().zip(given) {
        let length = running.job.prompt.len();
        if *given > 0 && running.done + given == length {
            samplers.push((Sampler::new(running.job.sampling.clone(), &running.job.prompt), length));
        }
    }
    if samplers.is_empty() {
        return Ok(Vec::new());
    }
    Ok(workspace.sample(samplers.iter_mut().map(|(sampler, position)| (sampler, *position))))
}

impl Job {
    /// Whether nobody waits for it any more: the router has gone, or its push has failed (which has told the router).
    fn abandoned(&self) -> bool {
        self.events.is_closed() || self.handoff.as_ref().is_some_and(Sender::broken)
    }

    /// The first token, from the full model's logits after the whole prompt.
    fn finish(mut self, sampled: &Sampled, eos: &[u32]) {
        let finish = self.stop.after(sampled.token, 1, eos);
        let token = Token { id: sampled.token, index: 0, logprob: sampled.logprob.as_ref().map(convert::logprob_to_wire) };
        let first = FirstToken { token: Some(token), finish: finish.map_or(0, |f| convert::finish_to_wire(f).into()) };
        self.send(Ok(PrefillEvent { event: Some(prefill_event::Event::FirstToken(first)) }));
        if let Some(handoff) = self.handoff.take()
            && finish.is_none()
        {
            handoff.commit(&self.prompt, sampled.token);
        }
    }

    fn send(&self, event: Result<PrefillEvent, Status>) {
        // Closed: the router has gone. Full it cannot be: there is room for all events of a prompt.
        let _ = self.events.try_send(event);
    }
}
