//! The task that carries one handoff's frames to its decode node.

use overfill_lifecycle::Trace;
use overfill_nccl::GpuBytes;
use overfill_proto::v1::{HandoffDone, KvFrame, kv_frame};
use overfill_types::{Code, Fingerprint, ServiceError, Ticket};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::decode_nodes::DecodeNodes;
use crate::metrics::Metrics;
use crate::way::RowsWay;

/// Frames on their way from the communicator to the connection.
const FRAMES: usize = 2;

/// A frame, and its rows where they do not go in it.
pub(crate) struct Framed {
    pub(crate) frame: KvFrame,
    pub(crate) on_gpu: Option<GpuBytes>,
}

/// When a handoff's parts were there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// The first frame was given to the push.
    pub(crate) begun: Instant,
    /// The full model was through with the prompt.
    pub(crate) computed: Instant,
}

/// The push's side of a handoff.
pub(crate) struct Push {
    /// `host:port` of the decode node.
    pub(crate) address: String,
    /// The pair that the prompt was read for.
    pub(crate) fingerprint: Fingerprint,
    pub(crate) way: RowsWay,
    pub(crate) frames: mpsc::Receiver<Framed>,
    /// Told with the commit.
    pub(crate) committed: oneshot::Receiver<Times>,
    pub(crate) given_up: CancellationToken,
}

impl Push {
    /// Pushes until the decode node has acknowledged the whole; `None` where the sender gave up.
    ///
    /// # Errors
    /// What the decode node refused, or [`Code::Unavailable`] where it is gone; the sentence names it.
    pub(crate) async fn run(
        self,
        decode_nodes: &DecodeNodes,
        metrics: &Metrics,
        trace: &Trace,
    ) -> Result<Option<HandoffDone>, ServiceError> {
        let (passed, frames) = mpsc::channel(FRAMES);
        let carrying = carry(self.frames, &self.way, passed, metrics);
        let pushing = decode_nodes.push(&self.address, &self.fingerprint, ReceiverStream::new(frames), trace.headers(&Span::current()));
        let both = async {
            tokio::pin!(carrying, pushing);
            tokio::select! {
                pushed = &mut pushing => pushed,
                // All frames were passed on, or a communicator has ended.
                carried = &mut carrying => match carried {
                    Ok(()) => pushing.await,
                    Err(error) => Err(error),
                },
            }
        };
        let summary = tokio::select! {
            pushed = both => pushed?,
            () = self.given_up.cancelled() => return Ok(None),
        };
        let acknowledged = Instant::now();
        let Ok(Times { begun, computed }) = self.committed.await else {
            let message = format!("decode node {} acknowledged a handoff that was not whole", self.address);
            return Err(ServiceError::of_way(Code::DataLoss, message));
        };
        let since = |then: Instant| acknowledged.saturating_duration_since(then);
        metrics.handoff_seconds.observe(since(begun).as_secs_f64());
        metrics.handoff_tail_seconds.observe(since(computed).as_secs_f64());
        let since = |then: Instant| since(then).as_micros() as u64;
        Ok(Some(HandoffDone { frames: summary.frames, bytes: summary.bytes, tail_us: since(computed), transfer_us: since(begun) }))
    }
}

/// Passes frames on; rows that do not go in them go over the communicator before. Those are counted that do.
///
/// # Errors
/// Where the communicator has ended.
async fn carry(
    mut frames: mpsc::Receiver<Framed>,
    way: &RowsWay,
    passed: mpsc::Sender<KvFrame>,
    metrics: &Metrics,
) -> Result<(), ServiceError> {
    loop {
        let framed = match way {
            RowsWay::Tcp => frames.recv().await,
            RowsWay::Nccl { way, .. } => tokio::select! {
                framed = frames.recv() => framed,
                error = way.ended() => return Err(error),
            },
        };
        let Some(Framed { frame, on_gpu }) = framed else { break };
        if let Some(kv_frame::Body::Rows(rows)) = &frame.body {
            metrics.frames_sent.inc();
            let on_gpu = on_gpu.as_ref().map_or(0, GpuBytes::len);
            metrics.bytes_sent.inc_by((rows.k.len() + rows.v.len() + on_gpu) as u64);
            metrics.nccl_bytes_sent.inc_by(on_gpu as u64);
        }
        if let (RowsWay::Nccl { way, .. }, Some(rows)) = (way, on_gpu) {
            way.send(Ticket::new(frame.ticket.as_str()), frame.index, rows).await?;
        }
        // The push is over, and says why.
        if passed.send(frame).await.is_err() {
            break;
        }
    }
    drop(passed);
    match way {
        RowsWay::Tcp => Ok(()),
        // What was sent last may still fail.
        RowsWay::Nccl { way, .. } => Err(way.ended().await),
    }
}
