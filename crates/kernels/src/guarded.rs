//! Kernels must not touch what is not theirs: they run here with every buffer of theirs, matrices, cache, activations,
//! scratch and outputs, between two pages that nobody may touch.
//!
//! The test binary's allocator is the system's. On a thread that asks for it, an allocation gets pages of its own instead:
//! it ends where a guard page begins (as nearly as its alignment lets it), or it begins where one ends. What was freed
//! becomes a guard too. Fresh memory is full of ones, so that a number read before it was written is not one.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Which end of an allocation lies at a guard page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edge {
    Start,
    End,
}

/// Address space for guarded allocations: no place of it is used twice.
const ARENA: usize = 16 << 30;

thread_local! {
    static EDGE: Cell<Option<Edge>> = const { Cell::new(None) };
}
/// The arena's address, 0 if the system refused it.
static BASE: OnceLock<usize> = OnceLock::new();
static USED: AtomicUsize = AtomicUsize::new(0);

struct Guarding;

#[global_allocator]
static ALLOCATOR: Guarding = Guarding;

fn page() -> usize {
    // SAFETY: it asks a constant of the system.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

fn guarded(at: *mut u8) -> bool {
    BASE.get().is_some_and(|&base| (base..base + ARENA).contains(&at.addr()))
}

/// Zeroed memory with a guard at `edge`; null where there is none.
fn between_guards(layout: Layout, edge: Edge) -> *mut u8 {
    let base = *BASE.get_or_init(|| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: fresh address space, which replaces nothing.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), ARENA, libc::PROT_NONE, flags, -1, 0) };
        if at == libc::MAP_FAILED { 0 } else { at.addr() }
    });
    let size = layout.size().next_multiple_of(page());
    let first = USED.fetch_add(page() + size, Ordering::Relaxed) + page();
    if base == 0 || first + size + page() > ARENA || layout.align() > page() {
        return std::ptr::null_mut();
    }
    let pages = std::ptr::with_exposed_provenance_mut::<u8>(base + first);
    // SAFETY: these pages lie in the arena, and nobody else was given them.
    if unsafe { libc::mprotect(pages.cast(), size, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
        return std::ptr::null_mut();
    }
    let skipped = if edge == Edge::End { (size - layout.size()) & !(layout.align() - 1) } else { 0 };
    // SAFETY: it lies within the pages.
    unsafe { pages.add(skipped) }
}

// SAFETY: what is not the system's are pages that are used once: they are big enough, aligned (a page is, and so is what
// lies a multiple of the alignment further) and readable until they are freed.
unsafe impl GlobalAlloc for Guarding {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(edge) = EDGE.get() else {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc(layout) };
        };
        let at = between_guards(layout, edge);
        if !at.is_null() {
            // SAFETY: there are as many bytes.
            unsafe { at.write_bytes(0xff, layout.size()) };
        }
        at
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match EDGE.get() {
            Some(edge) => between_guards(layout, edge),
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if !guarded(at) {
            // SAFETY: the caller's promise; it is the system's.
            return unsafe { System.dealloc(at, layout) };
        }
        let pages = at.map_addr(|at| at & !(page() - 1));
        let size = layout.size().next_multiple_of(page());
        // SAFETY: these are the allocation's pages, and it is over.
        unsafe {
            libc::madvise(pages.cast(), size, libc::MADV_DONTNEED);
            libc::mprotect(pages.cast(), size, libc::PROT_NONE);
        }
    }
}

/// Calls `run` on a new thread, whose buffers are new too, with a guard at `edge` of each of its allocations.
fn with<R: Send>(edge: Edge, run: impl FnOnce() -> R + Send) -> R {
    let guarded = || {
        EDGE.set(Some(edge));
        let result = run();
        EDGE.set(None);
        result
    };
    std::thread::scope(|scope| scope.spawn(guarded).join().unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activations::Activations;
    use crate::activations::tests::{ALL, ANY_WIDTH};
    use crate::attention::tests::{Case, shape};
    use crate::destination::Into;
    use crate::kv::{KvFormat, Run};
    use crate::lanes;
    use crate::product::products;
    use crate::product::tests::{matrices, noise, product};
    use crate::rows::{Gate, gated, rms_norm, rotate};
    use crate::thread_pool::ThreadPool;

    /// `run` gives the same bits between guards, on any vector unit, as it does without: and it lives.
    fn holds(run: impl Fn() -> Vec<f32> + Send + Sync) {
        let want = run();
        assert!(want.iter().all(|x| x.is_finite()));
        for unit in lanes::here() {
            for edge in [Edge::Start, Edge::End] {
                let got = with(edge, || lanes::on(unit, &run));
                assert!(got.iter().map(|x| x.to_bits()).eq(want.iter().map(|x| x.to_bits())), "{unit}, {edge:?}");
            }
        }
    }

    /// Whether a child process that calls `touch` dies of it.
    fn kills(touch: impl Fn()) -> bool {
        // SAFETY: the child does nothing but touch memory and leave.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                touch();
                libc::_exit(0);
            }
            let mut status = 0;
            assert!(child > 0 && libc::waitpid(child, &mut status, 0) == child);
            libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV
        }
    }

    #[test]
    fn a_guard_kills_who_touches_it() {
        for edge in [Edge::Start, Edge::End] {
            with(edge, || {
                let numbers = vec![1.5f32; 1001];
                let read = |at: isize| {
                    // SAFETY: none, if the place is not one of the numbers: that is the test.
                    unsafe { numbers.as_ptr().offset(at).read_volatile() };
                };
                assert!(!kills(|| read(0)) && !kills(|| read(1000)));
                assert!(kills(|| read(if edge == Edge::End { 1001 } else { -1 })));
            });
            let freed = with(edge, || {
                let bytes = vec![1u8; std::hint::black_box(10)];
                bytes.as_ptr().expose_provenance()
            });
            // SAFETY: none, as above.
            assert!(kills(|| unsafe {
                std::ptr::with_exposed_provenance::<u8>(freed).read_volatile();
            }));
        }
    }

    #[test]
    fn products_keep_to_their_buffers() {
        for (outputs, inputs) in [(16, 576), (50, 256), (17, 50), (1, 40), (31, 32), (5, 6), (3, 1)] {
            for rows in [1, 2, 4, 5, 9, 13, 35] {
                holds(|| {
                    let pool = ThreadPool::new(1, &[]).unwrap();
                    let x = noise(rows * inputs, 3);
                    let matrices = matrices(&pool, outputs, inputs);
                    let mut y: Vec<f32> = matrices.iter().flat_map(|(_, matrix)| product(&pool, matrix, &x)).collect();
                    // Two matrices side by side, added to what is there: the last columns are the end of a buffer again.
                    let mut activations = Activations::new();
                    activations.set(&pool, &x, inputs, if inputs.is_multiple_of(32) { ALL } else { ANY_WIDTH });
                    for pair in matrices.windows(2) {
                        let mut sums = vec![0.5; rows * outputs * 2];
                        products(&pool, &activations, &[&pair[0].1, &pair[1].1], &mut sums, Into::Sum);
                        y.extend(sums);
                    }
                    let mut row = vec![0.0; inputs];
                    for (_, matrix) in &matrices {
                        matrix.row(outputs - 1, &mut row);
                        y.extend(&row);
                    }
                    y
                });
            }
        }
    }

    #[test]
    fn what_happens_to_rows_keeps_to_its_buffers() {
        for width in [576usize, 50, 40, 32, 6, 2] {
            holds(|| {
                let pool = ThreadPool::new(1, &[]).unwrap();
                let (rows, half) = (3, width / 2);
                let reads = if width.is_multiple_of(32) { ALL } else { ANY_WIDTH };
                let (mut x, weight) = (noise(rows * 2 * width, 7), noise(width, 8));
                let mut out = Activations::new();
                rms_norm(&pool, &x[..rows * width], &weight, 1e-5, reads, &mut out);
                let mut all = out.values.clone();
                gated(&pool, &x, width, Gate::Silu, reads, &mut out);
                all.extend(&out.values);
                all.extend(out.codes.iter().map(|code| f32::from(*code)));
                rotate(&pool, &mut x, 2 * width, 2, width, &noise(rows * half, 1), &noise(rows * half, 2));
                all.extend(x);
                all
            });
        }
    }

    #[test]
    fn attention_keeps_to_its_buffers() {
        for (heads, kv_heads, head_dim, block) in
            [(9, 3, 64, 16), (4, 2, 40, 32), (3, 3, 6, 16), (2, 1, 50, 48), (1, 1, 1, 16), (25, 1, 16, 16)]
        {
            let blocks = 290usize.div_ceil(block);
            // The last block of the table is the cache's last one, and the first one its first.
            let table: Vec<u32> = (0..blocks as u32).collect();
            // A prompt, a piece of one, a step in the first segment, one of three segments, the last place of the cache.
            for (start, tokens) in [(0, 37), (100, 60), (15, 1), (280, 1), (blocks * block - 1, 1), (blocks * block - 20, 20)] {
                for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
                    holds(|| {
                        let case = Case::new(heads, shape(kv_heads, head_dim, block, blocks), format, 1);
                        case.run(&case.queries(tokens), &[Run { blocks: &table, start, tokens }])
                    });
                }
            }
        }
    }
}
