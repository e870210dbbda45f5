//! What a core can do at best, for benchmarks to compare with.

use crate::simd::{Simd, dispatch};

/// Multiply-adds in a round of [`multiply_adds`].
pub const PER_ROUND: usize = CHAINS * 16;
/// Chains that do not wait for each other.
const CHAINS: usize = 8;

/// Reads all of `memory`; the result keeps the compiler from leaving it out.
pub fn read(memory: &[f32]) -> f32 {
    #[inline(always)]
    fn sum<S: Simd>(s: S, memory: &[f32]) -> f32 {
        let mut sums = [s.splat(0.0); CHAINS];
        for lines in memory.chunks_exact(CHAINS * S::LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the chunk has a vector for each chain.
                *sum = s.max(unsafe { s.load(lines.as_ptr().add(i * S::LANES)) }, *sum);
            }
        }
        let mut lanes = [0.0f32; 16];
        for sum in sums {
            // SAFETY: there is room for 16.
            unsafe { s.store(lanes.as_mut_ptr(), s.add(sum, s.load(lanes.as_ptr()))) };
        }
        lanes.iter().sum()
    }
    dispatch!(sum(memory))
}

/// Multiply-adds in registers.
pub fn multiply_adds(rounds: usize, seed: f32) -> f32 {
    #[inline(always)]
    fn chains<S: Simd>(s: S, rounds: usize, seed: f32) -> f32 {
        let (a, b) = (s.splat(0.999), s.splat(seed + 0.5));
        let mut sums = [s.splat(1.0); CHAINS];
        for _ in 0..rounds * 16 / S::LANES {
            for sum in &mut sums {
                *sum = s.fma(*sum, a, b);
            }
        }
        let mut lanes = [0.0f32; 16];
        for sum in sums {
            // SAFETY: there is room for 16.
            unsafe { s.store(lanes.as_mut_ptr(), s.add(sum, s.load(lanes.as_ptr()))) };
        }
        lanes.iter().sum()
    }
    dispatch!(chains(rounds, seed))
}
