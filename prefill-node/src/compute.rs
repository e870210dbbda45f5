//! What computes for the engine: the full model, its KV cache, and the way of its rows to the decode models.
//!
//! All that the engine decides (who is let in, who is read in a step, what is sent when, whose failure it is) needs these of
//! it. So the engine is generic over them, and a simulation drives the same engine over a model whose answers it knows.

use bytes::Bytes;
use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama, ModelError, Row, Sampled, ThreadPool, Workspace};
use overfill_nccl::{Gpu, GpuBytes};

use crate::rows::{Piece, RowProjector};

/// A model with its KV cache, and the pairs that its rows are for, by their numbers.
pub trait Compute: Send + 'static {
    /// One forward pass over all chunks, which appends to the cache. Done again it writes the same. The logits after the
    /// tokens whose numbers are in `wanted`, ascending and counted over all chunks, are kept for [`Self::tokens`].
    /// `on_layer` is called as soon as the rows of a layer of all chunks lie in the cache.
    ///
    /// # Errors
    /// Where a chunk does not fit the model or the cache.
    fn forward(&mut self, chunks: &[Chunk<'_>], wanted: &[usize], on_layer: OnLayer<'_>) -> Result<(), ModelError>;

    /// The token of each row of logits of the last pass, chosen or known. `None` where that panicked, which is that prompt's
    /// affair.
    fn tokens(&mut self, rows: Vec<Row<'_>>) -> Vec<Option<Sampled>>;

    /// Rows that lie in the cache.
    fn cached(&mut self) -> impl CachedRows;

    /// The GPU in whose memory rows for this pair lie as they travel, or are made so.
    fn gpu(&self, pair: usize) -> Option<Gpu>;
}

/// Called with a layer of the full model whose rows are computed.
pub type OnLayer<'a> = &'a mut dyn FnMut(usize, &mut dyn CachedRows);

/// Rows of the full model's cache, as they go to the decode model of a pair.
pub trait CachedRows {
    /// Layers of the decode model that the full model's `layer` feeds.
    fn targets(&self, pair: usize, layer: usize) -> &[usize];

    /// Keys and values of a piece of the sequence that has `blocks`, each `[tokens, kv_heads, head_dim]`, as they travel.
    ///
    /// # Errors
    /// Where the cache does not have them.
    fn bytes(&mut self, pair: usize, blocks: &[BlockId], piece: Piece) -> Result<[Bytes; 2], ModelError>;

    /// The same, keys before values in memory of `gpu`. Asked only of what is in [`Compute::gpu`]'s.
    ///
    /// # Errors
    /// Where the cache does not have them, or the GPU fails.
    fn gather(&mut self, gpu: &Gpu, pair: usize, blocks: &[BlockId], piece: Piece) -> Result<GpuBytes, ModelError>;
}

/// The full model of all pairs.
pub(crate) struct FullModel {
    pub(crate) model: Llama,
    pub(crate) cache: KvCache,
    pub(crate) workspace: Workspace,
    /// Of each pair.
    pub(crate) rows: Vec<RowProjector>,
}

/// The rows of a [`FullModel`], which may be in the middle of a pass.
struct ModelRows<'a> {
    cache: &'a KvCache,
    pool: &'a ThreadPool,
    rows: &'a mut [RowProjector],
}

impl Compute for FullModel {
    fn forward(&mut self, chunks: &[Chunk<'_>], wanted: &[usize], on_layer: OnLayer<'_>) -> Result<(), ModelError> {
        let Self { model, cache, workspace, rows } = self;
        let computed = &mut |layer, cache: &KvCache, pool: &ThreadPool| {
            on_layer(layer, &mut ModelRows { cache, pool, rows });
            Ok(())
        };
        model.forward_rows(chunks, wanted, cache, workspace, computed).map(|_| ())
    }

    fn tokens(&mut self, rows: Vec<Row<'_>>) -> Vec<Option<Sampled>> {
        self.workspace.tokens(rows)
    }

    fn cached(&mut self) -> impl CachedRows {
        ModelRows { cache: &self.cache, pool: self.workspace.pool(), rows: &mut self.rows }
    }

    fn gpu(&self, pair: usize) -> Option<Gpu> {
        self.rows[pair].gpu(&self.cache).cloned()
    }
}

impl CachedRows for ModelRows<'_> {
    fn targets(&self, pair: usize, layer: usize) -> &[usize] {
        self.rows[pair].targets(layer)
    }

    fn bytes(&mut self, pair: usize, blocks: &[BlockId], piece: Piece) -> Result<[Bytes; 2], ModelError> {
        self.rows[pair].bytes(self.cache, self.pool, blocks, piece)
    }

    fn gather(&mut self, gpu: &Gpu, pair: usize, blocks: &[BlockId], piece: Piece) -> Result<GpuBytes, ModelError> {
        self.rows[pair].gather(self.cache, gpu, blocks, piece)
    }
}
