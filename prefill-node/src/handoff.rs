//! The sending side of one handoff: which rows there are, which were sent, and their frames.
//!
//! Rows wait where they are, in the full model's cache, until the push has room for a frame, so a slow decode node costs
//! the engine no time and a few frames of memory at most.
//!
//! **Invariant:** the rows of each layer are sent in the order of their tokens, without a gap, each once, and only those
//! that are computed and that the decode node does not hold. The commit comes after all of them.

use overfill_kv::wire;
use overfill_model::ModelError;
use overfill_proto::MAX_FRAME_PAYLOAD;
use overfill_types::prompt_digest;
use overfill_types::{Epoch, Fingerprint, KvGeometry, Ticket, WireFormat};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::framing::Framing;
use crate::push::{Part, Push, Times};
use crate::rows::Piece;
use crate::way::{Carried, RowsWay};

/// Payload of a frame at most; small enough that the next layer's rows do not wait long behind it.
const FRAME_PAYLOAD: usize = 1 << 20;
const _: () = assert!(FRAME_PAYLOAD <= MAX_FRAME_PAYLOAD);
/// Frames between the engine and the push. Enough that the push does not run dry while a layer computes; 8 MiB a prompt at most.
const FRAMES_AHEAD: usize = 8;

/// Where a handoff goes.
#[derive(Clone)]
pub(crate) struct HandoffTarget {
    pub(crate) address: String,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) ticket: Ticket,
    pub(crate) epoch: Epoch,
    /// Tokens at the prompt's front whose rows the decode node has.
    pub(crate) held_tokens: usize,
    /// How rows get there.
    pub(crate) way: RowsWay,
}

/// Cuts rows into the parts of frames. Dropped before the commit it breaks the push off, silently.
pub(crate) struct Sender {
    geometry: KvGeometry,
    wire: WireFormat,
    way: RowsWay,
    parts: mpsc::Sender<Part>,
    layers: Vec<Layer>,
    begun: Option<Instant>,
    end: Option<End>,
    /// `None` after the commit.
    committed: Option<oneshot::Sender<Times>>,
    given_up: CancellationToken,
}

/// How far one layer of the decode model is, in tokens from the prompt's first.
#[derive(Clone, Copy)]
struct Layer {
    available: usize,
    sent: usize,
}

/// What the commit says.
struct End {
    prompt_digest: [u8; 32],
    first_token: u32,
    computed: Instant,
}

/// Both sides of a handoff of rows of this geometry.
pub(crate) fn handoff(target: HandoffTarget, geometry: KvGeometry, wire: WireFormat) -> (Sender, Push) {
    let (parts, received) = mpsc::channel(FRAMES_AHEAD);
    let (committed, when) = oneshot::channel();
    let given_up = CancellationToken::new();
    let HandoffTarget { address, fingerprint, ticket, epoch, held_tokens, way } = target;
    let sender = Sender {
        layers: vec![Layer { available: 0, sent: held_tokens }; geometry.layers],
        geometry,
        wire,
        way: way.clone(),
        parts,
        begun: None,
        end: None,
        committed: Some(committed),
        given_up: given_up.clone(),
    };
    let framing = Framing::new(fingerprint.clone(), ticket, epoch, wire);
    (sender, Push { address, fingerprint, way, parts: received, framing, committed: when, given_up })
}

impl Sender {
    /// Whether the push has ended (the decode node refused it or is gone).
    pub(crate) fn broken(&self) -> bool {
        self.parts.is_closed()
    }

    /// Rows of the first `tokens` tokens are in the cache, for these layers of the decode model.
    pub(crate) fn available(&mut self, layers: &[usize], tokens: usize) {
        layers.iter().for_each(|&layer| self.layers[layer].available = tokens);
    }

    /// As [`Self::available`], for all layers.
    pub(crate) fn available_in_all(&mut self, tokens: usize) {
        self.layers.iter_mut().for_each(|layer| layer.available = tokens);
    }

    /// The prompt was read to its end at `computed`: the commit may follow the rows.
    pub(crate) fn end(&mut self, prompt: &[u32], first_token: u32, computed: Instant) {
        self.end = Some(End { prompt_digest: prompt_digest(prompt), first_token, computed });
    }

    /// Gives the push what it has room for and what there is: rows, which `rows` fetches for their way, and the commit. True after
    /// the commit.
    ///
    /// # Errors
    /// What `rows` returns.
    pub(crate) fn fill(&mut self, mut rows: impl FnMut(Piece, &RowsWay) -> Result<Carried, ModelError>) -> Result<bool, ModelError> {
        while self.committed.is_some() {
            // Full, or over, which `broken` tells.
            let Ok(place) = self.parts.try_reserve() else { break };
            let part = if let Some(piece) = self.due() {
                let rows = rows(piece, &self.way)?;
                self.layers[piece.layer].sent += piece.tokens;
                Part::Rows(piece, rows)
            } else if let Some(End { prompt_digest, first_token, computed }) = self.end.take() {
                // The push may have failed already; it has told the router then.
                let _ = self.committed.take().map(|c| c.send(Times { begun: self.begun.unwrap_or_else(Instant::now), computed }));
                Part::Commit { prompt_digest, first_token }
            } else {
                break;
            };
            place.send(part);
            self.begun.get_or_insert_with(Instant::now);
        }
        Ok(self.committed.is_none())
    }

    /// The next rows to send: of the layer that is furthest behind, so that what waits longest leaves first.
    fn due(&self) -> Option<Piece> {
        let owed = |layer: &Layer| layer.available.saturating_sub(layer.sent);
        let (layer, behind) = self.layers.iter().enumerate().filter(|(_, l)| owed(l) > 0).min_by_key(|(_, l)| l.sent)?;
        let most = (FRAME_PAYLOAD / (2 * wire::row_bytes(self.wire, &self.geometry))).max(1);
        Some(Piece { layer, start: behind.sent, tokens: owed(behind).min(most) })
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // A push that broke is about to say why; it is not to be silenced.
        if self.committed.is_some() && !self.broken() {
            self.given_up.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use overfill_kv::{Assembler, Commit, Expected, FrameError, Payload, RowsHeader};
    use overfill_proto::v1::{KvFrame, KvRows, kv_frame};

    use super::*;

    const GEOMETRY: KvGeometry = KvGeometry { layers: 3, kv_heads: 1, head_dim: 2 };
    const PROMPT: [u32; 20] = [7; 20];

    fn target(held_tokens: usize) -> HandoffTarget {
        let (fingerprint, ticket) = (Fingerprint::new("pair"), Ticket::new("ticket"));
        HandoffTarget { address: "host:1".into(), fingerprint, ticket, epoch: Epoch(3), held_tokens, way: RowsWay::Tcp { gpu: None } }
    }

    fn assembler(held_tokens: usize) -> Assembler {
        let HandoffTarget { fingerprint, ticket, epoch, .. } = target(held_tokens);
        let (geometry, wire, prompt_digest) = (GEOMETRY, WireFormat::F32, prompt_digest(&PROMPT));
        Assembler::new(Expected { fingerprint, ticket, epoch, geometry, wire, prompt_tokens: PROMPT.len(), held_tokens, prompt_digest })
    }

    /// Rows that name their layer and token.
    fn bytes(piece: Piece, _: &RowsWay) -> Result<Carried, ModelError> {
        let rows: Vec<f32> = (piece.start..piece.start + piece.tokens).flat_map(|t| [piece.layer as f32, t as f32]).collect();
        let rows = wire::encode(WireFormat::F32, &GEOMETRY, &rows);
        Ok(Carried::Host([rows.clone(), rows]))
    }

    /// The next frame, if there is one.
    fn frame(push: &mut Push) -> Option<KvFrame> {
        match push.parts.try_recv().ok()? {
            Part::Rows(piece, Carried::Host(rows)) => Some(push.framing.rows(piece, rows)),
            Part::Rows(_, Carried::Gpu(_)) => unreachable!("nothing is on a GPU"),
            Part::Commit { prompt_digest, first_token } => Some(push.framing.commit(prompt_digest, first_token)),
        }
    }

    /// Takes a frame as a decode node would; true if it was the commit.
    fn take(assembler: &mut Assembler, frame: KvFrame) -> Result<bool, FrameError> {
        let (fingerprint, ticket, epoch) = (Fingerprint::new(frame.fingerprint), Ticket::new(frame.ticket), Epoch(frame.epoch));
        match frame.body.unwrap() {
            kv_frame::Body::Rows(KvRows { layer, start, tokens, k, v, checksum, .. }) => {
                let header = RowsHeader { fingerprint, ticket, epoch, index: frame.index, layer, start, tokens };
                let piece = Piece { layer: layer as usize, start: start as usize, tokens: tokens as usize };
                let Carried::Host(rows) = bytes(piece, &RowsWay::Tcp { gpu: None }).unwrap() else { unreachable!("nothing is on a GPU") };
                assert_eq!([k.clone(), v.clone()], rows);
                assembler.rows(&header, Payload::Seen { k: &k, v: &v }, checksum).map(|()| false)
            }
            kv_frame::Body::Commit(commit) => {
                assert_eq!(commit.first_token, 9);
                assembler
                    .commit(
                        &fingerprint,
                        &ticket,
                        epoch,
                        frame.index,
                        Commit { digest: &commit.digest, prompt_digest: &commit.prompt_digest, first_token: commit.first_token },
                    )
                    .map(|()| true)
            }
        }
    }

    /// A prompt read in chunks of 3, of which the first `cached` tokens are in the cache before; the push takes `speed` frames a chunk.
    fn whole(held: usize, cached: usize, speed: usize) -> u32 {
        let (mut sender, mut push) = handoff(target(held), GEOMETRY, WireFormat::F32);
        let mut assembler = assembler(held);
        let mut committed = false;
        sender.available_in_all(cached);
        for end in (cached + 3..PROMPT.len()).step_by(3).chain([PROMPT.len()]) {
            for layer in 0..GEOMETRY.layers {
                sender.available(&[layer], end);
                assert!(!sender.fill(bytes).unwrap());
                assert!(push.parts.len() <= FRAMES_AHEAD);
            }
            for _ in 0..speed {
                committed |= frame(&mut push).is_some_and(|frame| take(&mut assembler, frame).unwrap());
            }
        }
        sender.end(&PROMPT, 9, Instant::now());
        while !committed {
            let complete = sender.fill(bytes).unwrap();
            committed = take(&mut assembler, frame(&mut push).unwrap()).unwrap();
            assert!(complete || !committed);
        }
        assert!(sender.fill(bytes).unwrap() && frame(&mut push).is_none() && push.committed.try_recv().is_ok());
        let frames = push.framing.next();
        drop(sender);
        assert!(!push.given_up.is_cancelled());
        frames
    }

    #[test]
    fn every_row_is_sent_once_in_order_whatever_the_speed() {
        for held in [0, 1, 5, 16, 19, 20] {
            for cached in [0, 16] {
                for speed in [0, 1, 2, 100] {
                    whole(held, cached, speed);
                }
            }
        }
        assert_eq!(whole(20, 0, 100), 1, "all is held: only the commit is left");
        assert_eq!(whole(0, 0, 100), 3 * 7 + 1, "each chunk's rows leave as they are computed");
        assert_eq!(whole(0, 0, 0), 8 + 3 + 1, "what waited leaves in one frame a layer");
    }

    #[test]
    fn a_push_that_takes_nothing_gets_a_few_frames() {
        let (mut sender, mut push) = handoff(target(0), GEOMETRY, WireFormat::F32);
        for end in 1..=20 {
            sender.available_in_all(end);
            assert!(!sender.fill(bytes).unwrap());
        }
        assert_eq!(push.parts.len(), FRAMES_AHEAD);
        push.parts.close();
        assert!(sender.broken() && !sender.fill(bytes).unwrap());
        drop(sender);
        assert!(!push.given_up.is_cancelled(), "the push says why");
        let (sender, push) = handoff(target(0), GEOMETRY, WireFormat::F32);
        drop(sender);
        assert!(push.given_up.is_cancelled());
    }

    #[test]
    fn large_rows_are_cut() {
        let geometry = KvGeometry { layers: 1, kv_heads: 8, head_dim: 128 };
        let (mut sender, mut push) = handoff(target(0), geometry, WireFormat::F16);
        sender.available_in_all(300);
        let mut pieces = Vec::new();
        sender
            .fill(|piece, _| {
                pieces.push((piece.start, piece.tokens));
                Ok(Carried::Host([Bytes::new(), Bytes::new()]))
            })
            .unwrap();
        assert_eq!(pieces, [(0, 256), (256, 44)]);
        assert_eq!(frame(&mut push).unwrap().index, 0);
    }
}
