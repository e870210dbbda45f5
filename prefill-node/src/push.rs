//! The task that carries one handoff's frames to its decode node.

use overfill_lifecycle::Trace;
use overfill_proto::v1::{HandoffDone, KvFrame, kv_frame};
use overfill_types::{Code, Fingerprint, ServiceError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::decode_nodes::DecodeNodes;
use crate::metrics::Metrics;

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
    pub(crate) frames: mpsc::Receiver<KvFrame>,
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
        let (frames_sent, bytes_sent) = (metrics.frames_sent.clone(), metrics.bytes_sent.clone());
        let frames = ReceiverStream::new(self.frames).map(move |frame| {
            if let Some(kv_frame::Body::Rows(rows)) = &frame.body {
                frames_sent.inc();
                bytes_sent.inc_by((rows.k.len() + rows.v.len()) as u64);
            }
            frame
        });
        let summary = tokio::select! {
            pushed = decode_nodes.push(&self.address, &self.fingerprint, frames, trace.headers(&Span::current())) => pushed?,
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
