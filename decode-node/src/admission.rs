//! Who may come in: blocks for the prompt are reserved before any prefill, or the sequence is refused at once.
//!
//! The blocks of the answer are taken as it grows. So that this ends well for most, a sequence is let in only while all
//! that are here may grow to their end within the pool's blocks times the overcommit, and while the pool has a block to
//! spare for each that is here already.
//!
//! Whole blocks of a prompt outlive it, and are shared with prompts that begin alike. They hold the full model's keys and
//! values alone: a block with a token that the decode model has read has no name.
//!
//! **Invariants:** a ticket is in the table exactly as long as its sequence lives, and is handed to one push only. Any one
//! sequence alone can grow to its end.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use overfill_kv::{BlockHash, BlockPool, Expected, ReservedBlocks, block_hashes};
use overfill_types::prompt_digest;
use overfill_types::{
    Code, Epoch, Fingerprint, KvGeometry, Limits, PairManifest, RequestId, SamplingParams, ServiceError, StopConditions, Ticket, WireFormat,
};
use tokio::time::Instant;

/// How many ended tickets are remembered, so that a late frame is told what happened.
const REMEMBERED: usize = 1024;

/// What a request asks of this node, checked in form.
pub(crate) struct SequenceRequest {
    pub(crate) fingerprint: Fingerprint,
    pub(crate) request: RequestId,
    pub(crate) epoch: Epoch,
    /// When the request came to its router.
    pub(crate) arrived: Instant,
    pub(crate) prompt: Vec<u32>,
    /// Tokens of the answer that were written before, elsewhere.
    pub(crate) written: Vec<u32>,
    /// The decode model reads the prompt itself.
    pub(crate) alone: bool,
    /// Prefixes are shared with those of the same.
    pub(crate) cache_salt: String,
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: StopConditions,
}

pub(crate) struct Admission {
    fingerprint: Fingerprint,
    geometry: KvGeometry,
    wire: WireFormat,
    limits: Limits,
    pool: BlockPool,
    bounds: SequenceBounds,
    table: Mutex<Table>,
    preempted: AtomicU64,
    prefixes: Prefixes,
}

/// Tokens of prompts that were let in, ever.
#[derive(Default)]
pub(crate) struct Prefixes {
    /// That were looked for among the blocks that are here already.
    pub(crate) queries: AtomicU64,
    /// Of these, found.
    pub(crate) hits: AtomicU64,
}

/// What bounds the sequences of this node.
pub(crate) struct SequenceBounds {
    /// Most sequences at a time.
    pub(crate) sequences: usize,
    /// Blocks that all of them together may come to need.
    pub(crate) blocks: usize,
    /// How long a sequence waits for the next frame of its KV cache.
    pub(crate) reservation_timeout: Duration,
}

#[derive(Default)]
struct Table {
    held: HashMap<Ticket, Held>,
    ended: VecDeque<Ticket>,
    /// Sequences that were let in, ever.
    admitted: u64,
}

impl Table {
    /// Blocks that all who stay may come to need.
    fn promised(&self) -> usize {
        self.held.values().filter(|h| !h.superseded).map(|h| h.most).sum()
    }
}

/// What is held and promised at one moment.
pub(crate) struct HeldNow {
    pub(crate) sequences: usize,
    pub(crate) sequences_most: usize,
    /// Sequences whose handoff has begun.
    pub(crate) running: usize,
    /// Blocks that they may come to need in all.
    pub(crate) promised: usize,
    pub(crate) promised_most: usize,
}

struct Held {
    request: RequestId,
    expected: Expected,
    /// Blocks that it may come to need in all.
    most: usize,
    /// A push stream has taken it.
    claimed: bool,
    /// A newer attempt at the same request has come.
    superseded: bool,
}

impl Admission {
    pub(crate) fn new(manifest: &PairManifest, limits: Limits, pool: BlockPool, bounds: SequenceBounds) -> Self {
        Self {
            fingerprint: manifest.fingerprint.clone(),
            geometry: manifest.decode.kv,
            wire: manifest.kv_formats.wire,
            limits,
            pool,
            bounds,
            table: Mutex::default(),
            preempted: AtomicU64::new(0),
            prefixes: Prefixes::default(),
        }
    }

    /// Holds blocks for the prompt and what was written of the answer, and one token more.
    ///
    /// # Errors
    /// [`Code::Mismatch`] for another pair, [`Code::InvalidArgument`], [`Code::Stale`] for an attempt that is not newer than the
    /// one that is held, [`Code::ResourceExhausted`].
    pub(crate) fn admit(self: &Arc<Self>, asked: &SequenceRequest) -> Result<KvReservation, ServiceError> {
        self.check_pair(&asked.fingerprint)?;
        self.limits.check(&asked.prompt, &asked.stop)?;
        self.limits.check_sampling(&asked.sampling)?;
        self.limits.check_written(&asked.written, &asked.stop)?;
        let most = (asked.prompt.len() + asked.stop.max_tokens).div_ceil(self.pool.block_tokens());
        if most > self.pool.total() {
            let total = self.pool.total();
            let message = format!("{most} KV blocks are needed, this decode node has {total} in all: ask for fewer tokens");
            // A node with a larger cache may take it.
            return Err(ServiceError::new(Code::ResourceExhausted, message).elsewhere());
        }
        // Names are of what the full model has read.
        let names = if asked.alone {
            Vec::new()
        } else {
            block_hashes(&self.fingerprint, &asked.cache_salt, &asked.prompt, self.pool.block_tokens())
        };
        let mut table = self.lock();
        if let Some(held) = table.held.values_mut().find(|h| h.request == asked.request && !h.superseded) {
            if held.expected.epoch >= asked.epoch {
                return Err(ServiceError::new(
                    Code::Stale,
                    format!(
                        "attempt {} at request {} is not newer than attempt {}, which is held",
                        asked.epoch, asked.request, held.expected.epoch
                    ),
                ));
            }
            held.superseded = true;
        }
        let others = table.held.len();
        if others >= self.bounds.sequences {
            return full(format!("this decode node holds {others} sequences, its most: try another node, or later"));
        }
        let promised = table.promised();
        if promised + most > self.bounds.blocks {
            return full(format!(
                "{most} KV blocks may be needed, beside {promised} for the sequences that are here already, and this decode node takes on {} in all: ask for fewer tokens, or try another node or later",
                self.bounds.blocks
            ));
        }
        let tokens = asked.prompt.len() + asked.written.len().max(1);
        let blocks = self.pool.reserve(&names, tokens).or_else(|none| full(format!("{none}: try another node, or later")))?;
        // Each of the others will need a block some time: one that is taken now would be taken away again at once.
        let free = self.pool.free();
        if free < others {
            return full(format!("{free} KV blocks would be left for {others} sequences that grow: try another node, or later"));
        }
        let held_tokens = blocks.shared_tokens();
        self.prefixes.queries.fetch_add(asked.prompt.len() as u64, Ordering::Relaxed);
        self.prefixes.hits.fetch_add(held_tokens as u64, Ordering::Relaxed);
        let (ticket, prompt_digest) = (Ticket::new(uuid::Uuid::new_v4().to_string()), prompt_digest(&asked.prompt));
        let expected = Expected {
            fingerprint: self.fingerprint.clone(),
            ticket: ticket.clone(),
            epoch: asked.epoch,
            geometry: self.geometry,
            wire: self.wire,
            prompt_tokens: asked.prompt.len(),
            held_tokens,
            prompt_digest,
        };
        // No push is to come where the decode model reads the prompt.
        let held = Held { request: asked.request.clone(), expected, most, claimed: asked.alone, superseded: false };
        table.held.insert(ticket.clone(), held);
        table.admitted += 1;
        let seniority = Seniority { arrived: asked.arrived, number: table.admitted };
        Ok(KvReservation { ticket, seniority, blocks, prompt_digest, names, admission: self.clone() })
    }

    /// Gives a ticket to the one push that may use it.
    ///
    /// # Errors
    /// [`Code::Mismatch`], [`Code::NotFound`], [`Code::Stale`].
    pub(crate) fn claim(&self, fingerprint: &Fingerprint, ticket: &Ticket, epoch: Epoch) -> Result<Expected, ServiceError> {
        // The router has asked both nodes for this pair: one that comes here with another was changed on its way.
        self.check_pair(fingerprint).map_err(|error| ServiceError::of_way(error.code, error.message))?;
        let mut table = self.lock();
        let ended = table.ended.contains(ticket);
        let Some(held) = table.held.get_mut(ticket) else {
            return Err(if ended {
                ServiceError::of_way(Code::Stale, format!("ticket {ticket} is used up or given up: the router has to ask for a new one"))
            } else {
                ServiceError::of_way(Code::NotFound, format!("ticket {ticket} is not of this node: the router has to ask for a new one"))
            });
        };
        if held.expected.epoch != epoch {
            return Err(ServiceError::of_way(
                Code::Stale,
                format!("ticket {ticket} is of epoch {}, the frames are of epoch {epoch}", held.expected.epoch),
            ));
        }
        if std::mem::replace(&mut held.claimed, true) {
            return Err(ServiceError::of_way(
                Code::Stale,
                format!("ticket {ticket} is in use by another push: a ticket serves one handoff"),
            ));
        }
        Ok(held.expected.clone())
    }

    /// Whether a newer attempt has taken this ticket's place.
    pub(crate) fn superseded(&self, ticket: &Ticket) -> bool {
        self.lock().held.get(ticket).is_none_or(|h| h.superseded)
    }

    /// Whether a reservation is held.
    pub(crate) fn holds(&self, ticket: &Ticket) -> bool {
        self.lock().held.contains_key(ticket)
    }

    /// Sequences that are held.
    pub(crate) fn sequences(&self) -> usize {
        self.lock().held.len()
    }

    /// What is held and promised at this moment.
    pub(crate) fn held(&self) -> HeldNow {
        let table = self.lock();
        HeldNow {
            sequences: table.held.len(),
            sequences_most: self.bounds.sequences,
            running: table.held.values().filter(|h| h.claimed).count(),
            promised: table.promised(),
            promised_most: self.bounds.blocks,
        }
    }

    /// Sequences that lost their blocks to older ones, ever.
    pub(crate) fn preempted(&self) -> u64 {
        self.preempted.load(Ordering::Relaxed)
    }

    /// What was found of prompts that begin alike.
    pub(crate) fn prefixes(&self) -> &Prefixes {
        &self.prefixes
    }

    /// The pool that they hold blocks of.
    pub(crate) fn pool(&self) -> &BlockPool {
        &self.pool
    }

    pub(crate) fn max_context(&self) -> usize {
        self.limits.max_context
    }

    pub(crate) fn reservation_timeout(&self) -> Duration {
        self.bounds.reservation_timeout
    }

    fn check_pair(&self, got: &Fingerprint) -> Result<(), ServiceError> {
        if *got == self.fingerprint {
            return Ok(());
        }
        let message = format!(
            "the sender's pair is {}, this decode node serves {}: every node needs the same pair",
            got.short(),
            self.fingerprint.short()
        );
        Err(ServiceError::of_node(Code::Mismatch, message))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Each change of the table is one insertion or removal: it is whole whatever panicked beside it.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn full<T>(message: String) -> Result<T, ServiceError> {
    Err(ServiceError::no_room(Code::ResourceExhausted, message))
}

/// A sequence's age among all of this node, the least is the oldest; no two are alike. It goes by when the request came to its
/// router, so that a sequence that was preempted does not come again as the youngest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seniority {
    arrived: Instant,
    /// Among all that were let in.
    number: u64,
}

/// What a sequence holds on this node: its ticket and its blocks. Dropping it gives both back.
pub(crate) struct KvReservation {
    pub(crate) ticket: Ticket,
    pub(crate) seniority: Seniority,
    pub(crate) blocks: ReservedBlocks,
    /// sha256 of the prompt's token ids.
    pub(crate) prompt_digest: [u8; 32],
    /// Of the blocks that the prompt fills to their end.
    names: Vec<BlockHash>,
    admission: Arc<Admission>,
}

impl KvReservation {
    /// Whether a newer attempt has taken it.
    pub(crate) fn superseded(&self) -> bool {
        self.admission.superseded(&self.ticket)
    }

    /// The whole handoff is in its blocks: those of the prompt are shared from now on with prompts that begin alike.
    pub(crate) fn keep(&self) {
        self.blocks.keep(&self.names);
    }

    /// Counts that it was taken away.
    pub(crate) fn count_preempted(&self) {
        self.admission.preempted.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for KvReservation {
    fn drop(&mut self) {
        let mut table = self.admission.lock();
        table.held.remove(&self.ticket);
        if table.ended.len() == REMEMBERED {
            table.ended.pop_front();
        }
        table.ended.push_back(self.ticket.clone());
    }
}
