//! The streamed forward pass: all samples go through one layer before the next layer's weights are read.
//!
//! What is held between layers is the hidden states of the samples, in batches. Norms are folded into the matrices that
//! read them, so a norm here has no weights. The attention of a batch's rows may begin with keys and values of another
//! model, as that of a decode model does.

use std::ops::Range;

use overfill_model::LlamaConfig;
use overfill_model::config::Rotation;
use overfill_model::family::Gate;
use overfill_model::rope::Frequencies;
use rayon::prelude::*;

use crate::calibrate::Sample;
use crate::checkpoint::LayerWeights;
use crate::matrix::Matrix;
use crate::product::{Onto, View, ViewMut, multiply_here};
use crate::vector::{exp, max, sum, vectorised};

/// Most tokens of a batch, unless one sample has more: bounds what a layer computes at once.
const BATCH_TOKENS: usize = 4096;

/// Tokens whose scores are made at once: with a few hundred keys they stay in a core's cache.
const TILE: usize = 64;

/// One sample's rows in a batch.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    /// Its rows.
    pub(crate) rows: Range<usize>,
    /// Position of the first of them.
    pub(crate) start: usize,
    /// Rows of the context's batch that hold positions 0 to `start`; empty where `start` is 0.
    pub(crate) context: Range<usize>,
}

/// Samples that go through a layer together.
#[derive(Clone)]
pub(crate) struct Batch {
    pub(crate) spans: Vec<Span>,
    /// A token for each row.
    pub(crate) tokens: Vec<u32>,
    /// The token that follows each row, where it belongs to the answer and the decode model has to write it.
    pub(crate) targets: Vec<Option<u32>>,
}

/// Which positions of its samples a model reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    /// All of them, as a model alone does.
    Everything,
    /// The answer's, all but its last token, as a decode model does that has the full model's keys and values of the prompt.
    Answers,
}

/// Cuts samples into batches.
pub(crate) fn batches(samples: &[Sample], reads: Reads) -> Vec<Batch> {
    let mut all: Vec<Batch> = Vec::new();
    let mut context = 0;
    for sample in samples {
        let begins = context == 0 || context + sample.tokens.len() > BATCH_TOKENS;
        if begins {
            context = 0;
            all.push(Batch { spans: Vec::new(), tokens: Vec::new(), targets: Vec::new() });
        }
        let Some(batch) = all.last_mut() else { continue };
        let n = sample.tokens.len();
        let (start, end) = match reads {
            Reads::Everything => (0, n),
            Reads::Answers => (sample.prompt, n - 1),
        };
        let first = batch.tokens.len();
        batch.spans.push(Span { rows: first..first + end - start, start, context: context..context + start });
        batch.tokens.extend_from_slice(&sample.tokens[start..end]);
        // The full model writes the answer's first token.
        batch.targets.extend((start..end).map(|i| if i >= sample.prompt { sample.tokens.get(i + 1).copied() } else { None }));
        context += n;
    }
    all
}

impl Batch {
    /// Which rows of the same samples' [`Reads::Everything`] batch these rows are.
    pub(crate) fn rows_of_everything(&self) -> impl Iterator<Item = usize> + '_ {
        self.spans.iter().flat_map(|s| s.context.end..s.context.end + s.rows.len())
    }
}

/// A model's attention and MLP, whatever its weights.
pub(crate) struct Shape {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) eps: f32,
    config: LlamaConfig,
    global: Frequencies,
    local: Option<Frequencies>,
}

impl Shape {
    pub(crate) fn of(config: &LlamaConfig) -> Self {
        Self {
            heads: config.heads,
            kv_heads: config.kv.kv_heads,
            head_dim: config.kv.head_dim,
            eps: config.rms_norm_eps as f32,
            config: config.clone(),
            global: Frequencies::new(&config.rope),
            local: config.local_rope.as_ref().map(Frequencies::new),
        }
    }

    /// The hidden states before the first layer.
    pub(crate) fn embed(&self, embedding: &Matrix, batch: &Batch) -> Matrix {
        let mut rows = embedding.select_rows(batch.tokens.iter().map(|&t| t as usize));
        scale(&mut rows, self.config.scalars.embedding);
        rows
    }

    /// Queries, keys and values of layer `i`, of rows as it reads them; queries and keys are normed and rotated as it does.
    pub(crate) fn qkv(&self, i: usize, layer: &LayerWeights, normed: &Matrix, batch: &Batch) -> [Matrix; 3] {
        let mut all = [0, 1, 2].map(|i| {
            let mut rows = normed.through(&layer.qkv[i]);
            let bias = &layer.qkv_bias[i];
            if !bias.is_empty() {
                let n = rows.columns();
                rows.numbers_mut().chunks_exact_mut(n).for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
            }
            rows
        });
        for (rows, norm) in all.iter_mut().zip(&layer.query_key_norms) {
            if !norm.is_empty() {
                rows.numbers_mut().par_chunks_mut(norm.len()).for_each(|part| self.norm_part(part, norm));
            }
        }
        let frequencies = match self.config.layers[i].rotation {
            Rotation::None => return all,
            Rotation::Global => &self.global,
            Rotation::Local => self.local.as_ref().unwrap_or(&self.global),
        };
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        frequencies.at_positions(batch.spans.iter().flat_map(|s| s.start..s.start + s.rows.len()), &mut cos, &mut sin);
        for rows in &mut all[..2] {
            self.rotate(rows, &cos, &sin);
        }
        all
    }

    fn rotate(&self, rows: &mut Matrix, cos: &[f32], sin: &[f32]) {
        let (n, half) = (rows.columns(), cos.len() / rows.rows().max(1));
        rows.numbers_mut().par_chunks_mut(n).enumerate().for_each(|(i, row)| {
            let (cos, sin) = (&cos[i * half..(i + 1) * half], &sin[i * half..(i + 1) * half]);
            for head in row.chunks_exact_mut(self.head_dim) {
                let (low, high) = head.split_at_mut(half);
                for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        });
    }

    /// Causal attention of layer `i`; `context` has the keys and values of the positions before a span's first.
    pub(crate) fn attention(&self, i: usize, [q, k, v]: &[Matrix; 3], context: Option<&(Matrix, Matrix)>, spans: &[Span]) -> Matrix {
        let (window, scalars) = (self.config.layers[i].window.unwrap_or(usize::MAX), &self.config.scalars);
        let (size, group) = (self.head_dim, self.heads / self.kv_heads);
        let parts: Vec<(&Span, usize)> = spans.iter().flat_map(|s| (0..self.kv_heads).map(move |h| (s, h))).collect();
        let done: Vec<Vec<f32>> = parts
            .par_iter()
            .map(|&(span, kv_head)| {
                let gather = |before: Option<&Matrix>, own: &Matrix| {
                    let own = span.rows.clone().map(|r| own.row(r));
                    let rows = before.into_iter().flat_map(|m| span.context.clone().map(|r| m.row(r))).chain(own);
                    rows.flat_map(|row| &row[kv_head * size..(kv_head + 1) * size]).copied().collect::<Vec<f32>>()
                };
                let keys = gather(context.map(|c| &c.0), k);
                let values = gather(context.map(|c| &c.1), v);
                let mut out = vec![0.0; span.rows.len() * group * size];
                let mut scores = Vec::new();
                for (first, out) in out.chunks_mut(TILE * group * size).enumerate().map(|(i, out)| (i * TILE, out)) {
                    let tile = first..(first + TILE).min(span.rows.len());
                    let rows = tile.clone().map(|i| &q.row(span.rows.start + i)[kv_head * group * size..(kv_head + 1) * group * size]);
                    let queries: Vec<f32> = rows.flatten().copied().collect();
                    let visible = span.start + tile.end;
                    scores.resize(tile.len() * group * visible, 0.0);
                    let (keys, values) = (&keys[..visible * size], &values[..visible * size]);
                    multiply_here(
                        ViewMut::new(&mut scores, visible),
                        View::new(&queries, size),
                        View::new(keys, size).transposed(),
                        scalars.attention as f32,
                        Onto::Replace,
                    );
                    for (i, row) in scores.chunks_exact_mut(visible).enumerate() {
                        if let Some(cap) = scalars.attention_cap.map(|cap| cap as f32) {
                            row.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
                        }
                        let end = span.start + first + i / group + 1;
                        softmax(row, end.saturating_sub(window)..end);
                    }
                    multiply_here(ViewMut::new(out, size), View::new(&scores, visible), View::new(values, size), 1.0, Onto::Replace);
                }
                out
            })
            .collect();
        let mut all = Matrix::zeros(q.rows(), q.columns());
        let columns = all.columns();
        for ((span, kv_head), part) in parts.iter().zip(&done) {
            for (row, piece) in span.rows.clone().zip(part.chunks_exact(group * size)) {
                all.numbers_mut()[row * columns + kv_head * group * size..][..group * size].copy_from_slice(piece);
            }
        }
        all
    }

    /// Rows of the residual stream as attention and MLP read them, but for the norms' weights, which are folded into matrices.
    pub(crate) fn read(&self, x: &Matrix) -> Matrix {
        if self.config.family.norms().before_attention.is_some() { self.normed(x) } else { x.clone() }
    }

    /// Rows divided by their root mean square.
    pub(crate) fn normed(&self, x: &Matrix) -> Matrix {
        let mut normed = x.clone();
        let n = x.columns();
        normed.numbers_mut().par_chunks_mut(n).for_each(|row| self.normalise(row));
        normed
    }

    fn normalise(&self, row: &mut [f32]) {
        vectorised(|| {
            let squares = sum(row.len(), |i| row[i] * row[i]);
            let scale = (1.0 / (squares / row.len() as f64 + f64::from(self.eps)).sqrt()) as f32;
            row.iter_mut().for_each(|x| *x *= scale);
        });
    }

    fn norm_part(&self, part: &mut [f32], weights: &[f32]) {
        self.normalise(part);
        part.iter_mut().zip(weights).for_each(|(x, w)| *x *= w);
    }

    /// What the MLP's output reads: the gate, activated, times the input.
    pub(crate) fn activations(&self, layer: &LayerWeights, normed: &Matrix) -> Matrix {
        let mut gate = normed.through(&layer.gate);
        let up = normed.through(&layer.up);
        let n = gate.columns();
        let act = self.config.family.gate();
        gate.numbers_mut().par_chunks_mut(n).zip(up.numbers().par_chunks(n)).for_each(|(gate, up)| {
            vectorised(|| match act {
                Gate::Silu => gate.iter_mut().zip(up).for_each(|(g, u)| *g = *g / (1.0 + exp(-*g)) * u),
                // As the kernels of overfill-kernels compute it: twice the root of 2 / pi.
                Gate::Gelu => gate.iter_mut().zip(up).for_each(|(g, u)| {
                    *g = *g / (1.0 + exp(-1.595_769 * (*g + 0.044_715 * *g * *g * *g))) * u;
                }),
            });
        });
        gate
    }

    /// Adds `x` through a linear map to the residual stream; `norm` is that of what is added, or empty.
    pub(crate) fn add_through(&self, hidden: &mut Matrix, x: &Matrix, map: &Matrix, norm: &[f32]) {
        let mut sum = x.through(map);
        if !norm.is_empty() {
            sum.numbers_mut().par_chunks_mut(norm.len()).for_each(|row| self.norm_part(row, norm));
        }
        scale(&mut sum, self.config.scalars.residual);
        hidden.numbers_mut().iter_mut().zip(sum.numbers()).for_each(|(h, s)| *h += s);
    }

    /// Logits of rows of the residual stream, through the head with the last norm folded in.
    pub(crate) fn logits(&self, rows: &Matrix, head: &Matrix) -> Matrix {
        let mut logits = self.normed(rows).through(head);
        scale(&mut logits, self.config.scalars.logits);
        if let Some(cap) = self.config.scalars.logits_cap.map(|cap| cap as f32) {
            logits.numbers_mut().par_chunks_mut(1024).for_each(|part| part.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh()));
        }
        logits
    }

    /// What is added to the residual stream is multiplied by it.
    pub(crate) fn residual(&self) -> f64 {
        self.config.scalars.residual
    }
}

fn scale(rows: &mut Matrix, factor: f64) {
    if factor != 1.0 {
        rows.numbers_mut().iter_mut().for_each(|x| *x *= factor as f32);
    }
}

/// The softmax of a row's scores in `seen`; the others become 0.
fn softmax(row: &mut [f32], seen: Range<usize>) {
    row[seen.end..].fill(0.0);
    row[..seen.start].fill(0.0);
    let row = &mut row[seen];
    vectorised(|| {
        let most = max(row);
        row.iter_mut().for_each(|s| *s = exp(*s - most));
        let scale = (1.0 / sum(row.len(), |i| row[i])) as f32;
        row.iter_mut().for_each(|s| *s *= scale);
    });
}

impl LayerWeights {
    /// The same layer with its norms inside the matrices that read them.
    pub(crate) fn folded(mut self) -> Self {
        if !self.input_norm.is_empty() {
            self.qkv.iter_mut().for_each(|m| m.scale_columns(&self.input_norm));
        }
        if !self.mlp_norm.is_empty() {
            self.gate.scale_columns(&self.mlp_norm);
            self.up.scale_columns(&self.mlp_norm);
        }
        self.input_norm.fill(1.0);
        self.mlp_norm.fill(1.0);
        self
    }
}
