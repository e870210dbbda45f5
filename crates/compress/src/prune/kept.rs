//! What is kept of a full model: widths, and which layers, KV heads, neurons and channels.

use overfill_model::LlamaConfig;
use serde::Serialize;

use crate::checkpoint::LayerWeights;
use crate::error::CompressError;

/// Blocks of quantised formats: an MLP that comes of a ratio keeps whole ones.
const BLOCK: usize = 32;

/// How much of a width is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// All of it.
    All,
    /// All but this share.
    Without(f64),
    /// This much.
    Exactly(usize),
}

/// What a decode model is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Of the residual stream.
    pub hidden: Keep,
    /// Of the MLP.
    pub intermediate: Keep,
    /// KV heads; their queries go with them.
    pub kv_heads: Keep,
    /// Layers.
    pub layers: Keep,
}

impl Sizes {
    /// The shape of the decode model.
    ///
    /// # Errors
    /// [`CompressError::Refused`] where a ratio or width is not possible, naming the nearest that is.
    pub fn shape(&self, full: &LlamaConfig) -> Result<LlamaConfig, CompressError> {
        let kv_heads = count("--kv-heads", self.kv_heads, full.kv.kv_heads)?;
        let heads = full.heads / full.kv.kv_heads * kv_heads;
        let mut shape = full.clone();
        shape.heads = heads;
        shape.kv.kv_heads = kv_heads;
        shape.kv.layers = count("--layers", self.layers, full.kv.layers)?;
        shape.intermediate_size = match self.intermediate {
            Keep::Without(_) if full.intermediate_size.is_multiple_of(BLOCK) => {
                nearest(count("--mlp-ratio", self.intermediate, full.intermediate_size)?, BLOCK)
            }
            keep => count("--intermediate or --mlp-ratio", keep, full.intermediate_size)?,
        };
        shape.hidden_size = count("--hidden or --hidden-ratio", self.hidden, full.hidden_size)?;
        if !shape.hidden_size.is_multiple_of(heads) {
            match self.hidden {
                Keep::Without(_) => shape.hidden_size = nearest(shape.hidden_size, heads).min(full.hidden_size / heads * heads),
                _ => {
                    let below = shape.hidden_size / heads * heads;
                    return Err(CompressError::Refused(format!(
                        "a hidden size of {} is not a multiple of the {heads} heads, which transformers asks for: use {} or {}",
                        shape.hidden_size,
                        below.max(heads),
                        below + heads
                    )));
                }
            }
        }
        Ok(shape)
    }
}

/// The multiple of `of` that is next to `n`; at least one of it.
fn nearest(n: usize, of: usize) -> usize {
    ((n + of / 2) / of * of).max(of)
}

fn count(flag: &str, keep: Keep, all: usize) -> Result<usize, CompressError> {
    match keep {
        Keep::All => Ok(all),
        Keep::Without(ratio) if (0.0..1.0).contains(&ratio) && ((1.0 - ratio) * all as f64) >= 1.0 => {
            Ok(((1.0 - ratio) * all as f64) as usize)
        }
        Keep::Without(ratio) => Err(CompressError::Refused(format!("{flag} {ratio} is the share to cut away: at least 0 and less than 1"))),
        Keep::Exactly(n) if (1..=all).contains(&n) => Ok(n),
        Keep::Exactly(n) => {
            Err(CompressError::Refused(format!("{flag} {n} is not possible: the full model has {all}, so 1 to {all} can be kept")))
        }
    }
}

/// What is kept, by the full model's numbers, ascending.
#[derive(Clone, Debug, Serialize)]
pub struct Kept {
    /// Layers.
    pub layers: Vec<usize>,
    /// Channels of the residual stream; nothing where the stream was rotated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<Vec<usize>>,
    /// KV heads of each kept layer.
    pub kv_heads: Vec<Vec<usize>>,
    /// Neurons of each kept layer.
    pub neurons: Vec<Vec<usize>>,
}

/// The `n` most important, ascending. Of equals the first are kept.
pub(crate) fn most_important(importance: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..importance.len()).collect();
    order.sort_by(|&a, &b| importance[b].total_cmp(&importance[a]));
    order.truncate(n);
    order.sort_unstable();
    order
}

/// Columns of a KV row that belong to these heads.
pub(crate) fn kv_columns(heads: &[usize], head_dim: usize) -> Vec<usize> {
    heads.iter().flat_map(|h| h * head_dim..(h + 1) * head_dim).collect()
}

impl Kept {
    /// Layer `j` of the decode model, its residual stream as wide as the full model's still: `layer` without the KV heads and
    /// neurons that go.
    pub(crate) fn within(&self, j: usize, layer: &LayerWeights, full: &LlamaConfig) -> LayerWeights {
        let (kv_heads, neurons) = (&self.kv_heads[j], &self.neurons[j]);
        let mut cut = layer.clone();
        if kv_heads.len() < full.kv.kv_heads {
            let kv = kv_columns(kv_heads, full.kv.head_dim);
            let q = kv_columns(kv_heads, full.heads / full.kv.kv_heads * full.kv.head_dim);
            for (i, rows) in [&q, &kv, &kv].into_iter().enumerate() {
                cut.qkv[i] = layer.qkv[i].select_rows(rows.iter().copied());
                if !layer.qkv_bias[i].is_empty() {
                    cut.qkv_bias[i] = rows.iter().map(|&r| layer.qkv_bias[i][r]).collect();
                }
            }
            cut.output = layer.output.select_columns(&q);
        }
        if neurons.len() < full.intermediate_size {
            cut.gate = layer.gate.select_rows(neurons.iter().copied());
            cut.up = layer.up.select_rows(neurons.iter().copied());
            cut.down = layer.down.select_columns(neurons);
        }
        cut
    }
}
