//! The prefill node's ends of communicators: one for each decode node that takes rows so.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use overfill_nccl::{Communicator, Gpu, GpuBytes, Nccl, Rank};
use overfill_proto::error;
use overfill_proto::v1::decode_client::DecodeClient;
use overfill_proto::v1::{NcclJoin, NcclJoined, NcclPiece, NcclSend, nccl_send};
use overfill_types::{Code, Fingerprint, ServiceError, Ticket};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::Streaming;

use super::{CLOSING, PATIENCE, PIECES};
use crate::Connector;

/// How long rows go over TCP to a node whose communicator failed, before another is made.
const AGAIN: Duration = Duration::from_secs(60);
/// How long a communicator that nothing goes over is kept: it holds some of the GPU's memory.
const KEPT: Duration = Duration::from_secs(300);
/// Communicators at most; rows for further nodes go over TCP.
const NODES: usize = 64;

/// The ways of one prefill node. Clones share them.
#[derive(Clone)]
pub struct Ways {
    nccl: Nccl,
    connector: Connector,
    nodes: Arc<Mutex<HashMap<String, State>>>,
    keepers: TaskTracker,
}

enum State {
    Joining,
    Open(Way),
    /// Until then it is not tried again.
    Failed(Instant),
}

/// Why there is no way to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoWay {
    /// It is being made.
    Joining,
    /// It failed a short while ago.
    Failed,
    /// There are as many as there may be.
    TooMany,
}

/// A communicator to one decode node. Clones share it.
#[derive(Clone)]
pub struct Way {
    communicator: Arc<str>,
    gpu: Gpu,
    pieces: mpsc::Sender<Piece>,
    /// Says why it ended, once it has.
    ended: watch::Receiver<Option<String>>,
}

/// The payload of one frame.
struct Piece {
    ticket: Ticket,
    index: u32,
    bytes: GpuBytes,
}

impl Ways {
    /// None yet; `connector` makes the connections that communicators are told over.
    pub fn new(nccl: Nccl, connector: Connector) -> Self {
        Self { nccl, connector, nodes: Arc::default(), keepers: TaskTracker::new() }
    }

    /// Ends all of them; returns when nothing is left of them, or soon.
    pub async fn close(&self) {
        self.lock().clear();
        self.keepers.close();
        // What is left then goes with the process.
        let _ = timeout(CLOSING, self.keepers.wait()).await;
    }

    /// The way to the decode node at `address`, which serves this pair; where there is none one is begun. Must be called inside a
    /// tokio runtime.
    ///
    /// # Errors
    /// Where there is none yet.
    pub fn to(&self, address: &str, pair: &Fingerprint) -> Result<Way, NoWay> {
        let mut nodes = self.lock();
        let now = Instant::now();
        nodes.retain(|_, state| !matches!(state, State::Failed(until) if *until <= now));
        match nodes.get(address) {
            Some(State::Open(way)) => Ok(way.clone()),
            Some(State::Joining) => Err(NoWay::Joining),
            Some(State::Failed(_)) => Err(NoWay::Failed),
            None if nodes.len() >= NODES => Err(NoWay::TooMany),
            None => {
                nodes.insert(address.to_owned(), State::Joining);
                self.keepers.spawn(self.clone().keep(address.to_owned(), pair.clone()));
                Err(NoWay::Joining)
            }
        }
    }

    /// Makes a communicator and carries what goes over it, until it fails or is needed no more.
    async fn keep(self, address: String, pair: Fingerprint) {
        let (ending, ended) = watch::channel(None);
        match self.carry(&address, &pair, ended).await {
            Ok(()) => tracing::info!(decode_node = address, "a communicator was used no more"),
            Err(error) => {
                tracing::warn!(decode_node = address, %error, seconds = AGAIN.as_secs(), "no NCCL to this node for a while: TCP");
                self.lock().insert(address, State::Failed(Instant::now() + AGAIN));
                ending.send_replace(Some(error.message));
            }
        }
    }

    async fn carry(&self, address: &str, pair: &Fingerprint, ended: watch::Receiver<Option<String>>) -> Result<(), ServiceError> {
        let peer = format!("decode node {address}");
        let failed = |why: String| ServiceError::of_way(Code::Unavailable, format!("the communicator to {peer} failed: {why}"));
        let id = self.nccl.library().unique_id().map_err(|error| failed(error.to_string()))?;
        let communicator = hex::encode(rand::random::<[u8; 16]>());
        let (tell, told) = mpsc::channel(PIECES);
        let join = NcclJoin { fingerprint: pair.to_string(), communicator: communicator.clone(), unique_id: id.as_bytes().to_vec().into() };
        // The channel is empty and its reader is here: it has room.
        let _ = tell.try_send(NcclSend { what: Some(nccl_send::What::Join(join)) });
        let mut client = DecodeClient::new(self.connector.connect(address)?);
        let joining = async {
            let hear = client.join_nccl(ReceiverStream::new(told)).await.map_err(|told| error::from_status(&told, &peer))?;
            let mut hear = hear.into_inner();
            let ours = async { Communicator::join(&self.nccl, id, Rank::First, PATIENCE).await.map_err(|error| failed(error.to_string())) };
            let theirs = async { hear.message().await.map_err(|told| error::from_status(&told, &peer)) };
            let (communicator, joined) = tokio::try_join!(ours, theirs)?;
            joined.map(|NcclJoined {}| (communicator, hear)).ok_or_else(|| failed("it hung up".into()))
        };
        let joined = timeout(PATIENCE, joining).await;
        let (end, hear) = joined.map_err(|_| failed(format!("it did not stand after {} s", PATIENCE.as_secs())))??;
        tracing::info!(decode_node = address, nccl = self.nccl.library().version(), "rows go over NCCL from now on");
        let (pieces, given) = mpsc::channel(PIECES);
        let way = Way { communicator: communicator.into(), gpu: self.nccl.gpu().clone(), pieces, ended };
        self.lock().insert(address.to_owned(), State::Open(way));
        self.send(address, (end, given), (tell, hear)).await.map_err(|error| match error {
            Ended::Here(error) => failed(error.to_string()),
            Ended::There(why) => failed(why),
        })
    }

    /// Tells and sends one piece after the other.
    async fn send(
        &self,
        address: &str,
        (mut end, mut given): (Communicator, mpsc::Receiver<Piece>),
        (tell, mut hear): (mpsc::Sender<NcclSend>, Streaming<NcclJoined>),
    ) -> Result<(), Ended> {
        let gone = |told: Option<String>| Ended::There(told.unwrap_or_else(|| "it hung up".into()));
        let mut used = Instant::now();
        loop {
            let piece = tokio::select! {
                piece = given.recv() => piece,
                error = end.ended() => return Err(Ended::Here(error)),
                said = hear.message() => return Err(gone(said.err().map(|status| status.message().to_owned()))),
                () = sleep_until(used + KEPT) => {
                    if self.let_go(address) {
                        end.close().await;
                        return Ok(());
                    }
                    used = Instant::now();
                    continue;
                }
            };
            // Its senders are in the map and at handoffs: all gone, it is needed no more.
            let Some(Piece { ticket, index, bytes }) = piece else {
                end.close().await;
                return Ok(());
            };
            used = Instant::now();
            let piece = NcclPiece { ticket: ticket.to_string(), index, bytes: bytes.len() as u32 };
            let telling = tell.send(NcclSend { what: Some(nccl_send::What::Piece(piece)) });
            match timeout(PATIENCE, telling).await {
                Ok(Ok(())) => end.send(bytes).await.map_err(Ended::Here)?,
                Ok(Err(_)) => return Err(gone(None)),
                Err(_) => return Err(Ended::There(format!("it takes nothing for {} s", PATIENCE.as_secs()))),
            }
        }
    }

    /// Forgets a way that no handoff has; false where one has.
    fn let_go(&self, address: &str) -> bool {
        let mut nodes = self.lock();
        let unused = matches!(nodes.get(address), Some(State::Open(way)) if way.pieces.strong_count() == 1);
        if unused {
            nodes.remove(address);
        }
        unused
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, State>> {
        // A map of handles is whole whatever panicked beside it.
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a communicator ended.
enum Ended {
    Here(overfill_nccl::NcclError),
    There(String),
}

impl Way {
    /// Its name, in frames.
    pub fn communicator(&self) -> &str {
        &self.communicator
    }

    /// The GPU that it sends from.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Sends the payload of a frame; returns when it is on its way, which may be after others'.
    ///
    /// # Errors
    /// [`Code::Unavailable`] where the communicator has ended.
    pub async fn send(&self, ticket: Ticket, index: u32, bytes: GpuBytes) -> Result<(), ServiceError> {
        match self.pieces.send(Piece { ticket, index, bytes }).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.ended().await),
        }
    }

    /// Why it ended, once it has.
    pub async fn ended(&self) -> ServiceError {
        let mut ended = self.ended.clone();
        let why = match ended.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => "the communicator was given up".into(),
        };
        ServiceError::of_way(Code::Unavailable, why)
    }
}
