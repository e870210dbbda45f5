//! Where a simulation's randomness comes from: not from the system, but from its seed.
//!
//! Whatever draws random numbers in our processes (the thread's generator, hash maps' keys, the order in which tokio looks at
//! branches) asks the C library for its seed. Here that answers, in a process that simulates, with numbers that follow from the
//! simulation's seed. So two runs of one seed are the same to the last bit, and no code of ours has to be told of it.

use std::sync::atomic::{AtomicU64, Ordering};

/// 0 in a process that does not simulate.
static STATE: AtomicU64 = AtomicU64::new(0);

/// From now on all randomness of this process follows from `seed`.
pub(crate) fn follow(seed: u64) {
    STATE.store(seed.wrapping_mul(2).wrapping_add(1), Ordering::Relaxed);
}

/// SplitMix64.
fn next() -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut z = STATE.fetch_add(STEP.wrapping_mul(2), Ordering::Relaxed);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The C library's function of this name, which this one replaces where it is linked in.
///
/// # Safety
/// As the C library says: `buffer` has room for `length` bytes.
// SAFETY: no other function of this name is linked in statically; this one keeps to the contract of the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn getrandom(buffer: *mut libc::c_void, length: libc::size_t, flags: libc::c_uint) -> libc::ssize_t {
    if STATE.load(Ordering::Relaxed) == 0 {
        // SAFETY: the same arguments, to the system call that the C library would make.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) } as libc::ssize_t;
    }
    for at in (0..length).step_by(8) {
        let bytes = next().to_le_bytes();
        // SAFETY: the caller says that the buffer has room for `length` bytes, and this part of it ends there at most.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.cast::<u8>().add(at), bytes.len().min(length - at)) };
    }
    length as libc::ssize_t
}
