//! Frames of a handoff, as a decode node reads them.

use overfill_kv::{Assembler, Commit, Expected, HandoffDigest, Payload, RowsHeader};
use overfill_proto::v1::{KvCommit, KvFrame, KvRows, kv_frame};
use overfill_types::{Epoch, Fingerprint, KvGeometry, Ticket, WireFormat, prompt_digest};
use prost::Message;
use rand::Rng;
use rand::rngs::StdRng;

use crate::{Target, about_to_read, mutate};

const GEOMETRY: KvGeometry = KvGeometry { layers: 2, kv_heads: 2, head_dim: 8 };
const PROMPT: [u32; 6] = [1, 2, 3, 4, 5, 6];
const FIRST: u32 = 9;

/// A whole handoff, of which frames are changed.
pub(super) struct Frames {
    right: Vec<Vec<u8>>,
}

fn names() -> (Fingerprint, Ticket, Epoch) {
    (Fingerprint::new("pair"), Ticket::new("ticket"), Epoch(1))
}

impl Frames {
    pub(super) fn new() -> Self {
        let (fingerprint, ticket, epoch) = names();
        let mut digest = HandoffDigest::default();
        let frame = |index, body| KvFrame { fingerprint: "pair".into(), ticket: "ticket".into(), epoch: 1, index, body: Some(body) };
        let mut right = Vec::new();
        for (index, (layer, start)) in [(0, 0), (1, 0), (0, 3), (1, 3)].into_iter().enumerate() {
            let index = index as u32;
            let bytes = vec![layer as u8 + 1; 3 * GEOMETRY.kv_heads * GEOMETRY.head_dim * 4];
            let header = RowsHeader { fingerprint: fingerprint.clone(), ticket: ticket.clone(), epoch, index, layer, start, tokens: 3 };
            let checksum = header.checksum(&bytes, &bytes);
            digest.update(&header, checksum);
            let (k, v) = (bytes.clone().into(), bytes.into());
            right.push(frame(index, kv_frame::Body::Rows(KvRows { layer, start, tokens: 3, k, v, checksum, ..KvRows::default() })));
        }
        let prompt_digest = prompt_digest(&PROMPT).to_vec().into();
        let commit = KvCommit { digest: digest.finish(FIRST).to_vec().into(), prompt_digest, first_token: FIRST };
        right.push(frame(4, kv_frame::Body::Commit(commit)));
        Self { right: right.iter().map(KvFrame::encode_to_vec).collect() }
    }

    /// Whether the handoff was taken as whole.
    fn take(frames: &[Vec<u8>]) -> bool {
        let (fingerprint, ticket, epoch) = names();
        let expected = Expected {
            fingerprint,
            ticket,
            epoch,
            geometry: GEOMETRY,
            wire: WireFormat::F32,
            prompt_tokens: PROMPT.len(),
            held_tokens: 0,
            prompt_digest: prompt_digest(&PROMPT),
        };
        let mut assembler = Assembler::new(expected);
        for frame in frames {
            let Ok(frame) = KvFrame::decode(&frame[..]) else { return false };
            let (fingerprint, ticket, epoch) = (Fingerprint::new(frame.fingerprint), Ticket::new(frame.ticket), Epoch(frame.epoch));
            match frame.body {
                Some(kv_frame::Body::Rows(KvRows { layer, start, tokens, k, v, checksum, .. })) => {
                    let header = RowsHeader { fingerprint, ticket, epoch, index: frame.index, layer, start, tokens };
                    if assembler.rows(&header, Payload::Seen { k: &k, v: &v }, checksum).is_err() {
                        return false;
                    }
                }
                Some(kv_frame::Body::Commit(KvCommit { digest, prompt_digest, first_token })) => {
                    let commit = Commit { digest: &digest, prompt_digest: &prompt_digest, first_token };
                    return assembler.commit(&fingerprint, &ticket, epoch, frame.index, commit).is_ok();
                }
                None => return false,
            }
        }
        false
    }
}

impl Target for Frames {
    fn name(&self) -> &'static str {
        "frames"
    }

    fn read(&mut self, draws: &mut StdRng) -> Result<(), String> {
        let mut frames = self.right.clone();
        let at = draws.random_range(0..frames.len());
        match draws.random_range(0..4) {
            0 => frames.swap(at, draws.random_range(0..self.right.len())),
            1 => drop(frames.remove(at)),
            _ => frames[at] = mutate::bytes(&frames[at], draws),
        }
        about_to_read(&frames.concat());
        // What says the same says it in other bytes at most: fields of the protocol that are not known are passed over.
        let decoded = |frames: &[Vec<u8>]| frames.iter().map(|frame| KvFrame::decode(&frame[..]).ok()).collect::<Vec<_>>();
        if Self::take(&frames) && decoded(&frames) != decoded(&self.right) {
            return Err("a handoff was taken that is not the one that was sent".into());
        }
        Ok(())
    }
}
