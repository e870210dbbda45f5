//! Attention to one segment of an int8 cache, in integers.
//!
//! Queries are rounded to integers from -127 to 127 in groups of 32, softmax's numerators, times their values' scales, in tiles of 16
//! positions: products within a group or a tile are exact, and are summed in f32 in their order. A row is rounded by itself, so what is
//! beside it changes nothing.

use std::ops::Range;

use crate::activations::{GROUP, round_group};
use crate::kv::KvShape;
use crate::kv::int8::{Int8, TILE};
use crate::segment::{SEGMENT, Segment, bound, softmax_numerators};
use crate::simd::{LINE, Simd};

/// A task's rows in integers.
#[derive(Default)]
pub(crate) struct IntRows {
    count: usize,
    /// With a scale for each group of 32.
    queries: Codes,
    /// -128 times the sum of each group's codes, `[groups, rows]`.
    by_128: Vec<i32>,
    /// What weighs the values of a segment, with a scale for each tile of 16 positions.
    weights: Codes,
}

/// Rounded numbers of some rows.
#[derive(Default)]
struct Codes {
    /// `[groups, rows, 32]`
    codes: Vec<i8>,
    /// The value of code 1, `[groups, rows]` or `[tiles, rows]`.
    scales: Vec<f32>,
}

impl IntRows {
    /// Rounds `queries`, `[rows, head_dim]`, for all segments of a task.
    #[inline(always)]
    pub(crate) fn set_queries<S: Simd>(&mut self, s: S, queries: &[f32], head_dim: usize) {
        let (rows, groups) = (queries.len() / head_dim, head_dim.div_ceil(GROUP));
        self.count = rows;
        self.queries.codes.resize(rows * groups * GROUP, 0);
        self.queries.scales.resize(rows * groups, 0.0);
        self.by_128.resize(rows * groups, 0);
        self.weights.codes.resize(rows * SEGMENT, 0);
        self.weights.scales.resize(rows * SEGMENT / TILE, 0.0);
        for (r, query) in queries.chunks_exact(head_dim).enumerate() {
            for (g, numbers) in query.chunks(GROUP).enumerate() {
                let mut group = [0.0; GROUP];
                group[..numbers.len()].copy_from_slice(numbers);
                let at = g * rows + r;
                let (scale, [low, high]) = round_group(s, &group, &mut self.queries.codes.as_chunks_mut().0[at]);
                self.queries.scales[at] = scale;
                self.by_128[at] = -128 * (low + high);
            }
        }
    }
}

/// As [`crate::segment::attend_segment`], of rows whose queries have been set.
#[inline(always)]
pub(crate) fn attend_segment<S: Simd>(
    s: S,
    kv: &Int8,
    segment: Segment<'_>,
    rows: &mut IntRows,
    seen: impl Fn(usize) -> Range<usize>,
    scores: &mut [f32],
    part: &mut [f32],
) {
    let shape = segment.shape;
    let (count_rows, width) = (rows.count, 2 + shape.padded());
    let mut places = [Place::default(); SEGMENT / TILE];
    let tiles = segment.places(&mut places);
    score_rows(s, kv, shape, tiles, rows, scores);
    for r in 0..count_rows {
        let scores = &mut scores[r * SEGMENT..][..tiles.len() * TILE];
        let seen = seen(r);
        bound(s, scores, segment.cap, seen.clone());
        part[r * width..][..2].copy_from_slice(&softmax_numerators(s, scores));
        for (t, (tile, numerators)) in tiles.iter().zip(scores.as_chunks::<TILE>().0).enumerate() {
            let here = seen.end.saturating_sub(t * TILE);
            let Some(scales) = kv.scales[tile.scales + shape.block_tokens..].as_chunks::<TILE>().0.first() else { continue };
            // What is not seen has weight 0, whatever its scale is.
            let scales = if here >= TILE { *scales } else { std::array::from_fn(|i| if i < here { scales[i] } else { 0.0 }) };
            let codes = &mut rows.weights.codes[(t / 2 * count_rows + r) * GROUP + t % 2 * TILE..][..TILE];
            rows.weights.scales[t * count_rows + r] = round_weights(s, numerators, &scales, codes);
        }
    }
    let mut column = 0;
    while column < shape.padded() {
        let wide = shape.padded() - column >= 4 * S::LANES;
        let mut row = 0;
        while row < count_rows {
            let n = (count_rows - row).min(3);
            let to = &mut part[row * width..];
            macro_rules! rows {
                ($($n:literal)*) => {
                    match n {
                        $($n if wide => value_tile::<S, $n, 4>(s, &kv.v, shape, tiles, column, &rows.weights, (row, count_rows), to),
                        $n => value_tile::<S, $n, 1>(s, &kv.v, shape, tiles, column, &rows.weights, (row, count_rows), to),)*
                        _ => unreachable!("a tile has at most 3 rows"),
                    }
                };
            }
            rows!(1 2 3);
            row += n;
        }
        column += if wide { 4 * S::LANES } else { S::LANES };
    }
}

/// Where a tile lies: which one of the layer it is, and where its keys' scales begin.
#[derive(Clone, Copy, Default)]
struct Place {
    tile: usize,
    scales: usize,
}

impl Segment<'_> {
    /// Where the segment's tiles lie.
    #[inline(always)]
    fn places<'a>(&self, to: &'a mut [Place; SEGMENT / TILE]) -> &'a [Place] {
        let Self { shape, blocks, kv_head, from, count, .. } = *self;
        let (mut block, mut offset) = (from / shape.block_tokens, from % shape.block_tokens);
        let tiles = &mut to[..count.div_ceil(TILE)];
        for place in tiles.iter_mut() {
            let at = blocks[block] as usize;
            *place = Place { tile: shape.tile_at(at, kv_head) + offset / TILE, scales: shape.k_scales_at(at, kv_head) + offset };
            offset += TILE;
            if offset == shape.block_tokens {
                (block, offset) = (block + 1, 0);
            }
        }
        tiles
    }
}

/// Scores of all rows for all tiles, two tiles together where there are registers for it: a row's chain of products leaves the
/// processor waiting, another's fills the time.
#[inline(always)]
fn score_rows<S: Simd>(s: S, kv: &Int8, shape: KvShape, tiles: &[Place], rows: &IntRows, scores: &mut [f32]) {
    let mut first = 0;
    while first < tiles.len() {
        let two = S::LANES == TILE && first + 1 < tiles.len();
        let here = &tiles[first..first + 1 + usize::from(two)];
        let keys = |i: usize| &kv.k[here[i.min(here.len() - 1)].tile * shape.k_tile()..][..shape.k_tile()];
        let scales = |i: usize| &kv.scales[here[i.min(here.len() - 1)].scales..][..TILE];
        // Blocks lie anywhere, so the processor does not foresee them: the values that these keys' scores will weigh, and the next keys.
        for place in here {
            prefetch(s, &kv.v[place.tile * shape.v_tile()..][..shape.v_tile()]);
        }
        for place in tiles.iter().skip(first + here.len()).take(2) {
            prefetch(s, &kv.k[place.tile * shape.k_tile()..][..shape.k_tile()]);
        }
        let mut row = 0;
        while row < rows.count {
            let n = (rows.count - row).min(6);
            let to = &mut scores[row * SEGMENT + first * TILE..];
            macro_rules! rows {
                ($($n:literal)*) => {
                    match n {
                        $($n if two => score_tile::<S, $n, 2>(s, [keys(0), keys(1)], [scales(0), scales(1)], rows, row, to),
                        $n => score_tile::<S, $n, 1>(s, [keys(0)], [scales(0)], rows, row, to),)*
                        _ => unreachable!("a tile has at most 6 rows"),
                    }
                };
            }
            rows!(1 2 3 4 5 6);
            row += n;
        }
        first += here.len();
    }
}

/// Rounds what weighs the values of a tile, numerators times the values' scales, to integers from 0 to 127; gives the value of code 1.
#[inline(always)]
fn round_weights<S: Simd>(s: S, numerators: &[f32; TILE], scales: &[f32; TILE], codes: &mut [i8]) -> f32 {
    assert!(codes.len() == TILE);
    let mut weights = [s.splat(0.0); 2];
    let mut most = s.splat(0.0);
    for (i, weights) in weights.iter_mut().enumerate().take(TILE / S::LANES) {
        // SAFETY: both arrays have 16 numbers.
        *weights = unsafe { s.mul(s.load(numerators.as_ptr().add(i * S::LANES)), s.load(scales.as_ptr().add(i * S::LANES))) };
        most = s.max(*weights, most);
    }
    let greatest = s.greatest(most);
    let inverse = s.splat(if greatest > 0.0 { 127.0 / greatest } else { 0.0 });
    for (i, weights) in weights.into_iter().enumerate().take(TILE / S::LANES) {
        // SAFETY: there is room for 16 codes. The minimum turns what is not a number into one, and the greatest's rounding error.
        unsafe { s.store_i8(codes.as_mut_ptr().add(i * S::LANES), s.min(s.mul(weights, inverse), s.splat(127.0))) };
    }
    greatest * (1.0 / 127.0)
}

/// Asks for `bytes`.
#[inline(always)]
fn prefetch<S: Simd>(s: S, bytes: &[u8]) {
    (0..bytes.len()).step_by(LINE).for_each(|at| s.prefetch(bytes.as_ptr().wrapping_add(at)));
}

/// Scores of `R` rows, from `row` on, for the 16 positions of each of `N` tiles; `to` is `[rows, SEGMENT]` from the first on.
#[inline(always)]
fn score_tile<S: Simd, const R: usize, const N: usize>(
    s: S,
    keys: [&[u8]; N],
    scales: [&[f32]; N],
    rows: &IntRows,
    row: usize,
    to: &mut [f32],
) {
    const LINES: usize = GROUP / 4;
    let IntRows { count, queries, by_128, .. } = rows;
    let groups = keys[0].len() / (LINES * LINE);
    assert!(row + R <= *count && queries.scales.len() == groups * count && queries.codes.len() == groups * count * GROUP);
    assert!(by_128.len() == groups * count && keys.iter().all(|k| k.len() == groups * LINES * LINE));
    assert!(scales.iter().all(|s| s.len() == TILE) && to.len() >= (R - 1) * SEGMENT + N * TILE);
    for first in (0..TILE).step_by(S::LANES) {
        let mut sums = [[s.splat(0.0); N]; R];
        for g in 0..groups {
            let at = g * count + row;
            // SAFETY: each group has 8 lines of each tile's keys, and of each row 32 codes, a scale and a sum; codes are from -127 to 127.
            unsafe {
                let lines = keys.map(|keys| keys.as_ptr().add(g * LINES * LINE + first * 4));
                let dots = s.dot_i8::<R, N, LINES>(lines, queries.codes.as_ptr().add(at * GROUP), by_128.as_ptr().add(at));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let scale = s.splat(*queries.scales.get_unchecked(at + r));
                    for (sum, dot) in sums.iter_mut().zip(dots[r]) {
                        *sum = s.fma(s.to_f32(dot), scale, *sum);
                    }
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                // SAFETY: a tile has 16 scales, and 16 scores of it have room in each row.
                unsafe {
                    let scale = s.load(scales[n].as_ptr().add(first));
                    s.store(to.as_mut_ptr().add(r * SEGMENT + n * TILE + first), s.mul(sum, scale));
                }
            }
        }
    }
}

/// Weighted sums of `R` rows, from `row` of `rows` on, over the segment's positions, of `W` vectors of columns.
#[allow(clippy::needless_range_loop)] // a row's or a vector's place in several arrays
#[allow(clippy::too_many_arguments)] // a kernel: cache, weights, output
#[inline(always)]
fn value_tile<S: Simd, const R: usize, const W: usize>(
    s: S,
    values: &[u8],
    shape: KvShape,
    tiles: &[Place],
    column: usize,
    weights: &Codes,
    (row, rows): (usize, usize),
    to: &mut [f32],
) {
    const LINES: usize = TILE / 4;
    let (width, count) = (2 + shape.padded(), tiles.len());
    assert!(row + R <= rows && weights.scales.len() >= count * rows && weights.codes.len() >= count.div_ceil(2) * rows * GROUP);
    assert!(column + W * S::LANES <= shape.padded() && to.len() >= R * width);
    let mut sums = [[s.splat(0.0); W]; R];
    for (t, place) in tiles.iter().enumerate() {
        let values = &values[place.tile * shape.v_tile()..][..shape.v_tile()];
        // SAFETY: 16 columns have 4 lines of values; each row has 16 codes, from 0 to 127, and a scale for the tile.
        unsafe {
            let mut lines = [values.as_ptr().cast::<i8>(); W];
            for w in 0..W {
                let column = column + w * S::LANES;
                lines[w] = lines[w].add(column / 16 * LINES * LINE + column % 16 * 4);
            }
            let codes = weights.codes.as_ptr().add((t / 2 * rows + row) * GROUP + t % 2 * TILE);
            let dots = s.dot_weights::<R, W, LINES>(lines, codes);
            for r in 0..R {
                let scale = s.splat(*weights.scales.get_unchecked(t * rows + row + r));
                for w in 0..W {
                    sums[r][w] = s.fma(s.to_f32(dots[r][w]), scale, sums[r][w]);
                }
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (w, sum) in sums.into_iter().enumerate() {
            // SAFETY: `to` has `R` rows of `2 + padded`.
            unsafe { s.store(to.as_mut_ptr().add(r * width + 2 + column + w * S::LANES), sum) };
        }
    }
}
