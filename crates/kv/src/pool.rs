//! The block pool: who holds which blocks of the KV cache.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One block of the pool: a fixed run of token positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockId(pub u32);

/// The pool has not enough free blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} KV blocks are needed, {free} of {total} are free")]
pub struct PoolFull {
    /// Blocks that the sequence needs.
    pub needed: usize,
    /// Blocks that are free now.
    pub free: usize,
    /// Blocks of the pool.
    pub total: usize,
}

/// All blocks of a node's KV cache. Clones share them.
#[derive(Clone, Debug)]
pub struct BlockPool {
    free: Arc<Mutex<VecDeque<BlockId>>>,
    total: usize,
    block_tokens: usize,
}

impl BlockPool {
    /// A pool of `total` free blocks of `block_tokens` token positions each.
    pub fn new(total: u32, block_tokens: usize) -> Self {
        Self { free: Arc::new(Mutex::new((0..total).map(BlockId).collect())), total: total as usize, block_tokens }
    }

    /// Takes blocks for `tokens` token positions, all or none.
    ///
    /// # Errors
    /// [`PoolFull`] where fewer are free; nothing is taken then.
    pub fn reserve(&self, tokens: usize) -> Result<Reservation, PoolFull> {
        let needed = tokens.div_ceil(self.block_tokens);
        let mut free = self.lock();
        if free.len() < needed {
            return Err(PoolFull { needed, free: free.len(), total: self.total });
        }
        Ok(Reservation { blocks: free.drain(..needed).collect(), pool: self.clone() })
    }

    /// Blocks of the pool.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks that no one holds.
    pub fn free(&self) -> usize {
        self.lock().len()
    }

    /// Blocks that are held.
    pub fn held(&self) -> usize {
        self.total - self.free()
    }

    /// Token positions in a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<BlockId>> {
        // A list of numbers is whole whatever panicked beside it.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Blocks held for one sequence; dropping it frees them.
#[derive(Debug)]
#[must_use = "dropping a reservation frees its blocks at once"]
pub struct Reservation {
    blocks: Vec<BlockId>,
    pool: BlockPool,
}

impl Reservation {
    /// The block table.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.pool.lock().extend(self.blocks.drain(..));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservation_takes_all_or_none_and_gives_back() {
        let pool = BlockPool::new(4, 16);
        let first = pool.reserve(33).unwrap();
        assert_eq!((first.blocks().len(), pool.held(), pool.free()), (3, 3, 1));
        assert_eq!(pool.reserve(17).unwrap_err(), PoolFull { needed: 2, free: 1, total: 4 });
        assert_eq!(pool.free(), 1);
        drop(first);
        assert_eq!(pool.free(), 4);
    }

    #[test]
    fn no_block_has_two_holders() {
        let pool = BlockPool::new(64, 16);
        let held: Vec<_> = (1..=10).map(|n| pool.reserve(n * 16).unwrap()).collect();
        let mut ids: Vec<_> = held.iter().flat_map(|r| r.blocks().iter().map(|b| b.0)).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 55);
    }
}
