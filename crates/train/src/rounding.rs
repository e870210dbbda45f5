//! Training with weights as a quantised file will have them.
//!
//! Every forward and backward pass runs on rounded weights; the gradient is taken for that of the weights themselves, which
//! the optimiser moves (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432). So the weights learn to be
//! good after rounding, and what validation measures is the file that is exported.
//!
//! The rounding itself is the export's: [`GgufFormats::round`].

use overfill_compress::export::GgufFormats;

use crate::net::Entry;

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
            self.formats.round(&entry.name, &entry.shape, &mut self.weights[entry.range.clone()]);
        }
    }

    /// As they were at the last update.
    pub(super) fn weights(&self) -> &[f32] {
        &self.weights
    }
}
