//! What an evaluation tells: figures by arm and task, and how arms compare.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::eval::estimate::{Draw, Estimate, draws, estimate};
use crate::eval::manner::PLACES;
use crate::eval::{Outcome, Samples};
use crate::read::Arm;

/// The task of samples that name none.
const NO_TASK: &str = "all";

/// Figures of one arm on one task, or their mean over the tasks.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Nats a token of the given answers.
    pub loss: Estimate,
    /// KL divergence from the full model, nats a token.
    pub kl: Estimate,
    /// Share of tokens at which the full model's most likely token is this arm's.
    pub agreement: Estimate,
    /// Share of answers that are right word for word.
    pub exact: Estimate,
    /// Mean F1 of the answers' words.
    pub f1: Estimate,
    /// Share of answers in which a right one stands.
    pub contains: Estimate,
    /// Mean of the score that each sample asks for.
    pub score: Estimate,
    /// Share of answers that go round in circles: a block of four tokens or more stands in them three times in a row, or a
    /// sentence of five words or more twice.
    pub circles: Estimate,
    /// Tokens of the answers over tokens of the full model's, both cut off at the most that were asked for.
    pub length_ratio: Estimate,
    /// Share of the runs of four tokens that are different from all others of their answer.
    pub distinct_4: Estimate,
    /// The full model's loss on the arm's answers, nats a token.
    pub full_loss: Estimate,
    /// Share of tokens at which the full model's most likely token is this arm's, by their place in the given answer; over the
    /// tokens of all tasks together.
    pub agreement_at: Vec<AgreementAt>,
}

/// Agreement at some places.
#[derive(Clone, Debug, Serialize)]
pub struct AgreementAt {
    /// The first place, counted from 1.
    pub from: usize,
    /// The last; none where there is no last.
    pub to: Option<usize>,
    /// Share of tokens.
    pub agreement: Estimate,
}

/// One arm.
#[derive(Clone, Debug, Serialize)]
pub struct Contender {
    /// `overfill`, `decode`, `full`, or a baseline's folder.
    pub name: String,
    /// By task.
    pub tasks: BTreeMap<String, Figures>,
    /// The mean over the tasks, each counting alike.
    pub mean: Figures,
}

/// How the pair compares with a model that works alone, by the mean score over the tasks.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The other arm.
    pub baseline: String,
    /// The pair's mean score, relative to the other's, less 1.
    pub improvement: Estimate,
    /// The mean over the tasks of each task's relative improvement.
    pub improvement_by_task: Estimate,
    /// Which part of the way from the other's mean score to the full model's the pair goes; absent without the full model.
    pub gap_closed: Option<Estimate>,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Samples of each task.
    pub samples: BTreeMap<String, usize>,
    /// Conversations that did not fit the context.
    pub left_out: usize,
    /// In the order asked for.
    pub arms: Vec<Contender>,
    /// The pair against each arm that works alone.
    pub comparisons: Vec<Comparison>,
}

impl Report {
    pub(crate) fn new(arms: &[(String, Arm<'_>)], samples: &Samples, outcomes: &[Vec<Outcome>]) -> Self {
        let mut by_task: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (sample, conversation) in samples.conversations.iter().enumerate() {
            by_task.entry(conversation.task.clone().unwrap_or_else(|| NO_TASK.into())).or_default().push(sample);
        }
        let (names, tasks): (Vec<String>, Vec<Vec<usize>>) = by_task.into_iter().unzip();
        let draws = draws(&tasks);
        let contenders = arms.iter().zip(outcomes).map(|((name, _), outcomes)| Contender {
            name: name.clone(),
            tasks: names.iter().enumerate().map(|(task, name)| (name.clone(), figures(&draws, outcomes, task..task + 1))).collect(),
            mean: figures(&draws, outcomes, 0..names.len()),
        });
        let place = |wanted: fn(&Arm<'_>) -> bool| arms.iter().position(|(_, arm)| wanted(arm));
        let pair = place(|arm| matches!(arm, Arm::Overfill { .. }));
        let full = place(|arm| matches!(arm, Arm::Full));
        let mean = |arm: usize, draw: &Draw| mean(draw, &outcomes[arm], 0..names.len(), |o| o.score, |_| 1.0);
        let task_mean = |arm: usize, draw: &Draw, task| self::mean(draw, &outcomes[arm], task..task + 1, |o| o.score, |_| 1.0);
        let comparisons = arms.iter().enumerate().filter_map(|(other, (name, arm))| {
            let pair = pair.filter(|_| matches!(arm, Arm::Alone(_)))?;
            Some(Comparison {
                baseline: name.clone(),
                improvement: estimate(&draws, |d| mean(pair, d) / mean(other, d) - 1.0),
                improvement_by_task: estimate(&draws, |d| {
                    (0..names.len()).map(|t| task_mean(pair, d, t) / task_mean(other, d, t) - 1.0).sum::<f64>() / names.len() as f64
                }),
                gap_closed: full.map(|full| estimate(&draws, |d| (mean(pair, d) - mean(other, d)) / (mean(full, d) - mean(other, d)))),
            })
        });
        let comparisons = comparisons.collect();
        let arms = contenders.collect();
        Self { samples: names.into_iter().zip(tasks.iter().map(Vec::len)).collect(), left_out: samples.left_out, arms, comparisons }
    }
}

fn figures(draws: &[Draw], outcomes: &[Outcome], tasks: std::ops::Range<usize>) -> Figures {
    let of =
        |what: fn(&Outcome) -> f64, weight: fn(&Outcome) -> f64| estimate(draws, |draw| mean(draw, outcomes, tasks.clone(), what, weight));
    Figures {
        loss: of(|o| o.loss, |o| o.tokens),
        kl: of(|o| o.divergence, |o| o.tokens),
        agreement: of(|o| o.agreements, |o| o.tokens),
        exact: of(|o| o.exact, |_| 1.0),
        f1: of(|o| o.f1, |_| 1.0),
        contains: of(|o| o.contains, |_| 1.0),
        score: of(|o| o.score, |_| 1.0),
        circles: of(|o| o.manner.circles, |_| 1.0),
        length_ratio: of(|o| o.manner.tokens, |o| o.full_tokens),
        distinct_4: of(|o| o.manner.different, |o| o.manner.runs),
        full_loss: of(|o| o.full_loss, |o| o.manner.tokens),
        agreement_at: (0..PLACES.len()).filter_map(|at| agreement_at(draws, outcomes, tasks.clone(), at)).collect(),
    }
}

/// Agreement at one of [`PLACES`]; none where no answer is as long.
fn agreement_at(draws: &[Draw], outcomes: &[Outcome], tasks: std::ops::Range<usize>, at: usize) -> Option<AgreementAt> {
    let all = |draw: &Draw| {
        let of = draw[tasks.clone()].iter().flatten().map(|sample| &outcomes[*sample]);
        of.fold((0.0, 0.0), |(agree, tokens), o| (agree + o.agreements_at[at], tokens + o.tokens_at[at]))
    };
    let agreement = estimate(draws, |draw| {
        let (agree, tokens) = all(draw);
        agree / tokens
    });
    let from = at.checked_sub(1).map_or(1, |before| PLACES[before] + 1);
    let to = Some(PLACES[at]).filter(|to| *to < usize::MAX);
    agreement.value.is_finite().then_some(AgreementAt { from, to, agreement })
}

/// The mean over `tasks` of each task's sum of `what` over its sum of `weight`.
fn mean(
    draw: &Draw,
    outcomes: &[Outcome],
    tasks: std::ops::Range<usize>,
    what: impl Fn(&Outcome) -> f64,
    weight: impl Fn(&Outcome) -> f64,
) -> f64 {
    let count = tasks.len() as f64;
    let of_task = |samples: &Vec<usize>| {
        let sum = |of: &dyn Fn(&Outcome) -> f64| samples.iter().map(|s| of(&outcomes[*s])).sum::<f64>();
        sum(&what) / sum(&weight)
    };
    draw[tasks].iter().map(of_task).sum::<f64>() / count
}

/// One of the figures.
type Figure = fn(&Figures) -> Estimate;

/// Tables for a terminal: scores by task, then all figures' means, then comparisons.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cell = |e: Estimate| format!("{:.3} [{:.3}, {:.3}]", e.value, e.low, e.high);
        let widest = self.arms.iter().map(|arm| arm.name.chars().count()).max().unwrap_or(0).max(22);
        write!(f, "{:16}{:>8}", "score", "samples")?;
        self.arms.iter().try_for_each(|arm| write!(f, "  {:>widest$}", arm.name))?;
        for (task, samples) in &self.samples {
            write!(f, "\n{task:16}{samples:>8}")?;
            self.arms.iter().filter_map(|arm| arm.tasks.get(task)).try_for_each(|t| write!(f, "  {:>widest$}", cell(t.score)))?;
        }
        write!(f, "\n{:16}{:>8}", "mean of tasks", "")?;
        self.arms.iter().try_for_each(|arm| write!(f, "  {:>widest$}", cell(arm.mean.score)))?;
        let rows: [(&str, Figure); 10] = [
            ("loss, nats", |m| m.loss),
            ("KL to full", |m| m.kl),
            ("top-1 as full", |m| m.agreement),
            ("exact match", |m| m.exact),
            ("F1", |m| m.f1),
            ("contains", |m| m.contains),
            ("loops", |m| m.circles),
            ("length to full's", |m| m.length_ratio),
            ("distinct-4", |m| m.distinct_4),
            ("full's loss on it, nats", |m| m.full_loss),
        ];
        writeln!(f)?;
        for (name, of) in rows {
            write!(f, "\n{name:24}")?;
            self.arms.iter().try_for_each(|arm| write!(f, "  {:>widest$}", cell(of(&arm.mean))))?;
        }
        for (at, AgreementAt { from, to, .. }) in self.arms.first().into_iter().flat_map(|arm| arm.mean.agreement_at.iter().enumerate()) {
            let name = to.map_or_else(|| format!("top-1, tokens {from} on"), |to| format!("top-1, tokens {from} to {to}"));
            write!(f, "\n{name:24}")?;
            let cells = self.arms.iter().filter_map(|arm| arm.mean.agreement_at.get(at));
            cells.into_iter().try_for_each(|at| write!(f, "  {:>widest$}", cell(at.agreement)))?;
        }
        let percent = |e: Estimate| match e.value.is_finite() {
            true => format!("{:+.1} % [{:+.1}, {:+.1}]", e.value * 100.0, e.low * 100.0, e.high * 100.0),
            false => "n/a (against a score of 0)".to_owned(),
        };
        for Comparison { baseline, improvement, improvement_by_task, gap_closed } in &self.comparisons {
            write!(f, "\n\noverfill against {baseline}: {} of the mean score", percent(*improvement))?;
            write!(f, ", {} as the mean of the tasks' improvements", percent(*improvement_by_task))?;
            if let Some(closed) = gap_closed {
                write!(f, ", {} of the gap to the full model closed", percent(*closed))?;
            }
        }
        if self.left_out > 0 {
            write!(f, "\n\n{} conversations did not fit the context and were left out", self.left_out)?;
        }
        Ok(())
    }
}
