//! The sending side of one handoff: rows become frames as layers are computed, a task pushes them to the decode node.

use std::time::Instant;

use overfill_kv::{HandoffDigest, RowsHeader, prompt_digest, wire};
use overfill_lifecycle::grpc;
use overfill_proto::v1::decode_client::DecodeClient;
use overfill_proto::v1::{HandoffDone, KvCommit, KvFrame, KvRows, kv_frame};
use overfill_proto::{MAX_FRAME_PAYLOAD, MAX_MESSAGE, convert, status};
use overfill_types::{Code, Epoch, Fingerprint, KvGeometry, ServiceError, Ticket, WireFormat};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Payload of a frame at most; small enough that the next layer's rows do not wait long behind it.
const FRAME_PAYLOAD: usize = 1 << 20;
const _: () = assert!(FRAME_PAYLOAD <= MAX_FRAME_PAYLOAD);

/// Where a handoff goes.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) address: String,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) ticket: Ticket,
    pub(crate) epoch: Epoch,
}

/// Tokens of one layer in a frame.
pub(crate) fn tokens_per_frame(wire: WireFormat, geometry: &KvGeometry) -> usize {
    (FRAME_PAYLOAD / (2 * wire::row_bytes(wire, geometry))).max(1)
}

/// Cuts rows into frames. Dropped without [`Sender::commit`] it breaks the push off, silently.
pub(crate) struct Sender {
    target: Target,
    geometry: KvGeometry,
    wire: WireFormat,
    /// Has room for every frame of the prompt, so the engine never waits for a slow decode node. What it may hold is
    /// bounded by the prompts that are admitted.
    frames: mpsc::Sender<KvFrame>,
    next: u32,
    digest: HandoffDigest,
    committed: oneshot::Sender<Instant>,
    given_up: DropGuard,
}

/// The task's side of a handoff.
pub(crate) struct Push {
    target: Target,
    frames: mpsc::Receiver<KvFrame>,
    committed: oneshot::Receiver<Instant>,
    given_up: CancellationToken,
}

/// A handoff of a prompt of `tokens` tokens that is read at least one token a chunk.
pub(crate) fn handoff(target: Target, geometry: KvGeometry, wire: WireFormat, tokens: usize) -> (Sender, Push) {
    let (frames, received) = mpsc::channel(geometry.layers * tokens + 1);
    let (committed, when) = oneshot::channel();
    let given_up = CancellationToken::new();
    let push = Push { target: target.clone(), frames: received, committed: when, given_up: given_up.clone() };
    let digest = HandoffDigest::default();
    (Sender { target, geometry, wire, frames, next: 0, digest, committed, given_up: given_up.drop_guard() }, push)
}

impl Sender {
    /// Whether the push has ended (the decode node refused it or is gone).
    pub(crate) fn broken(&self) -> bool {
        self.frames.is_closed()
    }

    /// Sends rows `[tokens, kv_heads, head_dim]` of one decode-model layer, the first of them at position `start`.
    pub(crate) fn rows(&mut self, layer: usize, start: usize, k: &[f32], v: &[f32]) {
        let row = self.geometry.row();
        let step = tokens_per_frame(self.wire, &self.geometry) * row;
        for (i, (k, v)) in k.chunks(step).zip(v.chunks(step)).enumerate() {
            let header = RowsHeader {
                fingerprint: self.target.fingerprint.clone(),
                ticket: self.target.ticket.clone(),
                epoch: self.target.epoch,
                index: self.next,
                layer: layer as u32,
                start: (start + i * step / row) as u32,
                tokens: (k.len() / row) as u32,
            };
            let (k, v) = (wire::encode(self.wire, &self.geometry, k), wire::encode(self.wire, &self.geometry, v));
            let checksum = header.checksum(&k, &v);
            self.digest.update(&header, checksum);
            let RowsHeader { layer, start, tokens, .. } = header;
            let rows = KvRows { layer, start, tokens, dtype: convert::wire_format_to_wire(self.wire).into(), k, v, checksum };
            self.send(kv_frame::Body::Rows(rows));
        }
    }

    /// Sends the commit: all rows are on their way.
    pub(crate) fn commit(mut self, prompt: &[u32], first_token: u32) {
        let digest = std::mem::take(&mut self.digest).finish();
        let prompt_digest = prompt_digest(prompt);
        let commit = KvCommit { digest: digest.to_vec().into(), prompt_digest: prompt_digest.to_vec().into(), first_token };
        self.send(kv_frame::Body::Commit(commit));
        self.given_up.disarm();
        // The push may have failed already; it has told the router then.
        let _ = self.committed.send(Instant::now());
    }

    fn send(&mut self, body: kv_frame::Body) {
        let Target { fingerprint, ticket, epoch, .. } = &self.target;
        let frame = KvFrame {
            fingerprint: fingerprint.to_string(),
            ticket: ticket.to_string(),
            epoch: epoch.0,
            index: self.next,
            body: Some(body),
        };
        self.next += 1;
        // Closed: the push has ended, which `broken` tells.
        let _ = self.frames.try_send(frame);
    }
}

impl Push {
    /// Pushes until the decode node has acknowledged the whole; `None` where the sender gave up.
    ///
    /// # Errors
    /// What the decode node refused, or [`Code::Unavailable`] where it is gone; the sentence names it.
    pub(crate) async fn run(self) -> Result<Option<HandoffDone>, ServiceError> {
        let address = self.target.address;
        let peer = format!("decode node {address}");
        let channel = grpc::channel(&address)
            .map_err(|_| ServiceError::new(Code::InvalidArgument, format!("'{address}' is no address of a decode node: host:port is")))?;
        let mut client = DecodeClient::new(channel).max_encoding_message_size(MAX_MESSAGE);
        let pushed = tokio::select! {
            pushed = client.push_kv(ReceiverStream::new(self.frames)) => pushed,
            () = self.given_up.cancelled() => return Ok(None),
        };
        let summary = pushed
            .map_err(|e| {
                let error = status::from_status(&e, &peer);
                ServiceError::new(error.code, format!("the handoff to {peer} failed: {error}"))
            })?
            .into_inner();
        let tail = self.committed.await.map_or(0, |at| at.elapsed().as_micros() as u64);
        Ok(Some(HandoffDone { frames: summary.frames, bytes: summary.bytes, tail_us: tail, transfer_us: 0 }))
    }
}
