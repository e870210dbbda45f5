//! What this machine can do at best, measured: reading memory, and multiply-adds in f32.

use std::hint::black_box;
use std::time::Instant;

use overfill_model::ThreadPool;

/// Bytes that are read: more than any cache holds.
const READ: usize = 512 << 20;
/// Measurements, of which the best counts.
const RUNS: usize = 7;

/// Peaks of a number of threads together.
pub(super) struct Peaks {
    /// Gigabytes per second that can be read from memory.
    pub(super) read: f64,
    /// Billions of f32 operations per second, a multiply-add being two.
    pub(super) multiply: f64,
}

impl Peaks {
    pub(super) fn measure(threads: usize, cpus: &[usize]) -> std::io::Result<Self> {
        let pool = ThreadPool::new(threads, cpus)?;
        let memory = vec![1.0f32; READ / 4];
        let best = |work: &dyn Fn()| {
            let time = || {
                let begun = Instant::now();
                work();
                begun.elapsed().as_secs_f64()
            };
            (0..RUNS).map(|_| time()).fold(f64::INFINITY, f64::min)
        };
        let read = best(&|| {
            pool.run(threads, |i| {
                let part = memory.len() / threads;
                black_box(overfill_kernels::peak::read(&memory[i * part..(i + 1) * part]));
            });
        });
        /// Rounds of multiply-adds, some 50 ms.
        const ROUNDS: usize = 1 << 21;
        let multiply = best(&|| {
            pool.run(threads, |i| {
                black_box(overfill_kernels::peak::multiply_adds(ROUNDS, i as f32));
            });
        });
        let operations = (2 * overfill_kernels::peak::PER_ROUND * ROUNDS * threads) as f64;
        Ok(Self { read: READ as f64 / read / 1e9, multiply: operations / multiply / 1e9 })
    }
}
