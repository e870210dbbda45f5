//! The tokens of an answer are those of an undisturbed one; of an answer that was not finished, the first of them.

use overfill_types::StopConditions;

use crate::client::{self, Ended};
use crate::model;
use crate::world::Outcome;

pub(super) fn check(outcome: &Outcome) -> Result<(), String> {
    for answer in &outcome.answers {
        let plan = &outcome.plan.requests[answer.number];
        let stop = StopConditions { max_tokens: plan.max_tokens, stop_token_ids: Vec::new(), ignore_eos: false };
        let sampling = client::sampling(answer.number);
        let (undisturbed, _) = model::undisturbed((plan.pair, &outcome.manifests[plan.pair]), plan.quality, &plan.prompt, &sampling, &stop);
        let whole = matches!(answer.ended, Ended::Finished(_));
        let same = if whole { answer.tokens == undisturbed } else { undisturbed.starts_with(&answer.tokens) };
        if !same {
            return Err(format!(
                "request {} ({}) has the answer {:?}, an undisturbed one is {undisturbed:?}; it ended as {:?}",
                answer.number, plan.quality, answer.tokens, answer.ended
            ));
        }
        if let Ended::Finished(finished) = &answer.ended
            && finished.completion_tokens as usize != answer.tokens.len()
        {
            return Err(format!(
                "request {} is said to have {} tokens and has {}",
                answer.number,
                finished.completion_tokens,
                answer.tokens.len()
            ));
        }
    }
    Ok(())
}
