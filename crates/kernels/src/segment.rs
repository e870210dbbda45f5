//! Attention to one segment of the context: scores, softmax numerators with their sum and greatest score, weighted sum of
//! the values.
//!
//! Each row's numbers are fixed chains of operations over the head or the positions, whatever rows share a tile.

use std::ops::Range;

use crate::exp::exp;
use crate::kv::{Both, KvShape};
use crate::number::Number;
use crate::rows::{capped, join};
use crate::simd::Simd;

/// Positions whose scores are computed before any is used.
pub(crate) const SEGMENT: usize = 128;

/// `count` positions from `from` on, a multiple of [`SEGMENT`], of one sequence's cache and one KV head.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    pub(crate) shape: KvShape,
    pub(crate) blocks: &'a [u32],
    pub(crate) kv_head: usize,
    pub(crate) from: usize,
    pub(crate) count: usize,
    /// Scores are bounded by it: see [`crate::Scores`].
    pub(crate) cap: Option<f32>,
    /// What this thread attends to next, where its rows are so few that it would wait for it.
    pub(crate) next: Option<Next<'a>>,
}

/// The segment from a position on, of a KV head of a sequence.
#[derive(Clone, Copy)]
pub(crate) struct Next<'a> {
    pub(crate) blocks: &'a [u32],
    pub(crate) kv_head: usize,
    pub(crate) from: usize,
}

impl Next<'_> {
    /// The block that its position `done` begins, or is the first looked at of; `None` in the middle of one, and after the last.
    #[inline(always)]
    pub(crate) fn block(&self, done: usize, block_tokens: usize) -> Option<usize> {
        let position = self.from + done;
        let begins = done == 0 || position.is_multiple_of(block_tokens);
        self.blocks.get(position / block_tokens).filter(|_| begins).map(|block| *block as usize)
    }
}

/// What `queries`, `[rows, head_dim]` and scaled, make of a segment of which row `r` sees the positions `seen(r)`.
///
/// `part` is `[rows, 2 + padded head]`: greatest score, sum of numerators, weighted sum. `scores`, `[rows, SEGMENT]`, are for its own use.
#[inline(always)]
pub(crate) fn attend_segment<S: Simd, T: Number>(
    s: S,
    kv: &Both<T>,
    segment: Segment<'_>,
    queries: &[f32],
    seen: impl Fn(usize) -> Range<usize>,
    scores: &mut [f32],
    part: &mut [f32],
) {
    let Segment { shape, blocks, kv_head, from, count, cap, .. } = segment;
    let (head_dim, width) = (shape.head_dim, 2 + shape.padded());
    let rows = queries.len() / head_dim;
    let tiles = count.div_ceil(16);
    let most = tiles_together::<S>(rows);
    let mut tile = 0;
    while tile < tiles {
        let together = if tiles - tile < most { 1 } else { most };
        let mut keys: [&[T]; MOST_TILES] = [&[]; MOST_TILES];
        for (i, keys) in keys.iter_mut().enumerate().take(together) {
            let position = from + (tile + i) * 16;
            let block = blocks[position / shape.block_tokens] as usize;
            let offset = position % shape.block_tokens;
            *keys = &kv.k[shape.k_at(block, kv_head) + offset..];
            if rows >= MANY_ROWS {
                continue;
            }
            // Blocks lie anywhere, so the processor does not foresee them: the values that these keys' scores will weigh, and the next keys.
            prefetch(s, &kv.v[shape.v_at(block, kv_head) + offset * shape.padded()..], 16 * shape.padded());
            let after = position + together * 16;
            if let Some(&next) = blocks.get(after / shape.block_tokens)
                && after < from + count
                && shape.block_tokens == 16
            {
                prefetch(s, &kv.k[shape.k_at(next as usize, kv_head)..], 16 * head_dim);
            }
        }
        let to = &mut scores[tile * 16..];
        match together {
            4 => score_rows::<S, T, 4>(s, [keys[0], keys[1], keys[2], keys[3]], shape.block_tokens, queries, head_dim, rows, to),
            2 => score_rows::<S, T, 2>(s, [keys[0], keys[1]], shape.block_tokens, queries, head_dim, rows, to),
            _ => score_rows::<S, T, 1>(s, [keys[0]], shape.block_tokens, queries, head_dim, rows, to),
        }
        tile += together;
    }
    for r in 0..rows {
        let scores = &mut scores[r * SEGMENT..][..count.next_multiple_of(16)];
        bound(s, scores, cap, seen(r));
        part[r * width..][..2].copy_from_slice(&softmax_numerators(s, scores));
    }
    sum_values(s, kv, segment, scores, rows, part);
}

/// Bounds a row's scores, and leaves out those of positions that it does not see.
#[inline(always)]
pub(crate) fn bound<S: Simd>(s: S, scores: &mut [f32], cap: Option<f32>, seen: Range<usize>) {
    if let Some(cap) = cap {
        capped(s, scores, cap);
    }
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
}

/// Most tiles of 16 positions whose scores are computed together.
const MOST_TILES: usize = 4;

/// How many tiles are. A row's score is one chain of multiply-adds, each of which waits for the one before: a few rows alone leave
/// the processor waiting, and several tiles give it other chains to go on with, as far as there are registers.
fn tiles_together<S: Simd>(rows: usize) -> usize {
    match (S::LANES, rows) {
        (16, ..=3) => 4,
        (16, ..=6) => 2,
        (_, ..=2) => 2,
        _ => 1,
    }
}

/// Rows with which arithmetic takes so long that the processor itself fetches what comes next in time.
const MANY_ROWS: usize = 12;

/// Asks for the first `count` numbers.
#[inline(always)]
fn prefetch<S: Simd, T>(s: S, numbers: &[T], count: usize) {
    let first = numbers.as_ptr().cast::<u8>();
    for at in (0..count.min(numbers.len()) * size_of::<T>()).step_by(64) {
        s.prefetch(first.wrapping_add(at));
    }
}

/// Scores of all rows for `N` tiles of 16 positions, whose keys are `[head_dim, step]` each; `to` is `[rows, SEGMENT]` from the first
/// of them on.
#[inline(always)]
fn score_rows<S: Simd, T: Number, const N: usize>(
    s: S,
    keys: [&[T]; N],
    step: usize,
    queries: &[f32],
    head_dim: usize,
    rows: usize,
    to: &mut [f32],
) {
    let mut row = 0;
    while row < rows {
        let most = if S::LANES == 16 { 12 } else { 6 };
        let count = most.min(rows - row);
        let (queries, to) = (&queries[row * head_dim..], &mut to[row * SEGMENT..]);
        macro_rules! rows {
            ($($n:literal)*) => {
                match count {
                    $($n if S::LANES == 16 => score_tile::<S, T, $n, N, 1>(s, keys, step, queries, head_dim, to),
                    $n => score_tile::<S, T, $n, N, 2>(s, keys, step, queries, head_dim, to),)*
                    _ => unreachable!("a tile has at most 12 rows"),
                }
            };
        }
        // More than one tile is taken together only of few rows.
        if N == 4 {
            rows!(1 2 3);
        } else if N == 2 {
            rows!(1 2 3 4 5 6);
        } else {
            rows!(1 2 3 4 5 6 7 8 9 10 11 12);
        }
        row += count;
    }
}

/// One chain of multiply-adds over the head for each of `R` rows and 16 positions, `P` vectors, of each of `N` tiles.
#[inline(always)]
fn score_tile<S: Simd, T: Number, const R: usize, const N: usize, const P: usize>(
    s: S,
    keys: [&[T]; N],
    step: usize,
    queries: &[f32],
    head_dim: usize,
    to: &mut [f32],
) {
    assert!(keys.iter().all(|keys| keys.len() >= (head_dim - 1) * step + 16));
    assert!(queries.len() >= R * head_dim && to.len() >= (R - 1) * SEGMENT + N * 16);
    let mut sums = [[[s.splat(0.0); P]; N]; R];
    for d in 0..head_dim {
        let mut lines = [[s.splat(0.0); P]; N];
        for (keys, line) in keys.iter().zip(&mut lines) {
            for (p, line) in line.iter_mut().enumerate() {
                // SAFETY: 16 keys are there, `P` vectors.
                *line = unsafe { T::load(s, keys.as_ptr().add(d * step + p * S::LANES)) };
            }
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: there are `R * head_dim` queries.
            let q = s.splat(unsafe { *queries.get_unchecked(r * head_dim + d) });
            for (sums, line) in sums.iter_mut().zip(lines) {
                for (sum, key) in sums.iter_mut().zip(line) {
                    *sum = s.fma(q, key, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (n, sums) in sums.into_iter().enumerate() {
            for (p, sum) in sums.into_iter().enumerate() {
                // SAFETY: 16 scores of each tile have room in each row.
                unsafe { s.store(to.as_mut_ptr().add(r * SEGMENT + n * 16 + p * S::LANES), sum) };
            }
        }
    }
}

/// Turns scores into `e^(score - greatest)`; gives the greatest score and the sum. The length is a multiple of 16.
/// Where no score is above minus infinity all become 0.
#[inline(always)]
pub(crate) fn softmax_numerators<S: Simd>(s: S, scores: &mut [f32]) -> [f32; 2] {
    let mut highest = s.splat(f32::NEG_INFINITY);
    for scores in scores.chunks_exact(S::LANES) {
        // SAFETY: the chunk has `LANES` values.
        highest = s.max(unsafe { s.load(scores.as_ptr()) }, highest);
    }
    let highest = s.greatest(highest);
    if highest == f32::NEG_INFINITY {
        scores.fill(0.0);
        return [highest, 0.0];
    }
    let mut sums = [0.0f32; 16];
    for scores in scores.chunks_exact_mut(16) {
        for i in (0..16).step_by(S::LANES) {
            // SAFETY: the chunk has 16 values, and so have the sums.
            unsafe {
                let e = exp(s, s.sub(s.load(scores.as_ptr().add(i)), s.splat(highest)));
                s.store(scores.as_mut_ptr().add(i), e);
                s.store(sums.as_mut_ptr().add(i), s.add(s.load(sums.as_ptr().add(i)), e));
            }
        }
    }
    [highest, join(sums)]
}

/// Weighted sums of the segment's values, into `part`, `[rows, 2 + padded head]`, from the third number of each row on.
/// `weights` are `[rows, SEGMENT]`.
#[inline(always)]
fn sum_values<S: Simd, T: Number>(s: S, kv: &Both<T>, mut segment: Segment<'_>, weights: &[f32], rows: usize, part: &mut [f32]) {
    let padded = segment.shape.padded();
    let most = if S::LANES == 16 { 6 } else { 3 };
    let mut column = 0;
    while column < padded {
        let wide = padded - column >= 4 * S::LANES;
        let mut row = 0;
        while row < rows {
            let weights = &weights[row * SEGMENT..];
            let to = &mut part[row * (2 + padded)..];
            let n = most.min(rows - row);
            macro_rules! rows {
                ($($n:literal)*) => {
                    match n {
                        $($n if wide => value_tile::<S, T, $n, 4>(s, kv, segment, column, weights, to),
                        $n => value_tile::<S, T, $n, 1>(s, kv, segment, column, weights, to),)*
                        _ => unreachable!("a tile has at most 6 rows"),
                    }
                };
            }
            rows!(1 2 3 4 5 6);
            row += n;
            // Asked for once.
            segment.next = None;
        }
        column += if wide { 4 * S::LANES } else { S::LANES };
    }
}

/// One chain of multiply-adds over the positions for each of `R` rows and `W` vectors of columns.
#[inline(always)]
fn value_tile<S: Simd, T: Number, const R: usize, const W: usize>(
    s: S,
    kv: &Both<T>,
    segment: Segment<'_>,
    column: usize,
    weights: &[f32],
    to: &mut [f32],
) {
    let Segment { shape, blocks, kv_head, from, count, next, .. } = segment;
    let padded = shape.padded();
    assert!(column + W * S::LANES <= padded && weights.len() >= (R - 1) * SEGMENT + count && to.len() >= R * (2 + padded));
    let mut sums = [[s.splat(0.0); W]; R];
    let mut done = 0;
    while done < count {
        let position = from + done;
        let offset = position % shape.block_tokens;
        let run = (shape.block_tokens - offset).min(count - done);
        let block = blocks[position / shape.block_tokens] as usize;
        // Memory has nothing to do while values that are here already are weighed: it brings the keys that come next.
        if let Some(next) = next
            && let Some(block) = next.block(done, shape.block_tokens)
            && let Some(keys) = kv.k.get(shape.k_at(block, next.kv_head)..)
        {
            prefetch(s, keys, shape.head_dim * shape.block_tokens);
        }
        let values = &kv.v[shape.v_at(block, kv_head) + offset * padded..][..run * padded];
        for i in 0..run {
            let mut line = [s.splat(0.0); W];
            for (w, line) in line.iter_mut().enumerate() {
                // SAFETY: position `i` has `padded` values, of which the columns are some.
                *line = unsafe { T::load(s, values.as_ptr().add(i * padded + column + w * S::LANES)) };
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row `r` has `count` weights from `r * SEGMENT` on.
                let weight = s.splat(unsafe { *weights.get_unchecked(r * SEGMENT + done + i) });
                for (sum, value) in sums.iter_mut().zip(line) {
                    *sum = s.fma(weight, value, *sum);
                }
            }
        }
        done += run;
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (w, sum) in sums.into_iter().enumerate() {
            // SAFETY: `to` has `R` rows of `2 + padded`.
            unsafe { s.store(to.as_mut_ptr().add(r * (2 + padded) + 2 + column + w * S::LANES), sum) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes;
    use crate::simd::dispatch;

    #[test]
    fn numerators_are_those_of_the_greatest_score_and_unseen_positions_have_none() {
        for unit in lanes::here() {
            let numerators = |scores: &mut [f32]| lanes::on(unit, || dispatch!(softmax_numerators(scores)));
            let mut scores = [f32::NEG_INFINITY; 32];
            assert_eq!(numerators(&mut scores), [f32::NEG_INFINITY, 0.0], "{unit}");
            assert_eq!(scores, [0.0; 32], "{unit}");
            // One is the greatest, wherever it lies.
            for greatest in 0..32 {
                let mut scores = [f32::NEG_INFINITY; 32];
                (scores[greatest], scores[(greatest + 5) % 32]) = (-3.0, -4.0);
                let [highest, sum] = numerators(&mut scores);
                assert!(highest == -3.0 && (sum - 1.0 - (-1.0f32).exp()).abs() < 1e-6, "{unit}: {highest}, {sum}");
                assert!(scores[greatest] == 1.0 && scores.iter().filter(|e| **e == 0.0).count() == 30, "{unit}");
            }
        }
    }
}
