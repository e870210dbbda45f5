//! What one forward pass reads, whatever the model is held as and whatever it runs on.

use overfill_kernels::ThreadPool;
use overfill_kv::BlockId;

use crate::cache::KvCache;
use crate::error::ModelError;

/// A run of one sequence's tokens that a forward pass reads: a piece of a prompt, or one token of a decode step.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// Position of the first of them; the cache holds everything before it.
    pub start: usize,
    /// Block table of the sequence; covers `start + tokens.len()` positions at least.
    pub blocks: &'a [BlockId],
    /// Whether the logits after the last token are wanted.
    pub logits: bool,
}

/// What one forward pass reads, and after which of its tokens the logits are wanted: their numbers, ascending, counted over
/// all chunks.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) chunks: &'a [Chunk<'a>],
    pub(crate) rows: &'a [usize],
}

/// Called with a layer's number as soon as its keys and values of all chunks lie in the cache.
pub type OnLayer<'a> = &'a mut dyn FnMut(usize, &KvCache, &ThreadPool) -> Result<(), ModelError>;
