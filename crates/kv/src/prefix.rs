//! Names for the content of KV blocks, so that prompts that begin alike can share them.

use overfill_types::Fingerprint;
use sha2::{Digest, Sha256};

/// The name of a block's content: a hash over the pair and all tokens from the first to the block's last.
///
/// A block's keys and values depend on every token before it, so its name does too. It is a cryptographic hash: who could
/// make two prompts collide would read another one's keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 32]);

/// The names of all blocks that `tokens` fill to their end.
///
/// `pair` stands for the full model and the KV transform: other keys and values have other names. So has what is kept apart by
/// another `salt`; empty, it keeps nothing apart.
pub fn block_hashes(pair: &Fingerprint, salt: &str, tokens: &[u32], block_tokens: usize) -> Vec<BlockHash> {
    let mut before: [u8; 32] = Sha256::new_with_prefix(pair.as_str()).chain_update(salt).finalize().into();
    tokens
        .chunks_exact(block_tokens)
        .map(|block| {
            let mut hash = Sha256::new_with_prefix(before);
            block.iter().for_each(|token| hash.update(token.to_le_bytes()));
            before = hash.finalize().into();
            BlockHash(before)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_all_that_came_before() {
        let (pair, other) = (Fingerprint::new("a".repeat(64)), Fingerprint::new("b".repeat(64)));
        let tokens: Vec<u32> = (0..50).collect();
        let names = block_hashes(&pair, "", &tokens, 16);
        assert_eq!(names.len(), 3);
        assert_eq!(block_hashes(&pair, "", &tokens[..47], 16), names[..2]);
        assert_ne!(block_hashes(&other, "", &tokens, 16)[0], names[0]);
        assert_ne!(block_hashes(&pair, "a", &tokens, 16)[0], names[0]);
        let mut changed = tokens.clone();
        changed[3] = 99;
        assert!(block_hashes(&pair, "", &changed, 16).iter().zip(&names).all(|(a, b)| a != b));
        changed = tokens;
        changed[20] = 99;
        let third = block_hashes(&pair, "", &changed, 16);
        assert!(third[0] == names[0] && third[1] != names[1] && third[2] != names[2]);
    }
}
