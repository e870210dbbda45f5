//! Choosing a token from logits.

use overfill_types::{SamplingParams, TokenLogprob};

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-probability, if asked for.
    pub logprob: Option<TokenLogprob>,
}

/// Chooses one sequence's tokens.
pub struct Sampler {}

#[allow(unused_variables)]
impl Sampler {
    /// For a sequence with this prompt (the repetition penalty sees it).
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        todo!()
    }

    /// Counts a token of the answer that was chosen elsewhere (the full model's first token, a replayed one).
    pub fn observe(&mut self, token: u32) {
        todo!()
    }

    /// Chooses the token for `position` (prompt length + index in the answer), and counts it.
    /// The draw depends on the logits, the parameters, the seed and `position` alone.
    pub fn sample(&mut self, logits: &mut [f32], position: usize) -> Sampled {
        todo!()
    }
}
