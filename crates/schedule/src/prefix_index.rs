//! Which nodes have read which beginnings of prompts, as far as this router knows: it sent them there.
//!
//! A prompt's blocks have names, each a hash over all tokens up to its end. Each node has its own bounded set of names, and
//! one index over all of them leads from a name to nodes, so that nobody looks through the nodes. What is wrong here costs a
//! node some reading, never a wrong answer: nodes look in their own caches by cryptographic hashes.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::recency::{HashedMap, Recency};

/// Tokens in a block of the index: what nodes have unless they are told otherwise.
pub const BLOCK: usize = 16;
/// Most nodes that are known by name to hold a block. A block that more have (the beginning of all prompts) is taken to be
/// everywhere: then it does not matter for the choice.
const NAMED: usize = 8;
/// Most nodes of which it is told how much of a prompt they hold.
const TOLD: usize = 16;

/// The names of all blocks that `tokens` fill, which no other `salt` shares. `seed` is the router's own, so that who sends prompts
/// cannot make names collide.
pub fn keys(seed: u64, salt: &str, tokens: &[u32]) -> Vec<u64> {
    let mut before = xxh3_64_with_seed(salt.as_bytes(), seed);
    let mut bytes = [0; BLOCK * 4];
    tokens
        .chunks_exact(BLOCK)
        .map(|block| {
            for (bytes, token) in bytes.chunks_exact_mut(4).zip(block) {
                bytes.copy_from_slice(&token.to_le_bytes());
            }
            before = xxh3_64_with_seed(&bytes, before);
            before
        })
        .collect()
}

/// Who holds a block.
#[derive(Debug, Default)]
struct Holders {
    named: Vec<u32>,
    /// Named or not.
    count: u32,
}

/// What the nodes of one role and pair hold.
#[derive(Debug, Default)]
pub(crate) struct PrefixIndex {
    holders: HashedMap<Holders>,
    nodes: HashMap<u32, Recency>,
}

/// How many blocks at a prompt's front are held, and by whom.
#[derive(Debug, Default)]
pub(crate) struct Matches {
    by: Vec<(u32, usize)>,
    /// By every node.
    everywhere: usize,
}

impl Matches {
    /// Blocks at the prompt's front that `node` holds.
    pub(crate) fn of(&self, node: u32) -> usize {
        self.by.iter().find(|(n, _)| *n == node).map_or(0, |(_, blocks)| *blocks).max(self.everywhere)
    }

    /// Nodes that hold more than the others.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = u32> {
        self.by.iter().filter(|(_, blocks)| *blocks > self.everywhere).map(|(node, _)| *node)
    }
}

impl PrefixIndex {
    /// Who holds what of a prompt's blocks.
    pub(crate) fn matches(&self, keys: &[u64]) -> Matches {
        let mut matches = Matches::default();
        for (i, key) in keys.iter().enumerate() {
            let Some(holders) = self.holders.get(key) else { break };
            if holders.count as usize > NAMED && matches.everywhere == i {
                matches.everywhere = i + 1;
            }
            for &node in &holders.named {
                if let Some((_, blocks)) = matches.by.iter_mut().find(|(n, _)| *n == node) {
                    *blocks = i + 1;
                } else if matches.by.len() < TOLD {
                    matches.by.push((node, i + 1));
                } else if let Some(least) = matches.by.iter_mut().min_by_key(|(_, blocks)| *blocks) {
                    *least = (node, i + 1);
                }
            }
        }
        matches
    }

    /// A node reads a prompt: it holds these blocks from now on, and of all that it holds at most `most`.
    pub(crate) fn touch(&mut self, node: u32, keys: &[u64], most: usize) {
        let held = self.nodes.entry(node).or_default();
        // The first ones last: what comes early in a prompt is of use to more, so it stays longer.
        for key in keys.iter().rev() {
            if held.touch(*key) {
                let holders = self.holders.entry(*key).or_default();
                holders.count += 1;
                if holders.named.len() < NAMED {
                    holders.named.push(node);
                }
            }
        }
        while held.len() > most {
            let Some(key) = held.pop() else { break };
            let_go(&mut self.holders, key, node);
        }
    }

    /// A node is gone, and all that it held.
    pub(crate) fn forget(&mut self, node: u32) {
        for key in self.nodes.remove(&node).iter().flat_map(Recency::keys) {
            let_go(&mut self.holders, key, node);
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.holders.len()
    }
}

fn let_go(holders: &mut HashedMap<Holders>, key: u64, node: u32) {
    if let Some(held) = holders.get_mut(&key) {
        held.named.retain(|n| *n != node);
        held.count -= 1;
        if held.count == 0 {
            holders.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_of_all_that_came_before() {
        let tokens: Vec<u32> = (0..50).collect();
        let names = keys(7, "", &tokens);
        assert_eq!(names.len(), 3);
        assert_eq!(keys(7, "", &tokens[..47]), names[..2]);
        assert_ne!(keys(8, "", &tokens)[0], names[0]);
        assert_ne!(keys(7, "a", &tokens)[0], names[0]);
        let changed: Vec<u32> = tokens.iter().map(|t| if *t == 3 { 99 } else { *t }).collect();
        assert!(keys(7, "", &changed).iter().zip(&names).all(|(a, b)| a != b));
    }

    #[test]
    fn the_longest_beginning_is_found() {
        let mut prefixes = PrefixIndex::default();
        prefixes.touch(1, &[10, 11, 12], 100);
        prefixes.touch(2, &[10, 11], 100);
        prefixes.touch(3, &[20], 100);
        let matches = prefixes.matches(&[10, 11, 12, 13]);
        assert_eq!([1, 2, 3].map(|n| matches.of(n)), [3, 2, 0]);
        assert_eq!(matches.nodes().collect::<Vec<_>>(), [1, 2]);
        prefixes.forget(1);
        assert_eq!([1, 2].map(|n| prefixes.matches(&[10, 11, 12]).of(n)), [0, 2]);
    }

    #[test]
    fn what_many_hold_is_everywhere() {
        let mut prefixes = PrefixIndex::default();
        for node in 0..20 {
            prefixes.touch(node, &[1, 2, 100 + u64::from(node)], 100);
        }
        let matches = prefixes.matches(&[1, 2, 119]);
        assert_eq!((matches.of(19), matches.of(3), matches.of(77)), (3, 2, 2));
        assert_eq!(matches.nodes().collect::<Vec<_>>(), [19], "the others hold no more than all");
    }

    #[test]
    fn the_end_of_what_was_used_longest_ago_goes_first() {
        let mut prefixes = PrefixIndex::default();
        prefixes.touch(1, &[1, 2, 3], 4);
        prefixes.touch(1, &[5, 6, 7], 4);
        assert_eq!((prefixes.matches(&[1, 2, 3]).of(1), prefixes.matches(&[5, 6, 7]).of(1)), (1, 3));
    }

    proptest! {
        /// The index and the nodes' sets say the same, whatever is touched and forgotten.
        #[test]
        fn nothing_is_left_behind(steps in proptest::collection::vec((0..12u32, 0..6u64, 1..9usize, 1..30usize), 1..80)) {
            let mut prefixes = PrefixIndex::default();
            for (node, family, length, most) in steps {
                if length == 8 {
                    prefixes.forget(node);
                } else {
                    let keys: Vec<u64> = (0..length as u64).map(|i| family * 100 + i).collect();
                    prefixes.touch(node, &keys, most);
                    prop_assert!(prefixes.nodes[&node].len() <= most);
                }
                let held: usize = prefixes.nodes.values().map(Recency::len).sum();
                prop_assert_eq!(prefixes.holders.values().map(|h| h.count as usize).sum::<usize>(), held);
                for (key, holders) in &prefixes.holders {
                    prop_assert!(holders.named.iter().all(|n| prefixes.nodes[n].keys().any(|k| k == *key)));
                }
            }
            for node in 0..12 {
                prefixes.forget(node);
            }
            prop_assert_eq!(prefixes.len(), 0);
        }
    }
}
