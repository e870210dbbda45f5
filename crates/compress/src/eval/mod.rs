//! Evaluation: how a pair's arms, and baselines, score on the same conversations.
//!
//! Loss, KL divergence to the full model and top-1 agreement are teacher-forced over the given answers; task scores are of
//! greedy answers. All of it runs on the engine that serves.

pub mod estimate;
mod plot;
mod report;
pub mod words;

use overfill_model::{Llama, ModelError, Workspace};
use overfill_text::TextModel;
use overfill_types::{KvFormats, SamplingParams, ServiceError};

use crate::answer::{Asked, Writing, answer};
use crate::data::{Conversation, Example, Metric};
use crate::read::Arm;
use crate::score::score;

pub use plot::plot;
pub use report::{Comparison, Contender, Figures, Report};

/// What is measured with, besides the models.
#[derive(Clone, Debug)]
pub struct Measuring {
    /// Formats of the KV cache.
    pub formats: KvFormats,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Answers at a time.
    pub batch: usize,
    /// Tokens that end an answer; the first is the one that the template ends a turn with.
    pub end: Vec<u32>,
    /// Longest sequence that all models take.
    pub max_context: usize,
}

/// Conversations that can be measured.
pub struct Samples {
    conversations: Vec<Conversation>,
    examples: Vec<Example>,
    /// How many were left out, since they do not fit the context.
    pub left_out: usize,
}

impl Samples {
    /// Tokenises conversations.
    ///
    /// # Errors
    /// Where the chat template refuses one.
    pub fn new(conversations: Vec<Conversation>, text: &TextModel, how: &Measuring) -> Result<Self, ServiceError> {
        let mut samples = Self { conversations: Vec::new(), examples: Vec::new(), left_out: 0 };
        let end = how.end.first().copied().unwrap_or_default();
        for conversation in conversations {
            let example = conversation.tokenise(text, end)?;
            if example.prompt.len() + example.response.len().max(how.max_tokens) > how.max_context {
                samples.left_out += 1;
                continue;
            }
            samples.conversations.push(conversation);
            samples.examples.push(example);
        }
        Ok(samples)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.examples.len()
    }
}

/// What one arm made of one sample.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    tokens: f64,
    /// Sums over the tokens.
    loss: f64,
    divergence: f64,
    agreements: f64,
    exact: f64,
    f1: f64,
    contains: f64,
    /// The one of the last three that the sample asks for.
    score: f64,
}

/// Measures every arm on all samples. `progress` is told of each sample that an arm has been scored on or has answered.
///
/// # Errors
/// Where a forward pass fails or a baseline does not know a token.
pub fn evaluate(
    full: &Llama,
    arms: &[(String, Arm<'_>)],
    samples: &Samples,
    text: &TextModel,
    how: &Measuring,
    workspace: &mut Workspace,
    mut progress: impl FnMut(),
) -> Result<Report, ModelError> {
    let mut told = 0;
    let all = score(full, &arms.iter().map(|a| a.1).collect::<Vec<_>>(), how.formats, workspace, &samples.examples, |done| {
        (told * arms.len()..done * arms.len()).for_each(|_| progress());
        told = done;
    })?;
    let mut outcomes: Vec<Vec<Outcome>> = Vec::with_capacity(arms.len());
    for ((_, arm), scored) in arms.iter().zip(&all) {
        let of_tokens = scored.iter().map(|scored| Outcome {
            tokens: scored.log_probs.len() as f64,
            loss: scored.loss(true),
            divergence: scored.divergences.iter().map(|d| f64::from(*d)).sum(),
            agreements: scored.agrees.iter().filter(|agrees| **agrees).count() as f64,
            ..Outcome::default()
        });
        let mut of_tokens: Vec<Outcome> = of_tokens.collect();
        let longest = samples.examples.iter().map(|e| e.prompt.len()).max().unwrap_or(0);
        let writing = Writing { batch: how.batch, positions: longest + how.max_tokens, formats: how.formats, end: how.end.clone() };
        let asked = samples.examples.iter().map(|example| Asked {
            prompt: example.prompt.clone(),
            sampling: SamplingParams::greedy(),
            max_tokens: how.max_tokens,
        });
        answer(full, *arm, &writing, workspace, asked, |sample, written| -> Result<(), ModelError> {
            progress();
            let conversation = &samples.conversations[sample];
            let own = [conversation.response.clone()];
            let right = if conversation.answers.is_empty() { &own[..] } else { &conversation.answers };
            let answer = text.text_of(&written);
            let [exact, f1, contains] = [Metric::Exact, Metric::F1, Metric::Contains].map(|metric| words::score(metric, &answer, right));
            let score = match conversation.metric {
                Metric::Exact => exact,
                Metric::F1 => f1,
                Metric::Contains => contains,
            };
            of_tokens[sample] = Outcome { exact, f1, contains, score, ..of_tokens[sample] };
            Ok(())
        })?;
        outcomes.push(of_tokens);
    }
    Ok(Report::new(arms, samples, &outcomes))
}
