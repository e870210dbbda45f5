//! Where a product's parts, which run on several threads, put their columns.

use std::marker::PhantomData;

/// A result `[rows, width]` of which each thread writes its own columns.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    at: *mut f32,
    rows: usize,
    width: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: the slice is borrowed mutably for as long as this lives, and `write`'s contract keeps threads apart.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// `to` is `[rows, width]`.
    pub(crate) fn new(to: &'a mut [f32], width: usize) -> Self {
        Self { at: to.as_mut_ptr(), rows: to.len().checked_div(width).unwrap_or(0), width, borrowed: PhantomData }
    }

    /// Writes `values` to `row` from `column` on; what would lie beyond the last column is left out.
    ///
    /// # Safety
    /// No other thread writes these places at the same time.
    #[inline(always)]
    pub(crate) unsafe fn write(self, row: usize, column: usize, values: &[f32]) {
        assert!(row < self.rows && column < self.width);
        let count = values.len().min(self.width - column);
        // SAFETY: the places lie within the borrowed slice by the assertion; the caller keeps other threads away.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.at.add(row * self.width + column), count) };
    }
}
