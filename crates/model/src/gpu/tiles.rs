//! What our kernels are told of a pass (`kernels/attention.cu`): which tokens a block of threads takes, and where rows lie.

use overfill_kv::BlockId;

use crate::config::LlamaConfig;
use crate::pass::Chunk;

/// The kernels' `THREADS`: of a block.
pub(crate) const THREADS: usize = 128;
/// Their `SEGMENT`: positions whose softmax is one block's.
pub(crate) const SEGMENT: usize = 512;
/// Their `ROWS`: rows of queries of a tile.
pub(crate) const ROWS: usize = 16;
/// Dimensions of a head at most.
const MOST_DIMENSIONS: usize = 2 * THREADS;
/// Blocks of threads that keep a GPU busy (an H100 has 132 processors, each of which takes several). With fewer, each segment of
/// a sequence gets its own.
const ENOUGH: usize = 512;

/// Whether the kernel computes the attention of such a model; candle's operations do, of the others.
pub(crate) fn fits(config: &LlamaConfig) -> bool {
    config.heads / config.kv.kv_heads <= ROWS && config.kv.head_dim <= MOST_DIMENSIONS && config.kv.head_dim.is_multiple_of(8)
}

/// Floats of shared memory that a block needs.
pub(crate) fn shared(head_dim: usize) -> usize {
    ROWS * (2 * head_dim + THREADS + 5)
}

/// A pass, cut into tiles.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    /// The chunks' block tables, one after the other.
    pub(crate) tables: Vec<i32>,
    /// `[tiles, 4]`: number of the first token, tokens, position of the first, where its sequence's table begins.
    pub(crate) tiles: Vec<i32>,
    /// Blocks along z: 1, or the segments of the longest sequence.
    pub(crate) segments: usize,
}

impl Tiles {
    /// Of chunks, for a model with so many query heads of a KV head, and so many KV heads.
    pub(crate) fn of(chunks: &[Chunk<'_>], block_tokens: usize, group: usize, kv_heads: usize) -> Self {
        let most = (ROWS / group).max(1);
        let (mut tables, mut tiles, mut first, mut longest) = (Vec::new(), Vec::new(), 0, 0);
        for chunk in chunks {
            let end = chunk.start + chunk.tokens.len();
            for (number, tokens) in chunk.tokens.chunks(most).enumerate() {
                let at = number * most;
                tiles.extend([first + at, tokens.len(), chunk.start + at, tables.len()].map(|n| n as i32));
            }
            tables.extend(chunk.blocks[..end.div_ceil(block_tokens)].iter().map(|block| block.0 as i32));
            first += chunk.tokens.len();
            longest = longest.max(end);
        }
        let segments = if tiles.len() / 4 * kv_heads < ENOUGH { longest.div_ceil(SEGMENT).max(1) } else { 1 };
        Self { tables, tiles, segments }
    }
}

/// Slots of the rows of all tokens of a pass, in their order.
pub(crate) fn slots(chunks: &[Chunk<'_>], block_tokens: usize) -> Vec<i32> {
    let slot = |blocks: &[BlockId], position: usize| blocks[position / block_tokens].0 as usize * block_tokens + position % block_tokens;
    let of =
        |chunk: &Chunk<'_>| (chunk.start..chunk.start + chunk.tokens.len()).map(|at| slot(chunk.blocks, at) as i32).collect::<Vec<_>>();
    chunks.iter().flat_map(of).collect()
}
