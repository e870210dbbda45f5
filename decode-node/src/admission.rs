//! Who may come in: blocks for all that a sequence may need are reserved before any prefill, or it is refused at once.
//!
//! **Invariant:** a ticket is in the table exactly as long as its sequence lives, and is handed to one push only.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use overfill_kv::{BlockPool, Expected, Reservation, prompt_digest};
use overfill_types::{
    Code, Epoch, Fingerprint, KvGeometry, Limits, PairManifest, RequestId, SamplingParams, ServiceError, StopConditions, Ticket, WireFormat,
};

/// How many ended tickets are remembered, so that a late frame is told what happened.
const REMEMBERED: usize = 1024;

/// What a request asks of this node, checked in form.
pub(crate) struct Asked {
    pub(crate) fingerprint: Fingerprint,
    pub(crate) request: RequestId,
    pub(crate) epoch: Epoch,
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: StopConditions,
}

pub(crate) struct Admission {
    fingerprint: Fingerprint,
    geometry: KvGeometry,
    wire: WireFormat,
    limits: Limits,
    pool: BlockPool,
    max_sequences: usize,
    reservation_timeout: Duration,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    held: HashMap<Ticket, Held>,
    ended: VecDeque<Ticket>,
}

struct Held {
    request: RequestId,
    expected: Expected,
    /// A push stream has taken it.
    claimed: bool,
    /// A newer attempt at the same request has come.
    superseded: bool,
}

impl Admission {
    pub(crate) fn new(manifest: &PairManifest, limits: Limits, pool: BlockPool, max_sequences: u32, reservation_timeout: Duration) -> Self {
        Self {
            fingerprint: manifest.fingerprint.clone(),
            geometry: manifest.decode.kv,
            wire: manifest.kv_formats.wire,
            limits,
            pool,
            max_sequences: max_sequences as usize,
            reservation_timeout,
            table: Mutex::default(),
        }
    }

    /// Holds blocks for all that `asked` may need.
    ///
    /// # Errors
    /// [`Code::Mismatch`] for another pair, [`Code::InvalidArgument`], [`Code::Stale`] for an attempt that is not newer than the
    /// one that is held, [`Code::ResourceExhausted`].
    pub(crate) fn admit(self: &Arc<Self>, asked: &Asked) -> Result<Place, ServiceError> {
        self.check_pair(&asked.fingerprint)?;
        self.limits.check(&asked.prompt, &asked.stop)?;
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
        if table.held.len() >= self.max_sequences {
            let message = format!("this decode node holds {} sequences, its most: try another node, or later", table.held.len());
            return Err(ServiceError::new(Code::ResourceExhausted, message));
        }
        let reservation = self.pool.reserve(&[], asked.prompt.len() + asked.stop.max_tokens).map_err(|full| {
            ServiceError::new(Code::ResourceExhausted, format!("{full}: ask for fewer tokens, or try another node or later"))
        })?;
        let ticket = Ticket::new(uuid::Uuid::new_v4().to_string());
        let expected = Expected {
            fingerprint: self.fingerprint.clone(),
            ticket: ticket.clone(),
            epoch: asked.epoch,
            geometry: self.geometry,
            wire: self.wire,
            prompt_tokens: asked.prompt.len(),
            held_tokens: 0,
            prompt_digest: prompt_digest(&asked.prompt),
        };
        table.held.insert(ticket.clone(), Held { request: asked.request.clone(), expected, claimed: false, superseded: false });
        Ok(Place { ticket, reservation, admission: self.clone() })
    }

    /// Gives a ticket to the one push that may use it.
    ///
    /// # Errors
    /// [`Code::Mismatch`], [`Code::NotFound`], [`Code::Stale`].
    pub(crate) fn claim(&self, fingerprint: &Fingerprint, ticket: &Ticket, epoch: Epoch) -> Result<Expected, ServiceError> {
        self.check_pair(fingerprint)?;
        let mut table = self.lock();
        let ended = table.ended.contains(ticket);
        let Some(held) = table.held.get_mut(ticket) else {
            return Err(if ended {
                ServiceError::new(Code::Stale, format!("ticket {ticket} is used up or given up: the router has to ask for a new one"))
            } else {
                ServiceError::new(Code::NotFound, format!("ticket {ticket} is not of this node: the router has to ask for a new one"))
            });
        };
        if held.expected.epoch != epoch {
            return Err(ServiceError::new(
                Code::Stale,
                format!("ticket {ticket} is of epoch {}, the frames are of epoch {epoch}", held.expected.epoch),
            ));
        }
        if std::mem::replace(&mut held.claimed, true) {
            return Err(ServiceError::new(Code::Stale, format!("ticket {ticket} is in use by another push: a ticket serves one handoff")));
        }
        Ok(held.expected.clone())
    }

    /// Whether a newer attempt has taken this ticket's place.
    pub(crate) fn superseded(&self, ticket: &Ticket) -> bool {
        self.lock().held.get(ticket).is_none_or(|h| h.superseded)
    }

    /// Sequences that are held.
    pub(crate) fn sequences(&self) -> usize {
        self.lock().held.len()
    }

    /// Sequences whose handoff has begun.
    pub(crate) fn running(&self) -> usize {
        self.lock().held.values().filter(|h| h.claimed).count()
    }

    /// The pool that they hold blocks of.
    pub(crate) fn pool(&self) -> &BlockPool {
        &self.pool
    }

    pub(crate) fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    pub(crate) fn max_context(&self) -> usize {
        self.limits.max_context
    }

    pub(crate) fn reservation_timeout(&self) -> Duration {
        self.reservation_timeout
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
        Err(ServiceError::new(Code::Mismatch, message))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Each change of the table is one insertion or removal: it is whole whatever panicked beside it.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A sequence's place on this node: its ticket and its blocks. Dropping it gives both back.
pub(crate) struct Place {
    pub(crate) ticket: Ticket,
    pub(crate) reservation: Reservation,
    admission: Arc<Admission>,
}

impl Place {
    /// Whether a newer attempt has taken it.
    pub(crate) fn superseded(&self) -> bool {
        self.admission.superseded(&self.ticket)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.admission.lock();
        table.held.remove(&self.ticket);
        if table.ended.len() == REMEMBERED {
            table.ended.pop_front();
        }
        table.ended.push_back(self.ticket.clone());
    }
}
