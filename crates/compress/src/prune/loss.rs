//! Losses of a full model and of a decode model made from it, on the same answers, streamed layer by layer.

use rayon::prelude::*;
use serde::Serialize;

use crate::calibrate::Sample;
use crate::checkpoint::{Checkpoint, LayerWeights};
use crate::error::CompressError;
use crate::matrix::Matrix;
use crate::prune::Progress;
use crate::prune::kept::kv_columns;
use crate::prune::stream::{Batch, Reads, Shape, batches};
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
    fn new(shape: &Shape, embedding: &Matrix, samples: &[Sample], reads: Reads) -> Self {
        let batches = batches(samples, reads);
        let hidden = batches.iter().map(|b| shape.embed(embedding, b)).collect();
        Self { batches, hidden }
    }

    /// Through layer `l`; `keep` gets the keys and values of each batch.
    fn step(
        &mut self,
        shape: &Shape,
        l: usize,
        layer: &LayerWeights,
        context: Option<&[(Matrix, Matrix)]>,
        mut keep: impl FnMut(Matrix, Matrix),
    ) {
        for (i, (batch, hidden)) in self.batches.iter().zip(&mut self.hidden).enumerate() {
            let qkv = shape.qkv(l, layer, &shape.read(hidden), batch);
            let attended = shape.attention(l, &qkv, context.map(|c| &c[i]), &batch.spans);
            shape.add_through(hidden, &attended, &layer.output, &layer.attended_norm);
            let active = shape.activations(layer, &shape.read(hidden));
            shape.add_through(hidden, &active, &layer.down, &layer.down_norm);
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
                let logits = shape.logits(&hidden.select_rows(rows.iter().map(|r| r.0)), &head);
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
        let mut whole = Stream::new(&shape, &full.embedding()?, samples, Reads::Everything);
        let embedding = decode.embedding()?;
        let mut alone = Stream::new(&decode_shape, &embedding, samples, Reads::Everything);
        let mut answers = Stream::new(&decode_shape, &embedding, samples, Reads::Answers);
        drop(embedding);
        let layers = full.config().kv.layers;
        for l in 0..layers {
            progress("measuring losses", l, layers);
            let mut cache = Vec::new();
            whole.step(&shape, l, &full.layer(l)?.folded(), None, |k, v| cache.push((k, v)));
            let Some(j) = kv.layers.iter().position(|&from| from == l) else { continue };
            if kv.kv_heads[j].len() < shape.kv_heads {
                let columns = kv_columns(&kv.kv_heads[j], shape.head_dim);
                cache.iter_mut().for_each(|(k, v)| (*k, *v) = (k.select_columns(&columns), v.select_columns(&columns)));
            }
            let layer = decode.layer(j)?.folded();
            alone.step(&decode_shape, j, &layer, None, |_, _| ());
            answers.step(&decode_shape, j, &layer, Some(&cache), |_, _| ());
        }
        let (full, tokens) = whole.loss(&shape, full)?;
        Ok(Self { full, alone: alone.loss(&decode_shape, decode)?.0, overfill: answers.loss(&decode_shape, decode)?.0, tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::families;

    #[test]
    fn the_stream_computes_what_transformers_computes_in_every_family() {
        let fixture = families::Fixture::open();
        let sample = Sample { tokens: fixture.tokens(), prompt: 1 };
        for (name, config, expected) in fixture.cases() {
            let at = tempfile::tempdir().unwrap();
            families::folder(config, at.path());
            let model = Checkpoint::open(at.path()).unwrap();
            if model.layer(0).is_err() {
                assert!(name.ends_with("biases"), "{name}");
                continue;
            }
            let shape = Shape::of(model.config());
            let mut stream = Stream::new(&shape, &model.embedding().unwrap(), std::slice::from_ref(&sample), Reads::Everything);
            for layer in 0..model.config().kv.layers {
                stream.step(&shape, layer, &model.layer(layer).unwrap().folded(), None, |_, _| ());
            }
            let mut head = model.head().unwrap();
            head.scale_columns(&model.norm().unwrap());
            let logits = shape.logits(&stream.hidden[0].select_rows(fixture.rows()), &head);
            let far = logits.numbers().iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(logits.numbers().len() == expected.len() && far < 1e-4, "{name}: {far}");
        }
    }
}
