//! What is multiplied with a weight matrix: rows of f32, and the same rows rounded to 8-bit integers.

use crate::disjoint::Disjoint;
use crate::pool::Pool;
use crate::simd::{Simd, dispatch};

/// Inputs that share a scale.
pub(crate) const GROUP: usize = 32;

/// Rows `[rows, width]` that go into a product. Kept from step to step, so that a step allocates nothing.
///
/// Quantised weights are multiplied with rows rounded to integers from -127 to 127 in groups of 32, each group with its
/// own scale, as llama.cpp does. A row is rounded by itself, so the rows beside it change nothing.
#[derive(Default)]
pub struct Activations {
    rows: usize,
    width: usize,
    /// `[rows, width]`
    pub(crate) values: Vec<f32>,
    /// `[rows, width]`; rounded `values` where the width is a multiple of 32.
    pub(crate) codes: Vec<i8>,
    /// `[rows, width / 32]`: the value of code 1.
    pub(crate) scales: Vec<f32>,
    /// `[rows, width / 16]`: sums of 16 codes.
    pub(crate) sums: Vec<i32>,
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

    /// Whether the rows were rounded.
    pub(crate) fn rounded(&self) -> bool {
        self.width.is_multiple_of(GROUP)
    }

    /// Makes `rows` rows of `width` values, each written by `fill(row, values)`. `cost` is about the nanoseconds that `fill` takes.
    pub(crate) fn fill(&mut self, pool: &Pool, rows: usize, width: usize, cost: usize, fill: impl Fn(usize, &mut [f32]) + Sync) {
        (self.rows, self.width) = (rows, width);
        self.values.resize(rows * width, 0.0);
        let (groups, halves) = if self.rounded() { (width / GROUP, width / 16) } else { (0, 0) };
        self.codes.resize(groups * GROUP * rows, 0);
        self.scales.resize(groups * rows, 0.0);
        self.sums.resize(halves * rows, 0);
        let values = Disjoint::new(&mut self.values);
        let codes = Disjoint::new(&mut self.codes);
        let scales = Disjoint::new(&mut self.scales);
        let sums = Disjoint::new(&mut self.sums);
        pool.rows(rows, cost + width / 8, |row| {
            // SAFETY: each row is written once, by the thread that has it.
            let values = unsafe { values.part(row * width, width) };
            fill(row, values);
            if groups > 0 {
                // SAFETY: as above.
                let (codes, scales, sums) =
                    unsafe { (codes.part(row * width, width), scales.part(row * groups, groups), sums.part(row * halves, halves)) };
                dispatch!(round(values, codes, scales, sums));
            }
        });
    }

    /// Takes over `values`, `[rows, width]`.
    pub fn set(&mut self, pool: &Pool, values: &[f32], width: usize) {
        assert!(width > 0 && values.len().is_multiple_of(width), "values are [rows, width]");
        self.fill(pool, values.len() / width, width, 0, |row, to| to.copy_from_slice(&values[row * width..(row + 1) * width]));
    }
}

/// Rounds one row.
#[inline(always)]
fn round<S: Simd>(s: S, x: &[f32], codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    for (g, scale) in scales.iter_mut().enumerate() {
        let x = &x[g * GROUP..(g + 1) * GROUP];
        let mut greatest = s.splat(0.0);
        for i in (0..GROUP).step_by(S::LANES) {
            // SAFETY: the group has 32 values.
            let v = unsafe { s.load(x.as_ptr().add(i)) };
            greatest = s.max(s.max(v, s.sub(s.splat(0.0), v)), greatest);
        }
        let mut lanes = [0.0f32; 16];
        // SAFETY: there is room for 16.
        unsafe { s.store(lanes.as_mut_ptr(), greatest) };
        let greatest = lanes.iter().fold(0.0f32, |m, x| if *x > m { *x } else { m });
        *scale = greatest / 127.0;
        let inverse = s.splat(if greatest > 0.0 { 127.0 / greatest } else { 0.0 });
        let codes = &mut codes[g * GROUP..(g + 1) * GROUP];
        for i in (0..GROUP).step_by(S::LANES) {
            // SAFETY: the group has 32 values and as many codes. The product is at most 127 and a rounding error, which rounds to 127.
            unsafe { s.store_i8(codes.as_mut_ptr().add(i), s.mul(s.load(x.as_ptr().add(i)), inverse)) };
        }
        for (sum, codes) in sums[g * 2..g * 2 + 2].iter_mut().zip(codes.chunks_exact(16)) {
            *sum = codes.iter().map(|c| i32::from(*c)).sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_the_scalar_one_and_close() {
        let pool = Pool::new(2, &[]).unwrap();
        let (rows, width) = (37, 96);
        let values: Vec<f32> =
            (0..rows * width).map(|i| ((i * 7919 % 2003) as f32 / 2003.0 - 0.5) * if i % 7 == 0 { 40.0 } else { 0.3 }).collect();
        let mut x = Activations::new();
        x.set(&pool, &values, width);
        let (mut codes, mut scales, mut sums) = (vec![0; rows * width], vec![0.0; rows * 3], vec![0; rows * 6]);
        for row in 0..rows {
            let at = |n: usize| row * n..(row + 1) * n;
            round(crate::simd::Scalar, &values[at(width)], &mut codes[at(width)], &mut scales[at(3)], &mut sums[at(6)]);
        }
        assert!(x.codes == codes && x.scales == scales && x.sums == sums);
        for (i, value) in values.iter().enumerate() {
            let scale = x.scales[i / 32];
            assert!((f32::from(x.codes[i]) * scale - value).abs() <= scale * 0.501);
        }
    }
}
