//! The decode node's ends of communicators: what comes over them waits for the frames that it is of.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use overfill_nccl::{Communicator, GpuBytes, Nccl, NcclError, Rank, UniqueId};
use overfill_proto::v1::{NcclJoin, NcclJoined, NcclPiece, NcclSend, nccl_send};
use overfill_proto::{MAX_FRAME_PAYLOAD, error};
use overfill_types::{Code, Fingerprint, ServiceError, Ticket};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::task::TaskTracker;
use tonic::Status;

use super::{CLOSING, PATIENCE, PIECES};

/// Communicators at most: each holds some of the GPU's memory.
const NODES: usize = 64;
/// How often, while pieces wait in vain for their frames, those are let go whose reservation is over.
const SWEEP: Duration = Duration::from_millis(250);

/// Says whether a reservation is still held.
pub type LiveTickets = dyn Fn(&Ticket) -> bool + Send + Sync;

/// The communicators of one decode node. Clones share them.
#[derive(Clone)]
pub struct Joined {
    nccl: Nccl,
    pair: Fingerprint,
    live: Arc<LiveTickets>,
    inboxes: Arc<Mutex<HashMap<String, Arc<Inbox>>>>,
    keepers: TaskTracker,
}

/// What came over one communicator.
#[derive(Default)]
struct Inbox {
    pieces: Mutex<HashMap<(Ticket, u32), (GpuBytes, OwnedSemaphorePermit)>>,
    /// Something came, or it ended.
    changed: Notify,
    ended: std::sync::OnceLock<String>,
}

impl Joined {
    /// None yet, of a node that serves `pair`; pieces are kept for tickets that are `live`.
    pub fn new(nccl: Nccl, pair: Fingerprint, live: Arc<LiveTickets>) -> Self {
        Self { nccl, pair, live, inboxes: Arc::default(), keepers: TaskTracker::new() }
    }

    /// Returns when nothing is left of them, or soon: once no server takes calls any more, each has ended.
    pub async fn close(&self) {
        self.keepers.close();
        // What is left then goes with the process.
        let _ = timeout(CLOSING, self.keepers.wait()).await;
    }

    /// Makes this node's end of a communicator, as the first message asks, and receives what comes over it as long as the call
    /// lasts. What it gives is the call's answer.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`], [`Code::Mismatch`], [`Code::ResourceExhausted`].
    pub async fn join(
        &self,
        mut told: impl Stream<Item = Result<NcclSend, Status>> + Send + Unpin + 'static,
    ) -> Result<ReceiverStream<Result<NcclJoined, Status>>, ServiceError> {
        let first = timeout(PATIENCE, told.next()).await.ok().flatten();
        let Some(Ok(NcclSend { what: Some(nccl_send::What::Join(join)) })) = first else {
            return Err(ServiceError::of_way(Code::InvalidArgument, "the first message has to say which communicator to join"));
        };
        let NcclJoin { fingerprint, communicator, unique_id } = join;
        if fingerprint != self.pair.as_str() {
            let message = format!("a communicator for another pair than {}, which this decode node serves", self.pair.short());
            return Err(ServiceError::of_way(Code::Mismatch, message));
        }
        let Some(id) = UniqueId::told(&unique_id) else {
            let message = format!("an identifier of NCCL has 128 bytes, this one {}", unique_id.len());
            return Err(ServiceError::of_way(Code::InvalidArgument, message));
        };
        let inbox = Arc::new(Inbox::default());
        {
            let mut inboxes = self.lock();
            if inboxes.len() >= NODES {
                let message = format!("this decode node has {NODES} communicators, its most: use TCP");
                return Err(ServiceError::no_room(Code::ResourceExhausted, message));
            }
            if inboxes.contains_key(&communicator) {
                let message = "a communicator of this name is here already: name it anew";
                return Err(ServiceError::of_way(Code::InvalidArgument, message));
            }
            inboxes.insert(communicator.clone(), inbox.clone());
        }
        let (answer, answers) = mpsc::channel(2);
        self.keepers.spawn(self.clone().keep(communicator, inbox, id, told, answer));
        Ok(ReceiverStream::new(answers))
    }

    async fn keep(
        self,
        communicator: String,
        inbox: Arc<Inbox>,
        id: UniqueId,
        told: impl Stream<Item = Result<NcclSend, Status>> + Unpin,
        answer: mpsc::Sender<Result<NcclJoined, Status>>,
    ) {
        let ended = self.receive(&inbox, id, told, &answer).await;
        self.lock().remove(&communicator);
        let why = match ended {
            Ok(()) => "the prefill node has gone".to_owned(),
            Err(error) => {
                tracing::warn!(%error, "a communicator ended");
                let _ = answer.try_send(Err(error::to_peer(&error)));
                error.message
            }
        };
        let _ = inbox.ended.set(why);
        inbox.lock().clear();
        inbox.changed.notify_waiters();
    }

    /// Receives one piece after the other, in the order in which they are told.
    async fn receive(
        &self,
        inbox: &Arc<Inbox>,
        id: UniqueId,
        mut told: impl Stream<Item = Result<NcclSend, Status>> + Unpin,
        answer: &mpsc::Sender<Result<NcclJoined, Status>>,
    ) -> Result<(), ServiceError> {
        let failed = |error: NcclError| ServiceError::of_way(Code::Unavailable, error.to_string());
        let mut end = tokio::select! {
            end = Communicator::join(&self.nccl, id, Rank::Second, PATIENCE) => end.map_err(failed)?,
            // Nobody hears the answer: the call is over.
            () = answer.closed() => return Ok(()),
        };
        let _ = answer.try_send(Ok(NcclJoined {}));
        let room = Arc::new(Semaphore::new(PIECES));
        loop {
            let said = tokio::select! {
                said = told.next() => said,
                error = end.ended() => return Err(failed(error)),
            };
            let piece = match said {
                None | Some(Err(_)) => {
                    end.close().await;
                    return Ok(());
                }
                Some(Ok(NcclSend { what: Some(nccl_send::What::Piece(piece)) })) => piece,
                Some(Ok(_)) => return Err(ServiceError::of_way(Code::InvalidArgument, "a communicator is joined once")),
            };
            let NcclPiece { ticket, index, bytes } = piece;
            if bytes as usize > MAX_FRAME_PAYLOAD {
                let message = format!("a piece of {bytes} bytes: at most {MAX_FRAME_PAYLOAD} are taken");
                return Err(ServiceError::of_way(Code::ResourceExhausted, message));
            }
            let permit = loop {
                match timeout(SWEEP, room.clone().acquire_owned()).await {
                    Ok(permit) => break permit.map_err(|_| failed(NcclError::Ended))?,
                    Err(_) => inbox.lock().retain(|(ticket, _), _| (self.live)(ticket)),
                }
            };
            let coming = end.receive(bytes as usize).await.map_err(failed)?;
            let (inbox, live) = (inbox.clone(), self.live.clone());
            tokio::spawn(async move { inbox.put((Ticket::new(ticket), index), coming, permit, &*live).await });
        }
    }

    /// The payload of a frame, which came over the communicator of this name or is to come.
    ///
    /// # Errors
    /// Where there is no such communicator, it ends, or nothing comes for `patience`.
    pub async fn take(&self, communicator: &str, ticket: &Ticket, index: u32, patience: Duration) -> Result<GpuBytes, ServiceError> {
        let failed = |why: &str| ServiceError::of_way(Code::Unavailable, format!("frame {index} of {ticket} came without its rows: {why}"));
        let inbox = self.lock().get(communicator).cloned().ok_or_else(|| failed("its communicator has ended"))?;
        let place = (ticket.clone(), index);
        let coming = async {
            loop {
                let changed = inbox.changed.notified();
                if let Some((bytes, _permit)) = inbox.lock().remove(&place) {
                    return Ok(bytes);
                }
                if let Some(why) = inbox.ended.get() {
                    return Err(failed(why));
                }
                changed.await;
            }
        };
        timeout(patience, coming).await.unwrap_or_else(|_| Err(failed(&format!("none came for {} s", patience.as_secs()))))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Inbox>>> {
        // A map of handles is whole whatever panicked beside it.
        self.inboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    /// Keeps a piece that is coming, if it is still wanted then.
    async fn put(&self, place: (Ticket, u32), coming: oneshot::Receiver<GpuBytes>, permit: OwnedSemaphorePermit, live: &LiveTickets) {
        // What fails ends the communicator, which tells all who wait.
        let Ok(bytes) = coming.await else { return };
        if live(&place.0) && self.ended.get().is_none() {
            self.lock().insert(place, (bytes, permit));
            self.changed.notify_waiters();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Ticket, u32), (GpuBytes, OwnedSemaphorePermit)>> {
        // Each change is one insertion or removal.
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
