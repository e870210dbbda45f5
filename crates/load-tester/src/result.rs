//! A run as JSON: `vllm bench serve`'s keys, and under `overfill` what it has no key for.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::{Map, Value, json};

use super::Run;
use super::arrivals::Rate;
use super::backend::pair;
use super::record::{Outcome, Record};
use super::summary::FigureArgs;
use super::table::percent_word;
use crate::spread::Spread;

#[derive(Args)]
#[command(next_help_heading = "Results")]
pub(super) struct ResultArgs {
    /// Write a JSON file
    #[arg(long, env = "OVERFILL_BENCH_SAVE_RESULT")]
    save_result: bool,
    /// With every request's lengths, times, text and error in it
    #[arg(long, env = "OVERFILL_BENCH_SAVE_DETAILED")]
    pub(super) save_detailed: bool,
    /// Put the result on a new line after what the file has
    #[arg(long, env = "OVERFILL_BENCH_APPEND_RESULT")]
    append_result: bool,
    /// Where the file goes; made if it is not there [default: here]
    #[arg(long, env = "OVERFILL_BENCH_RESULT_DIR")]
    result_dir: Option<PathBuf>,
    /// The file's name; the results of several rates stand in it line by line [default: LABEL-RATEqps-MODEL-DATE.json]
    #[arg(long, env = "OVERFILL_BENCH_RESULT_FILENAME")]
    result_filename: Option<String>,
    /// KEY=VALUE pairs that the result carries
    #[arg(long, env = "OVERFILL_BENCH_METADATA", num_args = 1.., value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// What the result is called [default: the backend]
    #[arg(long, env = "OVERFILL_BENCH_LABEL")]
    label: Option<String>,
    /// Write an HTML file with plots
    #[arg(long, env = "OVERFILL_BENCH_REPORT", value_name = "FILE.html")]
    pub(super) report: Option<PathBuf>,
}

impl ResultArgs {
    /// Writes the result of a run, if that was asked for; says where. `first`: of the runs of this command.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub(super) fn save(&self, run: &Run, figures: &FigureArgs, first: bool) -> anyhow::Result<Option<PathBuf>> {
        if !self.save_result && !self.append_result {
            return Ok(None);
        }
        let dir = self.result_dir.as_deref().unwrap_or(Path::new("."));
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join(self.result_filename.clone().unwrap_or_else(|| self.file_name(run)));
        // Several runs under one given name: the later ones must not wipe the earlier ones out.
        let append = self.append_result || (self.result_filename.is_some() && !first);
        let write = || {
            let mut file = std::fs::OpenOptions::new().create(true).write(true).append(append).truncate(!append).open(&path)?;
            let begun = append && file.metadata()?.len() > 0;
            let text = format!("{}{}", if begun { "\n" } else { "" }, self.json(run, figures));
            file.write_all(text.as_bytes())
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Some(path))
    }

    fn file_name(&self, run: &Run) -> String {
        let plan = &run.plan;
        let label = self.label.as_deref().unwrap_or(plan.backend);
        let rate = match plan.rate {
            Some(Rate::Ramp { how, start, end }) => format!("ramp-up-{}-{start}qps-{end}qps", how.name()),
            Some(Rate::Constant(rate)) => format!("{rate}qps"),
            None => "trace".into(),
        };
        let cap = plan.max_concurrency.map_or(String::new(), |n| format!("-concurrency{n}"));
        let model = plan.model.rsplit('/').next().unwrap_or(&plan.model);
        format!("{label}-{rate}{cap}-{model}-{}.json", run.date)
    }

    fn json(&self, run: &Run, figures: &FigureArgs) -> Value {
        let (plan, summary) = (&run.plan, &run.summary);
        let mut result = Map::new();
        let mut put = |key: &str, value: Value| {
            result.insert(key.to_owned(), value);
        };
        put("date", json!(run.date));
        put("endpoint_type", json!(plan.backend));
        put("backend", json!(plan.backend));
        put("label", json!(self.label));
        put("model_id", json!(plan.model));
        put("tokenizer_id", json!(plan.tokenizer));
        put("num_prompts", json!(run.records.len()));
        for (key, value) in &self.metadata {
            put(key, json!(value));
        }
        match plan.rate {
            Some(Rate::Constant(rate)) if rate.is_finite() => put("request_rate", json!(rate)),
            _ => put("request_rate", json!("inf")),
        }
        put("burstiness", json!(plan.burstiness));
        put("max_concurrency", json!(plan.max_concurrency));
        if let Some(Rate::Ramp { how, start, end }) = plan.rate {
            put("ramp_up_strategy", json!(how.name()));
            put("ramp_up_start_rps", json!(start));
            put("ramp_up_end_rps", json!(end));
        }
        put("duration", json!(summary.duration.as_secs_f64()));
        put("completed", json!(summary.completed));
        put("failed", json!(summary.failed));
        put("total_input_tokens", json!(summary.input_tokens));
        put("total_output_tokens", json!(summary.output_tokens));
        put("request_throughput", json!(summary.request_throughput()));
        put("request_goodput", json!(summary.goodput));
        put("output_throughput", json!(summary.per_second(summary.output_tokens)));
        put("total_token_throughput", json!(summary.per_second(summary.input_tokens + summary.output_tokens)));
        if self.save_detailed {
            detail(&run.records, &mut put);
        }
        put("max_output_tokens_per_s", json!(summary.peak_tokens_per_second));
        put("max_concurrent_requests", json!(summary.peak_concurrency));
        for &metric in &figures.percentile_metrics {
            for (key, value) in told(summary.metric(metric), metric.name(), &figures.metric_percentiles) {
                put(&key, value);
            }
        }
        put("overfill", own(run, figures));
        Value::Object(result)
    }
}

/// Mean, median, spread and percentiles of seconds, in milliseconds.
fn told(spread: &Spread, name: &str, percentiles: &[f64]) -> Map<String, Value> {
    let mut told = Map::new();
    let mut put = |what: String, seconds: f64| told.insert(format!("{what}_{name}_ms"), json!(seconds * 1e3));
    put("mean".into(), spread.mean);
    put("median".into(), spread.median());
    put("std".into(), spread.std);
    for &percent in percentiles {
        put(format!("p{}", percent_word(percent)), spread.percentile(percent));
    }
    told
}

/// What there is no key for elsewhere.
fn own(run: &Run, figures: &FigureArgs) -> Value {
    let summary = &run.summary;
    let failures: Map<String, Value> =
        summary.failures.iter().map(|f| (f.kind.clone(), json!({ "count": f.count, "first": f.first }))).collect();
    let mut own = Map::new();
    for (name, spread) in [
        ("due_ttft", &summary.due_ttft),
        ("due_e2el", &summary.due_e2el),
        ("sent_late", &summary.lateness),
        ("held_back", &summary.held_back),
    ] {
        own.extend(told(spread, name, &figures.metric_percentiles));
    }
    let rest = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "dataset": run.plan.dataset,
        "seed": run.plan.seed,
        "failures": failures,
        "interrupted": summary.interrupted,
        "due_request_goodput": summary.due_goodput,
        "tokens_per_piece": summary.tokens_per_piece,
        "p99_event_loop_lag_ms": summary.health.lag_p99 * 1e3,
        "cores_used": summary.health.cores_used,
        "cores": summary.health.cores,
        "notes": run.notes,
        "warnings": summary.warnings,
    });
    if let Value::Object(rest) = rest {
        own.extend(rest);
    }
    Value::Object(own)
}

/// Every request, in the order of the plan. One that was never sent has the start time at which it was due.
fn detail(records: &[Record], put: &mut impl FnMut(&str, Value)) {
    let seconds = |d: std::time::Duration| d.as_secs_f64();
    let each = |value: &dyn Fn(&Record) -> Value| Value::Array(records.iter().map(value).collect());
    put("input_lens", each(&|r| json!(r.prompt_tokens)));
    put("output_lens", each(&|r| json!(if r.completed() { r.output_tokens } else { 0 })));
    put("ttfts", each(&|r| json!(r.latency().map_or(0.0, |l| l.ttft))));
    put("itls", each(&|r| json!(if r.completed() { r.gaps().collect() } else { Vec::new() })));
    put("generated_texts", each(&|r| json!(r.text)));
    put(
        "errors",
        each(&|r| match &r.outcome {
            Outcome::Completed => json!(""),
            Outcome::Failed(failure) => json!(format!("{}: {}", failure.kind.name(), failure.message)),
            Outcome::Interrupted => json!("interrupted"),
        }),
    );
    put("start_times", each(&|r| json!(seconds(r.sent.unwrap_or(r.due)))));
    put("due_times", each(&|r| json!(seconds(r.due))));
}
