//! The task that carries one handoff's frames to its decode node.

use overfill_lifecycle::Trace;
use overfill_proto::v1::{HandoffDone, KvFrame};
use overfill_types::{Code, Fingerprint, ServiceError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::decode_nodes::DecodeNodes;
use crate::framing::Framing;
use crate::metrics::Metrics;
use crate::rows::{self, Piece};
use crate::way::{Carried, RowsWay};

/// Frames on their way to the connection, beside those that wait for it.
const FRAMES: usize = 2;

/// What the engine gives the push, in the order of its frames.
pub(crate) enum Part {
    Rows(Piece, Carried),
    /// The prompt was read to its end.
    Commit {
        prompt_digest: [u8; 32],
        first_token: u32,
    },
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
    pub(crate) parts: mpsc::Receiver<Part>,
    pub(crate) framing: Framing,
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
        let carrying = carry(self.parts, self.framing, &self.way, passed, metrics);
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

/// Makes frames of parts and passes them on; rows that do not go in them go over the communicator before.
///
/// # Errors
/// Where the communicator has ended, or a GPU does not give its rows.
async fn carry(
    mut parts: mpsc::Receiver<Part>,
    mut framing: Framing,
    way: &RowsWay,
    passed: mpsc::Sender<KvFrame>,
    metrics: &Metrics,
) -> Result<(), ServiceError> {
    loop {
        let part = match way {
            RowsWay::Tcp { .. } => parts.recv().await,
            RowsWay::Nccl { way, .. } => tokio::select! {
                part = parts.recv() => part,
                error = way.ended() => return Err(error),
            },
        };
        let Some(part) = part else { break };
        let frame = match part {
            Part::Rows(piece, rows) => {
                metrics.frames_sent.inc();
                metrics.bytes_sent.inc_by(rows.len() as u64);
                match (rows, way) {
                    (Carried::Host(rows), _) => framing.rows(piece, rows),
                    (Carried::Gpu(rows), RowsWay::Tcp { .. }) => framing.rows(piece, rows::halves(rows::read(rows).await?.1.into())),
                    (Carried::Gpu(rows), RowsWay::Nccl { way, checksum_every }) => {
                        metrics.nccl_bytes_sent.inc_by(rows.len() as u64);
                        let chosen = *checksum_every > 0 && rand::random_ratio(1, *checksum_every);
                        let (rows, seen) =
                            if chosen { rows::read(rows).await.map(|(rows, seen)| (rows, Some(seen)))? } else { (rows, None) };
                        let frame = framing.rows_beside(piece, way.communicator(), seen.as_deref());
                        way.send(framing.ticket().clone(), frame.index, rows).await?;
                        frame
                    }
                }
            }
            Part::Commit { prompt_digest, first_token } => framing.commit(prompt_digest, first_token),
        };
        // The push is over, and says why.
        if passed.send(frame).await.is_err() {
            break;
        }
    }
    drop(passed);
    match way {
        RowsWay::Tcp { .. } => Ok(()),
        // What was sent last may still fail.
        RowsWay::Nccl { way, .. } => Err(way.ended().await),
    }
}
