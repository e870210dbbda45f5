//! What a run comes to: counts, rates and latencies, under `vllm bench serve`'s definitions.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::goodput::{Goal, Goals, Since, parse};
use super::health::{self, Health};
use super::load::Measured;
use super::record::{Latency, Outcome, Record};
use crate::spread::Spread;

/// A piece carries more tokens than this on average: gaps between pieces are then not gaps between tokens. One token of an
/// answer may come without a piece: many servers count the end of sequence, and send nothing for it.
const BUNDLED: f64 = 1.05;

#[derive(Args)]
#[command(next_help_heading = "Figures")]
pub(super) struct FigureArgs {
    /// Latencies that are told, separated by commas
    #[arg(long, env = "OVERFILL_BENCH_PERCENTILE_METRICS", value_enum, value_delimiter = ',', default_value = "ttft,tpot,itl,e2el")]
    pub(super) percentile_metrics: Vec<Metric>,
    /// Their percentiles, separated by commas
    #[arg(long, env = "OVERFILL_BENCH_METRIC_PERCENTILES", value_delimiter = ',', default_value = "99", value_parser = percent)]
    pub(super) metric_percentiles: Vec<f64>,
    /// Goals in milliseconds, e.g. `ttft:200 tpot:50 e2el:5000`: how many requests a second meet all of them
    #[arg(long, env = "OVERFILL_BENCH_GOODPUT", num_args = 1.., value_delimiter = ' ', value_parser = parse)]
    pub(super) goodput: Vec<(Goal, f64)>,
}

fn percent(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err("it must be a number from 0 to 100".into()),
    }
}

/// A latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Metric {
    /// To the first token
    Ttft,
    /// Between tokens on average, without the first
    Tpot,
    /// Between one arrival of tokens and the next
    Itl,
    /// To the last token
    E2el,
}

impl Metric {
    /// Its name in results.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
        }
    }

    /// What a table calls it.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Ttft => "Time to First Token",
            Self::Tpot => "Time per Output Token (excl. 1st token)",
            Self::Itl => "Inter-token Latency",
            Self::E2el => "End-to-end Latency",
        }
    }
}

/// Failures of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FailureCount {
    pub(super) kind: String,
    pub(super) count: usize,
    /// What the first of them said.
    pub(super) first: String,
}

/// One run. `completed + failed + interrupted` is the number of requests that were planned.
pub(super) struct Summary {
    pub(super) completed: usize,
    pub(super) failed: usize,
    /// Not answered, or never sent, because of Ctrl-C.
    pub(super) interrupted: usize,
    /// Most first.
    pub(super) failures: Vec<FailureCount>,
    pub(super) duration: Duration,
    pub(super) input_tokens: usize,
    /// Of each prompt, and of each answer.
    pub(super) input_lengths: Spread,
    pub(super) output_lengths: Spread,
    pub(super) output_tokens: usize,
    /// Requests a second that met the goals, timed from when they were sent; none if there are no goals.
    pub(super) goodput: Option<f64>,
    /// The same, timed from when they were due.
    pub(super) due_goodput: Option<f64>,
    /// Most tokens that came within one second.
    pub(super) peak_tokens_per_second: f64,
    /// Most requests that were under way at once.
    pub(super) peak_concurrency: usize,
    pub(super) ttft: Spread,
    pub(super) tpot: Spread,
    pub(super) itl: Spread,
    pub(super) e2el: Spread,
    pub(super) due_ttft: Spread,
    pub(super) due_e2el: Spread,
    /// How late this program let requests go.
    pub(super) lateness: Spread,
    /// How long `--max-concurrency` held requests back.
    pub(super) held_back: Spread,
    /// Of answered requests.
    pub(super) tokens_per_piece: f64,
    pub(super) health: Health,
    pub(super) warnings: Vec<String>,
}

impl Summary {
    /// `scheduled`: requests were due one after the other, and not all at once.
    pub(super) fn of(measured: &Measured, goals: Option<Goals>, scheduled: bool) -> Self {
        let records = &measured.records;
        let answered: Vec<(&Record, Latency)> = records.iter().filter_map(|r| Some((r, r.latency()?))).collect();
        let spread = |value: fn(&Latency) -> f64| Spread::of(answered.iter().map(|(_, l)| value(l)));
        let seconds = measured.duration.as_secs_f64().max(f64::MIN_POSITIVE);
        let goodput = |since| goals.map(|g| answered.iter().filter(|(_, l)| g.met(l, since)).count() as f64 / seconds);
        let sent = || records.iter().filter_map(|r| Some((r, r.sent?)));
        let lateness = health::lateness(records);
        let pieces: usize = answered.iter().map(|(r, _)| r.arrivals.len()).sum();
        let output_tokens: usize = answered.iter().map(|(r, _)| r.output_tokens).sum();
        let tokens_per_piece = output_tokens as f64 / pieces as f64;
        let mut warnings: Vec<String> = health::warning(&measured.health, scheduled.then_some(&lateness)).into_iter().collect();
        let untold = answered.iter().filter(|(r, _)| !r.usage_told).count();
        if untold > 0 {
            warnings.push(format!("the server told no usage for {untold} answers: their tokens are counted by the pieces that came"));
        }
        if output_tokens.saturating_sub(answered.len()) as f64 > BUNDLED * pieces as f64 {
            warnings.push(format!(
                "{tokens_per_piece:.2} tokens came in one piece on average: ITL is the time between pieces, TPOT the time per token"
            ));
        }
        Self {
            completed: answered.len(),
            failed: records.iter().filter(|r| matches!(r.outcome, Outcome::Failed(_))).count(),
            interrupted: records.iter().filter(|r| r.outcome == Outcome::Interrupted).count(),
            failures: failures(records),
            duration: measured.duration,
            input_tokens: answered.iter().map(|(r, _)| r.prompt_tokens).sum(),
            input_lengths: Spread::of(answered.iter().map(|(r, _)| r.prompt_tokens as f64)),
            output_lengths: Spread::of(answered.iter().map(|(r, _)| r.output_tokens as f64)),
            output_tokens,
            goodput: goodput(Since::Sent),
            due_goodput: goodput(Since::Due),
            peak_tokens_per_second: peak_tokens(answered.iter().map(|(r, _)| *r)),
            peak_concurrency: peak_concurrency(sent().map(|(r, sent)| (sent, r.ended))),
            ttft: spread(|l| l.ttft),
            tpot: Spread::of(answered.iter().filter_map(|(_, l)| l.tpot)),
            itl: Spread::of(answered.iter().flat_map(|(r, _)| r.gaps())),
            e2el: spread(|l| l.e2el),
            due_ttft: spread(|l| l.due_ttft),
            due_e2el: spread(|l| l.due_e2el),
            held_back: Spread::of(sent().map(|(r, sent)| sent.saturating_sub(r.released).as_secs_f64())),
            lateness,
            tokens_per_piece,
            health: measured.health,
            warnings,
        }
    }

    /// Answered requests a second.
    pub(super) fn request_throughput(&self) -> f64 {
        self.per_second(self.completed)
    }

    /// So many, over the run.
    pub(super) fn per_second(&self, count: usize) -> f64 {
        count as f64 / self.duration.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    pub(super) fn metric(&self, metric: Metric) -> &Spread {
        match metric {
            Metric::Ttft => &self.ttft,
            Metric::Tpot => &self.tpot,
            Metric::Itl => &self.itl,
            Metric::E2el => &self.e2el,
        }
    }
}

fn failures(records: &[Record]) -> Vec<FailureCount> {
    let mut failed: Vec<_> = records
        .iter()
        .filter_map(|r| match &r.outcome {
            Outcome::Failed(failure) => Some((r.ended, failure)),
            _ => None,
        })
        .collect();
    failed.sort_by_key(|(ended, _)| *ended);
    let mut counts: Vec<FailureCount> = Vec::new();
    for (_, failure) in failed {
        let kind = failure.kind.name();
        match counts.iter_mut().find(|c| c.kind == kind) {
            Some(known) => known.count += 1,
            None => counts.push(FailureCount { kind, count: 1, first: failure.message.clone() }),
        }
    }
    counts.sort_by_key(|c| std::cmp::Reverse(c.count));
    counts
}

/// Most tokens in any whole second, counted from the first request that was sent.
fn peak_tokens<'a>(answered: impl Iterator<Item = &'a Record> + Clone) -> f64 {
    let Some(begun) = answered.clone().filter_map(|r| r.sent).min() else { return 0.0 };
    let mut seconds: Vec<u64> = Vec::new();
    for arrival in answered.flat_map(|r| &r.arrivals) {
        let second = arrival.at.saturating_sub(begun).as_secs() as usize;
        if seconds.len() <= second {
            seconds.resize(second + 1, 0);
        }
        seconds[second] += u64::from(arrival.tokens);
    }
    seconds.into_iter().max().unwrap_or(0) as f64
}

/// Most spans that overlap. One that ends when another begins does not.
fn peak_concurrency(spans: impl Iterator<Item = (Duration, Duration)>) -> usize {
    let mut steps: Vec<(Duration, i64)> = spans.flat_map(|(from, to)| [(from, 1), (to, -1)]).collect();
    steps.sort();
    let (mut running, mut most) = (0, 0);
    for (_, step) in steps {
        running += step;
        most = most.max(running);
    }
    usize::try_from(most).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::{Failure, Kind};
    use crate::record::tests::answered;

    fn failed(kind: Kind, message: &str, ended: u64) -> Record {
        let record = answered(0, 0, &[(5, 1)], 1);
        Record { outcome: Outcome::Failed(Failure::new(kind, message)), ended: Duration::from_millis(ended), ..record }
    }

    #[test]
    fn by_hand() {
        let records = vec![
            answered(0, 0, &[(100, 1), (200, 1), (300, 1)], 3),
            answered(500, 600, &[(800, 1), (1200, 5)], 6),
            failed(Kind::Http(503), "second", 20),
            failed(Kind::Http(503), "first", 10),
            failed(Kind::Timeout, "slow", 900),
            Record { outcome: Outcome::Interrupted, sent: None, ..answered(900, 900, &[], 0) },
        ];
        let measured = Measured { records, duration: Duration::from_secs(2), health: Health::default() };
        let goals = Goals { ttft: Some(250.0), ..Goals::default() };
        let summary = Summary::of(&measured, Some(goals), true);
        assert_eq!((summary.completed, summary.failed, summary.interrupted), (2, 3, 1));
        let count = |kind: &str, count, first: &str| FailureCount { kind: kind.into(), count, first: first.into() };
        assert_eq!(summary.failures, [count("http_503", 2, "first"), count("timeout", 1, "slow")]);
        assert_eq!((summary.input_tokens, summary.output_tokens), (20, 9));
        // The second one waited 100 ms before it was sent and is good only from then on.
        assert_eq!((summary.goodput, summary.due_goodput), (Some(1.0), Some(0.5)));
        assert_eq!(summary.request_throughput(), 1.0);
        assert!((summary.ttft.mean - 0.15).abs() < 1e-9 && (summary.due_ttft.mean - 0.2).abs() < 1e-9);
        assert!((summary.tpot.mean - 0.09).abs() < 1e-9, "(0.2 / 2 + 0.4 / 5) / 2");
        assert_eq!(summary.itl.values().len(), 3);
        assert_eq!(summary.peak_tokens_per_second, 5.0);
        assert_eq!(summary.peak_concurrency, 4);
        assert!((summary.tokens_per_piece - 1.8).abs() < 1e-9);
        assert!(summary.warnings[0].contains("1.80 tokens"), "{:?}", summary.warnings);
    }

    #[test]
    fn nothing_answered_is_no_number() {
        let records = vec![failed(Kind::Connect, "refused", 1)];
        let summary = Summary::of(&Measured { records, duration: Duration::from_secs(1), health: Health::default() }, None, true);
        assert_eq!((summary.completed, summary.failed, summary.goodput), (0, 1, None));
        assert!(summary.ttft.mean.is_nan() && summary.warnings.is_empty());
    }
}
