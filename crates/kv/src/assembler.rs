//! The receiving side of one handoff: every frame is checked before its rows may touch the cache.
//!
//! **Invariant:** a handoff is complete only if each layer's rows of each prompt token came exactly once, whole, in order,
//! for this reservation, of this epoch, from a node of this pair, and are of this prompt. After the first error, and after
//! the commit, nothing more is accepted.

use overfill_types::{Code, Epoch, Fingerprint, KvGeometry, ServiceError, Ticket, WireFormat};

use crate::frame::{HandoffDigest, RowsHeader};
use crate::wire::row_bytes;

/// What a reservation waits for.
#[derive(Clone, Debug)]
pub struct Expected {
    /// This node's pair.
    pub fingerprint: Fingerprint,
    /// The reservation.
    pub ticket: Ticket,
    /// Its attempt.
    pub epoch: Epoch,
    /// The decode model's KV geometry.
    pub geometry: KvGeometry,
    /// How its rows travel.
    pub wire: WireFormat,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens at its front whose rows are here already: they do not come again.
    pub held_tokens: usize,
    /// [`overfill_types::prompt_digest`] of the prompt.
    pub prompt_digest: [u8; 32],
}

/// A frame that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Of another pair.
    #[error("frame {index} of {ticket} comes from a node of pair {got}, this node serves pair {held}")]
    OtherPair {
        /// The frame's place.
        index: u32,
        /// The reservation.
        ticket: Ticket,
        /// The sender's pair.
        got: Fingerprint,
        /// This node's.
        held: Fingerprint,
    },
    /// For another reservation than the stream's first frame.
    #[error("frame {index} is for ticket {got}, this handoff is for {held}")]
    OtherTicket {
        /// The frame's place.
        index: u32,
        /// The frame's.
        got: Ticket,
        /// The handoff's.
        held: Ticket,
    },
    /// Of another attempt.
    #[error("frame {index} of {ticket} has epoch {got}, the reservation has {held}")]
    StaleEpoch {
        /// The frame's place.
        index: u32,
        /// The reservation.
        ticket: Ticket,
        /// The frame's.
        got: Epoch,
        /// The reservation's.
        held: Epoch,
    },
    /// Twice, left out or swapped.
    #[error("frame {got} of {ticket} came where frame {expected} was due")]
    OutOfOrder {
        /// The reservation.
        ticket: Ticket,
        /// The frame's place.
        got: u32,
        /// The place that was due.
        expected: u32,
    },
    /// Of a layer or of tokens that the handoff does not have, or of the wrong size.
    #[error("frame {index} of {ticket} does not fit: {what}")]
    Shape {
        /// The frame's place.
        index: u32,
        /// The reservation.
        ticket: Ticket,
        /// In what.
        what: String,
    },
    /// Changed on the way.
    #[error("frame {index} of {ticket} is damaged: its checksum is {got:016x}, its content has {computed:016x}")]
    Checksum {
        /// The frame's place.
        index: u32,
        /// The reservation.
        ticket: Ticket,
        /// As sent.
        got: u64,
        /// As computed here.
        computed: u64,
    },
    /// Committed before all rows had come.
    #[error("the handoff of {ticket} was committed with {have} of {want} rows")]
    Incomplete {
        /// The reservation.
        ticket: Ticket,
        /// Rows that came (a row is one layer of one token).
        have: usize,
        /// Rows that were due.
        want: usize,
    },
    /// The digest over all frames differs.
    #[error("the handoff of {ticket} is damaged: the digest over its frames is not the sender's")]
    Digest {
        /// The reservation.
        ticket: Ticket,
    },
    /// Of another prompt.
    #[error("the handoff of {ticket} is of another prompt than the reservation")]
    OtherPrompt {
        /// The reservation.
        ticket: Ticket,
    },
    /// After the commit or an error.
    #[error("the handoff of {ticket} is over: nothing more is accepted")]
    Over {
        /// The reservation.
        ticket: Ticket,
    },
}

impl FrameError {
    /// What kind of failure it is.
    pub fn code(&self) -> Code {
        match self {
            Self::OtherPair { .. } => Code::Mismatch,
            Self::StaleEpoch { .. } | Self::Over { .. } => Code::Stale,
            Self::OtherTicket { .. } | Self::Shape { .. } | Self::OtherPrompt { .. } => Code::InvalidArgument,
            Self::OutOfOrder { .. } | Self::Checksum { .. } | Self::Incomplete { .. } | Self::Digest { .. } => Code::DataLoss,
        }
    }
}

impl From<FrameError> for ServiceError {
    fn from(error: FrameError) -> Self {
        ServiceError::of_way(error.code(), error.to_string())
    }
}

/// What the last frame of a handoff says.
#[derive(Clone, Copy, Debug)]
pub struct Commit<'a> {
    /// Over all frames and the first token: [`HandoffDigest`].
    pub digest: &'a [u8],
    /// Of the prompt.
    pub prompt_digest: &'a [u8],
    /// The answer's first.
    pub first_token: u32,
}

/// What a frame of rows carries.
#[derive(Clone, Copy, Debug)]
pub enum Payload<'a> {
    /// Keys and values, `[tokens, kv_heads, head_dim]` each.
    Seen {
        /// The keys.
        k: &'a [u8],
        /// The values.
        v: &'a [u8],
    },
    /// Both lie in a GPU's memory, and only how many bytes they have in all is known: the checksum is of the header alone.
    Unseen {
        /// Keys and values together.
        bytes: usize,
    },
}

/// Checks one handoff, frame by frame.
pub struct Assembler {
    expected: Expected,
    next: u32,
    digest: HandoffDigest,
    /// How many tokens of each layer are here; they come in order.
    filled: Vec<usize>,
    over: bool,
}

impl Assembler {
    /// For one reservation.
    pub fn new(expected: Expected) -> Self {
        let filled = vec![expected.held_tokens; expected.geometry.layers];
        Self { expected, next: 0, digest: HandoffDigest::default(), filled, over: false }
    }

    /// How rows are to come.
    pub fn wire(&self) -> WireFormat {
        self.expected.wire
    }

    /// Checks a frame of rows; if it is good they may be written to the cache.
    ///
    /// # Errors
    /// Every violation; then the handoff is over.
    pub fn rows(&mut self, header: &RowsHeader, payload: Payload<'_>, checksum: u64) -> Result<(), FrameError> {
        let checked = self.place(&header.fingerprint, &header.ticket, header.epoch, header.index).and_then(|()| {
            self.shape(header, payload)?;
            let computed = match payload {
                Payload::Seen { k, v } => header.checksum(k, v),
                Payload::Unseen { .. } => header.checksum(&[], &[]),
            };
            if computed != checksum {
                return Err(FrameError::Checksum { index: header.index, ticket: header.ticket.clone(), got: checksum, computed });
            }
            Ok(())
        });
        if checked.is_err() {
            self.over = true;
            return checked;
        }
        self.filled[header.layer as usize] += header.tokens as usize;
        self.digest.update(header, checksum);
        self.next += 1;
        Ok(())
    }

    /// Checks the commit, whose frame came at `index`; if it is good the sequence may run.
    ///
    /// # Errors
    /// Every violation. The handoff is over either way.
    pub fn commit(
        &mut self,
        fingerprint: &Fingerprint,
        ticket: &Ticket,
        epoch: Epoch,
        index: u32,
        commit: Commit<'_>,
    ) -> Result<(), FrameError> {
        let checked = self.place(fingerprint, ticket, epoch, index);
        self.over = true;
        checked?;
        let ticket = ticket.clone();
        let want = self.expected.geometry.layers * self.expected.prompt_tokens;
        let have = self.filled.iter().sum();
        if have != want {
            return Err(FrameError::Incomplete { ticket, have, want });
        }
        if self.digest.clone().finish(commit.first_token) != commit.digest {
            return Err(FrameError::Digest { ticket });
        }
        if self.expected.prompt_digest != commit.prompt_digest {
            return Err(FrameError::OtherPrompt { ticket });
        }
        Ok(())
    }

    fn place(&self, fingerprint: &Fingerprint, ticket: &Ticket, epoch: Epoch, index: u32) -> Result<(), FrameError> {
        let Expected { fingerprint: pair, ticket: held, epoch: current, .. } = &self.expected;
        if fingerprint != pair {
            return Err(FrameError::OtherPair { index, ticket: ticket.clone(), got: fingerprint.clone(), held: pair.clone() });
        }
        if ticket != held {
            return Err(FrameError::OtherTicket { index, got: ticket.clone(), held: held.clone() });
        }
        if epoch != *current {
            return Err(FrameError::StaleEpoch { index, ticket: ticket.clone(), got: epoch, held: *current });
        }
        if self.over {
            return Err(FrameError::Over { ticket: ticket.clone() });
        }
        if index != self.next {
            return Err(FrameError::OutOfOrder { ticket: ticket.clone(), got: index, expected: self.next });
        }
        Ok(())
    }

    fn shape(&self, header: &RowsHeader, payload: Payload<'_>) -> Result<(), FrameError> {
        let fail = |what: String| Err(FrameError::Shape { index: header.index, ticket: header.ticket.clone(), what });
        let Expected { geometry, wire, prompt_tokens, .. } = &self.expected;
        let Some(&filled) = self.filled.get(header.layer as usize) else {
            return fail(format!("layer {} of a decode model with {}", header.layer, geometry.layers));
        };
        let (start, tokens) = (header.start as usize, header.tokens as usize);
        if tokens == 0 || start + tokens > *prompt_tokens {
            return fail(format!("tokens {start}..{} of a prompt with {prompt_tokens}", start + tokens));
        }
        if start != filled {
            return fail(format!("tokens of layer {} from {start} on came where {filled} was due", header.layer));
        }
        let bytes = tokens * row_bytes(*wire, geometry);
        match payload {
            Payload::Seen { k, v } if k.len() != bytes || v.len() != bytes => fail(format!(
                "{} bytes of keys and {} of values for {tokens} tokens of {geometry} as {wire}: {bytes} are due",
                k.len(),
                v.len()
            )),
            Payload::Unseen { bytes: both } if both != 2 * bytes => {
                fail(format!("{both} bytes of keys and values for {tokens} tokens of {geometry} as {wire}: {} are due", 2 * bytes))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use overfill_types::prompt_digest;

    const GEOMETRY: KvGeometry = KvGeometry { layers: 2, kv_heads: 1, head_dim: 2 };
    const PROMPT: [u32; 5] = [3, 1, 4, 1, 5];

    #[derive(Clone, Debug, PartialEq)]
    struct Frame {
        header: RowsHeader,
        k: Vec<u8>,
        v: Vec<u8>,
        checksum: u64,
    }

    fn expected() -> Expected {
        Expected {
            fingerprint: Fingerprint::new("pair"),
            ticket: Ticket::new("ticket"),
            epoch: Epoch(2),
            geometry: GEOMETRY,
            wire: WireFormat::F32,
            prompt_tokens: PROMPT.len(),
            held_tokens: 0,
            prompt_digest: prompt_digest(&PROMPT),
        }
    }

    fn frame(index: u32, layer: u32, start: u32, tokens: u32) -> Frame {
        let Expected { fingerprint, ticket, epoch, .. } = expected();
        let header = RowsHeader { fingerprint, ticket, epoch, index, layer, start, tokens };
        let bytes = |seed: u8| (0..tokens as usize * GEOMETRY.row() * 4).map(|i| seed ^ i as u8).collect::<Vec<u8>>();
        let (k, v) = (bytes(index as u8), bytes(100 + index as u8));
        let checksum = header.checksum(&k, &v);
        Frame { header, k, v, checksum }
    }

    /// Two chunks, layer by layer.
    fn handoff() -> Vec<Frame> {
        vec![frame(0, 0, 0, 3), frame(1, 1, 0, 3), frame(2, 0, 3, 2), frame(3, 1, 3, 2)]
    }

    fn receive(frames: &[Frame]) -> Result<(), FrameError> {
        let Expected { fingerprint, ticket, epoch, prompt_digest, .. } = expected();
        let mut assembler = Assembler::new(expected());
        let mut digest = HandoffDigest::default();
        for f in handoff() {
            digest.update(&f.header, f.checksum);
        }
        for f in frames {
            assembler.rows(&f.header, Payload::Seen { k: &f.k, v: &f.v }, f.checksum)?;
        }
        assembler.commit(
            &fingerprint,
            &ticket,
            epoch,
            frames.len() as u32,
            Commit { digest: &digest.finish(7), prompt_digest: &prompt_digest, first_token: 7 },
        )
    }

    #[test]
    fn a_whole_handoff_is_accepted_once() {
        assert_eq!(receive(&handoff()), Ok(()));
        let mut assembler = Assembler::new(expected());
        let Frame { header, k, v, checksum } = frame(0, 0, 0, 5);
        assembler.rows(&header, Payload::Seen { k: &k, v: &v }, checksum).unwrap();
        let again = RowsHeader { index: 1, ..header };
        assert!(
            matches!(assembler.rows(&again, Payload::Seen { k: &k, v: &v }, again.checksum(&k, &v)), Err(FrameError::Shape { .. })),
            "the same tokens twice"
        );
        let Frame { header, k, v, checksum } = frame(1, 1, 0, 5);
        assert!(
            matches!(assembler.rows(&header, Payload::Seen { k: &k, v: &v }, checksum), Err(FrameError::Over { .. })),
            "nothing after an error"
        );
    }

    #[test]
    fn what_is_held_does_not_come_again() {
        let held = || Assembler::new(Expected { held_tokens: 3, ..expected() });
        let Frame { header, k, v, checksum } = frame(0, 0, 3, 2);
        held().rows(&header, Payload::Seen { k: &k, v: &v }, checksum).unwrap();
        for (start, tokens) in [(0, 3), (2, 2), (4, 1)] {
            let Frame { header, k, v, checksum } = frame(0, 0, start, tokens);
            assert!(matches!(held().rows(&header, Payload::Seen { k: &k, v: &v }, checksum), Err(FrameError::Shape { .. })));
        }
        let Expected { fingerprint, ticket, epoch, prompt_digest, .. } = expected();
        let commit = |mut assembler: Assembler| {
            let digest = HandoffDigest::default().finish(7);
            assembler.commit(&fingerprint, &ticket, epoch, 0, Commit { digest: &digest, prompt_digest: &prompt_digest, first_token: 7 })
        };
        assert!(matches!(commit(held()), Err(FrameError::Incomplete { have: 6, want: 10, .. })));
        assert_eq!(commit(Assembler::new(Expected { held_tokens: 5, ..expected() })), Ok(()));
    }

    #[test]
    fn every_violation_has_its_name() {
        let refused = |change: fn(&mut RowsHeader)| {
            let mut f = frame(0, 0, 0, 3);
            change(&mut f.header);
            f.checksum = f.header.checksum(&f.k, &f.v);
            receive(&[f]).unwrap_err().code()
        };
        assert_eq!(refused(|h| h.fingerprint = Fingerprint::new("other")), Code::Mismatch);
        assert_eq!(refused(|h| h.ticket = Ticket::new("other")), Code::InvalidArgument);
        assert_eq!(refused(|h| h.epoch = Epoch(1)), Code::Stale);
        assert_eq!(refused(|h| h.index = 1), Code::DataLoss);
        assert_eq!(refused(|h| h.layer = 2), Code::InvalidArgument);
        assert_eq!(refused(|h| h.start = 3), Code::InvalidArgument);
        assert_eq!(refused(|h| h.tokens = 0), Code::InvalidArgument);
        assert_eq!(refused(|h| h.tokens = u32::MAX), Code::InvalidArgument);
        assert!(matches!(receive(&handoff()[..3]), Err(FrameError::Incomplete { have: 8, want: 10, .. })));
        let mut other = expected();
        other.prompt_digest = prompt_digest(&[1]);
        let mut assembler = Assembler::new(other);
        let mut digest = HandoffDigest::default();
        for f in handoff() {
            assembler.rows(&f.header, Payload::Seen { k: &f.k, v: &f.v }, f.checksum).unwrap();
            digest.update(&f.header, f.checksum);
        }
        let Expected { fingerprint, ticket, epoch, prompt_digest, .. } = expected();
        let result = assembler.commit(
            &fingerprint,
            &ticket,
            epoch,
            4,
            Commit { digest: &digest.finish(7), prompt_digest: &prompt_digest, first_token: 7 },
        );
        assert!(matches!(result, Err(FrameError::OtherPrompt { .. })));
        let mut assembler = Assembler::new(expected());
        let mut digest = HandoffDigest::default();
        for f in handoff() {
            assembler.rows(&f.header, Payload::Seen { k: &f.k, v: &f.v }, f.checksum).unwrap();
            digest.update(&f.header, f.checksum);
        }
        let changed = Commit { digest: &digest.finish(7), prompt_digest: &expected().prompt_digest, first_token: 6 };
        assert!(
            matches!(assembler.commit(&fingerprint, &ticket, epoch, 4, changed), Err(FrameError::Digest { .. })),
            "another first token"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn nothing_but_the_handoff_itself_is_accepted(order in prop::collection::vec(0usize..4, 0..6)) {
            let all = handoff();
            let frames: Vec<Frame> = order.iter().map(|&i| all[i].clone()).collect();
            prop_assert_eq!(receive(&frames).is_ok(), frames == all);
        }

        #[test]
        fn a_flipped_bit_is_found(which in 0usize..4, values in any::<bool>(), at in 0usize..16, bit in 0u8..8) {
            let mut frames = handoff();
            let bytes = if values { &mut frames[which].v } else { &mut frames[which].k };
            bytes[at] ^= 1 << bit;
            let found = matches!(receive(&frames), Err(FrameError::Checksum { .. }));
            prop_assert!(found);
        }

        #[test]
        fn a_truncated_frame_is_found(which in 0usize..4, cut in 1usize..16) {
            let mut frames = handoff();
            let length = frames[which].k.len();
            frames[which].k.truncate(length - cut);
            let found = matches!(receive(&frames), Err(FrameError::Shape { .. }));
            prop_assert!(found);
        }
    }
}
