//! The Llama family's forward pass (Llama 2 and 3, SmolLM2, TinyLlama; Qwen2 with its biases).
//!
//! One pass reads any mix of prompt chunks and single tokens of any sequences. Their tokens are rows of one matrix in all
//! but the attention, so weights are read once for all of them.

use std::path::Path;

use candle_core::{Device, Tensor};
use candle_nn::ops::{rms_norm, silu};
use candle_nn::rotary_emb::rope_thd;
use overfill_kv::BlockId;
use overfill_types::KvGeometry;
use overfill_types::pair::WeightFormat;

use crate::attention;
use crate::cache::KvCache;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::linear::{Linear, Matrix};
use crate::rope::Frequencies;
use crate::weights::Weights;

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
pub struct Llama {
    config: LlamaConfig,
    device: Device,
    frequencies: Frequencies,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Norm,
    head: Matrix,
}

impl Llama {
    /// Loads a Hugging Face folder or a `.gguf` file.
    ///
    /// # Errors
    /// [`ModelError::Read`] and [`ModelError::Format`] where the files are not there or not whole, naming the tensor.
    pub fn load(path: &Path, format: WeightFormat, device: &Device) -> Result<Self, ModelError> {
        let weights = Weights::open(path)?;
        let config = weights.config().clone();
        let embedding = Matrix::load(&weights, "model.embed_tokens.weight", format, device)?;
        let head = if weights.has("lm_head.weight") && !config.tied_embeddings {
            Matrix::load(&weights, "lm_head.weight", format, device)?
        } else {
            embedding.clone()
        };
        let layers = (0..config.kv.layers).map(|i| Layer::load(&weights, &config, i, format, device)).collect::<Result<_, _>>()?;
        let norm = Norm::load(&weights, "model.norm.weight", &config, device)?;
        let frequencies = Frequencies::new(&config.rope, config.kv.head_dim);
        Ok(Self { config, device: device.clone(), frequencies, embedding, layers, norm, head })
    }

    /// Its shape.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The device that it computes on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Reads all chunks, appending to the cache.
    ///
    /// `on_layer(layer, cache)` is called as soon as a layer's keys and values of all chunks lie in the cache.
    /// Returns the logits `[vocab]` of the chunks that want them, in their order.
    ///
    /// **Invariant:** on the CPU a sequence's logits and cache rows are the same bits whatever else is in `chunks`,
    /// however its tokens were cut into them, and on any number of threads.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where a chunk is empty, or a token id, the cache or a block table does not fit; whatever
    /// `on_layer` returns.
    pub fn forward(
        &self,
        chunks: &[Chunk<'_>],
        cache: &mut KvCache,
        on_layer: &mut dyn FnMut(usize, &KvCache) -> Result<(), ModelError>,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        self.check(chunks, cache)?;
        let tokens: Vec<u32> = chunks.iter().flat_map(|c| c.tokens.iter().copied()).collect();
        let positions: Vec<usize> = chunks.iter().flat_map(|c| c.start..c.start + c.tokens.len()).collect();
        let (cos, sin) = self.frequencies.at(&positions, &self.device)?;
        let mut x = self.embedding.rows(&tokens, &self.device)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let step = Step { config: &self.config, layer: i, chunks, cos: &cos, sin: &sin };
            let attended = layer.attention(&layer.input_norm.forward(&x)?, &step, cache, on_layer)?;
            x = (x + attended)?;
            x = (&x + layer.mlp(&layer.mlp_norm.forward(&x)?)?)?;
        }
        self.logits(&x, chunks)
    }

    fn logits(&self, x: &Tensor, chunks: &[Chunk<'_>]) -> Result<Vec<Vec<f32>>, ModelError> {
        let mut end = 0;
        let mut last = Vec::new();
        for chunk in chunks {
            end += chunk.tokens.len();
            if chunk.logits {
                last.push(end as u32 - 1);
            }
        }
        if last.is_empty() {
            return Ok(Vec::new());
        }
        let last = Tensor::from_slice(&last, last.len(), &self.device)?;
        let x = self.norm.forward(&x.index_select(&last, 0)?)?;
        Ok(self.head.multiply(&x)?.to_vec2()?)
    }

    fn check(&self, chunks: &[Chunk<'_>], cache: &KvCache) -> Result<(), ModelError> {
        if cache.geometry() != self.config.kv {
            let (have, want) = (cache.geometry(), self.config.kv);
            return Err(ModelError::Mismatch(format!("the KV cache has {have}, the model {want}")));
        }
        for chunk in chunks {
            if chunk.tokens.is_empty() {
                return Err(ModelError::Mismatch("a chunk without tokens".into()));
            }
            if let Some(id) = chunk.tokens.iter().find(|id| **id as usize >= self.config.vocab_size) {
                return Err(ModelError::Mismatch(format!("token id {id} is out of the vocabulary of {}", self.config.vocab_size)));
            }
        }
        Ok(())
    }
}

/// What the layers of one forward pass share.
struct Step<'a> {
    config: &'a LlamaConfig,
    layer: usize,
    chunks: &'a [Chunk<'a>],
    cos: &'a Tensor,
    sin: &'a Tensor,
}

struct Layer {
    input_norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    mlp_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn load(weights: &Weights, config: &LlamaConfig, layer: usize, format: WeightFormat, device: &Device) -> Result<Self, ModelError> {
        let linear = |name: &str| Linear::load(weights, &format!("model.layers.{layer}.{name}"), format, device);
        let norm = |name: &str| Norm::load(weights, &format!("model.layers.{layer}.{name}.weight"), config, device);
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            q: linear("self_attn.q_proj")?,
            k: linear("self_attn.k_proj")?,
            v: linear("self_attn.v_proj")?,
            o: linear("self_attn.o_proj")?,
            mlp_norm: norm("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj")?,
            up: linear("mlp.up_proj")?,
            down: linear("mlp.down_proj")?,
        })
    }

    /// `[tokens, hidden]` to `[tokens, hidden]`; the tokens' keys and values go into the cache on the way.
    fn attention(
        &self,
        x: &Tensor,
        step: &Step<'_>,
        cache: &mut KvCache,
        on_layer: &mut dyn FnMut(usize, &KvCache) -> Result<(), ModelError>,
    ) -> Result<Tensor, ModelError> {
        let KvGeometry { kv_heads, head_dim, .. } = step.config.kv;
        let (tokens, _) = x.dims2()?;
        let rotate = |y: Tensor, heads: usize| -> Result<Tensor, ModelError> {
            Ok(rope_thd(&y.reshape((1, tokens, heads, head_dim))?, step.cos, step.sin)?.squeeze(0)?)
        };
        let q = rotate(self.q.forward(x)?, step.config.heads)?;
        let k = rotate(self.k.forward(x)?, kv_heads)?;
        let v = self.v.forward(x)?.reshape((tokens, kv_heads, head_dim))?;
        attention::append(cache, step.layer, step.chunks, &k, &v)?;
        on_layer(step.layer, cache)?;
        self.o.forward(&attention::attend(cache, step.layer, step.chunks, &q)?)
    }

    fn mlp(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let gate = silu(&self.gate.forward(x)?)?;
        self.down.forward(&(gate * self.up.forward(x)?)?)
    }
}

/// Root-mean-square normalisation with a weight for each channel.
struct Norm {
    weight: Tensor,
    eps: f32,
}

impl Norm {
    fn load(weights: &Weights, name: &str, config: &LlamaConfig, device: &Device) -> Result<Self, ModelError> {
        Ok(Self { weight: weights.vector(name, device)?, eps: config.rms_norm_eps as f32 })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(rms_norm(x, &self.weight, self.eps)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What runs on a GPU (tensors for the cache, candle's operations for attention), on the CPU.
    #[test]
    fn the_device_form_of_the_cache_gives_the_same_logits() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/wide");
        let model = Llama::load(&folder, WeightFormat::F32, &Device::Cpu).unwrap();
        let geometry = model.config().kv;
        let host = KvCache::new(geometry, 12, 4, &Device::Cpu).unwrap();
        let device = KvCache::in_tensors(geometry, 12, 4);
        let tables: [Vec<BlockId>; 2] = [vec![BlockId(7), BlockId(2), BlockId(3)], vec![BlockId(0), BlockId(9)]];
        let run = |mut cache: KvCache| {
            let mut all = Vec::new();
            let steps: [&[(&[u32], usize, usize)]; 3] =
                [&[(&[5, 9, 1, 80, 3], 0, 0), (&[4, 4], 0, 1)], &[(&[77, 2, 2, 9], 5, 0)], &[(&[1], 9, 0), (&[8], 2, 1)]];
            for step in steps {
                let chunks: Vec<Chunk<'_>> = step
                    .iter()
                    .map(|&(tokens, start, sequence)| Chunk { tokens, start, blocks: &tables[sequence], logits: true })
                    .collect();
                all.extend(model.forward(&chunks, &mut cache, &mut |_, _| Ok(())).unwrap());
            }
            all.concat()
        };
        let difference = run(host).iter().zip(run(device)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-4, "{difference}");
    }
}
