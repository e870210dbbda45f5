//! The block pool: who holds which blocks of the KV cache, and which content outlives its holder.
//!
//! A block whose content has a name ([`BlockHash`]) can be held by several sequences whose prompts begin alike. When its last
//! holder is gone it stays, idle, until its memory is needed: the idle block that was used longest ago goes first.
//!
//! **Invariant:** a block that is shared or idle is full and never written to; only a block with one holder and no name is.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::prefix::BlockHash;

/// One block of the pool: a fixed run of token positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, bytemuck::TransparentWrapper)]
#[repr(transparent)]
pub struct BlockId(pub u32);

impl BlockId {
    /// A block table as plain numbers.
    pub fn numbers(blocks: &[Self]) -> &[u32] {
        bytemuck::TransparentWrapper::peel_slice(blocks)
    }
}

/// The pool has not enough free blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} KV blocks are needed, {free} of {total} are free")]
pub struct PoolFull {
    /// Blocks that the sequence needs beside those that it holds or shares.
    pub needed: usize,
    /// Blocks that are free now.
    pub free: usize,
    /// Blocks of the pool.
    pub total: usize,
}

/// All blocks of a node's KV cache. Clones share them.
#[derive(Clone, Debug)]
pub struct BlockPool {
    blocks: Arc<Mutex<Blocks>>,
    total: usize,
    block_tokens: usize,
}

#[derive(Debug, Default)]
struct Blocks {
    /// Without content that anyone could use.
    empty: Vec<BlockId>,
    /// Without a holder, by when they were last used.
    idle: BTreeMap<u64, BlockId>,
    named: HashMap<BlockHash, BlockId>,
    states: Vec<BlockState>,
    /// Counts uses.
    clock: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct BlockState {
    holders: u32,
    name: Option<BlockHash>,
    /// Key among the idle ones.
    used: u64,
}

impl BlockPool {
    /// A pool of `total` free blocks of `block_tokens` token positions each.
    pub fn new(total: u32, block_tokens: usize) -> Self {
        let blocks = Blocks {
            // The first are handed out first.
            empty: (0..total).rev().map(BlockId).collect(),
            states: vec![BlockState::default(); total as usize],
            ..Blocks::default()
        };
        Self { blocks: Arc::new(Mutex::new(blocks)), total: total as usize, block_tokens }
    }

    /// Takes blocks for `tokens` token positions, all or none. Blocks at the front whose content is that of `prefix` are shared.
    ///
    /// # Errors
    /// [`PoolFull`] where fewer are free; nothing is taken then.
    pub fn reserve(&self, prefix: &[BlockHash], tokens: usize) -> Result<ReservedBlocks, PoolFull> {
        let count = tokens.div_ceil(self.block_tokens);
        let mut pool = self.lock();
        let found: Vec<BlockId> = prefix.iter().take(count).map_while(|name| pool.named.get(name).copied()).collect();
        // An idle block that is shared is not there for others any more.
        let idle = found.iter().filter(|b| pool.states[b.0 as usize].holders == 0).count();
        let needed = count - found.len();
        let free = pool.free() - idle;
        if free < needed {
            return Err(PoolFull { needed, free, total: self.total });
        }
        for &block in &found {
            pool.hold(block);
        }
        let shared = found.len();
        let mut blocks = found;
        blocks.extend((0..needed).filter_map(|_| pool.take()));
        drop(pool);
        Ok(ReservedBlocks { blocks, shared, pool: self.clone() })
    }

    /// Blocks of the pool.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks that no one holds; some may have content that is of use to come.
    pub fn free(&self) -> usize {
        self.lock().free()
    }

    /// Blocks that are held.
    pub fn held(&self) -> usize {
        self.total - self.free()
    }

    /// Blocks whose content has a name, held or not.
    pub fn named(&self) -> usize {
        self.lock().named.len()
    }

    /// Token positions in a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        // Each change is whole before anything in it can panic.
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Blocks {
    fn free(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    /// A block for new content; an idle one loses its own.
    fn take(&mut self) -> Option<BlockId> {
        let block = match self.empty.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.idle.pop_first()?;
                if let Some(name) = self.states[block.0 as usize].name.take() {
                    self.named.remove(&name);
                }
                block
            }
        };
        self.states[block.0 as usize].holders = 1;
        Some(block)
    }

    fn hold(&mut self, block: BlockId) {
        let state = &mut self.states[block.0 as usize];
        if state.holders == 0 {
            self.idle.remove(&state.used);
        }
        state.holders += 1;
    }

    fn let_go(&mut self, block: BlockId) {
        let state = &mut self.states[block.0 as usize];
        state.holders -= 1;
        if state.holders > 0 {
            return;
        }
        if state.name.is_some() {
            self.clock += 1;
            state.used = self.clock;
            self.idle.insert(self.clock, block);
        } else {
            self.empty.push(block);
        }
    }
}

/// Blocks held for one sequence; dropping it lets go of them.
#[derive(Debug)]
#[must_use = "dropping a reservation frees its blocks at once"]
pub struct ReservedBlocks {
    blocks: Vec<BlockId>,
    /// How many at the front had their content already.
    shared: usize,
    pool: BlockPool,
}

impl ReservedBlocks {
    /// The block table.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Token positions at the front whose keys and values were there when the reservation was made.
    pub fn shared_tokens(&self) -> usize {
        self.shared * self.pool.block_tokens
    }

    /// Takes more blocks until it has room for `tokens` token positions, all or none.
    ///
    /// # Errors
    /// [`PoolFull`] where fewer are free; what it had it keeps.
    pub fn grow(&mut self, tokens: usize) -> Result<(), PoolFull> {
        let needed = tokens.div_ceil(self.pool.block_tokens).saturating_sub(self.blocks.len());
        if needed == 0 {
            return Ok(());
        }
        let mut pool = self.pool.lock();
        let free = pool.free();
        if free < needed {
            return Err(PoolFull { needed, free, total: self.pool.total });
        }
        self.blocks.extend((0..needed).filter_map(|_| pool.take()));
        Ok(())
    }

    /// Names the content of the first blocks, which from now on is shared with whoever needs the same, and is not written to.
    pub fn keep(&self, names: &[BlockHash]) {
        let mut pool = self.pool.lock();
        let Blocks { named, states, .. } = &mut *pool;
        for (&block, &name) in self.blocks.iter().zip(names) {
            let state = &mut states[block.0 as usize];
            // Another sequence may have computed the same at the same time: one copy is kept.
            if state.name.is_none() && !named.contains_key(&name) {
                state.name = Some(name);
                named.insert(name, block);
            }
        }
    }
}

impl Drop for ReservedBlocks {
    fn drop(&mut self) {
        let mut pool = self.pool.lock();
        // The last ones first: what comes later in a prompt is of use to fewer, so it goes earlier.
        self.blocks.iter().rev().for_each(|&block| pool.let_go(block));
    }
}

#[cfg(test)]
mod tests {
    use overfill_types::Fingerprint;
    use proptest::prelude::*;

    use super::*;
    use crate::prefix::block_hashes;

    fn names(tokens: impl Iterator<Item = u32>) -> Vec<BlockHash> {
        block_hashes(&Fingerprint::new("0".repeat(64)), "", &tokens.collect::<Vec<_>>(), 16)
    }

    #[test]
    fn a_reservation_takes_all_or_none_and_gives_back() {
        let pool = BlockPool::new(4, 16);
        let mut first = pool.reserve(&[], 33).unwrap();
        assert_eq!((first.blocks().len(), pool.held(), pool.free()), (3, 3, 1));
        assert_eq!(pool.reserve(&[], 17).unwrap_err(), PoolFull { needed: 2, free: 1, total: 4 });
        first.grow(48).unwrap();
        assert_eq!(pool.free(), 1);
        assert_eq!(first.grow(65).unwrap_err(), PoolFull { needed: 2, free: 1, total: 4 });
        first.grow(49).unwrap();
        assert_eq!((first.blocks().len(), pool.free()), (4, 0));
        drop(first);
        assert_eq!(pool.free(), 4);
    }

    #[test]
    fn a_prefix_is_shared_while_it_is_held_and_after() {
        let pool = BlockPool::new(8, 16);
        let prompt = names(0..64);
        let first = pool.reserve(&prompt, 70).unwrap();
        assert_eq!(first.shared_tokens(), 0);
        assert_eq!(pool.reserve(&prompt, 16).unwrap().shared_tokens(), 0, "nothing is shared before it is there");
        first.keep(&prompt[..3]);
        let second = pool.reserve(&prompt, 80).unwrap();
        assert_eq!((second.shared_tokens(), pool.held()), (48, 7));
        assert_eq!(first.blocks()[..3], second.blocks()[..3]);
        let kept = first.blocks()[..3].to_vec();
        drop((first, second));
        assert_eq!((pool.held(), pool.free()), (0, 8));
        let third = pool.reserve(&names((0..32).chain(100..132)), 64).unwrap();
        assert_eq!((third.shared_tokens(), &third.blocks()[..2]), (32, &kept[..2]));
    }

    #[test]
    fn what_was_used_longest_ago_makes_room_its_end_first() {
        let pool = BlockPool::new(6, 16);
        let (old, new) = (names(0..48), names(100..148));
        for prompt in [&old, &new] {
            pool.reserve(prompt, 48).unwrap().keep(prompt);
        }
        assert_eq!(pool.reserve(&old, 48).unwrap().shared_tokens(), 48);
        // `old` was used last. Two blocks are needed: the end of `new` goes.
        drop(pool.reserve(&[], 32).unwrap());
        assert_eq!(pool.reserve(&new, 48).unwrap().shared_tokens(), 16);
        assert_eq!(pool.reserve(&old, 48).unwrap().shared_tokens(), 48);
        drop(pool.reserve(&[], 96).unwrap());
        assert_eq!(pool.reserve(&old, 48).unwrap().shared_tokens(), 0);
    }

    #[test]
    fn what_is_shared_does_not_make_room_for_its_own_rest() {
        let pool = BlockPool::new(4, 16);
        let prompt = names(0..48);
        pool.reserve(&prompt, 48).unwrap().keep(&prompt);
        assert_eq!(pool.reserve(&prompt, 80).unwrap_err(), PoolFull { needed: 2, free: 1, total: 4 });
        assert_eq!(pool.reserve(&prompt, 64).unwrap().shared_tokens(), 48);
    }

    proptest! {
        /// Whatever is reserved, grown, kept and dropped: a block without a name has one holder, and nothing is lost.
        #[test]
        fn no_block_is_written_by_two(steps in proptest::collection::vec((0..4u8, 0..6usize, 1..90usize), 1..60)) {
            let pool = BlockPool::new(12, 16);
            let mut held: Vec<(ReservedBlocks, Vec<BlockHash>)> = Vec::new();
            for (what, which, tokens) in steps {
                match what {
                    0 => {
                        // Prompts of three families, which begin alike.
                        let prompt = names((0..tokens as u32).map(|t| t + which as u32 % 3 * 1000));
                        if let Ok(reservation) = pool.reserve(&prompt, tokens) {
                            held.push((reservation, prompt));
                        }
                    }
                    1 if which < held.len() => {
                        let _ = held[which].0.grow(tokens);
                    }
                    2 if which < held.len() => {
                        let (reservation, prompt) = &held[which];
                        reservation.keep(prompt);
                    }
                    3 if which < held.len() => drop(held.swap_remove(which)),
                    _ => {}
                }
                let blocks = pool.lock();
                let mut holders = [0; 12];
                held.iter().flat_map(|(r, _)| r.blocks()).for_each(|b| holders[b.0 as usize] += 1);
                for (state, holders) in blocks.states.iter().zip(holders) {
                    prop_assert_eq!(state.holders, holders);
                    prop_assert!(holders < 2 || state.name.is_some());
                }
                let in_use = holders.iter().filter(|h| **h > 0).count();
                prop_assert_eq!(blocks.free() + in_use, 12);
                prop_assert_eq!(blocks.named.len(), blocks.states.iter().filter(|s| s.name.is_some()).count());
            }
        }
    }
}
