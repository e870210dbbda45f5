//! Where packed weights lie, and how they get there.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::disjoint::Disjoint;
use crate::huge_pages::{self, HUGE_PAGE};
use crate::thread_pool::ThreadPool;

/// Bytes of a chunk that matrices share.
const CHUNK: usize = 32 << 20;
/// Each matrix begins at a cache line.
const LINE: usize = 64;

/// Packs weights on the threads of a pool.
///
/// A thread writes the panels that it will read: their pages come from its part of the machine's memory, and all threads share the work
/// of getting them from the system.
pub struct Packer<'p> {
    pool: &'p ThreadPool,
    /// The chunk in which there is room, and how much of it is taken; `None` where each matrix has memory of its own.
    shared: Option<RefCell<(Option<Arc<Chunk>>, usize)>>,
}

/// Packed values, which nobody changes any more.
pub(crate) struct Packed<T> {
    at: NonNull<T>,
    len: usize,
    /// What they lie in; `None` where there are none.
    _chunk: Option<Arc<Chunk>>,
}

/// Memory of one or several matrices.
struct Chunk {
    at: NonNull<u8>,
    layout: Layout,
}

impl<'p> Packer<'p> {
    /// Each matrix has memory of its own.
    pub fn new(pool: &'p ThreadPool) -> Self {
        Self { pool, shared: None }
    }

    /// Matrices lie side by side in huge pages, where there are any. The memory is given back chunk by chunk, once all matrices in it
    /// are gone: for those of one model.
    pub fn in_huge_pages(pool: &'p ThreadPool) -> Self {
        Self { pool, shared: Some(RefCell::default()) }
    }

    /// The threads that pack.
    pub(crate) fn pool(&self) -> &ThreadPool {
        self.pool
    }

    /// `panels` times `each` values, zero but for what `write` makes of each panel.
    pub(crate) fn panels<T: Copy + Send + Sync>(
        &self,
        panels: usize,
        each: usize,
        zero: T,
        write: impl Fn(usize, &mut [T]) + Sync,
    ) -> Packed<T> {
        let len = panels * each;
        if len == 0 {
            return Packed { at: NonNull::dangling(), len, _chunk: None };
        }
        const { assert!(size_of::<T>() > 0 && align_of::<T>() <= LINE) };
        let Ok(wanted) = Layout::array::<T>(len) else { unreachable!("{len} values are more than addresses can tell") };
        let (at, chunk) = self.room(wanted);
        let at = at.cast::<T>();
        let mut empty = NonNull::slice_from_raw_parts(at.cast::<MaybeUninit<T>>(), len);
        // SAFETY: it is room for as many values, which is this one's alone; what they are need not be known.
        let to = Disjoint::new(unsafe { empty.as_mut() });
        self.pool.run(panels, |panel| {
            // SAFETY: each panel is written once.
            let empty = unsafe { to.part(panel * each, each) };
            empty.fill(MaybeUninit::new(zero));
            // SAFETY: all of them were just written.
            write(panel, unsafe { &mut *(std::ptr::from_mut(empty) as *mut [T]) });
        });
        Packed { at, len, _chunk: Some(chunk) }
    }

    fn room(&self, wanted: Layout) -> (NonNull<u8>, Arc<Chunk>) {
        let Some(shared) = &self.shared else {
            let chunk = Arc::new(Chunk::new(wanted));
            return (chunk.at, chunk);
        };
        let (open, used) = &mut *shared.borrow_mut();
        let bytes = wanted.size().next_multiple_of(LINE);
        let chunk = match open {
            Some(chunk) if chunk.layout.size() - *used >= bytes => Arc::clone(chunk),
            _ => {
                let size = bytes.max(CHUNK).next_multiple_of(HUGE_PAGE);
                let Ok(layout) = Layout::from_size_align(size, HUGE_PAGE) else {
                    unreachable!("{size} bytes are more than addresses can tell")
                };
                let chunk = Arc::new(Chunk::new(layout));
                // SAFETY: so many bytes are there; what they are is not looked at.
                huge_pages::ask(unsafe { std::slice::from_raw_parts(chunk.at.as_ptr().cast::<MaybeUninit<u8>>(), size) });
                (*open, *used) = (Some(Arc::clone(&chunk)), 0);
                chunk
            }
        };
        // SAFETY: so much of the chunk is there, and free.
        let at = unsafe { chunk.at.add(*used) };
        *used += bytes;
        (at, chunk)
    }
}

impl Chunk {
    fn new(layout: Layout) -> Self {
        // SAFETY: it is more than nothing.
        let at = unsafe { alloc(layout) };
        Self { at: NonNull::new(at).unwrap_or_else(|| handle_alloc_error(layout)), layout }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: it was allocated so, and nothing lies in it any more.
        unsafe { dealloc(self.at.as_ptr(), self.layout) };
    }
}

// SAFETY: it is memory, and whoever has values in it may read them from any thread.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

// SAFETY: nobody writes the values.
unsafe impl<T: Send + Sync> Send for Packed<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Packed<T> {}

impl<T> Deref for Packed<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: all were written before there was a `Packed`, and the chunk lives as long.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_lie_side_by_side_and_outlive_their_packer() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        let packer = Packer::in_huge_pages(&pool);
        let all: Vec<Packed<u32>> = (0..9u32)
            .map(|n| packer.panels(if n == 4 { 9 } else { 3 }, 1 << 20, n, |panel, values| values[panel] = 100 + panel as u32))
            .collect();
        let chunks: Vec<usize> = all.iter().map(|packed| Arc::as_ptr(packed._chunk.as_ref().unwrap()).addr()).collect();
        // Two of 12 MiB to a chunk; the one of 36 MiB has its own.
        assert!(chunks[0] == chunks[1] && chunks[1] != chunks[2] && chunks[3] != chunks[4] && chunks[4] != chunks[5], "{chunks:x?}");
        drop(packer);
        for (n, packed) in all.iter().enumerate() {
            assert_eq!(packed.as_ptr().addr() % LINE, 0);
            for (at, value) in packed.iter().enumerate() {
                let (panel, at) = (at >> 20, at & ((1 << 20) - 1));
                assert_eq!(*value as usize, if at == panel { 100 + panel } else { n }, "value {at} of panel {panel} of matrix {n}");
            }
        }
    }

    #[test]
    fn no_values_are_none() {
        let pool = ThreadPool::new(1, &[]).unwrap();
        for packer in [Packer::new(&pool), Packer::in_huge_pages(&pool)] {
            assert!(packer.panels(0, 7, 0u8, |_, _| ()).is_empty() && packer.panels(7, 0, 0u8, |_, _| ()).is_empty());
        }
    }
}
