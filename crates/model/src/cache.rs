//! The KV cache: for each layer a run of slots, cut into blocks that sequences hold by their block tables.

use overfill_kv::BlockId;
use overfill_types::KvGeometry;

use crate::error::ModelError;

/// KV cache of one node, all sequences together.
///
/// Slot of token position `p` of a sequence with block table `blocks`: `blocks[p / block_tokens] * block_tokens + p % block_tokens`.
/// A row is `[kv_heads, head_dim]`, keys after the rotary embedding, f32.
pub struct KvCache {}

#[allow(unused_variables)]
impl KvCache {
    /// Room for `blocks` blocks of `block_tokens` token positions, all zero, on `device`.
    pub fn new(geometry: KvGeometry, blocks: usize, block_tokens: usize, device: &candle_core::Device) -> Result<Self, ModelError> {
        todo!()
    }

    /// Its shape.
    pub fn geometry(&self) -> KvGeometry {
        todo!()
    }

    /// Token positions in a block.
    pub fn block_tokens(&self) -> usize {
        todo!()
    }

    /// Keys and values of positions `start..start + count` of a sequence in one layer, each `[count, kv_heads, head_dim]`.
    pub fn read(&self, layer: usize, blocks: &[BlockId], start: usize, count: usize) -> Result<(Vec<f32>, Vec<f32>), ModelError> {
        todo!()
    }

    /// Sets keys and values of positions `start..` of a sequence in one layer; `k` and `v` are `[count, kv_heads, head_dim]`.
    pub fn write(&mut self, layer: usize, blocks: &[BlockId], start: usize, k: &[f32], v: &[f32]) -> Result<(), ModelError> {
        todo!()
    }
}
