//! Frames of a handoff: what each one's checksum and what the digest over all of them cover.

use overfill_types::{Epoch, Fingerprint, Ticket};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

/// Where a frame belongs, and which rows it carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowsHeader {
    /// The pair of the node that sent it.
    pub fingerprint: Fingerprint,
    /// The reservation that it is for.
    pub ticket: Ticket,
    /// The attempt that it is of.
    pub epoch: Epoch,
    /// Place among the handoff's frames, from 0.
    pub index: u32,
    /// Layer of the decode model.
    pub layer: u32,
    /// First token position.
    pub start: u32,
    /// Token positions.
    pub tokens: u32,
}

impl RowsHeader {
    /// XXH3-64 of the header and both payloads, each text with its length before it.
    pub fn checksum(&self, k: &[u8], v: &[u8]) -> u64 {
        let mut hash = Xxh3::new();
        for text in [self.fingerprint.as_str(), self.ticket.as_str()] {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        }
        hash.update(&self.epoch.0.to_le_bytes());
        for number in [self.index, self.layer, self.start, self.tokens] {
            hash.update(&number.to_le_bytes());
        }
        for bytes in [k, v] {
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
        hash.digest()
    }
}

/// sha256 over every frame's place and checksum, in order, and the first token: what the commit carries.
#[derive(Clone, Default)]
pub struct HandoffDigest(Sha256);

impl HandoffDigest {
    /// Takes the next frame.
    pub fn update(&mut self, header: &RowsHeader, checksum: u64) {
        for number in [header.index, header.layer, header.start, header.tokens] {
            self.0.update(number.to_le_bytes());
        }
        self.0.update(checksum.to_le_bytes());
    }

    /// The digest of all frames so far, and of the answer's first token.
    pub fn finish(mut self, first_token: u32) -> [u8; 32] {
        self.0.update(first_token.to_le_bytes());
        self.0.finalize().into()
    }
}
