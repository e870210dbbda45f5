//! The engine: a thread of its own that owns the model, the KV cache and all sequences.
//!
//! Between two steps it takes what came in (admissions, rows of KV, commits, failures) and lets go of what nobody waits for.
//! A step is one forward pass of the decode model over one token of every running sequence.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use overfill_kv::{BlockId, wire};
use overfill_lifecycle::Drain;
use overfill_model::{Chunk, KvCache, Llama, ModelError, Pool, Workspace};
use overfill_types::{Code, ServiceError, Ticket, WireFormat};
use tokio::sync::oneshot;

use crate::sequence::{Sequence, State};

/// Commands on their way to the engine. Each row frame is at most 4 MiB, so this bounds what waits in memory.
const COMMANDS: usize = 64;
/// How often an idle engine looks for sequences that nobody waits for, and whether it is to end.
const SWEEP: Duration = Duration::from_millis(20);

/// What the engine is told.
pub(crate) enum Command {
    /// A sequence waits for its KV cache.
    Admit(Box<Sequence>),
    /// Checked rows of one layer, `[tokens, kv_heads, head_dim]` each, as they came over the wire.
    Rows { ticket: Ticket, layer: usize, start: usize, k: Bytes, v: Bytes },
    /// The handoff is whole. Answered when the sequence runs, or with why it does not.
    Start { ticket: Ticket, first: u32, answer: oneshot::Sender<Result<(), ServiceError>> },
    /// The handoff broke.
    Fail { ticket: Ticket, error: ServiceError },
}

pub(crate) struct Settings {
    /// Token ids that end an answer.
    pub(crate) eos: Vec<u32>,
    /// Most sequences in one step.
    pub(crate) max_batch: u32,
    /// How long a sequence waits for the next frame of its KV cache.
    pub(crate) patience: Duration,
    /// How rows come over the wire.
    pub(crate) wire: WireFormat,
    /// Cores that the threads keep to; none in particular if empty.
    pub(crate) cpus: Vec<usize>,
}

pub(crate) struct Engine {
    pub(crate) model: Llama,
    pub(crate) cache: KvCache,
    pub(crate) workspace: Workspace,
    pub(crate) settings: Settings,
}

impl Engine {
    /// Starts the thread; it ends when `end` is given, or when all senders of commands are gone.
    pub(crate) fn start(self, end: Drain) -> std::io::Result<(flume::Sender<Command>, JoinHandle<()>)> {
        let (sender, commands) = flume::bounded(COMMANDS);
        let thread = std::thread::Builder::new().name("decode-engine".into()).spawn(move || {
            Pool::pin_caller(&self.settings.cpus);
            let (k, v) = (Vec::new(), Vec::new());
            Loop { engine: self, waiting: HashMap::new(), running: Vec::new(), turn: 0, k, v }.run(&commands, &end);
        })?;
        Ok((sender, thread))
    }
}

struct Loop {
    engine: Engine,
    waiting: HashMap<Ticket, Sequence>,
    running: Vec<Sequence>,
    /// Where the next step's batch begins, so that all get their turn when there are more than fit.
    turn: usize,
    /// Rows of the frame that is being written, kept so that none allocates.
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Loop {
    fn run(mut self, commands: &flume::Receiver<Command>, end: &Drain) {
        while !end.draining() {
            if self.running.is_empty() {
                match commands.recv_timeout(SWEEP) {
                    Ok(command) => self.take(command),
                    Err(flume::RecvTimeoutError::Timeout) => {}
                    Err(flume::RecvTimeoutError::Disconnected) => return,
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.take(command);
            }
            self.sweep();
            self.step();
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Admit(sequence) => {
                self.waiting.insert(sequence.place.ticket.clone(), *sequence);
            }
            Command::Rows { ticket, layer, start, k, v } => {
                // A sequence that is gone by now needs no rows.
                let Some(sequence) = self.waiting.get_mut(&ticket) else { return };
                let Engine { cache, workspace, settings, .. } = &mut self.engine;
                let geometry = cache.geometry();
                // The assembler saw that both are whole rows.
                wire::decode(settings.wire, &geometry, &k, &mut self.k);
                wire::decode(settings.wire, &geometry, &v, &mut self.v);
                let written = cache.write(workspace.pool(), layer, blocks(sequence), start, &self.k, &self.v);
                if let State::Waiting { until } = &mut sequence.state {
                    // Frames come: the sender lives. The same patience again.
                    *until = Instant::now() + self.engine.settings.patience;
                }
                if let Err(error) = written {
                    self.fail(&ticket, &internal(&error));
                }
            }
            Command::Start { ticket, first, answer } => {
                let started = self.start(&ticket, first);
                // The push may have gone meanwhile; the sequence runs all the same.
                let _ = answer.send(started);
            }
            Command::Fail { ticket, error } => self.fail(&ticket, &error),
        }
    }

    fn start(&mut self, ticket: &Ticket, first: u32) -> Result<(), ServiceError> {
        let Some(mut sequence) = self.waiting.remove(ticket) else {
            return Err(ServiceError::new(Code::Stale, format!("the reservation of {ticket} was given up before its KV cache was whole")));
        };
        match sequence.begin(first, &self.engine.settings.eos) {
            Some(reason) => sequence.finish(reason),
            None => self.running.push(sequence),
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
        self.running.retain(|s| !s.abandoned());
        let superseded: Vec<Sequence> = self.running.extract_if(.., |s| s.place.superseded()).collect();
        superseded.into_iter().for_each(supersede);
        let now = Instant::now();
        let over: Vec<Ticket> = self
            .waiting
            .iter()
            .filter(|(_, s)| s.abandoned() || s.place.superseded() || matches!(s.state, State::Waiting { until } if until <= now))
            .map(|(ticket, _)| ticket.clone())
            .collect();
        for ticket in over {
            let Some(sequence) = self.waiting.remove(&ticket) else { continue };
            if sequence.place.superseded() {
                supersede(sequence);
            } else if !sequence.abandoned() {
                let message =
                    format!("no KV cache came for reservation {ticket} in time: the prefill node is slow or gone; send the request again");
                sequence.fail(&ServiceError::new(Code::DeadlineExceeded, message));
            }
        }
    }

    /// One forward pass over one token of each sequence of the batch.
    fn step(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let size = self.running.len().min(self.engine.settings.max_batch as usize);
        let first = self.turn % self.running.len();
        self.running.rotate_left(first);
        self.turn = if size < self.running.len() { size } else { 0 };

        let inputs: Vec<([u32; 1], usize)> = self.running[..size]
            .iter()
            .map(|s| match s.state {
                State::Running { last, written } => ([last], s.prompt_tokens + written - 1),
                State::Waiting { .. } => ([0], 0),
            })
            .collect();
        let Engine { model, cache, workspace, settings } = &mut self.engine;
        // Whatever a forward pass does wrong ends the sequences of its batch, not the node.
        let computed = catch_unwind(AssertUnwindSafe(|| {
            let chunks: Vec<Chunk<'_>> = self.running[..size]
                .iter()
                .zip(&inputs)
                .map(|(s, (tokens, start))| Chunk { tokens, start: *start, blocks: blocks(s), logits: true })
                .collect();
            model.forward(&chunks, cache, workspace, &mut |_, _, _| Ok(()))?;
            let samplers = self.running[..size].iter_mut().zip(&inputs).map(|(s, (_, start))| (&mut s.sampler, start + 1));
            Ok(workspace.sample(samplers))
        }));
        let sampled = match computed {
            Ok(Ok(sampled)) => sampled,
            Ok(Err(error)) => return self.fail_batch(size, &internal(&error)),
            Err(_) => return self.fail_batch(size, &ServiceError::new(Code::Internal, "the decode step panicked; the node goes on")),
        };

        let batch: Vec<Sequence> = self.running.drain(..size).collect();
        let mut going_on = Vec::with_capacity(size);
        for (mut sequence, sampled) in batch.into_iter().zip(sampled) {
            let State::Running { written, .. } = sequence.state else { continue };
            match sequence.wrote(&sampled, written, &settings.eos) {
                Some(reason) => sequence.finish(reason),
                None => going_on.push(sequence),
            }
        }
        self.turn = self.turn.min(going_on.len());
        going_on.append(&mut self.running);
        self.running = going_on;
    }

    fn fail_batch(&mut self, size: usize, error: &ServiceError) {
        tracing::error!(%error, sequences = size, "decode step failed");
        self.running.drain(..size).for_each(|s| s.fail(error));
    }
}

fn blocks(sequence: &Sequence) -> &[BlockId] {
    sequence.place.reservation.blocks()
}

fn supersede(sequence: Sequence) {
    let message = format!("a newer attempt at this request has replaced reservation {}", sequence.place.ticket);
    sequence.fail(&ServiceError::new(Code::Stale, message));
}

fn internal(error: &ModelError) -> ServiceError {
    ServiceError::new(Code::Internal, format!("the decode model failed: {error}"))
}
