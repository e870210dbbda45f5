//! A prompt's name: what it is known by where its text is not to be told.

use sha2::{Digest, Sha256};

/// sha256 of a prompt's token ids, 4 bytes little endian each.
pub type PromptDigest = [u8; 32];

/// The digest of a prompt.
pub fn prompt_digest(prompt: &[u32]) -> PromptDigest {
    let mut hash = Sha256::new();
    prompt.iter().for_each(|id| hash.update(id.to_le_bytes()));
    hash.finalize().into()
}

/// The first twelve digits of a digest, for people and metrics.
pub fn short(prompt: &PromptDigest) -> String {
    hex::encode(&prompt[..6])
}
