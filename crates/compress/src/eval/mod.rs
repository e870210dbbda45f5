//! Evaluation: how a pair's arms, and baselines, score on the same conversations.
//!
//! Loss, KL divergence to the full model and top-1 agreement are teacher-forced over the given answers; task scores, and all
//! that is told of the answers' manner, are of greedy answers. All of it runs on the engine that serves.

pub mod estimate;
mod manner;
mod plot;
mod report;
pub mod words;

use overfill_model::{Llama, ModelError, Workspace};
use overfill_text::TextModel;
use overfill_types::{Code, KvFormats, SamplingParams, ServiceError};

use crate::answer::{Question, Writing, answer};
use crate::data::{Conversation, Example, Metric};
use crate::eval::manner::{Manner, PLACES, place};
use crate::read::Arm;
use crate::score::{Scored, score};

pub use plot::plot;
pub use report::{AgreementAt, Comparison, Contender, Figures, Report};

/// What is measured with, besides the models.
#[derive(Clone, Debug)]
pub struct Measuring {
    /// Formats of the KV cache.
    pub formats: KvFormats,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Answers at a time.
    pub batch: usize,
    /// Tokens that end an answer.
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
    /// Where the chat template refuses one, or the pair has no token that ends an answer.
    pub fn new(conversations: Vec<Conversation>, text: &TextModel, how: &Measuring) -> Result<Self, ServiceError> {
        let mut samples = Self { conversations: Vec::new(), examples: Vec::new(), left_out: 0 };
        let end = text.eos().or(how.end.first().copied()).ok_or_else(|| {
            ServiceError::new(
                Code::InvalidArgument,
                "the pair names no token that ends an answer: make it of models whose config.json has an eos_token_id",
            )
        })?;
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
    /// Agreements and tokens at each of [`PLACES`].
    agreements_at: [f64; PLACES.len()],
    tokens_at: [f64; PLACES.len()],
    exact: f64,
    f1: f64,
    contains: f64,
    /// The one of the last three that the sample asks for.
    score: f64,
    /// Of what was written.
    manner: Manner,
    /// Tokens that the full model writes there.
    full_tokens: f64,
    /// The full model's loss on what was written, summed over its tokens.
    full_loss: f64,
}

impl Outcome {
    /// What the given answer's tokens tell.
    fn of(scored: &Scored) -> Self {
        let mut of = Self {
            tokens: scored.log_probs.len() as f64,
            loss: scored.loss(true),
            divergence: scored.divergences.iter().map(|d| f64::from(*d)).sum(),
            agreements: scored.agrees.iter().filter(|agrees| **agrees).count() as f64,
            ..Self::default()
        };
        for (at, agrees) in scored.agrees.iter().enumerate() {
            of.agreements_at[place(at)] += f64::from(*agrees);
            of.tokens_at[place(at)] += 1.0;
        }
        of
    }

    /// And how well the arm answered.
    fn with_answer(self, conversation: &Conversation, answer: &str) -> Self {
        let own = [conversation.response.clone()];
        let right = if conversation.answers.is_empty() { &own[..] } else { &conversation.answers };
        let [exact, f1, contains] = [Metric::Exact, Metric::F1, Metric::Contains].map(|metric| words::score(metric, answer, right));
        let score = match conversation.metric {
            Metric::Exact => exact,
            Metric::F1 => f1,
            Metric::Contains => contains,
        };
        Self { exact, f1, contains, score, ..self }
    }
}

/// An arm's greedy answers to all samples.
fn answers(
    full: &Llama,
    arm: Arm<'_>,
    samples: &Samples,
    how: &Measuring,
    workspace: &mut Workspace,
    progress: &mut dyn FnMut(),
) -> Result<Vec<Vec<u32>>, ModelError> {
    let longest = samples.examples.iter().map(|e| e.prompt.len()).max().unwrap_or(0);
    let writing = Writing { batch: how.batch, positions: longest + how.max_tokens, formats: how.formats, end: how.end.clone() };
    let asked = samples.examples.iter().map(|example| Question {
        prompt: example.prompt.clone(),
        sampling: SamplingParams::greedy(),
        max_tokens: how.max_tokens,
    });
    let mut all = Vec::with_capacity(samples.count());
    answer(full, arm, &writing, workspace, asked, |_, written| -> Result<(), ModelError> {
        progress();
        all.push(written);
        Ok(())
    })?;
    Ok(all)
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
    let mut written = Vec::with_capacity(arms.len());
    for (_, arm) in arms {
        written.push(answers(full, *arm, samples, how, workspace, &mut progress)?);
    }
    // How long the full model's answers are is told in any case.
    let of_full = match arms.iter().position(|(_, arm)| matches!(arm, Arm::Full)) {
        Some(at) => written[at].clone(),
        None => answers(full, Arm::Full, samples, how, workspace, &mut || {})?,
    };
    let mut outcomes: Vec<Vec<Outcome>> = Vec::with_capacity(arms.len());
    for (scored, written) in all.iter().zip(written) {
        let asked = samples.examples.iter().zip(&written);
        let read: Vec<Example> = asked.map(|(asked, own)| Example { prompt: asked.prompt.clone(), response: own.clone() }).collect();
        let of_written = score(full, &[Arm::Full], how.formats, workspace, &read, |_| {})?;
        let of_written: Vec<Scored> = of_written.into_iter().flatten().collect();
        let outcome = |sample: usize| {
            let answer = text.decode(&written[sample], false);
            Outcome {
                manner: Manner::of(&written[sample], &answer),
                full_tokens: of_full[sample].len() as f64,
                full_loss: of_written[sample].loss(true),
                ..Outcome::of(&scored[sample]).with_answer(&samples.conversations[sample], &answer)
            }
        };
        outcomes.push((0..samples.count()).map(outcome).collect());
    }
    Ok(Report::new(arms, samples, &outcomes))
}

#[cfg(test)]
mod tests {
    use overfill_model::{Device, KvSpec, MakePair, ThreadPool};
    use overfill_types::pair::WeightFormat;

    use super::*;
    use crate::fixture;

    fn conversation(prompt: &str, answer: &str, task: &str) -> Conversation {
        let line = format!(r#"{{"prompt": "{prompt}", "response": "{answer}", "task": "{task}", "metric": "contains"}}"#);
        crate::data::parse(&line).unwrap()
    }

    #[test]
    fn a_decode_model_that_is_the_full_one_loses_nothing() {
        let (full, narrow, folder) = (fixture::model("full"), fixture::model("narrow"), tempfile::tempdir().unwrap());
        let making = MakePair {
            name: "same".into(),
            full: full.path().into(),
            full_weights: WeightFormat::F32,
            decode: full.path().into(),
            decode_weights: WeightFormat::F32,
            kv: KvSpec::Identity,
            kv_formats: KvFormats::default(),
            generation: overfill_types::GenerationConfig::default(),
            provenance: serde_json::Map::new(),
        };
        let pair = making.make(&folder.path().join("pair")).unwrap();
        let text = TextModel::open(&pair.dir).unwrap();
        let mut workspace = Workspace::new(ThreadPool::new(2, &[]).unwrap());
        let (full, decode) = (pair.load_full(&Device::Cpu, workspace.pool()), pair.load_decode(&Device::Cpu, workspace.pool()));
        let (full, decode, transform) = (full.unwrap(), decode.unwrap(), pair.load_transform(workspace.pool()).unwrap());
        let other = Llama::load(narrow.path(), WeightFormat::F32, &Device::Cpu, workspace.pool()).unwrap();

        let how = Measuring { formats: KvFormats::default(), max_tokens: 12, batch: 3, end: vec![fixture::END], max_context: 100 };
        let mut conversations: Vec<Conversation> = (0..9)
            .map(|i| conversation(&"ask ".repeat(i + 1), &"say".repeat(i % 3 + 1), if i % 2 == 0 { "even" } else { "odd" }))
            .collect();
        conversations.push(conversation(&"long ".repeat(30), "no", "odd"));
        // What the full model writes counts as right, so that there is a score.
        for conversation in &mut conversations[..9] {
            let prompt = text.encode_chat(&conversation.messages).unwrap();
            let writing = Writing { batch: 1, positions: 90, formats: how.formats, end: how.end.clone() };
            let asked = Question { prompt, sampling: SamplingParams::greedy(), max_tokens: 12 };
            answer(&full, Arm::Full, &writing, &mut workspace, [asked], |_, written| -> Result<(), ModelError> {
                conversation.answers = vec![text.decode(&written, false)];
                Ok(())
            })
            .unwrap();
        }
        let samples = Samples::new(conversations, &text, &how).unwrap();
        assert_eq!((samples.count(), samples.left_out), (9, 1));
        let arms = [
            ("overfill".to_owned(), Arm::Overfill { decode: &decode, transform: &transform }),
            ("full".to_owned(), Arm::Full),
            ("narrow <&>".to_owned(), Arm::Alone(&other)),
        ];
        let mut told = 0;
        let report = evaluate(&full, &arms, &samples, &text, &how, &mut workspace, || told += 1).unwrap();
        assert_eq!(told, 2 * 9 * 3);
        let [pair, itself, other] = report.arms.as_slice() else { panic!("three arms") };
        assert_eq!(report.samples.iter().map(|(task, count)| (task.as_str(), *count)).collect::<Vec<_>>(), [("even", 5), ("odd", 4)]);
        assert!((pair.mean.loss.value - itself.mean.loss.value).abs() < 1e-6 && pair.mean.kl.value < 1e-6);
        assert_eq!((pair.mean.agreement.value, pair.mean.exact.value), (1.0, 1.0));
        assert_eq!(pair.mean.score, itself.mean.score);
        assert_eq!((pair.mean.length_ratio.value, itself.mean.length_ratio.value), (1.0, 1.0));
        // The full model's greedy words are likely to it; others' are less so.
        assert!(pair.mean.full_loss == itself.mean.full_loss && other.mean.full_loss.value > itself.mean.full_loss.value);
        assert!(pair.mean.agreement_at.iter().all(|at| at.agreement.value == 1.0) && pair.mean.agreement_at[0].from == 1);
        assert!((0.0..=1.0).contains(&other.mean.circles.value) && (0.0..=1.0).contains(&other.mean.distinct_4.value));
        assert!(other.mean.kl.value > 1e-3 && other.mean.kl.low <= other.mean.kl.value && other.mean.kl.value <= other.mean.kl.high);
        assert!(other.mean.exact.value < 1.0);
        let [comparison] = report.comparisons.as_slice() else { panic!("one arm works alone") };
        assert_eq!(comparison.gap_closed.unwrap().value, 1.0);

        let picture = plot(&report);
        assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>") && picture.contains("narrow &lt;&amp;&gt;"));
        let told = report.to_string();
        assert!(
            ["even", "odd", "KL to full", "loops", "top-1, tokens 1 to 8", "of the gap", "1 conversations did not fit"]
                .iter()
                .all(|what| told.contains(what)),
            "{told}"
        );
        assert!(serde_json::to_value(&report).unwrap()["arms"][0]["tasks"]["odd"]["f1"]["high"].is_number());
    }
}
