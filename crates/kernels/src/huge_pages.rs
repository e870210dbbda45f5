//! Pages of 2 MiB for what every step reads: with pages of 4 KiB its 50 to 200 MB miss the processor's address cache at every page.

/// Bytes of a huge page on x86-64 and, mostly, on Arm.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Asks the system to give `memory` in huge pages as it is first touched. It does where `transparent_hugepage` is `madvise` or `always`
/// and there are some; else the pages are small.
pub(crate) fn ask<T>(memory: &[T]) {
    #[cfg(target_os = "linux")]
    {
        let first = memory.as_ptr().addr().next_multiple_of(HUGE_PAGE);
        let end = memory.as_ptr_range().end.addr() / HUGE_PAGE * HUGE_PAGE;
        if first < end {
            let at = memory.as_ptr().cast_mut().cast::<u8>().wrapping_add(first - memory.as_ptr().addr());
            // SAFETY: whole pages within the memory, of which nothing but their size may change. That it was refused need not be known.
            let _ = unsafe { rustix::mm::madvise(at.cast(), end - first, rustix::mm::Advice::LinuxHugepage) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}
