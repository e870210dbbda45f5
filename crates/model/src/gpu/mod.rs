//! The forward pass on devices that are not the CPU: candle's operations, but for attention, which on a GPU is a kernel of ours.

mod attention;
pub(crate) mod choice;
#[cfg(feature = "cuda")]
mod compiled;
#[cfg(feature = "cuda")]
mod launch;
mod linear;
#[cfg(test)]
mod on_host;
mod reduce;
mod split;
mod step;
#[cfg(any(feature = "cuda", test))]
mod tiles;
pub(crate) mod transfer;

use candle_core::{Device, Tensor};
use candle_nn::ops::{rms_norm, silu};
use candle_nn::rotary_emb::rope_thd;
use overfill_kernels::Gate;
use overfill_types::KvGeometry;
use overfill_types::pair::WeightFormat;

use crate::cache::KvCache;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gpu::linear::{Linear, Matrix, Place};
use crate::gpu::split::{Along, Devices, Part};
use crate::gpu::step::Step;
use crate::pass::Pass;
use crate::rope::Rotary;
use crate::weights::Weights;

/// A Llama's weights on a device, or on several that have a part each.
pub(crate) struct GpuLlama {
    devices: Devices,
    embedding: Matrix,
    parts: Vec<PartOfLayers>,
    norm: Norm,
    head: Matrix,
}

/// What one device has of all layers.
struct PartOfLayers {
    device: Device,
    /// Of this part: its heads, its KV heads, its MLP.
    config: LlamaConfig,
    layers: Vec<Layer>,
}

impl GpuLlama {
    /// On at least one device.
    pub(crate) fn load(weights: &Weights, format: WeightFormat, devices: &[Device]) -> Result<Self, ModelError> {
        let (config, devices) = (weights.config(), Devices::of(devices)?);
        let device = devices.first();
        let embedding = Matrix::load(weights, "model.embed_tokens.weight", format, device)?;
        let head = if config.tied_embeddings || !weights.has("lm_head.weight") {
            embedding.clone()
        } else {
            Matrix::load(weights, "lm_head.weight", format, device)?
        };
        let norm = Norm::load(weights, "model.norm.weight", config, device)?;
        let of = devices.all.len();
        let parts = devices.all.iter().enumerate().map(|(number, device)| {
            let part = Part { number, of };
            let config = part.config(config)?;
            let layers = (0..config.kv.layers).map(|i| Layer::load(weights, &config, i, format, (device, part)));
            Ok(PartOfLayers { device: device.clone(), layers: layers.collect::<Result<_, ModelError>>()?, config })
        });
        let parts = parts.collect::<Result<_, ModelError>>()?;
        Ok(Self { devices, embedding, parts, norm, head })
    }

    /// Reads all chunks; gives the logits of the rows that are wanted, `[rows, vocab]` in f32, where they were
    /// computed; `None` where none are.
    pub(crate) fn forward(
        &self,
        config: &LlamaConfig,
        rotary: &Rotary,
        Pass { chunks, rows }: Pass<'_>,
        cache: &mut KvCache,
        on_layer: &mut dyn FnMut(usize, &KvCache) -> Result<(), ModelError>,
    ) -> Result<Option<Tensor>, ModelError> {
        let tokens: Vec<u32> = chunks.iter().flat_map(|c| c.tokens.iter().copied()).collect();
        let steps = self.parts.iter().enumerate().map(|(number, part)| {
            let step = Step::new(&part.config, rotary, (chunks, number), &part.device)?;
            #[cfg(feature = "cuda")]
            let step = step.with_told(cache.block_tokens(), &part.device)?;
            Ok(step)
        });
        let steps: Vec<Step<'_>> = steps.collect::<Result<_, ModelError>>()?;
        let device = self.devices.first();
        let mut xs = self.devices.copies((self.embedding.rows(&tokens, device)? * config.scalars.embedding)?)?;
        let added = |x: &Tensor, norm: Option<&Norm>, made: &Tensor| -> Result<Tensor, ModelError> {
            Ok((x + (normed(norm, made)? * config.scalars.residual)?)?)
        };
        for i in 0..config.kv.layers {
            let parts = || self.parts.iter().map(|part| &part.layers[i]).zip(&steps);
            let mut queries = Vec::with_capacity(xs.len());
            for ((layer, step), x) in parts().zip(&xs) {
                queries.push(layer.look_up(&normed(layer.attention_norm.as_ref(), x)?, (step, i), cache)?);
            }
            on_layer(i, cache)?;
            let attended = parts().zip(&queries).map(|((layer, step), q)| layer.o.forward(&attention::attend(cache, step, i, q)?));
            let attended = self.devices.sums(attended.collect::<Result<_, ModelError>>()?)?;
            let after = parts().zip(xs.iter().zip(&attended)).map(|((layer, _), (x, made))| added(x, layer.attended_norm.as_ref(), made));
            xs = after.collect::<Result<_, ModelError>>()?;
            let made = parts().zip(&xs).map(|((layer, _), x)| layer.mlp(&normed(layer.mlp_norm.as_ref(), x)?, config.family.gate()));
            let made = self.devices.sums(made.collect::<Result<_, ModelError>>()?)?;
            let after = parts().zip(xs.iter().zip(&made)).map(|((layer, _), (x, made))| added(x, layer.down_norm.as_ref(), made));
            xs = after.collect::<Result<_, ModelError>>()?;
        }
        let x = xs.swap_remove(0);
        let Some(logits) = self.logits(&x, rows)? else { return Ok(None) };
        let logits = (logits * config.scalars.logits)?;
        let logits = match config.scalars.logits_cap {
            Some(cap) => attention::capped(&logits, cap)?,
            None => logits,
        };
        // So that a pass takes as long as it says, and fails where it fails.
        device.synchronize()?;
        Ok(Some(logits))
    }

    /// `[rows, vocab]`, before factor and cap; `None` where none are wanted.
    fn logits(&self, x: &Tensor, rows: &[usize]) -> Result<Option<Tensor>, ModelError> {
        if rows.is_empty() {
            return Ok(None);
        }
        let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let rows = Tensor::from_slice(&rows, rows.len(), self.devices.first())?;
        let x = self.norm.forward(&x.index_select(&rows, 0)?)?;
        Ok(Some(self.head.multiply(&x)?))
    }
}

fn normed(norm: Option<&Norm>, x: &Tensor) -> Result<Tensor, ModelError> {
    norm.map_or_else(|| Ok(x.clone()), |norm| norm.forward(x))
}

struct Layer {
    attention_norm: Option<Norm>,
    query_key_norms: Option<[Norm; 2]>,
    attended_norm: Option<Norm>,
    down_norm: Option<Norm>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    mlp_norm: Option<Norm>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn load(
        weights: &Weights,
        config: &LlamaConfig,
        layer: usize,
        format: WeightFormat,
        (device, part): (&Device, Part),
    ) -> Result<Self, ModelError> {
        let split =
            |name: &str, along| Linear::load(weights, &format!("model.layers.{layer}.{name}"), format, Place { device, part, along });
        let (by_outputs, by_inputs) = (|name| split(name, Along::Outputs), |name| split(name, Along::Inputs));
        let norm = |name: &str| Norm::load(weights, &format!("model.layers.{layer}.{name}.weight"), config, device);
        let maybe = |name: Option<&str>| name.map(norm).transpose();
        let norms = config.family.norms();
        let query_key_norms = match config.family.query_key_norm() {
            Some(_) => Some([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]),
            None => None,
        };
        Ok(Self {
            attention_norm: maybe(norms.before_attention)?,
            query_key_norms,
            attended_norm: maybe(norms.after_attention)?,
            down_norm: maybe(norms.after_mlp)?,
            q: by_outputs("self_attn.q_proj")?,
            k: by_outputs("self_attn.k_proj")?,
            v: by_outputs("self_attn.v_proj")?,
            o: by_inputs("self_attn.o_proj")?,
            mlp_norm: maybe(norms.before_mlp)?,
            gate: by_outputs("mlp.gate_proj")?,
            up: by_outputs("mlp.up_proj")?,
            down: by_inputs("mlp.down_proj")?,
        })
    }

    /// The tokens' queries `[tokens, heads, head_dim]`; their keys and values go into the cache.
    fn look_up(&self, x: &Tensor, (step, layer): (&Step<'_>, usize), cache: &mut KvCache) -> Result<Tensor, ModelError> {
        let KvGeometry { kv_heads, head_dim, .. } = step.config.kv;
        let (tokens, _) = x.dims2()?;
        let ready = |y: Tensor, heads: usize, norm: Option<&Norm>| -> Result<Tensor, ModelError> {
            let y = match norm {
                // Over each head, or over all of them, as long as its weights are.
                Some(norm) => norm.forward(&y.reshape((tokens, (), norm.weight.elem_count()))?)?,
                None => y,
            };
            let y = y.reshape((1, tokens, heads, head_dim))?;
            let Some([cos, sin]) = step.turn(layer) else { return Ok(y.squeeze(0)?) };
            let turned = 2 * cos.dim(1)?;
            let rotated = rope_thd(&y.narrow(3, 0, turned)?.contiguous()?, cos, sin)?;
            Ok(Tensor::cat(&[rotated, y.narrow(3, turned, head_dim - turned)?], 3)?.squeeze(0)?)
        };
        let [query_norm, key_norm] = self.query_key_norms.as_ref().map_or([None, None], |norms| norms.each_ref().map(Some));
        let q = ready(self.q.forward(x)?, step.config.heads, query_norm)?;
        let k = ready(self.k.forward(x)?, kv_heads, key_norm)?;
        let v = self.v.forward(x)?.reshape((tokens, kv_heads, head_dim))?;
        attention::append(cache, step, layer, &k, &v)?;
        Ok(q)
    }

    fn mlp(&self, x: &Tensor, act: Gate) -> Result<Tensor, ModelError> {
        let gate = self.gate.forward(x)?;
        let gate = match act {
            Gate::Silu => silu(&gate)?,
            Gate::Gelu => gate.gelu()?,
        };
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
