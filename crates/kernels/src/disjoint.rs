//! A slice whose parts are written by several threads.

use std::marker::PhantomData;

/// A mutable slice that can be shared among threads which write different parts of it.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint<'a, T> {
    at: *mut T,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: the slice is borrowed mutably for as long as this lives, and `part`'s contract keeps threads apart.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { at: slice.as_mut_ptr(), len: slice.len(), borrowed: PhantomData }
    }

    /// The `count` values from `first` on.
    ///
    /// # Safety
    /// Nobody else uses these values while the part lives.
    #[inline(always)]
    pub(crate) unsafe fn part(self, first: usize, count: usize) -> &'a mut [T] {
        if first > self.len || count > self.len - first {
            outside(first, count, self.len);
        }
        // SAFETY: they lie within the slice; the caller keeps others away.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(first), count) }
    }
}

/// A function of its own: where it is not called, what it would say costs nothing.
#[cold]
#[inline(never)]
fn outside(first: usize, count: usize, len: usize) -> ! {
    #[allow(clippy::panic, reason = "a kernel that would write elsewhere")]
    {
        panic!("{count} values from {first} of {len}")
    }
}
