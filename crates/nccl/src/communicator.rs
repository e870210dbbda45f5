//! One communicator between two nodes' GPUs.
//!
//! It has a thread of its own, which asks NCCL for one thing after the other, in the order in which it is told, and looks how far they
//! are. NCCL never blocks it, so whatever the other end does, it ends in time: what is not done within the patience of the
//! communicator ends it, and with it all that is under way.

use std::collections::VecDeque;
use std::ffi::c_int;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::CudaStream;
use tokio::sync::oneshot;

use crate::error::NcclError;
use crate::gpu::GpuBytes;
use crate::library::{Comm, Library, Progress, UniqueId};
use crate::{Gpu, Nccl};

/// Pieces that wait for the thread or are under way: enough that the GPU is never idle between two. Their senders wait.
const PIECES: usize = 16;
/// How often it looks whether a piece is through: less than the time of one.
const POLL: Duration = Duration::from_micros(50);
/// How often it looks, when it has nothing to do, whether the other end is still there.
const IDLE: Duration = Duration::from_millis(100);

/// Which of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// The one that made the identifier.
    First,
    /// The one that was told it.
    Second,
}

impl Rank {
    fn number(self) -> c_int {
        match self {
            Self::First => 0,
            Self::Second => 1,
        }
    }

    fn other(self) -> c_int {
        1 - self.number()
    }
}

/// One end of a communicator. When it is dropped the communicator is aborted, and all that is under way fails.
pub struct Communicator {
    orders: flume::Sender<Order>,
    /// Told by the thread when it fails; taken by who hears it.
    failed: oneshot::Receiver<NcclError>,
}

/// Answered when a piece has come.
type Done = oneshot::Sender<GpuBytes>;

enum Order {
    Send(GpuBytes),
    Receive(usize, Done),
}

impl Communicator {
    /// Makes one end; returns when both are made. Whatever it does takes `patience` at most.
    ///
    /// # Errors
    /// Where the other end does not come in time, or NCCL fails.
    pub async fn join(nccl: &Nccl, id: UniqueId, rank: Rank, patience: Duration) -> Result<Self, NcclError> {
        let (orders, received) = flume::bounded(PIECES);
        let (made, joined) = oneshot::channel();
        let (failing, failed) = oneshot::channel();
        let nccl = nccl.clone();
        let started = thread::Builder::new().name("nccl".into()).spawn(move || {
            let ended = match End::make(&nccl, id, rank, patience, &received) {
                Ok(mut end) => match made.send(Ok(())) {
                    Ok(()) => end.work(&received),
                    // Nobody waits for it any more.
                    Err(_) => Ok(()),
                },
                Err(error) => {
                    let _ = made.send(Err(error));
                    Ok(())
                }
            };
            // The end is gone by now. Nobody may be there to hear why.
            drop(received);
            match ended {
                Ok(()) => drop(failing),
                Err(error) => drop(failing.send(error)),
            }
        });
        started.map_err(|error: io::Error| NcclError::Failed { what: "starting its thread", why: error.to_string() })?;
        joined.await.map_err(|_| NcclError::Ended)??;
        Ok(Self { orders, failed })
    }

    /// Sends bytes; waits while many others are before them. Where they cannot be sent the communicator ends.
    ///
    /// # Errors
    /// [`NcclError::Ended`]
    pub async fn send(&self, bytes: GpuBytes) -> Result<(), NcclError> {
        self.order(Order::Send(bytes)).await
    }

    /// Receives so many bytes, which the other end has to send; the answer is they. Where they do not come the communicator ends.
    ///
    /// # Errors
    /// [`NcclError::Ended`]
    pub async fn receive(&self, bytes: usize) -> Result<oneshot::Receiver<GpuBytes>, NcclError> {
        let (done, answer) = oneshot::channel();
        self.order(Order::Receive(bytes, done)).await.map(|()| answer)
    }

    /// Returns when it has failed, with why.
    pub async fn ended(&mut self) -> NcclError {
        (&mut self.failed).await.unwrap_or(NcclError::Ended)
    }

    /// Ends it, and returns when nothing of it is left.
    pub async fn close(self) {
        let Self { orders, failed } = self;
        drop(orders);
        // Whether it failed before does not matter any more.
        let _ = failed.await;
    }

    async fn order(&self, order: Order) -> Result<(), NcclError> {
        self.orders.send_async(order).await.map_err(|_| NcclError::Ended)
    }
}

/// What the thread has.
struct End {
    library: Library,
    comm: Comm,
    gpu: Gpu,
    stream: Arc<CudaStream>,
    peer: c_int,
    patience: Duration,
    under_way: VecDeque<UnderWay>,
}

/// A piece that NCCL was asked for.
struct UnderWay {
    since: Instant,
    bytes: GpuBytes,
    done: Waiting,
}

enum Waiting {
    Sent,
    Received(Done),
}

impl End {
    fn make(nccl: &Nccl, id: UniqueId, rank: Rank, patience: Duration, orders: &flume::Receiver<Order>) -> Result<Self, NcclError> {
        let (library, gpu) = (nccl.library.clone(), nccl.gpu.clone());
        gpu.bind()?;
        let stream = gpu.stream()?;
        let comm = library.begin(id, rank.number())?;
        let end = Self { library, comm, gpu, stream, peer: rank.other(), patience, under_way: VecDeque::new() };
        // Given up meanwhile.
        let wanted = || !orders.is_disconnected();
        end.settled("making a communicator", wanted)?;
        Ok(end)
    }

    /// Waits until NCCL has begun all that it was asked for, as long as that is `wanted`.
    fn settled(&self, what: &'static str, wanted: impl Fn() -> bool) -> Result<(), NcclError> {
        let since = Instant::now();
        while let Progress::UnderWay = self.library.state(self.comm, what)? {
            if !wanted() {
                return Err(NcclError::Ended);
            }
            if since.elapsed() > self.patience {
                return Err(NcclError::Late { what, waited: self.patience });
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Does what it is told until nobody can tell it anything more, or it fails.
    fn work(&mut self, orders: &flume::Receiver<Order>) -> Result<(), NcclError> {
        while !orders.is_disconnected() {
            self.turn(orders)?;
        }
        Ok(())
    }

    fn turn(&mut self, orders: &flume::Receiver<Order>) -> Result<(), NcclError> {
        let order = if self.under_way.is_empty() { orders.recv_timeout(IDLE).ok() } else { orders.try_recv().ok() };
        let told = order.is_some();
        if let Some(order) = order {
            self.begin(order)?;
        }
        self.library.state(self.comm, "its work")?;
        let mut through = false;
        while let Some(first) = self.under_way.front() {
            if first.bytes.idle()? {
                through = true;
                self.under_way.pop_front().into_iter().for_each(UnderWay::finish);
            } else if first.since.elapsed() > self.patience {
                return Err(NcclError::Late { what: first.done.what(), waited: self.patience });
            } else {
                break;
            }
        }
        if !told && !through && !self.under_way.is_empty() {
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Asks NCCL for a piece. Where that fails the piece is among those under way, until the communicator was aborted.
    fn begin(&mut self, order: Order) -> Result<(), NcclError> {
        let (bytes, done) = match order {
            Order::Send(bytes) => (bytes, Waiting::Sent),
            Order::Receive(bytes, done) => (self.gpu.room(bytes)?, Waiting::Received(done)),
        };
        let what = done.what();
        let mut piece = UnderWay { since: Instant::now(), bytes, done };
        let (length, stream) = (piece.bytes.len(), self.stream.cu_stream().cast());
        let asked = piece.bytes.on(&self.stream, |at| {
            // SAFETY: the bytes are kept until the stream is through with them, or until the communicator was aborted.
            let begun = unsafe {
                match &piece.done {
                    Waiting::Sent => self.library.send(at, length, self.peer, self.comm, stream),
                    Waiting::Received(_) => self.library.receive(at, length, self.peer, self.comm, stream),
                }
            };
            match begun? {
                Progress::Done => Ok(()),
                Progress::UnderWay => self.settled(what, || true),
            }
        });
        self.under_way.push_back(piece);
        asked
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // Before what is under way is given back: it may still be read or written.
        self.library.abort(self.comm);
    }
}

impl UnderWay {
    fn finish(self) {
        if let Waiting::Received(done) = self.done {
            // Who is not there any more needs no answer.
            let _ = done.send(self.bytes);
        }
    }
}

impl Waiting {
    fn what(&self) -> &'static str {
        match self {
            Self::Sent => "sending",
            Self::Received(_) => "receiving",
        }
    }
}
