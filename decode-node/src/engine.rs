//! The engine: it owns the model, the KV cache and all sequences. In a node it has a thread of its own; a simulation turns it.
//!
//! Between two steps it takes what came in (admissions, rows of KV, commits, failures) and lets go of what nobody waits for.
//! A step is one forward pass of the decode model over one token of every running sequence, or over several of one whose
//! answer was begun elsewhere and is read again, or that has no handoff and whose prompt is read here.
//!
//! What fails in the work on one sequence fails that sequence. A step that fails is done again by halves, so that what is to
//! blame fails alone and the others write the same tokens. An engine that fails one sequence after the other is broken: it ends,
//! and its node with it.
//!
//! **Invariants:** the oldest sequence, by when its request came to its router, is never preempted, so something always goes on.
//! Running sequences wait for the rows of
//! others [`ROWS_TIME`] a step, and for one frame more at most.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use overfill_kv::BlockId;
use overfill_lifecycle::Drain;
use overfill_model::cache::WireRows;
use overfill_model::{Chunk, ModelError};
use overfill_node::{Cores, Faults, Pulse, Streak};
use overfill_types::{Code, ServiceError, Ticket, WireFormat};
use tokio::time::{Instant, timeout};

use crate::admission::Seniority;
use crate::commands::{Command, LayerRows, Part, Rows};
use crate::compute::Compute;
use crate::metrics::Metrics;
use crate::sequence::Sequence;

/// How long rows are written between two steps: what a step is late by at most, but for one frame.
const ROWS_TIME: Duration = Duration::from_millis(1);
/// Most tokens that one step reads of prompts, and again of answers that are resumed: some two or three times what a step takes without.
const REPLAY_TOKENS: usize = 64;
/// How often an idle engine looks for sequences that nobody waits for, and whether it is to end.
const SWEEP: Duration = Duration::from_millis(20);

pub(crate) struct Settings {
    /// Token ids that end an answer.
    pub(crate) eos: Vec<u32>,
    /// Most sequences in one step.
    pub(crate) max_batch: u32,
    /// How long a sequence waits for the next frame of its KV cache.
    pub(crate) patience: Duration,
    /// How rows come over the wire.
    pub(crate) wire: WireFormat,
}

/// A decode node's engine, which `C` computes for.
pub struct Engine<C> {
    compute: C,
    cores: Cores,
    settings: Settings,
    metrics: Arc<Metrics>,
    pulse: Pulse,
    faults: Faults,
    commands: flume::Receiver<Command>,
    waiting: HashMap<Ticket, Sequence>,
    /// Those that wait longest for their turn first.
    running: Vec<Sequence>,
    /// What came of handoffs and was not looked at yet.
    parts: VecDeque<(Ticket, Part)>,
    failed_steps: Streak,
    failed_handoffs: Streak,
}

/// An engine that failed one sequence after the other: it is to blame, and its node is to end.
#[derive(Debug, thiserror::Error)]
#[error("one sequence failed after the other: the engine is broken")]
pub struct Broken;

impl<C: Compute> Engine<C> {
    /// Without sequences; `pulse` beats with each turn.
    pub(crate) fn new(
        (compute, cores): (C, Cores),
        commands: flume::Receiver<Command>,
        settings: Settings,
        metrics: Arc<Metrics>,
        (pulse, faults): (Pulse, Faults),
    ) -> Self {
        let (waiting, running, parts, failed_steps, failed_handoffs) = Default::default();
        Self { compute, cores, settings, metrics, pulse, faults, commands, waiting, running, parts, failed_steps, failed_handoffs }
    }

    /// Turns on the calling thread, which it keeps, until `end` is given, nobody can tell it anything more, or it is broken.
    pub fn run(mut self, end: &Drain) {
        while !end.draining() {
            if self.is_idle() {
                self.pulse.beat();
                match self.commands.recv_timeout(SWEEP) {
                    Ok(command) => self.take(command),
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

    /// Whether a turn would do nothing until it is told something.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.parts.is_empty()
    }

    /// What [`Self::run`] does before a turn of an idle engine, for a task that turns it: waits until it is told something,
    /// `limit` at most. False where nobody can tell it anything more.
    pub async fn told(&mut self, limit: Duration) -> bool {
        self.pulse.beat();
        match timeout(limit, self.commands.recv_async()).await {
            Ok(Ok(command)) => self.take(command),
            Ok(Err(flume::RecvError::Disconnected)) => return false,
            Err(_) => {}
        }
        true
    }

    /// One turn, which waits for nothing: takes what came, lets go of what nobody waits for, and does a step.
    ///
    /// # Errors
    /// Where it is broken.
    pub fn turn(&mut self) -> Result<(), Broken> {
        self.faults.at("turn");
        let late = Instant::now() + ROWS_TIME;
        loop {
            // All of them: a permit for each frame bounds what waits in `parts`.
            while let Ok(command) = self.commands.try_recv() {
                self.take(command);
            }
            let Some((ticket, part)) = self.parts.pop_front() else { break };
            self.go_on(&ticket, part);
            if Instant::now() >= late {
                break;
            }
        }
        self.sweep();
        self.step();
        if self.failed_steps.is_broken() || self.failed_handoffs.is_broken() { Err(Broken) } else { Ok(()) }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Admit(sequence) if sequence.alone => self.running.push(*sequence),
            Command::Admit(sequence) => {
                self.waiting.insert(sequence.reservation.ticket.clone(), *sequence);
            }
            Command::Handoff(ticket, part) => self.parts.push_back((ticket, part)),
            Command::Fail(ticket, error) => self.fail(&ticket, &error),
        }
    }

    fn go_on(&mut self, ticket: &Ticket, part: Part) {
        match part {
            Part::Rows(rows, _permit) => {
                // A sequence that is gone by now needs no rows.
                let Some(sequence) = self.waiting.get_mut(ticket) else { return };
                // Frames come: the sender lives. The same patience again.
                sequence.until = Instant::now() + self.settings.patience;
                let (compute, settings, faults) = (&mut self.compute, &self.settings, &self.faults);
                let LayerRows { layer, start, rows } = rows;
                let written = caught("writing its KV cache", || {
                    faults.of("rows", || sequence.reservation.prompt_digest);
                    match rows {
                        Rows::Host { k, v } => {
                            compute.write(layer, blocks(sequence), WireRows { format: settings.wire, start, k: &k, v: &v })
                        }
                        Rows::Gpu(mut rows) => compute.put(settings.wire, layer, blocks(sequence), start, &mut rows),
                    }
                });
                match written {
                    Ok(()) => self.failed_handoffs.end(),
                    Err(error) => {
                        self.failed_handoffs.failed(sequence.reservation.prompt_digest);
                        self.fail(ticket, &error);
                    }
                }
            }
            Part::Start { first, answer } => {
                let started = self.start(ticket, first);
                // The push may have gone meanwhile; the sequence runs all the same.
                let _ = answer.send(started);
            }
        }
    }

    fn start(&mut self, ticket: &Ticket, first: u32) -> Result<(), ServiceError> {
        let Some(mut sequence) = self.waiting.remove(ticket) else {
            return Err(ServiceError::of_way(
                Code::Stale,
                format!("the reservation of {ticket} was given up before its KV cache was whole"),
            ));
        };
        let (settings, faults) = (&self.settings, &self.faults);
        let begun = caught("beginning the answer", || {
            faults.of("begin", || sequence.reservation.prompt_digest);
            Ok(sequence.begin(first, &settings.eos))
        });
        match &begun {
            Ok(_) => self.failed_handoffs.end(),
            Err(_) => self.failed_handoffs.failed(sequence.reservation.prompt_digest),
        }
        match begun.flatten() {
            Ok(None) => {
                sequence.reservation.keep();
                self.running.push(sequence);
            }
            Ok(Some(reason)) => sequence.finish(reason),
            Err(error) => {
                sequence.fail(&error);
                return Err(error);
            }
        }
        Ok(())
    }

    fn fail(&mut self, ticket: &Ticket, error: &ServiceError) {
        if let Some(sequence) = self.waiting.remove(ticket) {
            sequence.fail(error);
        }
    }

    /// Lets go of sequences whose reader has gone, whose reservation ran out, or that a newer attempt replaced.
    fn sweep(&mut self) {
        self.faults.at("sweep");
        let metrics = self.metrics.clone();
        let dropped = self.running.extract_if(.., |s| s.abandoned()).count();
        metrics.dropped.inc_by(dropped as u64);
        let superseded: Vec<Sequence> = self.running.extract_if(.., |s| s.reservation.superseded()).collect();
        superseded.into_iter().for_each(supersede);
        let now = Instant::now();
        let mut over: Vec<(Seniority, Ticket)> = self
            .waiting
            .iter()
            .filter(|(_, s)| s.abandoned() || s.reservation.superseded() || s.until <= now)
            .map(|(ticket, s)| (s.reservation.seniority, ticket.clone()))
            .collect();
        // The oldest first: a map's order is another in each process.
        over.sort_unstable_by_key(|(age, _)| *age);
        for (_, ticket) in over {
            let Some(sequence) = self.waiting.remove(&ticket) else { continue };
            if sequence.reservation.superseded() {
                supersede(sequence);
            } else if sequence.abandoned() {
                metrics.dropped.inc();
            } else {
                metrics.reservations_expired.inc();
                let message =
                    format!("no KV cache came for reservation {ticket} in time: the prefill node is slow or gone; send the request again");
                sequence.fail(&ServiceError::of_way(Code::Unavailable, message));
            }
        }
    }

    /// One forward pass over what each sequence of the batch reads next.
    fn step(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let size = self.running.len().min(self.settings.max_batch as usize);
        let mut batch: Vec<Sequence> = self.running.drain(..size).collect();
        if !self.make_room(&mut batch) {
            // A block that this sequence needs is in the hands of one that is not known here yet: its command is on its way.
            self.running.append(&mut batch);
            return std::thread::yield_now();
        }
        let mut replay = REPLAY_TOKENS;
        let mut counted = Vec::with_capacity(batch.len());
        for sequence in batch {
            let count = sequence.due(replay).len();
            if count > 1 {
                replay -= count;
            }
            match count {
                // The budget is spent: the rest of those that read again wait for the next step.
                0 => self.running.push(sequence),
                _ => counted.push((sequence, count)),
            }
        }
        // All of them may have given up their blocks to older ones.
        if !counted.is_empty() {
            let (batch, counts) = counted.into_iter().unzip();
            self.compute(batch, counts);
        }
        self.pulse.beat();
    }

    /// The step of a batch of at least one, of each sequence over so many tokens. Where it fails, that of its halves: what it wrote to the cache
    /// before is written again, the same.
    fn compute(&mut self, mut batch: Vec<Sequence>, mut counts: Vec<usize>) {
        let (compute, metrics, faults) = (&mut self.compute, &self.metrics, &self.faults);
        let turn = self.cores.turn(counts.iter().sum());
        let begun = Instant::now();
        let error = match caught("the step", || forward(compute, faults, &batch, &counts)) {
            Ok(()) => {
                let now = Instant::now();
                metrics.step_seconds.observe((now - begun).as_secs_f64());
                metrics.step_sequences.observe(batch.len() as f64);
                return self.write(batch, &counts);
            }
            Err(error) => error,
        };
        drop(turn);
        if batch.len() == 1 {
            tracing::error!(%error, "a sequence failed its step");
            return batch.into_iter().for_each(|sequence| {
                self.failed_steps.failed(sequence.reservation.prompt_digest);
                sequence.fail(&error);
            });
        }
        tracing::warn!(%error, sequences = batch.len(), "a step failed: it is done again by halves");
        let half = batch.len() / 2;
        let (rest, counts_of_rest) = (batch.split_off(half), counts.split_off(half));
        self.compute(batch, counts);
        self.compute(rest, counts_of_rest);
    }

    /// After a step: the tokens of those that have read all that is written.
    fn write(&mut self, mut batch: Vec<Sequence>, counts: &[usize]) {
        self.failed_steps.end();
        let (compute, settings) = (&mut self.compute, &self.settings);
        let writing = batch.iter_mut().zip(counts).filter(|(s, count)| s.writes_after(**count));
        let samplers: Vec<_> = writing.map(|(s, _)| (s.next_position(), &mut s.sampler)).map(|(at, sampler)| (sampler, at)).collect();
        let sampled = if samplers.is_empty() { Vec::new() } else { compute.choose(samplers) };
        let (mut sampled, now) = (sampled.into_iter(), Instant::now());
        for (mut sequence, &count) in batch.into_iter().zip(counts) {
            if !sequence.writes_after(count) {
                sequence.read(count);
                self.running.push(sequence);
                continue;
            }
            let Some(sampled) = sampled.next().flatten() else {
                sequence.fail(&panicked("choosing its token"));
                continue;
            };
            if let Some(error) = sequence.sampler.failure().cloned() {
                sequence.fail(&error);
                continue;
            }
            match sequence.wrote(&sampled, &settings.eos, now) {
                Some(reason) => sequence.finish(reason),
                None => self.running.push(sequence),
            }
        }
    }

    /// Takes the blocks that the next step writes to, for the oldest sequence first; where there is none, the youngest of all
    /// gives up its own. False where the only sequence finds none.
    fn make_room(&mut self, batch: &mut Vec<Sequence>) -> bool {
        let mut ages: Vec<Seniority> = batch.iter().map(|s| s.reservation.seniority).collect();
        ages.sort_unstable();
        for age in ages {
            // It may have been the youngest.
            while let Some(sequence) = batch.iter_mut().find(|s| s.reservation.seniority == age) {
                if sequence.grow() {
                    break;
                }
                let all = || batch.iter().chain(&self.running).chain(self.waiting.values()).map(|s| s.reservation.seniority);
                let (oldest, youngest) = (all().min(), all().max());
                if oldest == youngest {
                    return false;
                }
                let youngest = |s: &mut Sequence| Some(s.reservation.seniority) == youngest;
                let preempted = batch.extract_if(.., youngest).chain(self.running.extract_if(.., youngest));
                preempted.chain(self.waiting.extract_if(|_, s| youngest(s)).map(|(_, s)| s)).for_each(preempt);
            }
        }
        true
    }
}

/// One forward pass over the next tokens of each sequence, so many. Changes no sequence.
fn forward(compute: &mut impl Compute, faults: &Faults, batch: &[Sequence], counts: &[usize]) -> Result<(), ModelError> {
    batch.iter().for_each(|sequence| faults.of("step", || sequence.reservation.prompt_digest));
    let chunk = |(s, count): (_, &usize)| {
        let s: &Sequence = s;
        Chunk { tokens: s.due(*count), start: s.cached, blocks: blocks(s), logits: s.writes_after(*count) }
    };
    let chunks: Vec<Chunk<'_>> = batch.iter().zip(counts).map(chunk).collect();
    compute.forward(&chunks)
}

/// What `work` gives; an error that names it where it fails or panics. It concerns one sequence, which may fare better elsewhere.
fn caught<T>(what: &str, work: impl FnOnce() -> Result<T, ModelError>) -> Result<T, ServiceError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => {
            done.map_err(|error| ServiceError::new(Code::Internal, format!("the decode model failed at {what}: {error}")).elsewhere())
        }
        Err(_) => Err(panicked(what)),
    }
}

fn panicked(what: &str) -> ServiceError {
    ServiceError::new(Code::Internal, format!("the decode node panicked at {what}; it goes on")).elsewhere()
}

fn blocks(sequence: &Sequence) -> &[BlockId] {
    sequence.reservation.blocks.blocks()
}

fn preempt(sequence: Sequence) {
    sequence.reservation.count_preempted();
    let message = format!("the blocks of reservation {} went to an older sequence: go on later, or elsewhere", sequence.reservation.ticket);
    sequence.fail(&ServiceError::no_room(Code::Preempted, message));
}

fn supersede(sequence: Sequence) {
    let message = format!("a newer attempt at this request has replaced reservation {}", sequence.reservation.ticket);
    sequence.fail(&ServiceError::new(Code::Stale, message));
}
