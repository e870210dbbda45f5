//! Which plots the report has.

use std::time::Duration;

use super::chart::{Axis, Chart};
use super::name;
use crate::Run;
use crate::record::{Outcome, Record};
use crate::spread::Spread;

/// Answered requests that a slice of time holds on average, so that its percentiles mean something.
const PER_SLICE: usize = 10;
/// Most slices of a run.
const SLICES: usize = 60;
/// Bars of a histogram.
const BARS: usize = 40;
/// Points of a distribution's curve.
const CURVE: usize = 200;

/// The plots of one run.
pub(super) fn of_run(run: &Run) -> String {
    let time = Slices::of(run, run.summary.duration);
    // An overloaded server answers long after the last request was due.
    let due = Slices::of(run, run.records.iter().map(|r| r.due).max().unwrap_or_default());
    let latency = |title, value: fn(&Record) -> Option<f64>| {
        let slices = due.fill(run.records.iter().filter_map(|r| Some((r.due, value(r)? * 1e3))));
        let of = |percent: f64| due.points(&slices, |values| Spread::of(values.iter().copied()).percentile(percent));
        Chart::new(title, Axis::linear("due, s"), Axis::linear("ms"))
            .line("p50", "var(--r0)", of(50.0))
            .line("p90", "var(--r1)", of(90.0))
            .line("p99", "var(--r2)", of(99.0))
            .svg()
    };
    let mut plots = latency("Time to first token over the run", |r| Some(r.latency()?.ttft));
    plots += &latency("End-to-end latency over the run", |r| Some(r.latency()?.e2el));
    plots += &throughput(run, &time);
    plots += &requests(run, &time);
    plots += &gaps(&run.summary.itl);
    plots += &first_tokens(run);
    plots
}

/// Rates against latencies and throughput.
pub(super) fn sweep(runs: &[Run]) -> String {
    let over = |value: &dyn Fn(&Run) -> f64| -> Vec<(f64, f64)> { runs.iter().filter_map(|r| Some((r.plan.rate()?, value(r)))).collect() };
    let answered = over(&|r| r.summary.request_throughput());
    let mut throughput = Chart::new("Throughput against rate", Axis::linear("requests/s due"), Axis::linear("requests/s"))
        .line("as due", "var(--grid)", answered.iter().map(|p| (p.0, p.0)).collect())
        .marked_line("answered", "var(--c0)", answered);
    if runs.iter().any(|r| r.summary.goodput.is_some()) {
        throughput = throughput.marked_line("goodput", "var(--c2)", over(&|r| r.summary.goodput.unwrap_or(f64::NAN)));
    }
    let failed = over(&|r| r.summary.per_second(r.summary.failed));
    if failed.iter().any(|p| p.1 > 0.0) {
        throughput = throughput.marked_line("failed", "var(--c1)", failed);
    }
    let latency = |title, of: fn(&Run) -> &Spread| {
        let percentile = |percent: f64| over(&|r| of(r).percentile(percent) * 1e3);
        Chart::new(title, Axis::linear("requests/s due"), Axis::log("ms"))
            .marked_line("p50", "var(--r0)", percentile(50.0))
            .marked_line("p90", "var(--r1)", percentile(90.0))
            .marked_line("p99", "var(--r2)", percentile(99.0))
            .svg()
    };
    let mut plots = throughput.svg();
    plots += &Chart::new("Tokens written against rate", Axis::linear("requests/s due"), Axis::linear("tokens/s"))
        .marked_line("", "var(--c0)", over(&|r| r.summary.per_second(r.summary.output_tokens)))
        .svg();
    plots += &latency("Time to first token against rate", |r| &r.summary.ttft);
    plots += &latency("Time per token against rate", |r| &r.summary.tpot);
    let mut curves = Chart::new("Time to first token, share of requests", Axis::log("ms"), Axis::linear("share"));
    for (index, run) in runs.iter().enumerate() {
        // From light to dark, as the rates go.
        let shade = 72.0 - 40.0 * index as f64 / (runs.len() - 1).max(1) as f64;
        curves = curves.line(name(run), format!("hsl(212 75% {shade:.0}%)"), share(&run.summary.ttft));
    }
    plots + &curves.svg()
}

/// Tokens and answered requests as they came.
fn throughput(run: &Run, time: &Slices) -> String {
    let tokens = time.fill(run.records.iter().flat_map(|r| r.arrivals.iter().map(|a| (a.at, f64::from(a.tokens)))));
    Chart::new("Tokens written over the run", Axis::linear("s"), Axis::linear("tokens/s"))
        .line("", "var(--c0)", time.points(&tokens, |values| values.iter().sum::<f64>() / time.seconds))
        .svg()
}

/// Requests a second: due, answered, failed.
fn requests(run: &Run, time: &Slices) -> String {
    let rate = |ended: &dyn Fn(&Record) -> Option<Duration>| {
        let counted = time.fill(run.records.iter().filter_map(|r| Some((ended(r)?, 1.0))));
        time.points(&counted, |values| values.len() as f64 / time.seconds)
    };
    let failed = rate(&|r| matches!(r.outcome, Outcome::Failed(_)).then_some(r.ended));
    let mut chart = Chart::new("Requests over the run", Axis::linear("s"), Axis::linear("requests/s"))
        .line("due", "var(--soft)", rate(&|r| Some(r.due)))
        .line("answered", "var(--c0)", rate(&|r| r.completed().then_some(r.ended)));
    if failed.iter().any(|p| p.1 > 0.0) {
        chart = chart.line("failed", "var(--c1)", failed);
    }
    chart.svg()
}

/// How many gaps between tokens are how long.
fn gaps(itl: &Spread) -> String {
    // Tokens that came together have no gap that a logarithm could show: they are in the first bar.
    let ms: Vec<f64> = itl.values().iter().map(|s| (s * 1e3).max(0.01)).collect();
    let (Some(&low), Some(&high)) = (ms.first(), ms.last()) else { return String::new() };
    let step = (high / low).max(1.0 + 1e-6).powf(1.0 / BARS as f64);
    let mut bars = vec![0usize; BARS];
    for gap in &ms {
        let bar = ((gap / low).ln() / step.ln()) as usize;
        bars[bar.min(BARS - 1)] += 1;
    }
    let points = bars.iter().enumerate().map(|(i, &n)| (low * step.powi(i as i32), n as f64)).collect();
    Chart::new("Inter-token latency", Axis::log("ms"), Axis::linear("gaps")).bars("", "var(--c0)", points).svg()
}

/// The share of requests whose first token was there by then.
fn first_tokens(run: &Run) -> String {
    let chart = Chart::new("Time to first token, share of requests", Axis::log("ms"), Axis::linear("share")).line(
        "from sent",
        "var(--c0)",
        share(&run.summary.ttft),
    );
    if run.plan.scheduled() { chart.line("from due", "var(--c1)", share(&run.summary.due_ttft)).svg() } else { chart.svg() }
}

/// A distribution's curve, in milliseconds: at each point the share of all values that are no greater. The first is that of the
/// smallest alone.
fn share(spread: &Spread) -> Vec<(f64, f64)> {
    let (values, count) = (spread.values(), spread.values().len());
    let points = (1..=count.min(CURVE)).map(|i| (i * count).div_ceil(count.min(CURVE)));
    let mut shares: Vec<usize> = points.collect();
    if let Some(first) = shares.first_mut() {
        *first = 1;
    }
    shares.into_iter().map(|n| (values[n - 1] * 1e3, n as f64 / count as f64)).collect()
}

/// Time cut into equal slices.
struct Slices {
    seconds: f64,
    count: usize,
}

impl Slices {
    /// As many as `run` has answers for.
    fn of(run: &Run, time: Duration) -> Self {
        let count = (run.summary.completed / PER_SLICE).clamp(5, SLICES);
        Self { seconds: time.as_secs_f64().max(1e-3) / count as f64, count }
    }

    /// Each slice's values.
    fn fill(&self, values: impl Iterator<Item = (Duration, f64)>) -> Vec<Vec<f64>> {
        let mut slices = vec![Vec::new(); self.count];
        for (at, value) in values {
            let slice = (at.as_secs_f64() / self.seconds) as usize;
            slices[slice.min(self.count - 1)].push(value);
        }
        slices
    }

    /// A point in the middle of each slice; one that says nothing is left out.
    fn points(&self, slices: &[Vec<f64>], of: impl Fn(&[f64]) -> f64) -> Vec<(f64, f64)> {
        slices.iter().enumerate().map(|(i, values)| ((i as f64 + 0.5) * self.seconds, of(values))).filter(|p| p.1.is_finite()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_begins_with_the_share_of_the_fastest_and_ends_with_all() {
        assert_eq!(share(&Spread::of([])), []);
        assert_eq!(share(&Spread::of([0.002, 0.001])), [(1.0, 0.5), (2.0, 1.0)]);
        let many = share(&Spread::of((1..=1000).map(f64::from)));
        assert_eq!((many.len(), many[0], many[CURVE - 1]), (CURVE, (1000.0, 0.001), (1e6, 1.0)));
        assert!(many.iter().all(|(value, share)| (value / 1e6 - share).abs() < 1e-9));
    }
}
