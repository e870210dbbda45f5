//! A run on the terminal: `vllm bench serve`'s table, what failed, and what to make of it.

use super::Run;
use super::summary::{FigureArgs, Metric, Summary};
use crate::spread::Spread;

const WIDTH: usize = 50;

/// A percentile as it is written: 99, 99.9.
pub(super) fn percent_word(percent: f64) -> String {
    format!("{percent}")
}

/// The whole table.
pub(super) fn render(run: &Run, figures: &FigureArgs) -> String {
    let summary = &run.summary;
    let mut table = Table::default();
    table.rule(" Serving Benchmark Result ", '=');
    table.count("Successful requests:", summary.completed);
    table.count("Failed requests:", summary.failed);
    if summary.interrupted > 0 {
        table.count("Interrupted requests:", summary.interrupted);
    }
    if let Some(most) = run.plan.max_concurrency {
        table.count("Maximum request concurrency:", most as usize);
    }
    if let Some(rate) = run.plan.rate() {
        table.number("Request rate configured (RPS):", rate);
    }
    table.number("Benchmark duration (s):", summary.duration.as_secs_f64());
    table.count("Total input tokens:", summary.input_tokens);
    table.count("Total generated tokens:", summary.output_tokens);
    table.number("Request throughput (req/s):", summary.request_throughput());
    if let Some(goodput) = summary.goodput {
        table.number("Request goodput (req/s):", goodput);
    }
    table.number("Output token throughput (tok/s):", summary.per_second(summary.output_tokens));
    table.number("Peak output token throughput (tok/s):", summary.peak_tokens_per_second);
    table.count("Peak concurrent requests:", summary.peak_concurrency);
    table.number("Total token throughput (tok/s):", summary.per_second(summary.input_tokens + summary.output_tokens));
    for &metric in &figures.percentile_metrics {
        let name = metric.name().to_uppercase();
        table.rule(metric.title(), '-');
        table.spread(&name, summary.metric(metric), &figures.metric_percentiles);
    }
    if run.plan.scheduled() {
        table.rule("From when requests were due", '-');
        for (name, spread) in [(Metric::Ttft, &summary.due_ttft), (Metric::E2el, &summary.due_e2el)] {
            table.spread(&name.name().to_uppercase(), spread, &figures.metric_percentiles);
        }
        if let Some(goodput) = summary.due_goodput {
            table.number("Request goodput (req/s):", goodput);
        }
    }
    table.own(summary, run.plan.scheduled(), run.plan.max_concurrency.is_some());
    table.failures(summary);
    table.rule("", '=');
    let mut text = table.text;
    for note in run.notes.iter() {
        text += &format!("note: {note}\n");
    }
    for warning in &summary.warnings {
        text += &format!("warning: {warning}\n");
    }
    text
}

#[derive(Default)]
struct Table {
    text: String,
}

impl Table {
    fn rule(&mut self, title: &str, line: char) {
        let left = WIDTH.saturating_sub(title.chars().count());
        let side = |n: usize| line.to_string().repeat(n);
        self.text += &format!("{}{title}{}\n", side(left / 2), side(left - left / 2));
    }

    fn count(&mut self, name: &str, count: usize) {
        self.text += &format!("{name:<40} {count:<10}\n");
    }

    fn number(&mut self, name: &str, number: f64) {
        self.text += &if number.is_nan() { format!("{name:<40} -\n") } else { format!("{name:<40} {number:<10.2}\n") };
    }

    /// Seconds, told in milliseconds.
    fn spread(&mut self, name: &str, spread: &Spread, percentiles: &[f64]) {
        self.number(&format!("Mean {name} (ms):"), spread.mean * 1e3);
        self.number(&format!("Median {name} (ms):"), spread.median() * 1e3);
        for &percent in percentiles {
            self.number(&format!("P{} {name} (ms):", percent_word(percent)), spread.percentile(percent) * 1e3);
        }
    }

    fn own(&mut self, summary: &Summary, scheduled: bool, capped: bool) {
        self.rule("The load tester itself", '-');
        if scheduled {
            self.number("P99 sent late (ms):", summary.lateness.percentile(99.0) * 1e3);
        }
        if capped {
            self.number("P99 held back by the cap (ms):", summary.held_back.percentile(99.0) * 1e3);
        }
        self.number("P99 event loop lag (ms):", summary.health.lag_p99 * 1e3);
        self.number(&format!("Cores used, of {}:", summary.health.cores), summary.health.cores_used);
    }

    fn failures(&mut self, summary: &Summary) {
        if summary.failures.is_empty() {
            return;
        }
        self.rule("Failed requests, by kind", '-');
        for failure in &summary.failures {
            self.count(&format!("{}:", failure.kind), failure.count);
            self.text += &format!("  first: {}\n", failure.first);
        }
    }
}
