//! Causal attention of query rows over the paged KV cache, grouped-query heads.
//!
//! The context is cut into segments of 128 positions, counted from 0, which `segment.rs` attends to. They are then joined
//! in their order. A prompt's tokens go through the segments one after the other; a decode step's token has them computed
//! on several threads, and joined after. Both give the same bits, since each number is one fixed chain of operations.
//! Positions after a row's own count with weight zero, which changes no bit of a finite sum.

use std::cell::RefCell;
use std::ops::Range;

use crate::disjoint::Disjoint;
use crate::exp::exp;
use crate::kv::int8::Int8;
use crate::kv::{Both, KvLayer, KvShape, Run, Stored};
use crate::number::Number;
use crate::segment::{self, Next, SEGMENT, Segment};
use crate::segment_int8::{self, IntRows};
use crate::simd::{Simd, dispatch};
use crate::thread_pool::ThreadPool;

/// Rows (query heads of one KV head times tokens) that pass over the cache together.
const ROWS: usize = 24;

/// How the products of queries and keys become weights.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    /// What a product is multiplied by.
    pub scale: f32,
    /// A score becomes `cap * tanh(score / cap)`.
    pub cap: Option<f32>,
    /// A token sees so many positions, itself the last of them; all there are where it is `None`.
    pub window: Option<usize>,
}

impl Scores {
    /// Plain attention: scores divided by the root of the head size.
    pub fn plain(head_dim: usize) -> Self {
        Self { scale: 1.0 / (head_dim as f32).sqrt(), cap: None, window: None }
    }

    /// The first position that the token at `position` sees.
    fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Buffers of [`paged_attention`], kept so that a step allocates nothing.
#[derive(Default)]
pub struct AttentionScratch {
    tasks: Vec<Task>,
    joins: Vec<Join>,
    /// `[segment's rows, 2 + padded head]`: greatest score, sum of numerators, weighted sum.
    partial: Vec<f32>,
}

/// The query heads of one KV head for a few consecutive tokens.
#[derive(Clone, Copy)]
struct Task {
    span: usize,
    /// Position of the first token.
    position: usize,
    tokens: usize,
    /// The first token's row in `q` and `out`.
    row: usize,
    kv_head: usize,
    /// One segment, whose rows are left at this place among the partial results; `None` for all segments.
    segment: Option<(usize, usize)>,
}

/// Partial results that make up one token's heads of one KV head.
#[derive(Clone, Copy)]
struct Join {
    row: usize,
    kv_head: usize,
    first: usize,
    segments: usize,
}

/// Attention of all `spans`, whose query rows follow each other in `q`, `[tokens, stride]`; `out` is `[tokens, heads, head_dim]`.
///
/// The keys and values of the query tokens themselves lie in the cache already.
///
/// # Panics
/// Where sizes do not fit or a block table points outside of the cache.
#[allow(clippy::too_many_arguments)] // a kernel: pool, cache, input, output
pub fn paged_attention(
    pool: &ThreadPool,
    layer: &KvLayer,
    q: &[f32],
    stride: usize,
    heads: usize,
    how: Scores,
    spans: &[Run<'_>],
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    let shape = layer.shape();
    let width = heads * shape.head_dim;
    assert!(heads > 0 && heads.is_multiple_of(shape.kv_heads), "{heads} heads in groups of {}", shape.kv_heads);
    let tokens: usize = spans.iter().map(|s| s.tokens).sum();
    assert!(
        width <= stride && q.len() >= tokens * stride && out.len() == tokens * width,
        "q is [tokens, stride], out [tokens, heads, head_dim]"
    );
    for span in spans {
        let blocks = &span.blocks[..(span.start + span.tokens).div_ceil(shape.block_tokens)];
        assert!(blocks.iter().all(|&b| (b as usize) < shape.blocks), "a block table points outside of the cache");
    }

    let group = heads / shape.kv_heads;
    let AttentionScratch { tasks, joins, partial } = scratch;
    let partial_rows = plan(shape, group, how, spans, tasks, joins);
    partial.resize(partial_rows * (2 + shape.padded()), 0.0);
    let context: usize = spans.iter().map(|s| s.start + s.tokens - how.first(s.start)).sum();
    let call = Call { shape, how, q, stride, group, out: Disjoint::new(out), partial: Disjoint::new(partial) };
    let run = |i: usize| {
        let task = &tasks[i];
        // The thread's next task, most of the time; a prompt's tokens have many segments before it.
        let next = task.segment.and(tasks.get(i + 1)).and_then(|next| {
            let (segment, _) = next.segment?;
            Some(Next { blocks: spans[next.span].blocks, kv_head: next.kv_head, from: segment * SEGMENT })
        });
        let blocks = spans[task.span].blocks;
        SCRATCH.with_borrow_mut(|local| match &layer.stored {
            Stored::F32(both) => dispatch!(attend(both, call, blocks, *task, next, local)),
            Stored::F16(both) => dispatch!(attend(both, call, blocks, *task, next, local)),
            Stored::Int8(both) => dispatch!(attend(both, call, blocks, *task, next, local)),
        });
    };
    // A position costs some ten nanoseconds for each KV head.
    let cost = (context * shape.kv_heads * 10 / tasks.len().max(1)).max(1);
    pool.rows(tasks.len(), cost, run);
    pool.rows(joins.len(), shape.head_dim * group / 4, |i| dispatch!(join_segments(call, joins[i])));
}

/// Cuts the work into tasks; gives how many rows of partial results they leave.
fn plan(shape: KvShape, group: usize, how: Scores, spans: &[Run<'_>], tasks: &mut Vec<Task>, joins: &mut Vec<Join>) -> usize {
    tasks.clear();
    joins.clear();
    let step = (ROWS / group).max(1);
    let (mut first, mut partial_rows) = (0, 0);
    for (span, run) in spans.iter().enumerate() {
        let segments = how.first(run.start) / SEGMENT..(run.start + run.tokens).div_ceil(SEGMENT);
        for kv_head in 0..shape.kv_heads {
            if run.tokens == 1 && segments.len() > 1 {
                joins.push(Join { row: first, kv_head, first: partial_rows, segments: segments.len() });
                for segment in segments.clone() {
                    let segment = Some((segment, partial_rows));
                    tasks.push(Task { span, position: run.start, tokens: 1, row: first, kv_head, segment });
                    partial_rows += group;
                }
            } else {
                for offset in (0..run.tokens).step_by(step) {
                    let tokens = step.min(run.tokens - offset);
                    tasks.push(Task { span, position: run.start + offset, tokens, row: first + offset, kv_head, segment: None });
                }
            }
        }
        first += run.tokens;
    }
    partial_rows
}

/// What the tasks of one call share.
#[derive(Clone, Copy)]
struct Call<'a> {
    shape: KvShape,
    how: Scores,
    q: &'a [f32],
    stride: usize,
    group: usize,
    /// Each task writes its own tokens' and heads' numbers only.
    out: Disjoint<'a, f32>,
    /// Each task writes its own rows only.
    partial: Disjoint<'a, f32>,
}

/// A thread's buffers.
#[derive(Default)]
struct Local {
    /// `[rows, SEGMENT]`
    scores: Vec<f32>,
    /// `[rows, head_dim]`, scaled
    queries: Vec<f32>,
    /// What an int8 cache makes of them.
    integers: IntRows,
    /// Of one segment: `[rows, 2 + padded head]`, as the partial results have it.
    part: Vec<f32>,
    /// Of all segments so far, likewise.
    state: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Local> = RefCell::default();
}

/// Keys and values as one of the formats stores them.
trait Cached {
    /// Told of a task's queries, `[rows, head_dim]`, before its first segment.
    fn begin<S: Simd>(s: S, queries: &[f32], head_dim: usize, integers: &mut IntRows);

    /// What the queries make of a segment: see [`segment::attend_segment`].
    fn segment<S: Simd>(&self, s: S, segment: Segment<'_>, seen: impl Fn(usize) -> Range<usize>, rows: Rows<'_>);
}

/// The rows of a task, and where a segment's result goes.
struct Rows<'a> {
    queries: &'a [f32],
    integers: &'a mut IntRows,
    scores: &'a mut [f32],
    part: &'a mut [f32],
}

impl<T: Number> Cached for Both<T> {
    #[inline(always)]
    fn begin<S: Simd>(_: S, _: &[f32], _: usize, _: &mut IntRows) {}

    #[inline(always)]
    fn segment<S: Simd>(&self, s: S, segment: Segment<'_>, seen: impl Fn(usize) -> Range<usize>, rows: Rows<'_>) {
        segment::attend_segment(s, self, segment, rows.queries, seen, rows.scores, rows.part);
    }
}

impl Cached for Int8 {
    #[inline(always)]
    fn begin<S: Simd>(s: S, queries: &[f32], head_dim: usize, integers: &mut IntRows) {
        integers.set_queries(s, queries, head_dim);
    }

    #[inline(always)]
    fn segment<S: Simd>(&self, s: S, segment: Segment<'_>, seen: impl Fn(usize) -> Range<usize>, rows: Rows<'_>) {
        segment_int8::attend_segment(s, self, segment, rows.integers, seen, rows.scores, rows.part);
    }
}

#[inline(always)]
fn attend<S: Simd, C: Cached>(s: S, kv: &C, call: Call<'_>, blocks: &[u32], task: Task, next: Option<Next<'_>>, local: &mut Local) {
    let Call { shape, how, group, .. } = call;
    let (head_dim, width) = (shape.head_dim, 2 + shape.padded());
    let rows = task.tokens * group;
    let context = task.position + task.tokens;
    let Local { scores, queries, integers, part, state } = local;
    queries.clear();
    for r in 0..rows {
        // Row r is head r % group of the task's token r / group.
        let at = (task.row + r / group) * call.stride + (task.kv_head * group + r % group) * head_dim;
        queries.extend(call.q[at..at + head_dim].iter().map(|x| x * how.scale));
    }
    C::begin(s, queries, head_dim, integers);
    scores.resize(rows * SEGMENT, 0.0);
    part.resize(rows * width, 0.0);
    state.resize(rows * width, 0.0);

    let first = how.first(task.position) / SEGMENT;
    let segments = task.segment.map_or(first..context.div_ceil(SEGMENT), |(segment, _)| segment..segment + 1);
    for segment in segments {
        let from = segment * SEGMENT;
        let count = SEGMENT.min(context - from);
        let positions = Segment { shape, blocks, kv_head: task.kv_head, from, count, cap: how.cap, next };
        let within = |position: usize| position.saturating_sub(from).min(count);
        let seen = |r: usize| {
            let position = task.position + r / group;
            within(how.first(position))..within(position + 1)
        };
        kv.segment(s, positions, seen, Rows { queries, integers, scores, part });
        for r in 0..rows {
            let position = task.position + r / group;
            // A segment that a row does not see changes nothing. The first that it sees begins its sums.
            let begins = how.first(position) / SEGMENT;
            if segment == begins || task.segment.is_some() {
                state[r * width..(r + 1) * width].copy_from_slice(&part[r * width..(r + 1) * width]);
            } else if segment > begins && position >= from {
                join_segment(s, &mut state[r * width..(r + 1) * width], &part[r * width..(r + 1) * width]);
            }
        }
    }
    match task.segment {
        // SAFETY: these rows are this task's alone.
        Some((_, first)) => unsafe { call.partial.part(first * width, rows * width) }.copy_from_slice(&state[..rows * width]),
        None => (0..rows)
            .for_each(|r| finish(call, (task.row + r / group, task.kv_head * group + r % group), &state[r * width..(r + 1) * width])),
    }
}

/// Joins the segments of one token's heads of one KV head.
#[inline(always)]
fn join_segments<S: Simd>(s: S, call: Call<'_>, join: Join) {
    let width = 2 + call.shape.padded();
    for head in 0..call.group {
        // SAFETY: a join's partial results are its own, and the tasks that wrote them are over.
        let at = |segment: usize| unsafe { call.partial.part((join.first + segment * call.group + head) * width, width) };
        let state = at(0);
        for segment in 1..join.segments {
            join_segment(s, state, at(segment));
        }
        finish(call, (join.row, join.kv_head * call.group + head), state);
    }
}

/// Weighted sums over a sum of weights; `at` is the row and the head.
#[inline(always)]
fn finish(call: Call<'_>, at: (usize, usize), state: &[f32]) {
    let KvShape { kv_heads, head_dim, .. } = call.shape;
    // SAFETY: each head of each row is written by one task.
    let out = unsafe { call.out.part((at.0 * kv_heads * call.group + at.1) * head_dim, head_dim) };
    let inverse = 1.0 / state[1];
    out.iter_mut().zip(&state[2..]).for_each(|(out, sum)| *out = sum * inverse);
}

/// Takes the next segment's result, `[2 + padded head]`, into that of the segments before it.
#[inline(always)]
fn join_segment<S: Simd>(s: S, state: &mut [f32], part: &[f32]) {
    let highest = if part[0] > state[0] { part[0] } else { state[0] };
    let (mut from, mut factors) = ([0.0f32; 16], [0.0f32; 16]);
    (from[0], from[1]) = (state[0] - highest, part[0] - highest);
    // SAFETY: both have 16 values.
    unsafe { s.store(factors.as_mut_ptr(), exp(s, s.load(from.as_ptr()))) };
    let [old, new, ..] = factors;
    state[0] = highest;
    for (a, b) in state[1..].iter_mut().zip(&part[1..]) {
        *a = b.mul_add(new, *a * old);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::kv::KvFormat;
    use crate::lanes;

    pub(crate) struct Case {
        pool: ThreadPool,
        heads: usize,
        layer: KvLayer,
        how: Scores,
    }

    impl Case {
        /// A cache full of noise.
        pub(crate) fn new(heads: usize, shape: KvShape, format: KvFormat, threads: usize) -> Self {
            let pool = ThreadPool::new(threads, &[]).unwrap();
            let mut layer = KvLayer::new(shape, format);
            let mut state = 1u64;
            let rows: Vec<f32> = (0..shape.blocks * shape.block_tokens * shape.row() * 2)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    half::f16::from_f32((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0).to_f32()
                })
                .collect();
            let blocks: Vec<u32> = (0..shape.blocks as u32).collect();
            let run = Run { blocks: &blocks, start: 0, tokens: shape.blocks * shape.block_tokens };
            layer.write(&pool, &[run], &rows, &rows[shape.row()..], 2 * shape.row());
            Self { pool, heads, layer, how: Scores::plain(shape.head_dim) }
        }

        pub(crate) fn queries(&self, tokens: usize) -> Vec<f32> {
            (0..tokens * self.heads * self.layer.shape().head_dim).map(|i| ((i * 7919 % 1013) as f32 / 1013.0 - 0.5) * 3.0).collect()
        }

        pub(crate) fn run(&self, q: &[f32], spans: &[Run<'_>]) -> Vec<f32> {
            let mut out = vec![f32::NAN; q.len()];
            let stride = self.heads * self.layer.shape().head_dim;
            paged_attention(&self.pool, &self.layer, q, stride, self.heads, self.how, spans, &mut out, &mut AttentionScratch::default());
            out
        }

        /// The definition, in f64.
        fn reference(&self, q: &[f32], span: Run<'_>) -> Vec<f32> {
            let KvShape { kv_heads, head_dim, .. } = self.layer.shape();
            let whole = Run { start: 0, tokens: span.start + span.tokens, ..span };
            let (mut k, mut v) = (vec![0.0; whole.tokens * kv_heads * head_dim], vec![0.0; whole.tokens * kv_heads * head_dim]);
            self.layer.read(whole, &mut k, &mut v);
            let mut out = Vec::new();
            for t in 0..span.tokens {
                for h in 0..self.heads {
                    let q = &q[(t * self.heads + h) * head_dim..][..head_dim];
                    let at = |p: usize| (p * kv_heads + h / (self.heads / kv_heads)) * head_dim;
                    let first = self.how.window.map_or(0, |window| (span.start + t + 1).saturating_sub(window));
                    let scores: Vec<f64> = (first..=span.start + t)
                        .map(|p| {
                            let product = q.iter().zip(&k[at(p)..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                            let score = product * f64::from(self.how.scale);
                            self.how.cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                        })
                        .collect();
                    let highest = scores.iter().copied().fold(f64::MIN, f64::max);
                    let e: Vec<f64> = scores.iter().map(|s| (s - highest).exp()).collect();
                    let sum: f64 = e.iter().sum();
                    for d in 0..head_dim {
                        out.push((e.iter().zip(first..).map(|(e, p)| e * f64::from(v[at(p) + d])).sum::<f64>() / sum) as f32);
                    }
                }
            }
            out
        }
    }

    pub(crate) fn shape(kv_heads: usize, head_dim: usize, block_tokens: usize, blocks: usize) -> KvShape {
        KvShape { kv_heads, head_dim, block_tokens, blocks }
    }

    #[test]
    fn it_is_attention() {
        for (heads, kv_heads, head_dim, block, start, tokens) in [
            (9, 3, 64, 16, 0, 37),
            (4, 4, 16, 16, 5, 1),
            (8, 2, 40, 32, 33, 12),
            (2, 1, 128, 16, 0, 1),
            (3, 3, 6, 16, 2, 3),
            (9, 3, 64, 16, 300, 1),
            (32, 1, 80, 64, 257, 1),
            (9, 3, 64, 32, 120, 150),
        ] {
            for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
                let case = Case::new(heads, shape(kv_heads, head_dim, block, 24), format, 2);
                let blocks: Vec<u32> = (0..24).map(|b| b * 7 % 24).filter(|b| b % 24 != 5).collect();
                let span = Run { blocks: &blocks, start, tokens };
                let q = case.queries(tokens);
                for (got, want) in case.run(&q, &[span]).iter().zip(case.reference(&q, span)) {
                    // Queries and weights are rounded too where the cache has integers.
                    let far = if format == KvFormat::Int8 { 0.02 } else { 1e-5 };
                    assert!((got - want).abs() < far, "{format:?}: {got} is not {want}");
                }
            }
        }
    }

    #[test]
    fn windows_and_caps_are_what_the_formulas_say_and_a_row_is_the_same_bits_however_it_is_cut() {
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
            for (window, cap) in
                [(Some(1), None), (Some(16), Some(0.7)), (Some(100), None), (Some(128), None), (Some(129), None), (Some(300), Some(2.0))]
            {
                let mut case = Case::new(4, shape(2, 40, 16, 30), format, 3);
                case.how = Scores { scale: 0.4, cap, window };
                let blocks: Vec<u32> = (0..30).rev().collect();
                let (tokens, row) = (400, 4 * 40);
                let q = case.queries(tokens);
                let span = Run { blocks: &blocks, start: 3, tokens };
                let whole = case.run(&q, &[span]);
                for (got, want) in whole.iter().zip(case.reference(&q, span)) {
                    let far = if format == KvFormat::Int8 { 0.05 } else { 2e-5 };
                    assert!((got - want).abs() < far, "{format:?} {window:?} {cap:?}: {got} is not {want}");
                }
                let mut first = 0;
                for tokens in [1, 2, 130, 1, 1, 60, 1, 1, 1, 202] {
                    let piece = case.run(&q[first * row..(first + tokens) * row], &[Run { blocks: &blocks, start: 3 + first, tokens }]);
                    assert!(
                        piece == whole[first * row..(first + tokens) * row],
                        "{format:?} {window:?}: tokens {first}..{}",
                        first + tokens
                    );
                    first += tokens;
                }
                assert_eq!(first, 400);
            }
        }
    }

    #[test]
    fn a_row_is_the_same_bits_in_any_company_and_on_any_number_of_threads() {
        for (threads, format) in [(1, KvFormat::F16), (3, KvFormat::F16), (1, KvFormat::Int8), (3, KvFormat::Int8)] {
            let case = Case::new(9, shape(3, 64, 16, 60), format, threads);
            let blocks: Vec<u32> = (0..30).rev().collect();
            let other: Vec<u32> = (30..60).collect();
            let (tokens, row) = (400, 9 * 64);
            let q = case.queries(tokens);
            let whole = case.run(&q, &[Run { blocks: &blocks, start: 3, tokens }]);
            // Cut in pieces, and beside another sequence. Pieces of one token are split over segments.
            let mut first = 0;
            for tokens in [1, 2, 7, 30, 40, 1, 150, 1, 1, 167] {
                let mut mixed = case.queries(1);
                mixed.extend(&q[first * row..(first + tokens) * row]);
                let spans = [Run { blocks: &other, start: 200, tokens: 1 }, Run { blocks: &blocks, start: 3 + first, tokens }];
                assert!(
                    case.run(&mixed, &spans)[row..] == whole[first * row..(first + tokens) * row],
                    "tokens {first}..{}",
                    first + tokens
                );
                first += tokens;
            }
            assert_eq!(first, 400);
        }
    }

    #[test]
    fn other_lanes_give_the_same_bits() {
        for format in [KvFormat::F16, KvFormat::Int8] {
            let case = Case::new(4, shape(2, 40, 16, 20), format, 1);
            let blocks: Vec<u32> = (0..20).collect();
            let q = case.queries(37);
            let span = Run { blocks: &blocks, start: 200, tokens: 37 };
            let want = case.run(&q, &[span]);
            for unit in lanes::here() {
                assert!(lanes::on(unit, || case.run(&q, &[span])) == want, "{format:?} on {unit}");
            }
        }
    }
}
