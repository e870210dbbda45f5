//! One push: frames come in, are checked, and go to the engine. Whatever breaks it ends the sequence that waits.

use std::time::Duration;

use overfill_kv::{Assembler, Commit, Payload, RowsHeader};
use overfill_proto::v1::{KvFrame, KvRows, PushSummary, kv_frame};
use overfill_proto::{MAX_FRAME_PAYLOAD, convert, error};
use overfill_transport::push::nccl::Joined;
use overfill_types::{Code, Epoch, Fingerprint, ServiceError, Ticket};
use tokio::time::{Instant, timeout};
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

use crate::admission::Admission;
use crate::commands::{Commands, LayerRows, Rows};
use crate::metrics::Metrics;

/// Takes one handoff.
///
/// # Errors
/// The first thing that was wrong; the sequence that waited for it has been told.
pub(crate) async fn receive(
    admission: &Admission,
    commands: &Commands,
    metrics: &Metrics,
    joined: Option<&Joined>,
    frames: &mut (impl Stream<Item = Result<KvFrame, Status>> + Unpin),
) -> Result<PushSummary, ServiceError> {
    let patience = admission.reservation_timeout();
    let Some(first) = next(frames, patience).await? else {
        return Err(ServiceError::of_way(Code::InvalidArgument, "a push without frames: send the rows and the commit"));
    };
    let begun = Instant::now();
    let (fingerprint, ticket, epoch) = names(&first);
    let expected = admission.claim(&fingerprint, &ticket, epoch)?;
    let guard = Guard::new(ticket.clone(), commands.clone());
    let taken = take(Assembler::new(expected), first, (commands, metrics, joined), frames, patience).await;
    if taken.is_ok() {
        metrics.handoff_seconds.observe(begun.elapsed().as_secs_f64());
    }
    guard.settle(taken.as_ref().err()).await?;
    taken
}

async fn take(
    mut assembler: Assembler,
    first: KvFrame,
    (commands, metrics, joined): (&Commands, &Metrics, Option<&Joined>),
    frames: &mut (impl Stream<Item = Result<KvFrame, Status>> + Unpin),
    patience: Duration,
) -> Result<PushSummary, ServiceError> {
    let mut summary = PushSummary::default();
    let mut frame = first;
    loop {
        let (fingerprint, ticket, epoch) = names(&frame);
        let index = frame.index;
        match frame.body {
            Some(kv_frame::Body::Rows(rows)) => {
                let wanted = assembler.wire();
                if convert::wire_format(rows.dtype()) != Some(wanted) {
                    let message = format!("frame {index} of {ticket} has rows of type {:?}: this pair's are {wanted}", rows.dtype());
                    return Err(ServiceError::of_way(Code::InvalidArgument, message));
                }
                let came = Came::take(&rows, (&ticket, index), joined, patience).await?;
                let payload = came.bytes();
                if payload > MAX_FRAME_PAYLOAD {
                    let message = format!("frame {index} of {ticket} has {payload} bytes: at most {MAX_FRAME_PAYLOAD} are taken");
                    return Err(ServiceError::of_way(Code::ResourceExhausted, message));
                }
                let KvRows { layer, start, tokens, checksum, .. } = rows;
                let header = RowsHeader { fingerprint, ticket: ticket.clone(), epoch, index, layer, start, tokens };
                assembler.rows(&header, came.payload(), checksum).inspect_err(|e| metrics.frame_refused(e))?;
                summary.frames += 1;
                summary.bytes += payload as u64;
                metrics.frames_received.inc();
                metrics.bytes_received.inc_by(payload as u64);
                metrics.nccl_bytes_received.inc_by(came.on_gpu() as u64);
                commands.rows(ticket, LayerRows { layer: layer as usize, start: start as usize, rows: came.rows }).await?;
            }
            Some(kv_frame::Body::Commit(commit)) => {
                let first_token = commit.first_token;
                let told = Commit { digest: &commit.digest, prompt_digest: &commit.prompt_digest, first_token };
                assembler.commit(&fingerprint, &ticket, epoch, index, told).inspect_err(|e| metrics.frame_refused(e))?;
                commands.start(ticket, first_token).await?;
                return Ok(summary);
            }
            None => return Err(ServiceError::of_way(Code::InvalidArgument, format!("frame {index} of {ticket} is empty"))),
        }
        frame = match next(frames, patience).await? {
            Some(frame) => frame,
            None => {
                return Err(ServiceError::of_way(Code::DataLoss, "the push ended before its commit: the prefill node gave up or is gone"));
            }
        };
    }
}

/// The rows of a frame, wherever they came.
struct Came {
    rows: Rows,
    /// Those on a GPU, where the frame has a checksum of them.
    seen: Option<Vec<u8>>,
}

impl Came {
    /// Those that are in a frame, or that come beside it.
    async fn take(
        frame: &KvRows,
        (ticket, index): (&Ticket, u32),
        joined: Option<&Joined>,
        patience: Duration,
    ) -> Result<Self, ServiceError> {
        if frame.communicator.is_empty() {
            return Ok(Self { rows: Rows::Host { k: frame.k.clone(), v: frame.v.clone() }, seen: None });
        }
        let Some(joined) = joined else {
            let message =
                format!("the rows of frame {index} of {ticket} are said to come over NCCL, which this decode node does not offer");
            return Err(ServiceError::of_way(Code::InvalidArgument, message));
        };
        let rows = joined.take(&frame.communicator, ticket, index, patience).await?;
        if frame.unseen {
            return Ok(Self { rows: Rows::Gpu(rows), seen: None });
        }
        let reading = tokio::task::spawn_blocking(move || {
            let mut rows = rows;
            rows.read().map(|seen| Self { rows: Rows::Gpu(rows), seen: Some(seen) })
        });
        let failed = |why: String| ServiceError::of_node(Code::Internal, format!("rows that came to the GPU cannot be read back: {why}"));
        reading.await.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))
    }

    fn payload(&self) -> Payload<'_> {
        match (&self.rows, &self.seen) {
            (Rows::Host { k, v }, _) => Payload::Seen { k, v },
            (Rows::Gpu(_), Some(both)) => {
                let (k, v) = both.split_at(both.len() / 2);
                Payload::Seen { k, v }
            }
            (Rows::Gpu(rows), None) => Payload::Unseen { bytes: rows.len() },
        }
    }

    /// Bytes of keys and values.
    fn bytes(&self) -> usize {
        match &self.rows {
            Rows::Host { k, v } => k.len() + v.len(),
            Rows::Gpu(rows) => rows.len(),
        }
    }

    /// Of these, those that came over NCCL.
    fn on_gpu(&self) -> usize {
        if matches!(self.rows, Rows::Gpu(_)) { self.bytes() } else { 0 }
    }
}

fn names(frame: &KvFrame) -> (Fingerprint, Ticket, Epoch) {
    (Fingerprint::new(frame.fingerprint.as_str()), Ticket::new(frame.ticket.as_str()), Epoch(frame.epoch))
}

async fn next(
    frames: &mut (impl Stream<Item = Result<KvFrame, Status>> + Unpin),
    patience: Duration,
) -> Result<Option<KvFrame>, ServiceError> {
    match timeout(patience, frames.next()).await {
        Ok(None) => Ok(None),
        Ok(Some(Ok(frame))) => Ok(Some(frame)),
        Ok(Some(Err(error))) => {
            let error = error::from_status(&error, "the prefill node");
            Err(ServiceError::of_way(error.code, format!("the push broke off: {error}")))
        }
        Err(_) => Err(ServiceError::of_way(Code::Unavailable, format!("no frame came for {} s", patience.as_secs()))),
    }
}

/// Ends the waiting sequence if the push itself is dropped, as it is when its connection breaks.
struct Guard {
    ticket: Ticket,
    commands: Commands,
    /// What the sequence is told; `None` once it needs to be told nothing.
    error: Option<ServiceError>,
}

impl Guard {
    fn new(ticket: Ticket, commands: Commands) -> Self {
        let error =
            ServiceError::of_way(Code::Unavailable, "the prefill node went away in the middle of the handoff; send the request again");
        Self { ticket, commands, error: Some(error) }
    }

    /// The push is over. Where it `failed` the sequence is told; this may be dropped while the engine has no room for that, and the
    /// sequence is told all the same.
    async fn settle(mut self, failed: Option<&ServiceError>) -> Result<(), ServiceError> {
        if let Some(error) = failed {
            self.error = Some(error.clone());
            self.commands.fail(self.ticket.clone(), error.clone()).await?;
        }
        self.error = None;
        Ok(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(error) = self.error.take() else { return };
        let (commands, ticket) = (self.commands.clone(), self.ticket.clone());
        // Ends as soon as the engine takes the command, or is gone.
        tokio::spawn(async move { commands.fail(ticket, error).await });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_sequence_is_told_of_its_push_although_that_is_dropped_while_the_engine_is_busy() {
        let (commands, engine) = Commands::bounded(1);
        commands.fail(Ticket::new("other"), ServiceError::of_way(Code::DataLoss, "its own")).await.unwrap();
        let failed = ServiceError::of_way(Code::DataLoss, "a checksum");
        let guard = Guard::new(Ticket::new("ours"), commands);
        // The engine takes nothing, and the connection breaks.
        timeout(Duration::from_millis(20), guard.settle(Some(&failed))).await.unwrap_err();
        let told = async || engine.recv_async().await.unwrap().failure().unwrap();
        assert_eq!(told().await.0.as_str(), "other");
        let (ticket, error) = timeout(Duration::from_secs(5), told()).await.unwrap();
        assert_eq!((ticket.as_str(), error), ("ours", failed));
    }

    #[tokio::test]
    async fn a_push_that_is_over_tells_its_sequence_once() {
        let (commands, engine) = Commands::bounded(8);
        Guard::new(Ticket::new("whole"), commands.clone()).settle(None).await.unwrap();
        Guard::new(Ticket::new("failed"), commands.clone()).settle(Some(&ServiceError::of_way(Code::DataLoss, "why"))).await.unwrap();
        drop(Guard::new(Ticket::new("dropped"), commands));
        for name in ["failed", "dropped"] {
            assert_eq!(engine.recv_async().await.unwrap().failure().unwrap().0.as_str(), name);
        }
        assert!(engine.recv_async().await.is_err(), "nothing else, and nobody is left to tell");
    }
}
