//! The forward pass on devices that are not the CPU: candle's operations throughout.

mod attention;
mod linear;

use candle_core::{Device, Tensor};
use candle_nn::ops::{rms_norm, silu};
use candle_nn::rotary_emb::rope_thd;
use overfill_types::KvGeometry;
use overfill_types::pair::WeightFormat;

use crate::cache::KvCache;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gpu::linear::{Linear, Matrix};
use crate::pass::{Chunk, Pass};
use crate::rope::Frequencies;
use crate::weights::Weights;

/// A Llama's weights on a device.
pub(crate) struct GpuLlama {
    device: Device,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Norm,
    head: Matrix,
}

impl GpuLlama {
    pub(crate) fn load(weights: &Weights, format: WeightFormat, device: &Device) -> Result<Self, ModelError> {
        let config = weights.config();
        let embedding = Matrix::load(weights, "model.embed_tokens.weight", format, device)?;
        let head = if config.tied_embeddings || !weights.has("lm_head.weight") {
            embedding.clone()
        } else {
            Matrix::load(weights, "lm_head.weight", format, device)?
        };
        let layers = (0..config.kv.layers).map(|i| Layer::load(weights, config, i, format, device)).collect::<Result<_, _>>()?;
        let norm = Norm::load(weights, "model.norm.weight", config, device)?;
        Ok(Self { device: device.clone(), embedding, layers, norm, head })
    }

    /// Reads all chunks; gives the logits of the rows that are wanted, `[rows, vocab]`.
    pub(crate) fn forward(
        &self,
        config: &LlamaConfig,
        frequencies: &Frequencies,
        Pass { chunks, rows }: Pass<'_>,
        cache: &mut KvCache,
        on_layer: &mut dyn FnMut(usize, &KvCache) -> Result<(), ModelError>,
    ) -> Result<Vec<f32>, ModelError> {
        let tokens: Vec<u32> = chunks.iter().flat_map(|c| c.tokens.iter().copied()).collect();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        frequencies.at(chunks, &mut cos, &mut sin);
        let shape = (tokens.len(), config.kv.head_dim / 2);
        let (cos, sin) = (Tensor::from_vec(cos, shape, &self.device)?, Tensor::from_vec(sin, shape, &self.device)?);
        let mut x = self.embedding.rows(&tokens, &self.device)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let step = Step { config, layer: i, chunks, cos: &cos, sin: &sin };
            let attended = layer.attention(&layer.input_norm.forward(&x)?, &step, cache, on_layer)?;
            x = (x + attended)?;
            x = (&x + layer.mlp(&layer.mlp_norm.forward(&x)?)?)?;
        }
        self.logits(&x, rows)
    }

    fn logits(&self, x: &Tensor, rows: &[usize]) -> Result<Vec<f32>, ModelError> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let rows = Tensor::from_slice(&rows, rows.len(), &self.device)?;
        let x = self.norm.forward(&x.index_select(&rows, 0)?)?;
        Ok(self.head.multiply(&x)?.flatten_all()?.to_vec1()?)
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
