//! What computes for the engine: the decode model, and the KV cache that it reads.
//!
//! All that the engine decides (who is let in, who steps, who gives way, whose failure it is) needs three things of it. So the
//! engine is generic over them, and a simulation drives the same engine over a model whose answers it knows.

use overfill_kv::BlockId;
use overfill_model::cache::WireRows;
use overfill_model::{Chunk, KvCache, Llama, ModelError, Sampled, Sampler, Workspace};
use overfill_nccl::GpuBytes;
use overfill_types::WireFormat;

/// A model with its KV cache.
pub trait Compute: Send + 'static {
    /// Writes rows of a handoff to the cache of the sequence that has `blocks`.
    ///
    /// # Errors
    /// Where they do not fit the cache.
    fn write(&mut self, layer: usize, blocks: &[BlockId], rows: WireRows<'_>) -> Result<(), ModelError>;

    /// As [`Self::write`], of rows that came to a GPU's memory, keys before values. Asked only of a format that is [`Self::on_gpu`].
    ///
    /// # Errors
    /// Where they do not fit the cache.
    fn put(&mut self, format: WireFormat, layer: usize, blocks: &[BlockId], start: usize, rows: &mut GpuBytes) -> Result<(), ModelError>;

    /// Whether it takes rows of this format from GPU to GPU: its cache is in a GPU's memory, and holds them so or can.
    fn on_gpu(&self, wire: WireFormat) -> bool;

    /// One forward pass over all chunks, which appends to the cache. Done again it writes the same.
    ///
    /// # Errors
    /// Where a chunk does not fit the model or the cache.
    fn forward(&mut self, chunks: &[Chunk<'_>]) -> Result<(), ModelError>;

    /// Chooses a token after each chunk of the last pass that wanted logits, in their order. Each sampler comes with its
    /// sequence's next position. `None` where the choice panicked, which is that sequence's affair.
    fn choose(&mut self, samplers: Vec<(&mut Sampler, usize)>) -> Vec<Option<Sampled>>;
}

/// The decode model of a pair.
pub(crate) struct DecodeModel {
    pub(crate) model: Llama,
    pub(crate) cache: KvCache,
    pub(crate) workspace: Workspace,
}

impl Compute for DecodeModel {
    fn write(&mut self, layer: usize, blocks: &[BlockId], rows: WireRows<'_>) -> Result<(), ModelError> {
        self.cache.write_wire(self.workspace.pool(), layer, blocks, rows)
    }

    fn put(&mut self, format: WireFormat, layer: usize, blocks: &[BlockId], start: usize, rows: &mut GpuBytes) -> Result<(), ModelError> {
        self.cache.put(format, layer, blocks, start, rows)
    }

    fn on_gpu(&self, wire: WireFormat) -> bool {
        self.cache.gpu(wire).is_some()
    }

    fn forward(&mut self, chunks: &[Chunk<'_>]) -> Result<(), ModelError> {
        self.model.forward(chunks, &mut self.cache, &mut self.workspace, &mut |_, _, _| Ok(())).map(|_| ())
    }

    fn choose(&mut self, samplers: Vec<(&mut Sampler, usize)>) -> Vec<Option<Sampled>> {
        self.workspace.sample(samplers)
    }
}
