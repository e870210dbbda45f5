//! How a product is cut into parts for the threads of the current pool.

use std::ops::Range;

use rayon::prelude::*;

/// Multiply-adds below which a second thread costs more than it brings.
const SERIAL: usize = 1 << 15;
/// Rows below which a product is bound by memory, so that one part a thread is best.
const FEW: usize = 6;

/// Calls `run` with ranges that together are `0..panels`; `weights` is how many the whole matrix has.
pub(crate) fn panels(panels: usize, rows: usize, weights: usize, run: impl Fn(Range<usize>) + Sync) {
    let threads = rayon::current_num_threads();
    if threads == 1 || rows * weights < SERIAL {
        return run(0..panels);
    }
    // A few parts a thread in a long product, so that one that is held up by another process does not hold up all.
    let part = panels.div_ceil(threads * if rows < FEW { 1 } else { 4 }).max(1);
    (0..panels.div_ceil(part)).into_par_iter().for_each(|i| run(i * part..((i + 1) * part).min(panels)));
}
