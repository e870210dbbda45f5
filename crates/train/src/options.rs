//! What a run is asked to do.

use std::path::Path;

use overfill_compress::export::GgufFormats;
use overfill_compress::product::Precision;
use overfill_compress::{CompressError, Example, data};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::adam::AdamOptions;
use crate::batches::Reading;
use crate::error::TrainError;
use crate::net::{Divergence, Mix};
use crate::rollout::OnPolicy;
use crate::schedule::Schedule;
use overfill_text::ModelText;

/// Everything that decides what a run computes, besides models and data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainOptions {
    /// What the full model reads.
    pub reading: Reading,
    /// Weight of the cross-entropy with the response's own tokens.
    pub ce_weight: f32,
    /// Weight of the divergence from the full model.
    pub distill_weight: f32,
    /// Which divergence that is.
    pub divergence: Divergence,
    /// Weight of the distance from the full model's hidden states.
    pub hidden_weight: f32,
    /// How many of the full model's most likely tokens are known at each place; 0 where it is not asked.
    pub top: usize,
    /// Whether a projection of the full model's keys and values is trained too.
    pub projection: bool,
    /// How much is learned from answers that the decode model writes itself.
    pub on_policy: Option<OnPolicy>,
    /// The optimiser.
    pub adam: AdamOptions,
    /// The learning rate.
    pub schedule: Schedule,
    /// Longest gradient of a step; longer ones are shortened to it.
    pub clip: f32,
    /// Times through the data.
    pub epochs: u64,
    /// Most steps, if fewer than the epochs have.
    pub most_steps: Option<u64>,
    /// Response tokens in a batch.
    pub batch_tokens: usize,
    /// Batches in a step.
    pub accumulate: usize,
    /// Decides the order of examples and all that is drawn.
    pub seed: u64,
    /// Steps from one validation to the next.
    pub validate_every: u64,
    /// Steps from one saved state to the next.
    pub save_every: u64,
    /// Validations in a row without a lower loss after which the run ends.
    pub patience: Option<u64>,
    /// Numbers of the large products of steps; validations are f32.
    pub precision: Precision,
    /// Formats of the file that the model will be: it learns with weights that are rounded to them.
    pub rounding: Option<GgufFormats>,
}

impl TrainOptions {
    /// The losses' weights.
    pub fn mix(&self) -> Mix {
        Mix { ce: self.ce_weight, distill: self.distill_weight, divergence: self.divergence, states: self.hidden_weight }
    }

    /// The same where the decode model wrote the answers itself: it is not taught to write them again.
    pub fn mix_on_policy(&self) -> Mix {
        Mix { ce: 0.0, ..self.mix() }
    }

    /// Refuses what no run can be made of.
    ///
    /// # Errors
    /// [`TrainError::Refused`] naming the option.
    pub fn check(&self) -> Result<(), TrainError> {
        let positive = [
            ("--lr", self.schedule.peak > 0.0 && self.schedule.peak.is_finite()),
            ("--clip", self.clip > 0.0),
            ("--epochs", self.epochs > 0),
            ("--batch-tokens", self.batch_tokens > 0),
            ("--accumulate", self.accumulate > 0),
            ("--validate-every", self.validate_every > 0),
            ("--save-every", self.save_every > 0),
            ("--patience", self.patience != Some(0)),
            ("--steps", self.most_steps != Some(0)),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, fine)| !fine) {
            return Err(TrainError::Refused(format!("{name} must be more than 0")));
        }
        let shares = [("--warmup", self.schedule.warmup), ("--last-lr", self.schedule.last)];
        if let Some((name, _)) = shares.iter().find(|(_, share)| !(0.0..=1.0).contains(share)) {
            return Err(TrainError::Refused(format!("{name} is a share: between 0 and 1")));
        }
        if let Reading::Share(share) = self.reading
            && !(0.0..=1.0).contains(&share)
        {
            return Err(TrainError::Refused("--prompt-share is a share: between 0 and 1".into()));
        }
        let weights = [self.ce_weight, self.distill_weight, self.hidden_weight];
        if !(weights.iter().all(|w| *w >= 0.0 && w.is_finite()) && self.ce_weight + self.distill_weight > 0.0) {
            return Err(TrainError::Refused(
                "the losses' weights must not be negative, and that of cross-entropy or divergence more than 0".into(),
            ));
        }
        if self.distill_weight + self.hidden_weight > 0.0 && self.top == 0 {
            return Err(TrainError::Refused("--top must be more than 0 to learn from the full model's distribution or states".into()));
        }
        if let Some(on_policy) = self.on_policy {
            on_policy.check(self)?;
        }
        if self.projection && self.reading == Reading::Nothing {
            return Err(TrainError::Refused(
                "a projection of the full model's KV cache cannot be trained where nothing of it is read".into(),
            ));
        }
        Ok(())
    }
}

/// Examples with the numbers of their conversations in the file.
#[derive(Clone, Debug, Default)]
pub struct Set {
    /// As token ids; each has a response of at least two tokens.
    pub examples: Vec<Example>,
    /// Counted from 1.
    pub numbers: Vec<usize>,
    /// Conversations that were left out: too long, or without two tokens to learn.
    pub left_out: usize,
}

impl Set {
    /// Reads a file of conversations; those of more than `longest` tokens are left out. `end` is the token that ends a turn.
    ///
    /// # Errors
    /// [`TrainError::Compress`], naming the line; [`TrainError::Refused`] where nothing is left.
    pub fn load(path: &Path, text: &ModelText, end: u32, longest: usize, most: usize) -> Result<Self, TrainError> {
        let mut set = Self::default();
        for (at, conversation) in data::read(path)?.into_iter().enumerate() {
            if set.examples.len() == most {
                break;
            }
            let example = conversation.tokenise(text, end).map_err(CompressError::from)?;
            if example.response.len() < 2 || example.prompt.len() + example.response.len() > longest {
                set.left_out += 1;
                continue;
            }
            set.examples.push(example);
            set.numbers.push(at + 1);
        }
        if set.examples.is_empty() {
            let what = format!("{}: none of its {} conversations has at most {longest} tokens and an answer", path.display(), set.left_out);
            return Err(TrainError::Refused(what));
        }
        Ok(set)
    }

    /// Response tokens in all.
    pub fn response_tokens(&self) -> usize {
        self.examples.iter().map(|e| e.response.len()).sum()
    }

    /// Hash of all tokens.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for example in &self.examples {
            hash.update((example.prompt.len() as u64).to_le_bytes());
            hash.update((example.response.len() as u64).to_le_bytes());
            example.prompt.iter().chain(&example.response).for_each(|t| hash.update(t.to_le_bytes()));
        }
        hex::encode(hash.finalize())
    }
}
