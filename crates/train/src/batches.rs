//! Which examples are read together, and in which order: decided by the seed alone, before anything is computed.
//!
//! Batches are filled by response tokens, which are the same in every mode, so a baseline sees the same batches in the same
//! order. Nothing is padded, so examples of different lengths may share a batch.

use overfill_compress::Example;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Where the full model's reading ends and the decode model's begins.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reading {
    /// The full model reads the whole prompt, and nothing else.
    Prompt,
    /// The full model reads this share of the prompt, the decode model the rest.
    Share(f32),
    /// Anywhere in the prompt or the response, drawn anew for each example in each epoch.
    Random,
    /// The full model reads nothing: the decode model by itself.
    Nothing,
}

impl Reading {
    /// How many tokens of the example the full model reads. At least one token is left that something is predicted from.
    pub fn cut(self, example: &Example, seed: u64, epoch: u64, index: usize) -> usize {
        let prompt = example.prompt.len();
        match self {
            Self::Nothing => 0,
            Self::Prompt => prompt,
            Self::Share(share) => ((prompt as f64 * f64::from(share)).round() as usize).min(prompt),
            Self::Random => {
                let mut rng = ChaCha8Rng::seed_from_u64(seed ^ epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                rng.set_stream(index as u64 + 1);
                rng.random_range(1..=prompt + example.response.len() - 2)
            }
        }
    }

    /// Whether keys and values of the response are wanted too.
    pub fn wants_response(self) -> bool {
        self == Self::Random
    }
}

/// Batches of one epoch: indices of examples, in an order that seed and epoch decide, each of about `tokens` response tokens.
pub fn epoch(examples: &[Example], tokens: usize, seed: u64, epoch: u64) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch);
    order.shuffle(&mut rng);
    fill(examples, order, tokens)
}

/// Batches of all examples in their own order.
pub fn in_order(examples: &[Example], tokens: usize) -> Vec<Vec<usize>> {
    fill(examples, (0..examples.len()).collect(), tokens)
}

fn fill(examples: &[Example], order: Vec<usize>, tokens: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for index in order {
        let length = examples[index].response.len();
        match batches.last_mut() {
            Some(batch) if length <= room => batch.push(index),
            _ => {
                batches.push(vec![index]);
                room = tokens;
            }
        }
        room = room.saturating_sub(length);
    }
    batches
}

/// All steps of a run: for each its epoch and its batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// In order.
    pub steps: Vec<(u64, Vec<Vec<usize>>)>,
}

impl Plan {
    /// `epochs` times through all examples, `accumulate` batches a step, at most `most` steps.
    pub fn new(examples: &[Example], tokens: usize, accumulate: usize, epochs: u64, most: Option<u64>, seed: u64) -> Self {
        let most = most.map_or(usize::MAX, |most| most as usize);
        let steps = (0..epochs).flat_map(|e| {
            let batches = epoch(examples, tokens, seed, e);
            let steps: Vec<_> = batches.chunks(accumulate.max(1)).map(|batches| (e, batches.to_vec())).collect();
            steps
        });
        Self { steps: steps.take(most).collect() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn examples() -> Vec<Example> {
        (0..100).map(|i| Example { prompt: vec![1; 3 + i % 5], response: vec![2; 2 + i * 7 % 31] }).collect()
    }

    #[test]
    fn every_epoch_has_every_example_once_in_its_own_order() {
        let examples = examples();
        let (first, second) = (epoch(&examples, 60, 1, 0), epoch(&examples, 60, 1, 1));
        assert_ne!(first, second);
        assert_ne!(first, epoch(&examples, 60, 2, 0));
        assert_eq!(first, epoch(&examples, 60, 1, 0));
        for batches in [first, second, in_order(&examples, 60)] {
            let all: BTreeSet<usize> = batches.iter().flatten().copied().collect();
            assert_eq!((all.len(), batches.iter().map(Vec::len).sum::<usize>()), (100, 100));
            for batch in &batches {
                let tokens: usize = batch.iter().map(|i| examples[*i].response.len()).sum();
                assert!(tokens <= 60 || batch.len() == 1, "{tokens}");
            }
        }
    }

    #[test]
    fn a_plan_is_cut_where_it_should_end() {
        let examples = examples();
        let batches = epoch(&examples, 60, 1, 0).len();
        let all = Plan::new(&examples, 60, 2, 3, None, 1);
        assert!(all.steps.len() >= 3 * batches / 2);
        let some = Plan::new(&examples, 60, 2, 3, Some(7), 1);
        assert_eq!(some.steps, all.steps[..7]);
    }

    #[test]
    fn a_cut_leaves_something_to_learn() {
        let example = Example { prompt: vec![1; 10], response: vec![2; 4] };
        assert_eq!(Reading::Nothing.cut(&example, 0, 0, 0), 0);
        assert_eq!(Reading::Prompt.cut(&example, 0, 0, 0), 10);
        assert_eq!(Reading::Share(0.5).cut(&example, 0, 0, 0), 5);
        let drawn: BTreeSet<usize> = (0..500).map(|epoch| Reading::Random.cut(&example, 7, epoch, 3)).collect();
        assert_eq!(drawn, (1..=12).collect());
        assert_eq!(Reading::Random.cut(&example, 7, 5, 3), Reading::Random.cut(&example, 7, 5, 3));
    }
}
