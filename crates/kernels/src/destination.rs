//! Where a product's numbers go, and the tiles that they are computed in: what kernels of dense and of quantised matrices share.

use crate::disjoint::Disjoint;
use crate::simd::Simd;

/// Output columns that are computed together.
pub(crate) const PANEL: usize = 16;

/// What becomes of a product's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// They replace what was there.
    Place,
    /// They are added to what was there.
    Sum,
}

/// Where one matrix's product goes: columns of `y` from `column` on.
#[derive(Clone, Copy)]
pub(crate) struct Destination<'a> {
    pub(crate) y: Disjoint<'a, f32>,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) column: usize,
    pub(crate) outputs: usize,
    pub(crate) into: Into,
}

impl Destination<'_> {
    /// Writes a vector of `row` from output `output` on; what would lie beyond the last output is left out.
    ///
    /// # Safety
    /// No other thread writes these places at the same time.
    #[inline(always)]
    pub(crate) unsafe fn write<S: Simd>(self, s: S, row: usize, output: usize, values: S::V) {
        if output >= self.outputs {
            return;
        }
        let count = S::LANES.min(self.outputs - output);
        // SAFETY: the caller keeps other threads away.
        let to = unsafe { self.y.part(row * self.width + self.column + output, count) };
        if count == S::LANES {
            let values = match self.into {
                Into::Place => values,
                // SAFETY: `to` has `LANES` values.
                Into::Sum => s.add(unsafe { s.load(to.as_ptr()) }, values),
            };
            // SAFETY: as above.
            unsafe { s.store(to.as_mut_ptr(), values) };
        } else {
            let mut line = [0.0f32; PANEL];
            // SAFETY: sixteen values have room for a vector.
            unsafe { s.store(line.as_mut_ptr(), values) };
            for (to, value) in to.iter_mut().zip(line) {
                *to = if self.into == Into::Sum { *to + value } else { value };
            }
        }
    }
}

/// Rows of the next tile, where `rows` are left and a tile has `most`: tiles of about one size, rather than a small one at the end.
#[inline(always)]
pub(crate) fn even(rows: usize, most: usize) -> usize {
    rows.div_ceil(rows.div_ceil(most))
}
