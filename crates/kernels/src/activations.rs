//! What is multiplied with a weight matrix: rows of f32, and the same rows as a product reads them.
//!
//! A product reads tiles of a few rows at a time. So what it reads lies in blocks of up to [`BLOCK_ROWS`] rows: all that the rows
//! of a tile have at one place follows each other, and the places of a block follow each other too. One pointer serves a tile.

use std::ops::Range;

use crate::bf16::{HalfRows, round_row};
use crate::disjoint::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::thread_pool::ThreadPool;

/// Inputs that share a scale.
pub(crate) const GROUP: usize = 32;
/// Rows of a block: a multiple of every tile's rows, so that no small tile is left over in the middle.
pub(crate) const BLOCK_ROWS: usize = 24;

/// How the matrices of a product read their rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reads {
    /// As f32: dense matrices.
    pub(crate) exact: bool,
    /// As rounded integers: quantised matrices.
    pub(crate) rounded: bool,
    /// Rounded to bfloat16: matrices of it.
    pub(crate) halves: bool,
}

/// Rows `[rows, width]` that go into a product. Kept from step to step, so that a step allocates nothing.
///
/// Quantised weights are multiplied with rows rounded to integers from -127 to 127 in groups of 32, each group with its
/// own scale, as llama.cpp does; weights of bfloat16 with rows rounded to it. A row is rounded by itself, so the rows beside it change
/// nothing.
#[derive(Default)]
pub struct Activations {
    rows: usize,
    width: usize,
    /// `[rows, width]`
    pub(crate) values: Vec<f32>,
    /// The values, in blocks `[width, rows of the block]`. Empty where there is one row, whose values are that already.
    columns: Vec<f32>,
    /// Rounded values, in blocks `[groups, rows of the block, 32]`.
    pub(crate) codes: Vec<i8>,
    /// The value of code 1, in blocks `[groups, rows of the block]`.
    pub(crate) scales: Vec<f32>,
    /// -128 times the sum of each group's codes, likewise.
    by_128: Vec<i32>,
    /// -8 times that sum, likewise.
    by_8: Vec<i32>,
    /// -128 times the sum of each half of a group, in blocks `[2 * groups, rows of the block]`.
    halves_by_128: Vec<i32>,
    /// The sum of each group's rounded values, in blocks `[groups, rows of the block]`.
    sums: Vec<f32>,
    /// Rounded to bfloat16.
    halves: HalfRows,
}

/// One block's rounded rows.
#[derive(Clone, Copy)]
pub(crate) struct RoundedBlock<'a> {
    pub(crate) rows: usize,
    /// `[groups, rows, 32]`
    pub(crate) codes: &'a [i8],
    /// `[groups, rows]`
    pub(crate) scales: &'a [f32],
    /// `[groups, rows]`
    pub(crate) by_128: &'a [i32],
    /// `[groups, rows]`
    pub(crate) by_8: &'a [i32],
    /// `[2 * groups, rows]`
    pub(crate) halves_by_128: &'a [i32],
    /// `[groups, rows]`
    pub(crate) sums: &'a [f32],
}

impl Activations {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Makes `rows` rows of `width` values, each written by `fill(row, values)`. `cost` is about the nanoseconds that `fill` takes.
    pub(crate) fn fill(
        &mut self,
        pool: &ThreadPool,
        (rows, width): (usize, usize),
        reads: Reads,
        cost: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        (self.rows, self.width) = (rows, width);
        assert!(!reads.rounded || width.is_multiple_of(GROUP), "a quantised matrix has rows of whole groups");
        let groups = if reads.rounded { width / GROUP } else { 0 };
        self.values.resize(rows * width, 0.0);
        self.columns.resize(if reads.exact && rows > 1 { rows * width } else { 0 }, 0.0);
        self.codes.resize(rows * groups * GROUP, 0);
        self.scales.resize(rows * groups, 0.0);
        self.by_128.resize(rows * groups, 0);
        self.by_8.resize(rows * groups, 0);
        self.halves_by_128.resize(rows * groups * 2, 0);
        self.sums.resize(rows * groups, 0.0);
        let halves = self.halves.begin(if reads.halves { rows } else { 0 }, width);
        let values = Disjoint::new(&mut self.values);
        let columns = (!self.columns.is_empty()).then(|| Disjoint::new(&mut self.columns));
        let to = Rounded {
            groups,
            codes: Disjoint::new(&mut self.codes),
            scales: Disjoint::new(&mut self.scales),
            by_128: Disjoint::new(&mut self.by_128),
            by_8: Disjoint::new(&mut self.by_8),
            halves_by_128: Disjoint::new(&mut self.halves_by_128),
            sums: Disjoint::new(&mut self.sums),
        };
        pool.rows(rows, cost + width / 8, |row| {
            // SAFETY: each row is written once, by the thread that has it.
            let values = unsafe { values.part(row * width, width) };
            fill(row, values);
            let place = Place::of(row, rows, BLOCK_ROWS);
            if let Some(columns) = columns {
                for (i, value) in values.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { columns.part(place.first * width + i * place.rows + place.offset, 1)[0] = *value };
                }
            }
            if groups > 0 {
                dispatch!(round(values, place, to));
            }
            if reads.halves {
                dispatch!(round_row(values, row, halves));
            }
        });
    }

    /// Takes over `values`, `[rows, width]`.
    pub fn set(&mut self, pool: &ThreadPool, values: &[f32], width: usize, reads: Reads) {
        assert!(width > 0 && values.len().is_multiple_of(width), "values are [rows, width]");
        self.fill(pool, (values.len() / width, width), reads, 0, |row, to| to.copy_from_slice(&values[row * width..(row + 1) * width]));
    }

    /// Values of the block whose first row is `first`: its rows, and `[width, rows]`.
    pub(crate) fn columns(&self, first: usize) -> (usize, &[f32]) {
        let block = self.block(first);
        let all = if self.rows == 1 { &self.values } else { &self.columns };
        (block.len(), &all[block.start * self.width..block.end * self.width])
    }

    /// All rows rounded to bfloat16.
    pub(crate) fn halves(&self) -> &HalfRows {
        &self.halves
    }

    /// Rounded rows of the block whose first row is `first`.
    pub(crate) fn rounded(&self, first: usize) -> RoundedBlock<'_> {
        let block = self.block(first);
        let groups = self.width / GROUP;
        let each = |n: usize| block.start * n..block.end * n;
        RoundedBlock {
            rows: block.len(),
            codes: &self.codes[each(self.width)],
            scales: &self.scales[each(groups)],
            by_128: &self.by_128[each(groups)],
            by_8: &self.by_8[each(groups)],
            halves_by_128: &self.halves_by_128[each(2 * groups)],
            sums: &self.sums[each(groups)],
        }
    }

    fn block(&self, first: usize) -> Range<usize> {
        debug_assert!(first.is_multiple_of(BLOCK_ROWS));
        first..(first + BLOCK_ROWS).min(self.rows)
    }
}

/// Where a row lies: its block's first row and rows, and its place among them.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    first: usize,
    rows: usize,
    offset: usize,
}

impl Place {
    /// Row `row` of `rows`, in blocks of `block`.
    pub(crate) fn of(row: usize, rows: usize, block: usize) -> Self {
        let first = row - row % block;
        Self { first, rows: block.min(rows - first), offset: row - first }
    }

    /// Index of the row's `n`th of `count` runs of `each` numbers.
    pub(crate) fn at(self, n: usize, count: usize, each: usize) -> usize {
        (self.first * count + n * self.rows + self.offset) * each
    }
}

/// Where rounded rows are written.
#[derive(Clone, Copy)]
struct Rounded<'a> {
    groups: usize,
    codes: Disjoint<'a, i8>,
    scales: Disjoint<'a, f32>,
    by_128: Disjoint<'a, i32>,
    by_8: Disjoint<'a, i32>,
    halves_by_128: Disjoint<'a, i32>,
    sums: Disjoint<'a, f32>,
}

/// The greatest absolute value of `x`; what is not a number counts as 0.
#[inline(always)]
pub(crate) fn greatest_magnitude<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut greatest = s.splat(0.0);
    let lanes = x.chunks_exact(S::LANES);
    let rest = lanes.remainder();
    for x in lanes {
        // SAFETY: the chunk has `LANES` values.
        let v = unsafe { s.load(x.as_ptr()) };
        greatest = s.max(s.max(v, s.sub(s.splat(0.0), v)), greatest);
    }
    rest.iter().fold(s.greatest(greatest), |m, x| m.max(x.abs()))
}

/// Rounds a group to integers from -127 to 127; gives the value of code 1, and the sums of the first and of the last 16 codes.
#[inline(always)]
pub(crate) fn round_group<S: Simd>(s: S, x: &[f32; GROUP], codes: &mut [i8; GROUP]) -> (f32, [i32; 2]) {
    let greatest = greatest_magnitude(s, x);
    let inverse = s.splat(if greatest > 0.0 { 127.0 / greatest } else { 0.0 });
    for i in (0..GROUP).step_by(S::LANES) {
        // SAFETY: both have 32 places. The product is at least -127 and a rounding error, which rounds to -127; the minimum turns what is
        // not a number into one, the same on all lanes.
        unsafe { s.store_i8(codes.as_mut_ptr().add(i), s.min(s.mul(s.load(x.as_ptr().add(i)), inverse), s.splat(127.0))) };
    }
    // SAFETY: each half is 16.
    (greatest / 127.0, unsafe { [s.sum_i8(codes.as_ptr()), s.sum_i8(codes.as_ptr().add(16))] })
}

/// Rounds one row.
#[inline(always)]
fn round<S: Simd>(s: S, x: &[f32], place: Place, to: Rounded<'_>) {
    for (g, x) in x.as_chunks().0.iter().enumerate() {
        let at = place.at(g, to.groups, 1);
        // SAFETY: these places are this row's, and one thread has it.
        let Some(codes) = unsafe { to.codes.part(at * GROUP, GROUP) }.first_chunk_mut() else { unreachable!("a part of a group") };
        let (scale, [low, high]) = round_group(s, x, codes);
        // SAFETY: as above.
        unsafe {
            to.scales.part(at, 1)[0] = scale;
            to.by_128.part(at, 1)[0] = -128 * (low + high);
            to.by_8.part(at, 1)[0] = -8 * (low + high);
            to.sums.part(at, 1)[0] = scale * (low + high) as f32;
            to.halves_by_128.part(place.at(2 * g, 2 * to.groups, 1), 1)[0] = -128 * low;
            to.halves_by_128.part(place.at(2 * g + 1, 2 * to.groups, 1), 1)[0] = -128 * high;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::lanes;

    pub(crate) const ALL: Reads = Reads { exact: true, rounded: true, halves: true };
    /// All that do not need whole groups.
    pub(crate) const ANY_WIDTH: Reads = Reads { exact: true, rounded: false, halves: true };

    impl Activations {
        /// The value that a quantised matrix sees.
        pub(crate) fn seen(&self, row: usize, input: usize) -> f64 {
            let place = Place::of(row, self.rows, BLOCK_ROWS);
            let at = place.at(input / GROUP, self.width / GROUP, 1);
            f64::from(self.codes[at * GROUP + input % GROUP]) * f64::from(self.scales[at])
        }
    }

    #[test]
    fn rounding_is_close_and_the_same_on_any_lanes() {
        for rows in [1, 23, 24, 37, 48] {
            let width = 96;
            let values: Vec<f32> =
                (0..rows * width).map(|i| ((i * 7919 % 2003) as f32 / 2003.0 - 0.5) * if i % 7 == 0 { 40.0 } else { 0.3 }).collect();
            let make = |threads| {
                let mut x = Activations::new();
                x.set(&ThreadPool::new(threads, &[]).unwrap(), &values, width, ALL);
                x
            };
            let x = make(2);
            for unit in lanes::here() {
                let other = lanes::on(unit, || make(1));
                assert!(x.codes == other.codes && x.scales == other.scales && x.sums == other.sums && x.by_8 == other.by_8, "{unit}");
                assert!(x.by_128 == other.by_128 && x.halves_by_128 == other.halves_by_128, "{unit}");
            }
            for row in 0..rows {
                let block = x.rounded(row - row % BLOCK_ROWS);
                let (count, columns) = x.columns(row - row % BLOCK_ROWS);
                let offset = row % BLOCK_ROWS;
                assert_eq!(count, block.rows);
                for i in 0..width {
                    let value = values[row * width + i];
                    assert_eq!(columns[i * count + offset], value);
                    let scale = block.scales[i / GROUP * count + offset];
                    assert!((x.seen(row, i) as f32 - value).abs() <= scale * 0.501);
                }
                for g in 0..width / GROUP {
                    let codes = &block.codes[(g * count + offset) * GROUP..][..GROUP];
                    let sum: i32 = codes.iter().map(|c| i32::from(*c)).sum();
                    let first: i32 = codes[..16].iter().map(|c| i32::from(*c)).sum();
                    let at = g * count + offset;
                    assert_eq!((block.by_128[at], block.by_8[at]), (-128 * sum, -8 * sum));
                    assert_eq!(block.sums[at], block.scales[at] * sum as f32);
                    let halves = [0, 1].map(|half| block.halves_by_128[(2 * g + half) * count + offset]);
                    assert_eq!(halves, [-128 * first, -128 * (sum - first)]);
                }
            }
        }
    }
}
