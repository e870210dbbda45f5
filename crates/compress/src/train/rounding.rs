//! Training with weights as a quantised file will have them.
//!
//! Every forward and backward pass runs on rounded weights; the gradient is taken for that of the weights themselves, which
//! the optimiser moves (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432). So the weights learn to be
//! good after rounding, and what validation measures is the file that is exported.
//!
//! **Invariant:** the same rounding as [`crate::export`]'s, blocks of 32 numbers along each row, the last one filled up with zeros.

use overfill_model::{GgmlDType, round_to_blocks};
use rayon::prelude::*;

use crate::export::{BLOCK, GgufFormats, Stored};
use crate::net::Entry;

/// Rows that one task rounds.
const ROWS: usize = 64;

/// Rounded weights beside those that are learned.
pub(super) struct Rounded {
    formats: GgufFormats,
    weights: Vec<f32>,
}

impl Rounded {
    pub(super) fn new(formats: GgufFormats) -> Self {
        Self { formats, weights: Vec::new() }
    }

    /// Rounds `parameters`, that `entries` describe.
    pub(super) fn update(&mut self, parameters: &[f32], entries: &[Entry]) {
        self.weights.clear();
        self.weights.extend_from_slice(parameters);
        for entry in entries.iter().filter(|e| e.of_model()) {
            let stored = self.formats.of(&entry.name, entry.shape.len());
            if let (Some(dtype), Some(&columns)) = (stored.and_then(Stored::blocks), entry.shape.last()) {
                round(&mut self.weights[entry.range.clone()], columns, dtype);
            }
        }
    }

    /// As they were at the last update.
    pub(super) fn weights(&self) -> &[f32] {
        &self.weights
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
