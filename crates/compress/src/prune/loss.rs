//! Losses of a full model and of a decode model made from it, on the same answers, streamed layer by layer.

use rayon::prelude::*;
use serde::Serialize;

use crate::calibrate::Sample;
use crate::checkpoint::{Checkpoint, LayerWeights};
use crate::error::CompressError;
use crate::matrix::Matrix;
use crate::prune::Progress;
use crate::prune::kept::kv_columns;
use crate::prune::statistics::embed;
use crate::prune::stream::{Batch, Reads, Shape, activations, add_through, batches};
use crate::vector::{exp, max, sum, vectorised};

/// Rows of logits that are computed at once: 256 x 128,256 numbers are 131 MB.
const LOGIT_ROWS: usize = 256;

/// Mean losses in nats a token, over the answers' tokens from the second on: the full model writes the first.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Losses {
    /// The full model.
    pub full: f64,
    /// The decode model, which reads the prompt itself.
    pub alone: f64,
    /// The decode model with the full model's keys and values of the prompt.
    pub overfill: f64,
    /// How many tokens.
    pub tokens: usize,
}

/// Where each of a decode model's layers has its keys and values from.
pub(crate) struct KvSource<'a> {
    /// The full model's layer, ascending.
    pub(crate) layers: &'a [usize],
    /// The full model's KV heads that it keeps.
    pub(crate) kv_heads: &'a [Vec<usize>],
}

/// A decode model's hidden states, in one of the two ways that it reads.
struct Stream {
    batches: Vec<Batch>,
    hidden: Vec<Matrix>,
}

impl Stream {
    fn new(embedding: &Matrix, samples: &[Sample], reads: Reads) -> Self {
        let batches = batches(samples, reads);
        let hidden = batches.iter().map(|b| embed(embedding, b)).collect();
        Self { batches, hidden }
    }

    /// Through one layer; `keep` gets the keys and values of each batch.
    fn step(&mut self, shape: &Shape, layer: &LayerWeights, context: Option<&[(Matrix, Matrix)]>, mut keep: impl FnMut(Matrix, Matrix)) {
        for (i, (batch, hidden)) in self.batches.iter().zip(&mut self.hidden).enumerate() {
            let qkv = shape.qkv(layer, &shape.normed(hidden), batch);
            let attended = shape.attention(&qkv, context.map(|c| &c[i]), &batch.spans);
            add_through(hidden, &attended, &layer.output);
            let active = activations(layer, &shape.normed(hidden));
            add_through(hidden, &active, &layer.down);
            let [_, k, v] = qkv;
            keep(k, v);
        }
    }

    /// Mean loss and number of tokens.
    fn loss(&self, shape: &Shape, model: &Checkpoint) -> Result<(f64, usize), CompressError> {
        let mut head = model.head()?;
        head.scale_columns(&model.norm()?);
        let (mut sum, mut count) = (0.0, 0);
        for (batch, hidden) in self.batches.iter().zip(&self.hidden) {
            let rows: Vec<(usize, u32)> = batch.targets.iter().enumerate().filter_map(|(i, t)| t.map(|t| (i, t))).collect();
            for rows in rows.chunks(LOGIT_ROWS) {
                let logits = shape.normed(&hidden.select_rows(rows.iter().map(|r| r.0))).through(&head);
                let losses = rows.par_iter().enumerate().map(|(i, &(_, target))| loss(logits.row(i), target as usize));
                sum += losses.sum::<f64>();
            }
            count += rows.len();
        }
        let mean = sum / count as f64;
        if mean.is_finite() { Ok((mean, count)) } else { Err(CompressError::Numbers("the loss".into())) }
    }
}

fn loss(logits: &[f32], target: usize) -> f64 {
    let (most, sum) = vectorised(|| {
        let most = max(logits);
        (most, sum(logits.len(), |i| exp(logits[i] - most)))
    });
    sum.ln() + f64::from(most) - f64::from(logits[target])
}

impl Losses {
    /// Measures them on `samples`.
    ///
    /// # Errors
    /// As [`Checkpoint::layer`]; [`CompressError::Numbers`] where one is not finite.
    pub(crate) fn measure(
        full: &Checkpoint,
        decode: &Checkpoint,
        kv: &KvSource<'_>,
        samples: &[Sample],
        progress: Progress<'_>,
    ) -> Result<Self, CompressError> {
        let (shape, decode_shape) = (Shape::of(full.config()), Shape::of(decode.config()));
        let mut whole = Stream::new(&full.embedding()?, samples, Reads::Everything);
        let embedding = decode.embedding()?;
        let mut alone = Stream::new(&embedding, samples, Reads::Everything);
        let mut answers = Stream::new(&embedding, samples, Reads::Answers);
        drop(embedding);
        let layers = full.config().kv.layers;
        for l in 0..layers {
            progress("measuring losses", l, layers);
            let mut cache = Vec::new();
            whole.step(&shape, &full.layer(l)?.folded(), None, |k, v| cache.push((k, v)));
            let Some(j) = kv.layers.iter().position(|&from| from == l) else { continue };
            if kv.kv_heads[j].len() < shape.kv_heads {
                let columns = kv_columns(&kv.kv_heads[j], shape.head_dim);
                cache.iter_mut().for_each(|(k, v)| (*k, *v) = (k.select_columns(&columns), v.select_columns(&columns)));
            }
            let layer = decode.layer(j)?.folded();
            alone.step(&decode_shape, &layer, None, |_, _| ());
            answers.step(&decode_shape, &layer, Some(&cache), |_, _| ());
        }
        let (full, tokens) = whole.loss(&shape, full)?;
        Ok(Self { full, alone: alone.loss(&decode_shape, decode)?.0, overfill: answers.loss(&decode_shape, decode)?.0, tokens })
    }
}
