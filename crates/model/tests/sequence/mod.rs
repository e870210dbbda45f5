//! One sequence with a cache of its own, in which everything that was not written is not a number.

use candle_core::Device;
use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama, ThreadPool, Workspace};
use overfill_types::{KvFormat, KvGeometry};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

/// What a forward pass reads a sequence with.
pub(crate) struct Sequence {
    pub(crate) cache: KvCache,
    pub(crate) workspace: Workspace,
    pub(crate) blocks: Vec<BlockId>,
    /// Positions that were read.
    pub(crate) length: usize,
}

/// Blocks of the pool that are not the sequence's.
const SPARE: usize = 7;

impl Sequence {
    /// Room for `tokens` positions in blocks of `block_tokens`, which lie anywhere in a larger pool; computes on `threads`.
    pub(crate) fn new(geometry: KvGeometry, tokens: usize, block_tokens: usize, threads: usize) -> Self {
        let workspace = Workspace::new(ThreadPool::new(threads, &[]).unwrap());
        let needed = tokens.div_ceil(block_tokens);
        let mut cache = KvCache::new(geometry, KvFormat::F32, needed + SPARE, block_tokens, &Device::Cpu).unwrap();
        let mut blocks: Vec<BlockId> = (0..(needed + SPARE) as u32).map(BlockId).collect();
        let nothing = vec![f32::NAN; blocks.len() * block_tokens * geometry.row()];
        for layer in 0..geometry.layers {
            cache.write(workspace.pool(), layer, &blocks, 0, &nothing, &nothing).unwrap();
        }
        blocks.shuffle(&mut StdRng::seed_from_u64(tokens as u64));
        blocks.truncate(needed);
        Self { cache, workspace, blocks, length: 0 }
    }

    /// Reads `tokens` in one chunk; gives the logits after the last.
    pub(crate) fn read(&mut self, model: &Llama, tokens: &[u32]) -> Vec<f32> {
        let chunk = Chunk { tokens, start: self.length, blocks: &self.blocks, logits: true };
        self.length += tokens.len();
        model.forward(&[chunk], &mut self.cache, &mut self.workspace, &mut |_, _, _| Ok(())).unwrap().read().unwrap().to_vec()
    }
}

/// The largest difference; infinite where one is not a number.
pub(crate) fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |most, d| if d.is_nan() { f32::INFINITY } else { d.max(most) })
}

/// Whether all bits are the same.
#[allow(dead_code, reason = "not every test compares answers of its own")]
pub(crate) fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
