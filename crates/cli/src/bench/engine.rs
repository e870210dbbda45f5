//! `overfill bench engine`: tokens per second of prefill and decode, straight on the forward pass.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use overfill_kernels::{Vectors, use_at_most};
use overfill_kv::BlockId;
use overfill_model::profile::Cost;
use overfill_model::{Chunk, Device, KvCache, Llama, ModelError, Placement, ThreadPool, Workspace};
use overfill_types::KvFormat;
use overfill_types::pair::WeightFormat;
use serde_json::json;

use crate::bench::peaks::Peaks;
use crate::bench::spread::Spread;
use crate::progress::bar;
use crate::{Home, fetch};

const BLOCK_TOKENS: usize = 16;

#[derive(Args)]
pub(crate) struct EngineArgs {
    /// A Hugging Face folder or a .gguf file [default: both models of the default pair]
    #[arg(long, env = "OVERFILL_MODEL")]
    model: Option<PathBuf>,
    /// How the weights are held: native, q8_0, bf16, f16 or f32
    #[arg(long, env = "OVERFILL_WEIGHTS", default_value = "native")]
    weights: WeightFormat,
    /// Tokens of the prompt
    #[arg(long, env = "OVERFILL_PROMPT_TOKENS", default_value_t = 512)]
    prompt_tokens: usize,
    /// Tokens that each sequence writes
    #[arg(long, env = "OVERFILL_NEW_TOKENS", default_value_t = 128)]
    new_tokens: usize,
    /// Sequences in a decode step, separated by commas
    #[arg(long, env = "OVERFILL_BATCH", value_delimiter = ',', default_value = "1,8")]
    batch: Vec<usize>,
    /// Compute threads, separated by commas
    #[arg(long, env = "OVERFILL_THREADS", value_delimiter = ',', default_value = "1,2")]
    threads: Vec<usize>,
    /// Tokens in each sequence's cache when decode starts, separated by commas
    #[arg(long, env = "OVERFILL_CONTEXT", value_delimiter = ',', default_value = "64")]
    context: Vec<usize>,
    /// How keys and values are stored: f32, f16 or int8
    #[arg(long, env = "OVERFILL_KV_CACHE", default_value_t = KvFormat::F16)]
    kv_cache: KvFormat,
    /// What is measured, separated by commas: prefill, decode
    #[arg(long, env = "OVERFILL_PHASES", value_delimiter = ',', default_value = "prefill,decode")]
    phases: Vec<Phase>,
    /// Prompt tokens in one forward pass
    #[arg(long, env = "OVERFILL_CHUNK_TOKENS", default_value_t = 256)]
    chunk_tokens: usize,
    /// Cores that the threads keep to, separated by commas [default: any]
    #[arg(long, env = "OVERFILL_CPUS", value_delimiter = ',')]
    cpus: Vec<usize>,
    /// The widest vectors that are used: scalar, avx2 (or neon), avx512 (with VNNI), or all that this CPU has
    #[arg(long, env = "OVERFILL_VECTORS", default_value = "all", value_parser = parse_vectors)]
    vectors: Vectors,
    /// Say where the time goes, beside this machine's own peaks
    #[arg(long, env = "OVERFILL_PROFILE")]
    profile: bool,
    /// Measured runs; one more comes first and warms up
    #[arg(long, env = "OVERFILL_RUNS", default_value_t = 5)]
    runs: usize,
    /// Where the model computes: cpu, cuda:N, or several GPUs that have a part each, separated by commas
    #[arg(long, visible_alias = "devices", env = "OVERFILL_DEVICE", default_value = "cpu", value_delimiter = ',')]
    device: Vec<String>,
    /// Print a JSON object a line
    #[arg(long, env = "OVERFILL_JSON")]
    json: bool,
}

fn parse_vectors(text: &str) -> Result<Vectors, String> {
    match text {
        "scalar" => Ok(Vectors::Scalar),
        "avx2" | "neon" => Ok(Vectors::Eight),
        "avx512" => Ok(Vectors::Sixteen),
        "all" => Ok(Vectors::All),
        _ => Err(format!("'{text}' is none of scalar, avx2, neon, avx512 and all")),
    }
}

/// The two phases of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Phase {
    Prefill,
    Decode,
}

/// One thing that is measured.
#[derive(Clone, Copy)]
struct Case {
    phase: Phase,
    batch: usize,
    context: usize,
    threads: usize,
}

/// One model on a number of threads.
struct Bench<'a> {
    args: &'a EngineArgs,
    devices: &'a [Device],
    model: Llama,
    workspace: Workspace,
}

pub(crate) fn run(args: &EngineArgs, home: &Home) -> anyhow::Result<()> {
    use_at_most(args.vectors);
    let models = match &args.model {
        Some(path) => vec![(path.clone(), args.weights)],
        None => {
            let pair = fetch::open(&home.dir()?)?;
            [&pair.manifest.full, &pair.manifest.decode].map(|m| (pair.dir.join(&m.path), m.weights)).to_vec()
        }
    };
    let devices = overfill_model::device::parse_all(&args.device)?;
    Placement { cpus: args.cpus.clone(), nice: 0 }.apply_to_caller();
    for &threads in &args.threads {
        let peaks = args.profile.then(|| Peaks::measure(threads, &args.cpus)).transpose()?;
        for (path, weights) in &models {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let pool = ThreadPool::new(threads, &args.cpus)?;
            let model = match &devices[..] {
                [device] => Llama::load(path, *weights, device, &pool)?,
                several => Llama::split(path, *weights, several)?,
            };
            let mut bench = Bench { args, devices: &devices, model, workspace: Workspace::new(pool) };
            for case in cases(args, threads) {
                let rates = Spread::of(bench.measure(case)?);
                bench.report(&name, case, &rates);
                if let Some(peaks) = &peaks {
                    bench.explain(&name, case, peaks)?;
                }
            }
        }
    }
    Ok(())
}

fn cases(args: &EngineArgs, threads: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    if args.phases.contains(&Phase::Prefill) {
        cases.push(Case { phase: Phase::Prefill, batch: 1, context: 0, threads });
    }
    if args.phases.contains(&Phase::Decode) {
        for &batch in &args.batch {
            cases.extend(args.context.iter().map(|&context| Case { phase: Phase::Decode, batch, context, threads }));
        }
    }
    cases
}

impl Bench<'_> {
    /// Tokens per second of each run.
    fn measure(&mut self, case: Case) -> anyhow::Result<Vec<f64>> {
        let progress = bar(self.args.runs as u64 + 1, format!("{:?} {}", case.phase, case.batch));
        let mut rates = Vec::with_capacity(self.args.runs);
        for run in 0..=self.args.runs {
            let rate = match case.phase {
                Phase::Prefill => self.prefill(run),
                Phase::Decode => self.decode(run, case),
            }?;
            progress.inc(1);
            if run > 0 {
                rates.push(rate);
            }
        }
        progress.finish_and_clear();
        Ok(rates)
    }

    fn prefill(&mut self, run: usize) -> Result<f64, ModelError> {
        let prompt = self.tokens(self.args.prompt_tokens, run);
        let (mut cache, tables) = self.cache(1, prompt.len())?;
        if self.args.profile {
            self.workspace.profile.begin();
        }
        let begun = Instant::now();
        for (i, chunk) in prompt.chunks(self.args.chunk_tokens).enumerate() {
            let start = i * self.args.chunk_tokens;
            let chunk = Chunk { tokens: chunk, start, blocks: &tables[0], logits: start + chunk.len() == prompt.len() };
            self.model.forward(&[chunk], &mut cache, &mut self.workspace, &mut |_, _, _| Ok(()))?;
        }
        Ok(prompt.len() as f64 / begun.elapsed().as_secs_f64())
    }

    fn decode(&mut self, run: usize, Case { batch, context, .. }: Case) -> Result<f64, ModelError> {
        let (mut cache, tables) = self.cache(batch, context + self.args.new_tokens)?;
        for (sequence, blocks) in tables.iter().enumerate() {
            let prompt = self.tokens(context, run + sequence);
            for (i, chunk) in prompt.chunks(self.args.chunk_tokens).enumerate() {
                let chunk = Chunk { tokens: chunk, start: i * self.args.chunk_tokens, blocks, logits: false };
                self.model.forward(&[chunk], &mut cache, &mut self.workspace, &mut |_, _, _| Ok(()))?;
            }
        }
        let inputs = self.tokens(self.args.new_tokens + batch, run);
        if self.args.profile {
            self.workspace.profile.begin();
        }
        let begun = Instant::now();
        for step in 0..self.args.new_tokens {
            let chunks: Vec<Chunk<'_>> = tables
                .iter()
                .enumerate()
                .map(|(s, blocks)| Chunk { tokens: &inputs[step + s..=step + s], start: context + step, blocks, logits: true })
                .collect();
            self.model.forward(&chunks, &mut cache, &mut self.workspace, &mut |_, _, _| Ok(()))?;
        }
        Ok((self.args.new_tokens * batch) as f64 / begun.elapsed().as_secs_f64())
    }

    fn cache(&self, sequences: usize, tokens: usize) -> Result<(KvCache, Vec<Vec<BlockId>>), ModelError> {
        let each = tokens.div_ceil(BLOCK_TOKENS);
        let cache = KvCache::split(self.model.config().kv, self.args.kv_cache, each * sequences, BLOCK_TOKENS, self.devices)?;
        let tables = (0..sequences).map(|s| (s * each..(s + 1) * each).map(|b| BlockId(b as u32)).collect()).collect();
        Ok((cache, tables))
    }

    /// Token ids that differ from run to run.
    fn tokens(&self, count: usize, run: usize) -> Vec<u32> {
        let vocabulary = self.model.config().vocab_size;
        (0..count).map(|i| ((7919 * (i + 1) + 31 * run) % vocabulary) as u32).collect()
    }

    fn report(&self, model: &str, case: Case, rates: &Spread) {
        let tenth = |x: f64| (x * 10.0).round() / 10.0;
        let [min, median, max] = [0.0, 50.0, 100.0].map(|percent| tenth(rates.percentile(percent)));
        let Case { phase, batch, context, threads } = case;
        let phase = format!("{phase:?}").to_lowercase();
        if self.args.json {
            let line = json!({
                "engine": "overfill", "model": model, "phase": phase, "batch": batch, "context": context, "threads": threads,
                "prompt_tokens": self.args.prompt_tokens, "new_tokens": self.args.new_tokens,
                "tokens_per_second": { "median": median, "min": min, "max": max },
            });
            println!("{line}");
        } else {
            println!(
                "{model:20} {phase:8} batch {batch:3}  context {context:5}  {threads} threads  {median:8.1} tokens/s  ({min:.1} to {max:.1})"
            );
        }
    }

    /// Where the last run's time went.
    fn explain(&self, model: &str, case: Case, peaks: &Peaks) -> anyhow::Result<()> {
        let costs: Vec<_> = self.workspace.profile.costs().filter(|(_, cost)| !cost.time.is_zero()).collect();
        let total = costs.iter().fold(Cost::default(), |sum, (_, cost)| Cost {
            time: sum.time + cost.time,
            bytes: sum.bytes + cost.bytes,
            operations: sum.operations + cost.operations,
        });
        let all = [("all".to_owned(), total)];
        for (part, cost) in costs.iter().map(|(part, cost)| (format!("{part:?}").to_lowercase(), *cost)).chain(all) {
            let seconds = cost.time.as_secs_f64();
            let share = seconds / total.time.as_secs_f64();
            let (bytes, operations) = (cost.bytes as f64 / seconds / 1e9, cost.operations as f64 / seconds / 1e9);
            if self.args.json {
                let line = json!({
                    "engine": "overfill", "model": model, "phase": format!("{:?}", case.phase).to_lowercase(), "batch": case.batch,
                    "context": case.context, "threads": case.threads, "part": part, "share": share, "seconds": seconds,
                    "gigabytes_per_second": bytes, "gigaflops_per_second": operations,
                    "peak_gigabytes_per_second": peaks.read, "peak_gigaflops_per_second": peaks.multiply,
                });
                println!("{line}");
            } else {
                println!(
                    "    {part:10} {:5.1} %  {bytes:6.1} GB/s ({:3.0} % of memory's)  {operations:7.1} GFLOP/s ({:3.0} % of f32's)",
                    share * 100.0,
                    bytes / peaks.read * 100.0,
                    operations / peaks.multiply * 100.0
                );
            }
        }
        Ok(())
    }
}
