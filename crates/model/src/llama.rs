//! The Llama family's forward pass.

use std::path::Path;

use candle_core::Device;
use overfill_kv::BlockId;
use overfill_types::pair::WeightFormat;

use crate::cache::KvCache;
use crate::config::LlamaConfig;
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

/// A Llama-family model on one device.
pub struct Llama {}

#[allow(unused_variables)]
impl Llama {
    /// Loads a Hugging Face folder or a `.gguf` file.
    pub fn load(path: &Path, weights: WeightFormat, device: &Device) -> Result<Self, ModelError> {
        todo!()
    }

    /// Its shape.
    pub fn config(&self) -> &LlamaConfig {
        todo!()
    }

    /// Reads all chunks, appending to the cache.
    ///
    /// `on_layer(layer, cache)` is called as soon as a layer's keys and values of all chunks lie in the cache.
    /// Returns the logits `[vocab]` of the chunks that want them, in their order.
    /// A sequence's logits and cache rows are the same bits whatever else is in `chunks` and however it was cut.
    pub fn forward(
        &self,
        chunks: &[Chunk<'_>],
        cache: &mut KvCache,
        on_layer: &mut dyn FnMut(usize, &KvCache) -> Result<(), ModelError>,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        todo!()
    }
}
