//! Learning from what the decode model writes itself: on-policy distillation (GKD, Agarwal et al. 2023, arXiv 2306.13649).
//!
//! A share of the batches does not have the answers of the data but those that the decode model of that moment writes to the
//! same prompts, on the engine that serves, after the full model's KV cache of the prompt. The full model then reads them and
//! says what it would have written at each place: so the decode model learns to go on from its own mistakes.
//!
//! Such training alone is known to run into long answers that repeat themselves (arXiv 2604.08527). So it is a share beside
//! the data's answers, and a rollout that begins to go round in circles is cut off there: the last place that is learned is
//! the one at which the circle begins.

use overfill_compress::answer::{self, Question, Writing};
use overfill_compress::repeats::first_repeat;
use overfill_compress::{Arm, Example};
use overfill_model::{Llama, ModelError};
use overfill_types::SamplingParams;
use serde::{Deserialize, Serialize};

use crate::batches::Reading;
use crate::error::TrainError;
use crate::lesson::{Carry, FullModel};
use crate::options::TrainOptions;

/// Positions that the caches of one rollout have room for: 64 answers of 512 tokens with their prompts, 3 GB for a model of
/// SmolLM2-135M's shape with its f16 cache, twice.
const POSITIONS: usize = 64 << 9;
/// Most answers at a time: what is gained by more is small.
const MOST_AT_ONCE: usize = 64;

/// How much is learned from the decode model's own answers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OnPolicy {
    /// Of all batches, from 0 to 1.
    pub share: f32,
    /// At which it writes.
    pub temperature: f32,
    /// Most tokens that it writes.
    pub tokens: usize,
}

impl OnPolicy {
    /// Refuses what cannot be learned from, naming the option.
    pub(crate) fn check(&self, options: &TrainOptions) -> Result<(), TrainError> {
        let refused = |what: &str| Err(TrainError::Refused(what.into()));
        if !(self.share > 0.0 && self.share <= 1.0) {
            return refused("--on-policy is a share of the batches: more than 0, at most 1");
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return refused("--rollout-temperature must not be negative");
        }
        if self.tokens < 2 {
            return refused("--rollout-tokens must be at least 2: the first token is the full model's");
        }
        if options.distill_weight == 0.0 {
            return refused("--on-policy learns from the full model's distribution, which has no weight: use --loss distill");
        }
        if options.projection {
            return refused(
                "--on-policy writes with the pair as it is served, which a projection that is still learned is not: leave --projection out",
            );
        }
        if matches!(options.reading, Reading::Share(_)) {
            return refused("--on-policy writes after the full model's reading of the whole prompt: leave --prompt-share out");
        }
        Ok(())
    }

    /// Whether a batch, counted from 0 over the whole run, is one of them: they are spread evenly.
    pub(crate) fn takes(&self, batch: u64) -> bool {
        let before = |batch: u64| (batch as f64 * f64::from(self.share)).floor();
        before(batch + 1) > before(batch)
    }
}

/// What was written for a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// Answers.
    pub answers: usize,
    /// Their tokens, without what was cut off.
    pub tokens: usize,
    /// Tokens of all of these as they were written, over tokens of the data's answers to the same prompts, none counted beyond
    /// the most that a rollout may have.
    pub length_ratio: f64,
    /// Answers that were cut off where they began to repeat themselves.
    pub circles: usize,
    /// Seconds that writing took.
    pub seconds: f64,
}

/// Puts the decode model's own answers in the place of the data's. An answer of less than two tokens teaches nothing: the data's
/// own stays there. `key` is the seed of an example's draws; `end` ends an answer.
pub(crate) fn write(
    full: &mut FullModel,
    decode: &Llama,
    reading: Reading,
    how: OnPolicy,
    end: &[u32],
    examples: &mut [(&mut Example, u64)],
) -> Result<Written, TrainError> {
    let begun = std::time::Instant::now();
    let longest = examples.iter().map(|(example, _)| example.prompt.len()).max().unwrap_or(0);
    let positions = longest + how.tokens;
    let batch = (POSITIONS / positions).clamp(1, MOST_AT_ONCE).min(examples.len());
    let writing = Writing { batch, positions, formats: full.formats, end: end.to_vec() };
    let arm = match (&full.carry, reading) {
        (_, Reading::Nothing) => Arm::Alone(decode),
        (Carry::Handoff(transform, _), _) => Arm::Overfill { decode, transform },
        (Carry::Raw(_), _) => return Err(TrainError::Refused("--on-policy cannot be had with --projection".into())),
    };
    let question = |(example, key): &(&mut Example, u64)| Question {
        prompt: example.prompt.clone(),
        sampling: SamplingParams { temperature: how.temperature, seed: *key, ..SamplingParams::greedy() },
        max_tokens: how.tokens,
    };
    let asked: Vec<Question> = examples.iter().map(question).collect();
    let mut answers: Vec<Vec<u32>> = Vec::with_capacity(asked.len());
    let done = |_, tokens| {
        answers.push(tokens);
        Ok::<_, ModelError>(())
    };
    answer::answer(&full.model, arm, &writing, &mut full.workspace, asked, done)?;

    let mut written = Written::default();
    let (mut own, mut theirs) = (0, 0);
    for ((example, _), mut answer) in examples.iter_mut().zip(answers) {
        own += answer.len();
        theirs += example.response.len().min(how.tokens);
        written.circles += usize::from(cut_circle(&mut answer));
        if answer.len() >= 2 {
            written.tokens += answer.len();
            written.answers += 1;
            example.response = answer;
        }
    }
    written.length_ratio = own as f64 / theirs.max(1) as f64;
    written.seconds = begun.elapsed().as_secs_f64();
    Ok(written)
}

/// Cuts an answer off after the token with which it begins to repeat itself; tells whether it does.
fn cut_circle(answer: &mut Vec<u32>) -> bool {
    let repeat = first_repeat(answer);
    if let Some(at) = repeat {
        answer.truncate(at + 1);
    }
    repeat.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_learned_of_a_circle_is_not_to_begin_it() {
        let mut circle = vec![9, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2];
        assert!(cut_circle(&mut circle));
        assert_eq!(circle, [9, 1, 2, 3, 4, 1]);
        let mut list = vec![9, 1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3];
        assert!(!cut_circle(&mut list));
        assert_eq!(list.len(), 12);
    }

    #[test]
    fn a_share_of_the_batches_is_spread_evenly() {
        for (share, of_a_hundred) in [(0.0, 0), (0.25, 25), (0.5, 50), (0.33, 33), (1.0, 100)] {
            let how = OnPolicy { share, temperature: 1.0, tokens: 8 };
            let takes: Vec<bool> = (0..100).map(|batch| how.takes(batch)).collect();
            assert_eq!(takes.iter().filter(|takes| **takes).count(), of_a_hundred, "{share}");
            let tens = takes.chunks(10).map(|ten| ten.iter().filter(|takes| **takes).count());
            assert!(tens.max() <= tens_at_most(share), "{share}");
        }
    }

    fn tens_at_most(share: f32) -> Option<usize> {
        Some((10.0 * share).ceil() as usize)
    }
}
