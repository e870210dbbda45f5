//! The load tester behind `overfill bench serve`: puts a load on a server, over HTTP or gRPC, and tells how it bore it.
//!
//! Options, definitions and results are those of `vllm bench serve`, so that figures can be put side by side. What it adds is
//! under names of its own: latencies from when a request was due, failures by kind, and whether this program kept up.
//!
//! It is a client like any other: it knows a server's public interface and no more, so other engines can be measured with it.

mod arrivals;
mod backend;
mod dataset;
mod failure;
mod goodput;
mod health;
mod load;
mod record;
mod report;
mod result;
mod sampling;
pub mod spread;
mod summary;
mod table;
mod verdict;

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use overfill_lifecycle::Drain;

use arrivals::{ArrivalArgs, Arrivals, Rate};
use backend::{Backend, TargetArgs};
use dataset::{DatasetArgs, Workload};
use goodput::Goals;
use load::Load;
use record::{Outcome, Record};
use result::ResultArgs;
use sampling::SamplingArgs;
use summary::{FigureArgs, Summary};
use verdict::VerdictArgs;

/// Warm-up prompts are drawn from another seed, so that they warm no cache for the run.
const WARM_UP_SEED: u64 = 0x5eed_0f3a;

/// What to ask, how often, of whom, and what to tell of it.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  overfill bench serve --request-rate 2 --num-prompts 100 --goodput ttft:500 tpot:50 --report report.html\n  overfill bench serve --backend grpc --request-rate 1,2,4,8 --save-result\n  overfill bench serve --backend openai-chat --dataset-name multi-turn --max-concurrency 8"
)]
pub struct LoadTestArgs {
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    dataset: DatasetArgs,
    #[command(flatten)]
    arrivals: ArrivalArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    figures: FigureArgs,
    #[command(flatten)]
    result: ResultArgs,
    #[command(flatten)]
    verdict: VerdictArgs,
    /// Requests that are answered first and not measured
    #[arg(long, env = "OVERFILL_BENCH_NUM_WARMUPS", default_value_t = 0)]
    num_warmups: usize,
    /// Show no progress
    #[arg(long, env = "OVERFILL_BENCH_DISABLE_TQDM")]
    disable_tqdm: bool,
}

/// What a run was to be.
struct Plan {
    backend: &'static str,
    /// Where the server is.
    url: String,
    /// The command line, without keys.
    command: String,
    model: String,
    tokenizer: String,
    dataset: String,
    seed: u64,
    /// None: a trace says itself when requests are due.
    rate: Option<Rate>,
    burstiness: f64,
    max_concurrency: Option<u32>,
}

impl Plan {
    /// Requests a second, if they are the same all the time and finite.
    fn rate(&self) -> Option<f64> {
        match self.rate {
            Some(Rate::Constant(rate)) if rate.is_finite() => Some(rate),
            _ => None,
        }
    }

    /// Whether requests were due one after the other, and not all at once.
    fn scheduled(&self) -> bool {
        !matches!(self.rate, Some(Rate::Constant(rate)) if rate.is_infinite())
    }
}

/// What a run was.
struct Run {
    plan: Plan,
    /// When it ended, as file names and results tell it.
    date: String,
    records: Vec<Record>,
    summary: Summary,
    notes: Vec<String>,
}

/// Puts each of the loads that were asked for on the server, prints a table for each, and writes the files that were asked for.
///
/// Blocks the calling thread, on a runtime of its own; Ctrl-C ends it early with what was measured until then.
///
/// # Errors
/// Where options contradict each other, a data set cannot be read, the server cannot be reached, more requests fail than may, or a
/// file cannot be written.
pub fn run(args: &LoadTestArgs) -> anyhow::Result<()> {
    let processes = args.arrivals.processes()?;
    if let Some(path) = &args.result.report {
        report::prepare(path)?;
    }
    tokio::runtime::Runtime::new()?.block_on(async {
        let stop = Drain::on_signal()?;
        let mut runs = Vec::new();
        for (index, process) in processes.iter().enumerate() {
            let Some(run) = args.measure(process, index, &stop).await? else { break };
            print!("{}", table::render(&run, &args.figures));
            if let Some(path) = args.result.save(&run, &args.figures, index == 0)? {
                println!("the result is in {}", path.display());
            }
            runs.push(run);
            if stop.draining() {
                break;
            }
        }
        if let (Some(path), false) = (&args.result.report, runs.is_empty()) {
            report::write(path, &runs, &args.figures)?;
            println!("the report is in {}", path.display());
        }
        runs.iter().try_for_each(|run| args.verdict.on(&run.summary))
    })
}

/// How the command was called. What follows `--api-key` or `--header` is nobody's affair.
fn command_line(arguments: impl Iterator<Item = String>) -> String {
    const SECRET: [&str; 2] = ["--api-key", "--header"];
    let (mut words, mut secret) = (Vec::new(), false);
    for argument in arguments {
        let (name, value) = argument.split_once('=').map_or((argument.as_str(), None), |(name, value)| (name, Some(value)));
        match (SECRET.contains(&name), value) {
            (true, Some(_)) => words.push(format!("{name}=…")),
            (true, None) => words.push(argument.clone()),
            _ if secret && !argument.starts_with("--") => words.push("…".into()),
            _ => words.push(argument.clone()),
        }
        secret = SECRET.contains(&name) && value.is_none() || secret && !argument.starts_with("--");
    }
    words.join(" ")
}

impl LoadTestArgs {
    /// One run; `None` if Ctrl-C came before it began.
    async fn measure(&self, process: &Arrivals, index: usize, stop: &Drain) -> anyhow::Result<Option<Run>> {
        // Prompts of their own for each rate: those of the run before may be in a cache.
        let seed = self.dataset.seed.wrapping_add(index as u64);
        let workload = self.dataset.draw(self.target.backend, seed, None)?;
        let traced = workload.due.is_some();
        ensure!(
            !traced || self.arrivals.untouched(),
            "a trace says itself when requests are due: leave --request-rate and --ramp-up-strategy out"
        );
        let reach = Backend::reach(&self.target, &self.sampling, self.target.ignore_eos || workload.ignore_eos);
        let backend = tokio::select! {
            reached = reach => Arc::new(reached?),
            () = stop.signaled() => return Ok(None),
        };
        let mut notes = self.warm_up(&backend, stop).await?;
        if stop.draining() {
            return Ok(None);
        }
        let Workload { conversations, due, think, notes: of_data, .. } = workload;
        notes.extend(of_data);
        let due = match due {
            Some(due) => due,
            None => process.schedule(conversations.len(), seed)?,
        };
        let plan = Plan {
            backend: self.target.backend.name(),
            url: self.target.url(),
            command: command_line(std::env::args()),
            model: backend.model.clone(),
            tokenizer: self.dataset.tokenizer.as_ref().map_or_else(|| backend.model.clone(), |t| t.display().to_string()),
            dataset: clap::ValueEnum::to_possible_value(&self.dataset.dataset_name).map_or_else(String::new, |v| v.get_name().to_owned()),
            seed,
            rate: (!traced).then_some(process.rate),
            burstiness: self.arrivals.burstiness,
            max_concurrency: self.arrivals.max_concurrency,
        };
        let load = Load { conversations, due, think, max_concurrency: plan.max_concurrency, keep_texts: self.result.save_detailed };
        let what = plan.rate().map_or_else(|| "requests".into(), |rate| format!("requests at {rate}/s"));
        let bar = self.bar(load.requests() as u64, what);
        let measured = load.run(backend, stop.clone(), bar.clone()).await;
        bar.finish_and_clear();
        let summary = Summary::of(&measured, Goals::of(&self.figures.goodput), plan.scheduled());
        let date = chrono::Local::now().format("%Y%m%d-%H%M%S").to_string();
        Ok(Some(Run { plan, date, records: measured.records, summary, notes }))
    }

    /// Answers some requests that are not measured; says what went wrong with them.
    async fn warm_up(&self, backend: &Arc<Backend>, stop: &Drain) -> anyhow::Result<Vec<String>> {
        if self.num_warmups == 0 {
            return Ok(Vec::new());
        }
        let workload = self.dataset.draw(self.target.backend, self.dataset.seed ^ WARM_UP_SEED, Some(self.num_warmups))?;
        let conversations: Vec<_> = workload.first_turns().collect();
        let due = vec![Duration::ZERO; conversations.len()];
        let bar = self.bar(conversations.len() as u64, "warming up".into());
        let load = Load { conversations, due, think: Duration::ZERO, max_concurrency: self.arrivals.max_concurrency, keep_texts: false };
        let measured = load.run(backend.clone(), stop.clone(), bar.clone()).await;
        bar.finish_and_clear();
        let failed = measured.records.iter().filter(|r| matches!(r.outcome, Outcome::Failed(_))).count();
        Ok(if failed > 0 { vec![format!("{failed} of {} warm-up requests failed", measured.records.len())] } else { Vec::new() })
    }

    /// On standard error, and only on a terminal; it vanishes when it is finished.
    fn bar(&self, total: u64, what: String) -> ProgressBar {
        if self.disable_tqdm {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(total).with_message(what);
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}") {
            bar.set_style(style);
        }
        bar
    }
}

#[cfg(test)]
mod tests {
    use super::command_line;

    #[test]
    fn a_command_line_is_told_without_its_keys() {
        let told = |line: &str| command_line(line.split(' ').map(str::to_owned));
        assert_eq!(told("x --api-key sk-1 --seed 3"), "x --api-key … --seed 3");
        assert_eq!(told("x --api-key=sk-1 --header a=b c=d --seed 3"), "x --api-key=… --header … … --seed 3");
    }
}
