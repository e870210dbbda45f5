//! The rotary embedding: frequencies, and their cosines and sines at given positions.

use std::f64::consts::TAU;

use crate::config::{Rope, RopeScaling};
use crate::pass::Chunk;

/// Frequencies of one model's rotary embedding, `[head_dim / 2]`.
pub struct Frequencies(Vec<f32>);

impl Frequencies {
    /// From the base and the scaling. Formulas: Su et al. 2021 for the base, Llama 3.1's release for `llama3`.
    pub fn new(rope: &Rope, head_dim: usize) -> Self {
        let half = head_dim / 2;
        let base = (0..half).map(|i| 1.0 / rope.theta.powf(2.0 * i as f64 / head_dim as f64));
        let scaled: Vec<f64> = match &rope.scaling {
            RopeScaling::None => base.collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RopeScaling::Factors { factors } => base.zip(factors).map(|(f, factor)| f / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let original = *original_context as f64;
                base.map(|f| {
                    let wavelength = TAU / f;
                    if wavelength < original / high_freq_factor {
                        f
                    } else if wavelength > original / low_freq_factor {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect()
            }
        };
        Self(scaled.into_iter().map(|f| f as f32).collect())
    }

    /// What each frequency of the base was divided by, where that is more than one number for all: `[head_dim / 2]`.
    pub(crate) fn divisors(rope: &Rope, head_dim: usize) -> Option<Vec<f32>> {
        if matches!(rope.scaling, RopeScaling::None | RopeScaling::Linear { .. }) {
            return None;
        }
        let plain = Self::new(&Rope { scaling: RopeScaling::None, ..rope.clone() }, head_dim);
        let scaled = Self::new(rope, head_dim);
        Some(plain.0.iter().zip(&scaled.0).map(|(plain, scaled)| plain / scaled).collect())
    }

    /// Cosines and sines at the positions of `chunks`, each `[tokens, head_dim / 2]`, put into `cos` and `sin`.
    pub(crate) fn at(&self, chunks: &[Chunk<'_>], cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        self.at_positions(chunks.iter().flat_map(|c| c.start..c.start + c.tokens.len()), cos, sin);
    }

    /// Cosines and sines at `positions`, each `[positions, head_dim / 2]`, put into `cos` and `sin`.
    pub fn at_positions(&self, positions: impl Iterator<Item = usize>, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        cos.clear();
        sin.clear();
        for position in positions {
            for frequency in &self.0 {
                let (s, c) = (position as f32 * frequency).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
    }
}
