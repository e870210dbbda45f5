//! The rotary embedding: frequencies, and their cosines and sines at given positions.

use std::f64::consts::TAU;

use crate::config::{LlamaConfig, Rope, RopeScaling, Rotation};
use crate::pass::Chunk;

/// What YaRN multiplies cosines and sines by where frequencies are divided by `factor` (Peng et al. 2023; `scale` is a file's own).
pub(crate) fn yarn_magnitude(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

/// The rotary embeddings of one model.
pub(crate) struct Rotary {
    global: Frequencies,
    local: Option<Frequencies>,
}

/// How a step's tokens turn.
#[derive(Default)]
pub(crate) struct Turns {
    global: Turn,
    local: Turn,
}

/// Cosines and sines of a step's tokens, each `[tokens, turned / 2]`.
#[derive(Default)]
pub(crate) struct Turn {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl Rotary {
    pub(crate) fn new(config: &LlamaConfig) -> Self {
        Self { global: Frequencies::new(&config.rope), local: config.local_rope.as_ref().map(Frequencies::new) }
    }

    /// How the tokens of `chunks` turn, put into `turns`.
    pub(crate) fn at(&self, chunks: &[Chunk<'_>], turns: &mut Turns) {
        let positions = || chunks.iter().flat_map(|c| c.start..c.start + c.tokens.len());
        self.global.at_positions(positions(), &mut turns.global.cos, &mut turns.global.sin);
        if let Some(local) = &self.local {
            local.at_positions(positions(), &mut turns.local.cos, &mut turns.local.sin);
        }
    }
}

impl Turns {
    /// Those of a layer; `None` where it has no rotary embedding.
    pub(crate) fn of(&self, rotation: Rotation) -> Option<&Turn> {
        match rotation {
            Rotation::Global => Some(&self.global),
            Rotation::Local => Some(&self.local),
            Rotation::None => None,
        }
    }
}

/// Frequencies of one rotary embedding, `[turned / 2]`.
pub struct Frequencies {
    frequencies: Vec<f32>,
    /// What cosines and sines are multiplied by.
    magnitude: f32,
}

impl Frequencies {
    /// From the base and the scaling. Formulas: Su et al. 2021 for the base, Llama 3.1's release for `llama3`, Peng et al. 2023
    /// (arXiv 2309.00071) for `yarn`.
    pub fn new(rope: &Rope) -> Self {
        let (half, turned) = (rope.turned / 2, rope.turned as f64);
        let base = (0..half).map(|i| 1.0 / rope.theta.powf(2.0 * i as f64 / turned));
        let scaled: Vec<f64> = match &rope.scaling {
            RopeScaling::None => base.collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RopeScaling::Factors { factors } => base.zip(factors).map(|(f, factor)| f / factor).collect(),
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, truncate } => {
                // The number of the frequency that turns so many times within the original context.
                let at = |turns: f64| turned * (*original_context as f64 / (turns * TAU)).ln() / (2.0 * rope.theta.ln());
                let (low, high) = (at(*beta_fast), at(*beta_slow));
                let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(turned - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                let divided = |i: usize| ((i as f64 - low) / width).clamp(0.0, 1.0);
                base.enumerate().map(|(i, f)| f / factor * divided(i) + f * (1.0 - divided(i))).collect()
            }
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
        Self { frequencies: scaled.into_iter().map(|f| f as f32).collect(), magnitude: rope.magnitude as f32 }
    }

    /// What each frequency of the base was divided by, where that is more than one number for all: `[turned / 2]`.
    pub(crate) fn divisors(rope: &Rope) -> Option<Vec<f32>> {
        if matches!(rope.scaling, RopeScaling::None | RopeScaling::Linear { .. }) {
            return None;
        }
        let plain = Self::new(&Rope { scaling: RopeScaling::None, ..rope.clone() });
        let scaled = Self::new(rope);
        Some(plain.frequencies.iter().zip(&scaled.frequencies).map(|(plain, scaled)| plain / scaled).collect())
    }

    /// Cosines and sines at `positions`, each `[positions, turned / 2]`, put into `cos` and `sin`.
    pub fn at_positions(&self, positions: impl Iterator<Item = usize>, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        cos.clear();
        sin.clear();
        for position in positions {
            for frequency in &self.frequencies {
                let (s, c) = (position as f32 * frequency).sin_cos();
                cos.push(c * self.magnitude);
                sin.push(s * self.magnitude);
            }
        }
    }
}
