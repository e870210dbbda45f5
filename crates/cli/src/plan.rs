//! `overfill plan`: how many nodes of each role a load needs.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::{ArgGroup, Args};
use overfill_planner::costs::OnThreads;
use overfill_planner::search::measured;
use overfill_planner::{Bounds, Cluster, Goals, Lengths, Load, Plan, Prices, ReadCost, Served, StepCost, cheapest};
use serde_json::{Value, json};

use overfill_load_tester::spread::Spread;

/// Runs of what was chosen, each with requests of its own, for the intervals.
const RUNS: u64 = 5;
/// Student's t for 95 % of a mean of five.
const T: f64 = 2.776;

#[derive(Args)]
#[command(
    group(ArgGroup::new("reading").required(true).args(["prefill_costs", "prefill_rate"])),
    group(ArgGroup::new("writing").required(true).args(["decode_costs", "decode_step"])),
    after_help = "Example, with costs measured on the machines that the nodes will have:\n  \
        overfill bench engine --model PAIR/full.gguf --weights bf16 --threads 2,4 --phases prefill --prompt-tokens 256 --json >read.jsonl\n  \
        overfill bench engine --model PAIR/full.gguf --weights bf16 --threads 2,4 --phases prefill --prompt-tokens 2048 --json >>read.jsonl\n  \
        overfill bench engine --model PAIR/decode.gguf --threads 1,2 --phases decode --batch 1,8,32 --context 64,1024 --json >write.jsonl\n  \
        overfill plan --prefill-costs read.jsonl --decode-costs write.jsonl --request-rate 40 --prompt-tokens lognormal:300:2000 --answer-tokens 20..300"
)]
pub(crate) struct PlanArgs {
    /// Lines of `overfill bench engine --phases prefill --json` for the full model; where they have several numbers of threads, the
    /// cheapest is chosen
    #[arg(long)]
    prefill_costs: Option<PathBuf>,
    /// Or: tokens a second that a prefill node reads
    #[arg(long, value_parser = positive)]
    prefill_rate: Option<f64>,
    /// Lines of `overfill bench engine --phases decode --json` for the decode model, at several batches
    #[arg(long)]
    decode_costs: Option<PathBuf>,
    /// Or: milliseconds of a decode step, and what each sequence and each 1,000 tokens in their caches add, as in 2,0.4,0.3
    #[arg(long, value_delimiter = ',', num_args = 1..=3, value_parser = not_negative)]
    decode_step: Vec<f64>,
    /// Requests a second, as a Poisson process; of a trace, the rate that it is stretched to [default with --trace: its own]
    #[arg(long, value_parser = positive, required_unless_present = "trace")]
    request_rate: Option<f64>,
    /// Tokens of prompts: 256, 100..900, or lognormal:MEDIAN:P95
    #[arg(long, default_value = "256", conflicts_with = "trace")]
    prompt_tokens: Lengths,
    /// Tokens of answers, in the same forms
    #[arg(long, default_value = "128", conflicts_with = "trace")]
    answer_tokens: Lengths,
    /// A trace: lines of JSON with timestamp (milliseconds), input_length and output_length (tokens)
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Part of each prompt that prefill nodes find in their caches
    #[arg(long, default_value_t = 0.0, value_parser = share)]
    cached: f64,
    /// Seconds to the first token that requests are to meet
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    ttft: f64,
    /// Seconds between tokens that they are to meet, on average over an answer
    #[arg(long, default_value_t = 0.05, value_parser = positive)]
    tpot: f64,
    /// Part of the requests that has to meet both
    #[arg(long, default_value_t = 0.95, value_parser = share)]
    goodput: f64,
    /// Tokens that a decode node's KV cache holds (its --kv-memory over the bytes of a token, which `overfill inspect` tells)
    #[arg(long, default_value_t = 90_000)]
    kv_tokens: usize,
    /// Most sequences of a decode node
    #[arg(long, default_value_t = 64)]
    max_sequences: usize,
    /// How many times over a decode node's cache is promised
    #[arg(long, default_value_t = 2.0, value_parser = positive)]
    kv_overcommit: f64,
    /// Milliseconds from a prompt's end until its KV cache is at the decode node
    #[arg(long, default_value_t = 5.0, value_parser = not_negative)]
    handoff_ms: f64,
    /// What a compute thread of a prefill node costs for an hour, in any money
    #[arg(long, default_value_t = 1.0, value_parser = not_negative)]
    prefill_price: f64,
    /// What one of a decode node costs
    #[arg(long, default_value_t = 1.0, value_parser = not_negative)]
    decode_price: f64,
    /// Say what these numbers of nodes do instead, prefill and decode, as in 3,2
    #[arg(long, value_parser = nodes)]
    nodes: Option<(usize, usize)>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: PlanArgs) -> anyhow::Result<()> {
    let begun = Instant::now();
    let read = match (&args.prefill_costs, args.prefill_rate) {
        (Some(file), _) => ReadCost::measured(&text(file)?).with_context(|| file.display().to_string())?,
        (None, Some(rate)) => vec![OnThreads { threads: 1, cost: ReadCost::of_rate(rate) }],
        (None, None) => Vec::new(),
    };
    let step = match &args.decode_costs {
        Some(file) => StepCost::measured(&text(file)?).with_context(|| file.display().to_string())?,
        None => {
            let ms = |number: usize| args.decode_step.get(number).copied().unwrap_or(0.0) / 1e3;
            let cost = StepCost { step: ms(0), sequence: ms(1), context: ms(2) / 1e3 };
            ensure!(cost.seconds(1.0, 1.0) > 0.0, "--decode-step: a step takes some time");
            vec![OnThreads { threads: 1, cost }]
        }
    };
    let load = match (&args.trace, args.request_rate) {
        (Some(file), rate) => Load::trace(&text(file)?, rate).with_context(|| file.display().to_string())?,
        (None, rate) => Load::Drawn { rate: rate.unwrap_or(1.0), prompt: args.prompt_tokens, answer: args.answer_tokens },
    };
    let bounds = Bounds {
        sequences: args.max_sequences,
        kv_tokens: args.kv_tokens,
        overcommit: args.kv_overcommit,
        ready_seconds: READY_SECONDS,
        cached: args.cached,
        handoff: args.handoff_ms / 1e3,
        patience: QUEUE_TIMEOUT,
    };
    let goals = Goals { ttft: args.ttft, tpot: args.tpot, share: args.goodput };
    let prices = Prices { prefill: args.prefill_price, decode: args.decode_price };
    let plan = match (args.nodes, &read[..], &step[..]) {
        (Some((prefill, decode)), [read, ..], [step, ..]) => {
            let cluster = Cluster { prefill, decode, read: read.cost, step: step.cost, bounds };
            let price = (prefill * read.threads) as f64 * prices.prefill + (decode * step.threads) as f64 * prices.decode;
            Plan { cluster, threads: (read.threads, step.threads), price }
        }
        _ => cheapest(&load, &read, &step, &bounds, &goals, &prices)?,
    };
    let runs = (1..=RUNS).map(|seed| measured(&load, &plan.cluster, 100 + seed)).collect::<Result<Vec<_>, _>>()?;
    let told = Told::of(&runs, &goals);
    if args.json {
        println!("{}", told.json(&plan, &load, begun.elapsed().as_secs_f64()));
    } else {
        told.print(&plan, &load, &goals);
    }
    Ok(())
}

/// As nodes and routers have it where nothing else is said.
const READY_SECONDS: f64 = 0.25;
const QUEUE_TIMEOUT: f64 = 10.0;

fn text(file: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

/// A figure's mean over the runs, and how far to either side of it the true one lies in 95 of 100 cases.
struct Figure {
    name: &'static str,
    unit: &'static str,
    mean: f64,
    interval: f64,
}

/// What a cluster does.
struct Told(Vec<Figure>);

impl Told {
    fn of(runs: &[Vec<Option<Served>>], goals: &Goals) -> Self {
        let figure = |name, unit, of: &dyn Fn(&[Option<Served>]) -> f64| {
            let values: Vec<f64> = runs.iter().map(|served| of(served)).collect();
            let (count, mean) = (values.len() as f64, values.iter().sum::<f64>() / values.len() as f64);
            let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
            Figure { name, unit, mean, interval: T * (variance / count).sqrt() }
        };
        let ttft = |served: &[Option<Served>]| Spread::of(served.iter().flatten().map(|s| s.ttft * 1e3));
        let tpot = |served: &[Option<Served>]| Spread::of(served.iter().flatten().filter_map(|s| s.tpot).map(|s| s * 1e3));
        Self(vec![
            figure("goodput", "%", &|served| goals.share_of(served) * 100.0),
            figure("refused", "%", &|served| served.iter().filter(|s| s.is_none()).count() as f64 * 100.0 / served.len() as f64),
            figure("TTFT mean", "ms", &|served| ttft(served).mean),
            figure("TTFT p50", "ms", &|served| ttft(served).median()),
            figure("TTFT p99", "ms", &|served| ttft(served).percentile(99.0)),
            figure("TPOT mean", "ms", &|served| tpot(served).mean),
            figure("TPOT p50", "ms", &|served| tpot(served).median()),
            figure("TPOT p99", "ms", &|served| tpot(served).percentile(99.0)),
        ])
    }

    fn print(&self, plan: &Plan, load: &Load, goals: &Goals) {
        let Plan { cluster, threads, price } = plan;
        println!("for {:.1} requests a second:", load.rate());
        println!("  {:6} prefill nodes of {} threads", cluster.prefill, threads.0);
        println!("  {:6} decode nodes of {} threads", cluster.decode, threads.1);
        println!("  {price:6.0} for an hour");
        println!("expected, with 95 % intervals of {RUNS} runs (goodput: TTFT within {} s and TPOT within {} s):", goals.ttft, goals.tpot);
        for Figure { name, unit, mean, interval } in &self.0 {
            println!("  {name:10} {mean:8.1} ± {interval:.1} {unit}");
        }
    }

    fn json(&self, plan: &Plan, load: &Load, seconds: f64) -> Value {
        let Plan { cluster, threads, price } = plan;
        let figures = self.0.iter().map(|Figure { name, unit, mean, interval }| {
            (name.to_lowercase().replace(' ', "_"), json!({ "mean": mean, "interval": interval, "unit": unit }))
        });
        json!({
            "request_rate": load.rate(), "price": price, "planning_seconds": seconds,
            "prefill": { "nodes": cluster.prefill, "threads": threads.0, "seconds_per_token": cluster.read.token, "seconds_per_token_before": cluster.read.attention },
            "decode": {
                "nodes": cluster.decode, "threads": threads.1, "seconds_per_step": cluster.step.step,
                "seconds_per_sequence": cluster.step.sequence, "seconds_per_cached_token": cluster.step.context,
            },
            "expected": figures.collect::<serde_json::Map<_, _>>(),
        })
    }
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| *number > 0.0 && number.is_finite()).ok_or_else(|| "a number above 0 is wanted".to_owned())
}

fn not_negative(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| *number >= 0.0 && number.is_finite()).ok_or_else(|| "a number from 0 on is wanted".to_owned())
}

fn nodes(text: &str) -> Result<(usize, usize), String> {
    let both = text.split_once(',').and_then(|(prefill, decode)| Some((prefill.parse().ok()?, decode.parse().ok()?)));
    both.filter(|(prefill, decode)| *prefill > 0 && *decode > 0).ok_or_else(|| "two numbers above 0 are wanted, as in 3,2".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number| (0.0..=1.0).contains(number)).ok_or_else(|| "a number from 0 to 1 is wanted".to_owned())
}
