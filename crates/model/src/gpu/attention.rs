//! Attention of a step's tokens over the paged cache: our kernel's on a GPU, else candle's operations.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;

use crate::cache::{KvCache, KvTensors};
use crate::config::Scalars;
use crate::error::ModelError;
#[cfg(feature = "cuda")]
use crate::gpu::launch;
use crate::gpu::step::Step;

/// Puts the step's keys and values, `[tokens, kv_heads, head_dim]`, into one layer of the cache.
pub(crate) fn append(cache: &mut KvCache, step: &Step<'_>, layer: usize, k: &Tensor, v: &Tensor) -> Result<(), ModelError> {
    #[cfg(feature = "cuda")]
    if let Some(told) = &step.told {
        let rows = cache.tensors(layer, step.part)?;
        launch::append(&rows.k, k, told)?;
        return Ok(launch::append(&rows.v, v, told)?);
    }
    let mut first = 0;
    for chunk in step.chunks {
        let count = chunk.tokens.len();
        let runs = cache.runs(layer, chunk.blocks, chunk.start, count)?;
        let rows = cache.tensors(layer, step.part)?;
        for (from, to) in [(k, &rows.k), (v, &rows.v)] {
            let mut at = first;
            for &(slot, n) in &runs {
                to.slice_set(&from.narrow(0, at, n)?.to_dtype(to.dtype())?.contiguous()?, 0, slot)?;
                at += n;
            }
        }
        first += count;
    }
    Ok(())
}

/// Causal attention of the step's queries `[tokens, heads, head_dim]`, in chunk order; gives `[tokens, heads * head_dim]`.
pub(crate) fn attend(cache: &KvCache, step: &Step<'_>, layer: usize, q: &Tensor) -> Result<Tensor, ModelError> {
    let Step { config, chunks, .. } = step;
    let window = config.layers[layer].window.unwrap_or(usize::MAX);
    #[cfg(feature = "cuda")]
    if let Some(tiles) = step.told.as_ref().and_then(|told| told.tiles.as_ref()) {
        let attention = launch::Attention { tiles, config, window, block_tokens: cache.block_tokens() };
        let rows = cache.tensors(layer, step.part)?;
        return Ok(q.contiguous()?.apply_op3_no_bwd(&rows.k, &rows.v, &attention)?.flatten_from(D::Minus(2))?);
    }
    let mut first = 0;
    let mut outs = Vec::with_capacity(chunks.len());
    for chunk in *chunks {
        let count = chunk.tokens.len();
        let runs = cache.runs(layer, chunk.blocks, 0, chunk.start + count)?;
        outs.push(attend_chunk(
            cache.tensors(layer, step.part)?,
            &runs,
            chunk.start,
            &q.narrow(0, first, count)?,
            &config.scalars,
            window,
        )?);
        first += count;
    }
    Ok(Tensor::cat(&outs, 0)?)
}

/// One chunk's attention in candle's operations: the sequence's rows are gathered, the heads of a group are rows of one
/// product.
fn attend_chunk(
    kv: &KvTensors,
    runs: &[(usize, usize)],
    start: usize,
    q: &Tensor,
    scalars: &Scalars,
    window: usize,
) -> Result<Tensor, ModelError> {
    let (tokens, heads, head_dim) = q.dims3()?;
    let gather = |rows: &Tensor| -> Result<Tensor, ModelError> {
        let parts: Vec<Tensor> = runs.iter().map(|&(slot, n)| rows.narrow(0, slot, n)).collect::<Result<_, _>>()?;
        Ok(Tensor::cat(&parts, 0)?.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous()?) // [kv_heads, context, head_dim]
    };
    let (k, v) = (gather(&kv.k)?, gather(&kv.v)?);
    let (kv_heads, context, _) = k.dims3()?;
    let group = heads / kv_heads;
    let q = q.reshape((tokens, kv_heads, group, head_dim))?.permute((1, 2, 0, 3))?;
    let q = q.reshape((kv_heads, group * tokens, head_dim))?.contiguous()?;
    let mut scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * scalars.attention)?;
    if let Some(cap) = scalars.attention_cap {
        scores = capped(&scores, cap)?;
    }
    let scores = scores.reshape((kv_heads, group, tokens, context))?.broadcast_add(&mask(start, tokens, context, window, q.device())?)?;
    let weights = softmax_last_dim(&scores)?.reshape((kv_heads, group * tokens, context))?;
    let out = weights.matmul(&v)?.reshape((kv_heads, group, tokens, head_dim))?;
    Ok(out.permute((2, 0, 1, 3))?.contiguous()?.flatten_from(D::Minus(3))?)
}

/// `cap * tanh(x / cap)`
pub(crate) fn capped(x: &Tensor, cap: f64) -> Result<Tensor, ModelError> {
    Ok(((x / cap)?.tanh()? * cap)?)
}

/// 0 where a token sees a position, minus infinity where it does not; `[tokens, context]`.
fn mask(start: usize, tokens: usize, context: usize, window: usize, device: &Device) -> Result<Tensor, ModelError> {
    let value = |t: usize, p: usize| if p <= start + t && start + t - p < window { 0.0 } else { f32::NEG_INFINITY };
    let mask: Vec<f32> = (0..tokens).flat_map(|t| (0..context).map(move |p| value(t, p))).collect();
    Ok(Tensor::from_vec(mask, (tokens, context), device)?)
}
