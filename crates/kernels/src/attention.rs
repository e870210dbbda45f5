//! Causal attention of query rows over a paged KV cache, grouped-query heads, f32.
//!
//! For each query head and position: scores over all positions up to its own, softmax, weighted sum of the values.
//! Scores are lane sums joined as [`Simd::sums`] does, the softmax's sum has one lane per position modulo 8, values are
//! summed from position 0 up: so a row's result does not depend on the rows beside it. Positions after a row's own
//! count with weight zero, which changes no bit of a finite sum.

use std::cell::RefCell;

use rayon::prelude::*;

use crate::exp::exp;
use crate::simd::{Simd, dispatch};

/// Rows (query heads times tokens) that pass over the cache together.
const ROWS: usize = 24;
/// Rows whose accumulators are in registers at the same time.
const GROUP: usize = 3;
/// Values of a head that are summed at the same time: 4 vectors of 8 lanes for each of `GROUP` rows.
const WIDTH: usize = 32;

/// One layer of the cache: keys and values, each `[slots, kv_heads, head_dim]`, a block being `block_tokens` slots.
#[derive(Clone, Copy)]
pub struct KvLayer<'a> {
    /// Keys, after the rotary embedding.
    pub k: &'a [f32],
    /// Values.
    pub v: &'a [f32],
    /// Key/value heads.
    pub kv_heads: usize,
    /// Values in a head.
    pub head_dim: usize,
    /// Token positions in a block.
    pub block_tokens: usize,
}

/// Consecutive query tokens of one sequence.
#[derive(Clone, Copy)]
pub struct Span<'a> {
    /// Block numbers of the sequence's table; cover `start + tokens` positions at least.
    pub blocks: &'a [u32],
    /// Position of the first query token.
    pub start: usize,
    /// Query tokens.
    pub tokens: usize,
}

/// Attention of all `spans`, whose query rows follow each other in `q` and `out`, both `[tokens, heads, head_dim]`.
///
/// The keys and values of the query tokens themselves lie in the cache already. Runs on the current rayon pool.
pub fn paged_attention(layer: KvLayer<'_>, q: &[f32], heads: usize, spans: &[Span<'_>], out: &mut [f32]) {
    let row = heads * layer.head_dim;
    assert!(heads > 0 && heads.is_multiple_of(layer.kv_heads), "{heads} heads in groups of {}", layer.kv_heads);
    let tokens: usize = spans.iter().map(|s| s.tokens).sum();
    assert!(q.len() == tokens * row && out.len() == tokens * row, "q and out are [tokens, heads, head_dim]");
    let slots = layer.k.len() / (layer.kv_heads * layer.head_dim);
    assert_eq!(layer.k.len(), layer.v.len());
    for span in spans {
        let blocks = &span.blocks[..(span.start + span.tokens).div_ceil(layer.block_tokens)];
        assert!(blocks.iter().all(|&b| (b as usize + 1) * layer.block_tokens <= slots), "a block table points outside of the cache");
    }

    let group = heads / layer.kv_heads;
    let step = (ROWS / group).max(1);
    let mut tasks = Vec::new();
    let mut first = 0;
    for span in spans {
        for offset in (0..span.tokens).step_by(step) {
            let tokens = step.min(span.tokens - offset);
            for kv_head in 0..layer.kv_heads {
                tasks.push(Task { blocks: span.blocks, position: span.start + offset, tokens, row: first + offset, kv_head });
            }
        }
        first += span.tokens;
    }
    let out = Output(out.as_mut_ptr());
    let run = |task: &Task<'_>| {
        SCRATCH.with_borrow_mut(|scratch| dispatch!(attend(layer, q, group, *task, out, scratch)));
    };
    if tasks.len() == 1 || rayon::current_num_threads() == 1 {
        tasks.iter().for_each(run);
    } else {
        tasks.par_iter().for_each(run);
    }
}

/// The query heads of one KV head for a few consecutive tokens.
#[derive(Clone, Copy)]
struct Task<'a> {
    blocks: &'a [u32],
    /// Position of the first token.
    position: usize,
    tokens: usize,
    /// The first token's row in `q` and `out`.
    row: usize,
    kv_head: usize,
}

/// Where results go: each task writes its own tokens' and heads' rows only.
#[derive(Clone, Copy)]
struct Output(*mut f32);

// SAFETY: tasks write disjoint rows, and the slice behind the pointer is borrowed mutably while they run.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// A thread's buffers, kept so that a step allocates nothing.
#[derive(Default)]
struct Scratch {
    /// `[rows, positions padded to 8]`
    scores: Vec<f32>,
    /// `[rows, head_dim]`, scaled
    queries: Vec<f32>,
    /// Offset of each position's row of this KV head.
    offsets: Vec<usize>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[inline(always)]
fn attend<S: Simd>(s: S, layer: KvLayer<'_>, q: &[f32], group: usize, task: Task<'_>, out: Output, scratch: &mut Scratch) {
    let KvLayer { kv_heads, head_dim, block_tokens, .. } = layer;
    let rows = task.tokens * group;
    let context = task.position + task.tokens;
    let padded = context.next_multiple_of(8);
    let scale = 1.0 / (head_dim as f32).sqrt();
    // Row r is head r % group of the task's token r / group.
    let place = |r: usize| ((task.row + r / group) * kv_heads * group + task.kv_head * group + r % group) * head_dim;

    let Scratch { scores, queries, offsets } = scratch;
    queries.clear();
    for r in 0..rows {
        queries.extend(q[place(r)..place(r) + head_dim].iter().map(|x| x * scale));
    }
    offsets.clear();
    offsets.extend((0..context).map(|p| {
        let slot = task.blocks[p / block_tokens] as usize * block_tokens + p % block_tokens;
        (slot * kv_heads + task.kv_head) * head_dim
    }));
    scores.resize(rows * padded, 0.0);

    // SAFETY (of the pointer reads below): `paged_attention` checked that all blocks lie in the cache, so every offset
    // has `head_dim` values behind it in `k` and in `v`.
    for p in (0..context).step_by(4) {
        let keys: [&[f32]; 4] = std::array::from_fn(|i| {
            let offset = offsets[(p + i).min(context - 1)];
            &layer.k[offset..offset + head_dim]
        });
        for r in 0..rows {
            let query = &queries[r * head_dim..(r + 1) * head_dim];
            let dots = dot4(s, query, keys);
            // `padded` is a multiple of 4 and at least p + 4.
            scores[r * padded + p..r * padded + p + 4].copy_from_slice(&dots);
        }
    }

    for r in 0..rows {
        let scores = &mut scores[r * padded..(r + 1) * padded];
        let seen = task.position + r / group + 1;
        scores[seen..].fill(f32::NEG_INFINITY);
        let inverse = 1.0 / softmax_numerators(s, scores);
        // The numerators are left as they are; the sum divides the result below, through the query's place.
        queries[r * head_dim] = inverse;
    }

    for first in (0..rows).step_by(GROUP) {
        let count = GROUP.min(rows - first);
        let weights: [&[f32]; GROUP] = std::array::from_fn(|i| {
            let r = first + i.min(count - 1);
            &scores[r * padded..r * padded + context]
        });
        let mut column = 0;
        while column < head_dim {
            let width = WIDTH.min(head_dim - column);
            let mut sums = [[0.0f32; WIDTH]; GROUP];
            if width == WIDTH {
                sum_values::<S>(s, layer.v, offsets, column, weights, &mut sums);
            } else {
                for (p, &offset) in offsets.iter().enumerate() {
                    for (row, weights) in sums.iter_mut().zip(weights) {
                        for (sum, v) in row.iter_mut().zip(&layer.v[offset + column..offset + column + width]) {
                            *sum = weights[p].mul_add(*v, *sum);
                        }
                    }
                }
            }
            for (i, row) in sums.iter().enumerate().take(count) {
                let r = first + i;
                let inverse = queries[r * head_dim];
                for (c, x) in row.iter().enumerate().take(width) {
                    // SAFETY: `place(r)` and the head behind it lie in `out`, which has q's length, and are this task's alone.
                    unsafe { *out.0.add(place(r) + column + c) = x * inverse };
                }
            }
            column += width;
        }
    }
}

/// Dot products of one query with four keys.
#[inline(always)]
fn dot4<S: Simd>(s: S, query: &[f32], keys: [&[f32]; 4]) -> [f32; 4] {
    let n = query.len();
    let mut sums = [s.splat(0.0); 4];
    let whole = n - n % 8;
    for i in (0..whole).step_by(8) {
        // SAFETY: query and keys have n values, i + 8 <= n.
        unsafe {
            let q = s.load(query.as_ptr().add(i));
            for (sum, key) in sums.iter_mut().zip(keys) {
                debug_assert_eq!(key.len(), n);
                *sum = s.fma(q, s.load(key.as_ptr().add(i)), *sum);
            }
        }
    }
    let mut dots = s.sums(sums);
    for (dot, key) in dots.iter_mut().zip(keys) {
        for i in whole..n {
            *dot = query[i].mul_add(key[i], *dot);
        }
    }
    dots
}

/// Turns scores into `e^(score - highest)` and returns their sum. The length is a multiple of 8.
#[inline(always)]
fn softmax_numerators<S: Simd>(s: S, scores: &mut [f32]) -> f32 {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = s.splat(0.0);
    for eight in scores.chunks_exact_mut(8) {
        // SAFETY: eight values are there.
        unsafe {
            let e = exp(s, s.sub(s.load(eight.as_ptr()), s.splat(highest)));
            s.store(eight.as_mut_ptr(), e);
            sum = s.add(sum, e);
        }
    }
    s.sum(sum)
}

/// Weighted sums of `WIDTH` columns of the values, for `GROUP` rows.
#[inline(always)]
fn sum_values<S: Simd>(s: S, v: &[f32], offsets: &[usize], column: usize, weights: [&[f32]; GROUP], to: &mut [[f32; WIDTH]; GROUP]) {
    let mut sums = [[s.splat(0.0); WIDTH / 8]; GROUP];
    for (p, &offset) in offsets.iter().enumerate() {
        let values = &v[offset + column..offset + column + WIDTH];
        // SAFETY: 32 values are there.
        let values: [S::V; WIDTH / 8] = std::array::from_fn(|i| unsafe { s.load(values.as_ptr().add(i * 8)) });
        for (sum, weights) in sums.iter_mut().zip(weights) {
            let w = s.splat(weights[p]);
            for (sum, v) in sum.iter_mut().zip(values) {
                *sum = s.fma(w, v, *sum);
            }
        }
    }
    for (to, sums) in to.iter_mut().zip(sums) {
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: `to` has 32 values.
            unsafe { s.store(to.as_mut_ptr().add(i * 8), sum) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Case {
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        block_tokens: usize,
        k: Vec<f32>,
        v: Vec<f32>,
    }

    impl Case {
        fn new(heads: usize, kv_heads: usize, head_dim: usize, block_tokens: usize, slots: usize) -> Self {
            let noise = |seed: u64| {
                let mut state = seed;
                (0..slots * kv_heads * head_dim)
                    .map(|_| {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
                    })
                    .collect()
            };
            Self { heads, kv_heads, head_dim, block_tokens, k: noise(1), v: noise(2) }
        }

        fn layer(&self) -> KvLayer<'_> {
            KvLayer { k: &self.k, v: &self.v, kv_heads: self.kv_heads, head_dim: self.head_dim, block_tokens: self.block_tokens }
        }

        fn queries(&self, tokens: usize) -> Vec<f32> {
            (0..tokens * self.heads * self.head_dim).map(|i| ((i * 7919 % 1013) as f32 / 1013.0 - 0.5) * 3.0).collect()
        }

        fn run(&self, q: &[f32], spans: &[Span<'_>]) -> Vec<f32> {
            let mut out = vec![f32::NAN; q.len()];
            paged_attention(self.layer(), q, self.heads, spans, &mut out);
            out
        }

        /// The definition, in f64.
        fn reference(&self, q: &[f32], span: Span<'_>) -> Vec<f32> {
            let Self { heads, kv_heads, head_dim, block_tokens, .. } = *self;
            let mut out = Vec::new();
            for t in 0..span.tokens {
                for h in 0..heads {
                    let q = &q[(t * heads + h) * head_dim..][..head_dim];
                    let at = |p: usize| {
                        ((span.blocks[p / block_tokens] as usize * block_tokens + p % block_tokens) * kv_heads + h / (heads / kv_heads))
                            * head_dim
                    };
                    let scores: Vec<f64> = (0..=span.start + t)
                        .map(|p| {
                            q.iter().zip(&self.k[at(p)..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
                                / (head_dim as f64).sqrt()
                        })
                        .collect();
                    let highest = scores.iter().copied().fold(f64::MIN, f64::max);
                    let e: Vec<f64> = scores.iter().map(|s| (s - highest).exp()).collect();
                    let sum: f64 = e.iter().sum();
                    for d in 0..head_dim {
                        out.push((e.iter().enumerate().map(|(p, e)| e * f64::from(self.v[at(p) + d])).sum::<f64>() / sum) as f32);
                    }
                }
            }
            out
        }
    }

    #[test]
    fn it_is_attention() {
        for (heads, kv_heads, head_dim, start, tokens) in
            [(9, 3, 64, 0, 37), (4, 4, 16, 5, 1), (8, 2, 40, 33, 12), (2, 1, 128, 0, 1), (3, 3, 6, 2, 3)]
        {
            let case = Case::new(heads, kv_heads, head_dim, 8, 128);
            let span = Span { blocks: &[9, 2, 15, 4, 0, 7], start, tokens };
            let q = case.queries(tokens);
            for (got, want) in case.run(&q, &[span]).iter().zip(case.reference(&q, span)) {
                assert!((got - want).abs() < 1e-5, "{got} is not {want}");
            }
        }
    }

    #[test]
    fn a_row_is_the_same_bits_in_any_company() {
        let case = Case::new(9, 3, 64, 8, 256);
        let blocks: Vec<u32> = (0..12).rev().collect();
        let other: Vec<u32> = (12..24).collect();
        let q = case.queries(80);
        let row = 9 * 64;
        let whole = case.run(&q, &[Span { blocks: &blocks, start: 3, tokens: 80 }]);
        // Cut in pieces, and beside another sequence.
        let mut first = 0;
        for tokens in [1, 2, 7, 30, 40] {
            let mut mixed = case.queries(5);
            mixed.extend(&q[first * row..(first + tokens) * row]);
            let spans = [Span { blocks: &other, start: 60, tokens: 5 }, Span { blocks: &blocks, start: 3 + first, tokens }];
            assert_eq!(
                case.run(&mixed, &spans)[5 * row..],
                whole[first * row..(first + tokens) * row],
                "tokens {first}..{}",
                first + tokens
            );
            first += tokens;
        }
    }
}
