//! Causal grouped-query attention over a context's keys and values and the sequence's own; forward and backward.
//!
//! For each sequence and KV head the queries of all heads that share it are rows of one matrix, so scores and sums are
//! products. They are made for some tokens at a time and never kept: backward makes them again from the logarithms of the
//! softmax's sums.

use std::sync::{Mutex, PoisonError};

use overfill_compress::product::{Onto, View, ViewMut, multiply_here};
use overfill_compress::vector::{dot, exp, max, sum, vectorised};
use rayon::prelude::*;

use super::batch::{KvRows, Packed, Span};
use super::layer_shape::LayerShape;

/// Rows of scores that are made at a time: with a few hundred columns they stay in a core's cache.
const ROWS: usize = 192;

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    /// Keys and values of context and sequence, `[context + tokens, head_dim]`.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Queries and gradients of outputs of a tile, `[rows, head_dim]`.
    q: Vec<f32>,
    dout: Vec<f32>,
    /// Scores or probabilities of a tile and their gradients, `[rows, columns]`.
    scores: Vec<f32>,
    dscores: Vec<f32>,
    /// Gradients of keys and values, `[context + tokens, head_dim]` or the sequence's own.
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// Buffers of attention that are kept from layer to layer.
#[derive(Default)]
pub(super) struct AttentionBuffers {
    scratch: Mutex<Vec<Scratch>>,
    /// Of queries' size, task by task.
    grouped: Vec<f32>,
    /// Of the keys' size, task by task; and of the values'.
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// One sequence and one KV head.
struct Task {
    sequence: usize,
    head: usize,
    span: Span,
}

fn tasks(shape: &LayerShape, packed: &Packed) -> Vec<Task> {
    let spans = packed.spans.iter().enumerate();
    spans.flat_map(|(sequence, &span)| (0..shape.kv_heads).map(move |head| Task { sequence, head, span })).collect()
}

/// Cuts `data` into a piece for each task: `per_token` numbers for each of its tokens.
fn cut<'a>(mut data: &'a mut [f32], tasks: &[Task], per_token: usize) -> Vec<&'a mut [f32]> {
    let mut pieces = Vec::with_capacity(tasks.len());
    for task in tasks {
        let (piece, rest) = std::mem::take(&mut data).split_at_mut(task.span.tokens * per_token);
        pieces.push(piece);
        data = rest;
    }
    pieces
}

impl AttentionBuffers {
    /// Runs `f` with buffers that no other thread has at the time.
    fn with_scratch<R>(pool: &Mutex<Vec<Scratch>>, f: impl FnOnce(&mut Scratch) -> R) -> R {
        let lock = || pool.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = lock().pop().unwrap_or_default();
        let result = f(&mut scratch);
        lock().push(scratch);
        result
    }
}

impl Scratch {
    /// Copies the keys and values that `task` attends to side by side.
    fn gather_kv(&mut self, shape: &LayerShape, task: &Task, context: Option<&KvRows>, qkv: &[f32]) {
        let (d, row, stride) = (shape.head_dim, shape.kv_row(), shape.qkv());
        let Span { first, tokens, context: before } = task.span;
        for (which, to) in [&mut self.k, &mut self.v].into_iter().enumerate() {
            to.clear();
            if let Some(rows) = context {
                let rows = if which == 0 { &rows.k } else { &rows.v };
                to.extend(rows.chunks_exact(row).take(before).flat_map(|r| &r[task.head * d..(task.head + 1) * d]));
            }
            let from = shape.q() + which * row + task.head * d;
            for token in first..first + tokens {
                to.extend_from_slice(&qkv[token * stride + from..][..d]);
            }
        }
    }

    /// Puts the probabilities of a tile's rows into `scores`, given queries and keys: `exp(score - shift)`, where `shift`
    /// is the row's. Columns that a row does not see are 0. `shift(row, seen scores)` is called before the exponential.
    fn probabilities(&mut self, shape: &LayerShape, before: usize, tile: &Tile, mut shift: impl FnMut(usize, &[f32]) -> f32) {
        let (d, columns) = (shape.head_dim, before + tile.end);
        let rows = tile.rows(shape);
        self.scores.resize(rows * columns, 0.0);
        let (q, k) = (View::new(&self.q, d), View::new(&self.k[..columns * d], d));
        multiply_here(ViewMut::new(&mut self.scores, columns), q, k.transposed(), shape.scale(), Onto::Replace);
        let group = shape.group();
        for (r, row) in self.scores.chunks_exact_mut(columns).enumerate() {
            let seen = shape.seen(before + tile.start + r / group + 1);
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            let row = &mut row[seen];
            if let Some(cap) = shape.scalars.attention_cap.map(|cap| cap as f32) {
                row.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
            }
            let shift = shift(r, row);
            vectorised(|| row.iter_mut().for_each(|s| *s = exp(*s - shift)));
        }
    }
}

/// Some of a sequence's tokens.
struct Tile {
    start: usize,
    end: usize,
}

impl Tile {
    fn all(shape: &LayerShape, tokens: usize) -> impl Iterator<Item = Self> {
        let size = (ROWS / shape.group()).max(1);
        (0..tokens).step_by(size).map(move |start| Self { start, end: (start + size).min(tokens) })
    }

    fn rows(&self, shape: &LayerShape) -> usize {
        (self.end - self.start) * shape.group()
    }

    /// Copies this tile's part of `from` (rows of `stride` numbers, heads of `head` at `offset`) to `to`, `[rows, head_dim]`.
    fn gather(&self, shape: &LayerShape, task: &Task, from: &[f32], stride: usize, to: &mut Vec<f32>) {
        let width = shape.group() * shape.head_dim;
        to.clear();
        for token in task.span.first + self.start..task.span.first + self.end {
            to.extend_from_slice(&from[token * stride + task.head * width..][..width]);
        }
    }
}

/// `attended = softmax(scale q kᵀ) v` of every row of `qkv`, `[rows, q + 2 kv]`, rotated.
/// `logs` gets the logarithm of the softmax's sum for every row and head, task by task.
pub(super) fn attend(
    shape: &LayerShape,
    packed: &Packed,
    contexts: &[Option<&KvRows>],
    qkv: &[f32],
    attended: &mut Vec<f32>,
    logs: &mut Vec<f32>,
    buffers: &mut AttentionBuffers,
) {
    let (d, group) = (shape.head_dim, shape.group());
    let tasks = tasks(shape, packed);
    logs.resize(packed.rows * shape.heads, 0.0);
    buffers.grouped.resize(packed.rows * shape.q(), 0.0);
    let (outs, sums) = (cut(&mut buffers.grouped, &tasks, group * d), cut(logs, &tasks, group));
    tasks.par_iter().zip(outs).zip(sums).for_each(|((task, out), logs)| {
        AttentionBuffers::with_scratch(&buffers.scratch, |scratch| {
            scratch.gather_kv(shape, task, contexts[task.sequence], qkv);
            for tile in Tile::all(shape, task.span.tokens) {
                tile.gather(shape, task, qkv, shape.qkv(), &mut scratch.q);
                let logs = &mut logs[tile.start * group..tile.end * group];
                let before = task.span.context;
                // The largest score first; the sum's logarithm is added once it is known.
                scratch.probabilities(shape, before, &tile, |r, row| {
                    logs[r] = vectorised(|| max(row));
                    logs[r]
                });
                let columns = before + tile.end;
                for (row, log) in scratch.scores.chunks_exact_mut(columns).zip(logs) {
                    let total = vectorised(|| sum(row.len(), |i| row[i]));
                    *log += total.ln() as f32;
                    let scale = (1.0 / total) as f32;
                    vectorised(|| row.iter_mut().for_each(|p| *p *= scale));
                }
                let out = &mut out[tile.start * group * d..tile.end * group * d];
                let (p, v) = (View::new(&scratch.scores, columns), View::new(&scratch.v[..columns * d], d));
                multiply_here(ViewMut::new(out, d), p, v, 1.0, Onto::Replace);
            }
        });
    });
    attended.resize(packed.rows * shape.q(), 0.0);
    scatter(shape, &tasks, &buffers.grouped, group * d, attended, shape.q(), 0);
}

/// Copies what lies task by task in `grouped`, `width` numbers a token, to rows of `to`, `stride` apart, heads from `offset` on.
fn scatter(shape: &LayerShape, tasks: &[Task], grouped: &[f32], width: usize, to: &mut [f32], stride: usize, offset: usize) {
    let mut from = 0;
    for tasks in tasks.chunks_exact(shape.kv_heads) {
        let Span { first, tokens, .. } = tasks[0].span;
        let grouped = &grouped[from..from + tokens * width * tasks.len()];
        to[first * stride..(first + tokens) * stride].par_chunks_mut(stride).enumerate().for_each(|(token, row)| {
            for head in 0..tasks.len() {
                row[offset + head * width..][..width].copy_from_slice(&grouped[(head * tokens + token) * width..][..width]);
            }
        });
        from += grouped.len();
    }
}

/// What backward reads.
pub(super) struct Attended<'a> {
    /// `[rows, q + 2 kv]`, rotated.
    pub(super) qkv: &'a [f32],
    /// `[rows, q]`
    pub(super) attended: &'a [f32],
    /// As [`attend`] left them.
    pub(super) logs: &'a [f32],
    /// The gradient of `attended`.
    pub(super) dattended: &'a [f32],
}

/// The gradient of `qkv` (rotated), put into `dqkv`; where `dcontexts` are given (one for each sequence, of its context's
/// size), those of the contexts' keys and values are put there.
pub(super) fn attend_backward(
    shape: &LayerShape,
    packed: &Packed,
    contexts: &[Option<&KvRows>],
    saved: &Attended<'_>,
    dqkv: &mut [f32],
    dcontexts: Option<&mut [KvRows]>,
    buffers: &mut AttentionBuffers,
) {
    let (d, group, row) = (shape.head_dim, shape.group(), shape.kv_row());
    let tasks = tasks(shape, packed);
    buffers.grouped.resize(packed.rows * shape.q(), 0.0);
    buffers.dk.resize(packed.rows * row, 0.0);
    buffers.dv.resize(packed.rows * row, 0.0);
    let with_context = dcontexts.is_some();
    // The sums' logarithms lie task by task; so each task's begin where those before it end.
    let mut at = 0;
    let logs = tasks.iter().map(|task| {
        let n = task.span.tokens * group;
        at += n;
        &saved.logs[at - n..at]
    });
    let logs: Vec<&[f32]> = logs.collect();
    let outs = cut(&mut buffers.grouped, &tasks, group * d);
    let (dks, dvs) = (cut(&mut buffers.dk, &tasks, d), cut(&mut buffers.dv, &tasks, d));
    let of_contexts: Vec<(Vec<f32>, Vec<f32>)> = tasks
        .par_iter()
        .zip(logs)
        .zip(outs)
        .zip(dks.into_par_iter().zip(dvs))
        .map(|(((task, logs), dq), (dk, dv))| {
            AttentionBuffers::with_scratch(&buffers.scratch, |scratch| {
                scratch.gather_kv(shape, task, contexts[task.sequence], saved.qkv);
                backward(shape, task, saved, logs, scratch, dq, if with_context { 0 } else { task.span.context });
                let own = scratch.dk.len() - task.span.tokens * d;
                dk.copy_from_slice(&scratch.dk[own..]);
                dv.copy_from_slice(&scratch.dv[own..]);
                (scratch.dk[..own].to_vec(), scratch.dv[..own].to_vec())
            })
        })
        .collect();
    scatter(shape, &tasks, &buffers.grouped, group * d, dqkv, shape.qkv(), 0);
    scatter(shape, &tasks, &buffers.dk, d, dqkv, shape.qkv(), shape.q());
    scatter(shape, &tasks, &buffers.dv, d, dqkv, shape.qkv(), shape.q() + row);
    let Some(dcontexts) = dcontexts else { return };
    for (task, (dk, dv)) in tasks.iter().zip(of_contexts) {
        let to = &mut dcontexts[task.sequence];
        for (to, from) in [(&mut to.k, dk), (&mut to.v, dv)] {
            to.resize(task.span.context * row, 0.0);
            to.chunks_exact_mut(row).zip(from.chunks_exact(d)).for_each(|(to, from)| to[task.head * d..][..d].copy_from_slice(from));
        }
    }
}

/// Backward of one task: gradients of its queries into `dq`, of keys and values from column `from` on into the scratch.
fn backward(shape: &LayerShape, task: &Task, saved: &Attended<'_>, logs: &[f32], scratch: &mut Scratch, dq: &mut [f32], from: usize) {
    let (d, group, before) = (shape.head_dim, shape.group(), task.span.context);
    let kept = before + task.span.tokens - from;
    for gradient in [&mut scratch.dk, &mut scratch.dv] {
        gradient.clear();
        gradient.resize(kept * d, 0.0);
    }
    for tile in Tile::all(shape, task.span.tokens) {
        let columns = before + tile.end;
        let rows = tile.rows(shape);
        tile.gather(shape, task, saved.qkv, shape.qkv(), &mut scratch.q);
        scratch.probabilities(shape, before, &tile, |r, _| logs[tile.start * group + r]);
        tile.gather(shape, task, saved.dattended, shape.q(), &mut scratch.dout);
        let Scratch { k, v, q, dout, scores, dscores, dk, dv } = scratch;
        dscores.resize(rows * columns, 0.0);
        let dout_view = View::new(dout, d);
        multiply_here(ViewMut::new(dscores, columns), dout_view, View::new(&v[..columns * d], d).transposed(), 1.0, Onto::Replace);
        let own = columns - from;
        let probabilities = View::strided(&scores[from..], rows, own, columns);
        multiply_here(ViewMut::new(&mut dv[..own * d], d), probabilities.transposed(), dout_view, 1.0, Onto::Add);

        // The softmax's own gradient: what all columns share is the product of output and its gradient.
        for (r, (p, ds)) in scores.chunks_exact(columns).zip(dscores.chunks_exact_mut(columns)).enumerate() {
            let token = task.span.first + tile.start + r / group;
            let head = task.head * group + r % group;
            let out = &saved.attended[token * shape.q() + head * d..][..d];
            vectorised(|| {
                let shared = dot(out, &dout[r * d..(r + 1) * d]);
                ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - shared));
            });
            if let Some(cap) = shape.scalars.attention_cap.map(|cap| cap as f32) {
                // A capped score is the logarithm of its probability and the row's shift.
                let log = logs[tile.start * group + r];
                let slope = |p: f32| 1.0 - ((p.ln() + log) / cap).powi(2);
                ds.iter_mut().zip(p).filter(|(_, p)| **p > 0.0).for_each(|(ds, p)| *ds *= slope(*p));
            }
        }
        let dscores_all = View::new(dscores, columns);
        let dq = &mut dq[tile.start * group * d..tile.end * group * d];
        multiply_here(ViewMut::new(dq, d), dscores_all, View::new(&k[..columns * d], d), shape.scale(), Onto::Replace);
        let dscores_kept = View::strided(&dscores[from..], rows, own, columns);
        multiply_here(ViewMut::new(&mut dk[..own * d], d), dscores_kept.transposed(), View::new(q, d), shape.scale(), Onto::Add);
    }
}
