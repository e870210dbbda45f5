//! Numbers rounded as a quantised file will have them, while they are still f32: training learns with them.
//!
//! **Invariant:** the same rounding as that of the file, blocks of 32 numbers along each row, the last one filled up with zeros.

use overfill_model::{GgmlDType, round_to_blocks};
use rayon::prelude::*;

use super::pad::BLOCK;
use super::{GgufFormats, Stored};

/// Rows that one task rounds.
const ROWS: usize = 64;

impl GgufFormats {
    /// Rounds the tensor of this name and shape in place, on all threads of the rayon pool that it is called in. What is not
    /// stored in blocks stays as it is.
    pub fn round(&self, name: &str, shape: &[usize], numbers: &mut [f32]) {
        if let (Some(dtype), Some(&columns)) = (self.of(name, shape.len()).and_then(Stored::blocks), shape.last()) {
            round(numbers, columns, dtype);
        }
    }
}

fn round(matrix: &mut [f32], columns: usize, dtype: GgmlDType) {
    if columns.is_multiple_of(BLOCK) {
        return matrix.par_chunks_mut(columns * ROWS).for_each(|rows| round_to_blocks(dtype, rows));
    }
    matrix.par_chunks_mut(columns).for_each(|row| {
        let mut padded = row.to_vec();
        padded.resize(columns.next_multiple_of(BLOCK), 0.0);
        round_to_blocks(dtype, &mut padded);
        row.copy_from_slice(&padded[..columns]);
    });
}
