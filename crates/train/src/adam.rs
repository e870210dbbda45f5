//! AdamW, as PyTorch has it, over all parameters in one pass through memory.

use overfill_compress::vector::{sum, vectorised};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::net::Entry;

/// Numbers that one task takes.
const PART: usize = 1 << 15;

/// The optimiser's constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamOptions {
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of their squares.
    pub beta2: f32,
    /// Added to the root of the squares' mean.
    pub eps: f32,
    /// Share of a matrix that is taken away in each step, times the learning rate. Norms and biases are left alone.
    pub weight_decay: f32,
}

impl Default for AdamOptions {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// The optimiser's memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Adam {
    options: AdamOptions,
    /// Mean of gradients.
    pub m: Vec<f32>,
    /// Mean of their squares.
    pub v: Vec<f32>,
    /// Steps taken.
    pub steps: u64,
}

impl Adam {
    /// Before the first step, of so many parameters.
    pub fn new(options: AdamOptions, parameters: usize) -> Self {
        Self { options, m: vec![0.0; parameters], v: vec![0.0; parameters], steps: 0 }
    }

    /// One step; gradients are multiplied by `scale` first (clipping).
    pub fn step(&mut self, parameters: &mut [f32], gradients: &[f32], entries: &[Entry], rate: f32, scale: f32) {
        let AdamOptions { beta1, beta2, eps, weight_decay } = self.options;
        self.steps += 1;
        let power = |beta: f32| f64::from(beta).powi(i32::try_from(self.steps).unwrap_or(i32::MAX));
        let step = (f64::from(rate) / (1.0 - power(beta1))) as f32;
        let root = (1.0 / (1.0 - power(beta2)).sqrt()) as f32;
        for entry in entries {
            let range = entry.range.clone();
            let keep = if entry.shape.len() > 1 { 1.0 - rate * weight_decay } else { 1.0 };
            let parts = parameters[range.clone()].par_chunks_mut(PART).zip(gradients[range.clone()].par_chunks(PART));
            let parts = parts.zip(self.m[range.clone()].par_chunks_mut(PART)).zip(self.v[range].par_chunks_mut(PART));
            parts.for_each(|(((parameters, gradients), m), v)| {
                vectorised(|| {
                    for (((p, g), m), v) in parameters.iter_mut().zip(gradients).zip(m).zip(v) {
                        let g = g * scale;
                        *m = beta1 * *m + (1.0 - beta1) * g;
                        *v = beta2 * *v + (1.0 - beta2) * g * g;
                        *p = *p * keep - step * *m / (v.sqrt() * root + eps);
                    }
                });
            });
        }
    }
}

/// Length of all gradients together.
pub fn norm(gradients: &[f32]) -> f64 {
    let parts: Vec<f64> = gradients.par_chunks(PART).map(|part| vectorised(|| sum(part.len(), |i| part[i] * part[i]))).collect();
    parts.iter().sum::<f64>().sqrt()
}
