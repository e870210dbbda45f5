//! `overfill bench engine`: tokens per second of prefill and decode, straight on the forward pass.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama, ModelError, Threads};
use overfill_types::pair::WeightFormat;
use serde_json::json;

use crate::progress::bar;
use crate::{Home, fetch};

const BLOCK_TOKENS: usize = 16;
/// Prompt tokens in one forward pass, as the prefill node's default has it.
const CHUNK_TOKENS: usize = 256;
/// Tokens in the cache of each sequence when decode starts.
const CONTEXT: usize = 64;

#[derive(Args)]
pub(crate) struct EngineArgs {
    /// A Hugging Face folder or a .gguf file [default: both models of the default pair]
    #[arg(long, env = "OVERFILL_MODEL")]
    model: Option<PathBuf>,
    /// How the weights are held: native, f32, bf16 or f16
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
    /// Measured runs; one more comes first and warms up
    #[arg(long, env = "OVERFILL_RUNS", default_value_t = 5)]
    runs: usize,
    /// Where the model computes: cpu or cuda:N
    #[arg(long, env = "OVERFILL_DEVICE", default_value = "cpu")]
    device: String,
    /// Print a JSON object a line
    #[arg(long, env = "OVERFILL_JSON")]
    json: bool,
}

pub(crate) fn run(args: EngineArgs, home: &Home) -> anyhow::Result<()> {
    let models = match &args.model {
        Some(path) => vec![(path.clone(), args.weights)],
        None => {
            let pair = fetch::open(&home.dir()?)?;
            [&pair.manifest.full, &pair.manifest.decode].map(|m| (pair.dir.join(&m.path), m.weights)).to_vec()
        }
    };
    let device = overfill_model::device::parse(&args.device)?;
    for (path, weights) in models {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for &threads in &args.threads {
            let pool = Threads::new(threads)?;
            let model = pool.run(|| Llama::load(&path, weights, &device))?;
            let cases = std::iter::once(("prefill", 1)).chain(args.batch.iter().map(|b| ("decode", *b)));
            for (phase, batch) in cases {
                let mut rates = measure(&args, &model, &pool, phase, batch)?;
                rates.sort_by(f64::total_cmp);
                report(&args, &name, phase, batch, threads, &rates);
            }
        }
    }
    Ok(())
}

fn measure(args: &EngineArgs, model: &Llama, pool: &Threads, phase: &str, batch: usize) -> anyhow::Result<Vec<f64>> {
    let progress = bar(args.runs as u64 + 1, format!("{phase} {batch}"));
    let mut rates = Vec::with_capacity(args.runs);
    for run in 0..=args.runs {
        let rate = pool.run(|| match phase {
            "prefill" => prefill(args, model, run),
            _ => decode(args, model, run, batch),
        })?;
        progress.inc(1);
        if run > 0 {
            rates.push(rate);
        }
    }
    progress.finish_and_clear();
    Ok(rates)
}

fn prefill(args: &EngineArgs, model: &Llama, run: usize) -> Result<f64, ModelError> {
    let prompt = tokens(model, args.prompt_tokens, run);
    let (mut cache, tables) = cache(model, 1, prompt.len())?;
    let begun = Instant::now();
    for (i, chunk) in prompt.chunks(CHUNK_TOKENS).enumerate() {
        let start = i * CHUNK_TOKENS;
        let chunk = Chunk { tokens: chunk, start, blocks: &tables[0], logits: start + chunk.len() == prompt.len() };
        model.forward(&[chunk], &mut cache, &mut |_, _| Ok(()))?;
    }
    Ok(prompt.len() as f64 / begun.elapsed().as_secs_f64())
}

fn decode(args: &EngineArgs, model: &Llama, run: usize, batch: usize) -> Result<f64, ModelError> {
    let (mut cache, tables) = cache(model, batch, CONTEXT + args.new_tokens)?;
    for (sequence, blocks) in tables.iter().enumerate() {
        let context = tokens(model, CONTEXT, run + sequence);
        model.forward(&[Chunk { tokens: &context, start: 0, blocks, logits: false }], &mut cache, &mut |_, _| Ok(()))?;
    }
    let inputs = tokens(model, args.new_tokens + batch, run);
    let begun = Instant::now();
    for step in 0..args.new_tokens {
        let chunks: Vec<Chunk<'_>> = tables
            .iter()
            .enumerate()
            .map(|(s, blocks)| Chunk { tokens: &inputs[step + s..=step + s], start: CONTEXT + step, blocks, logits: true })
            .collect();
        model.forward(&chunks, &mut cache, &mut |_, _| Ok(()))?;
    }
    Ok((args.new_tokens * batch) as f64 / begun.elapsed().as_secs_f64())
}

fn cache(model: &Llama, sequences: usize, tokens: usize) -> Result<(KvCache, Vec<Vec<BlockId>>), ModelError> {
    let each = tokens.div_ceil(BLOCK_TOKENS);
    let cache = KvCache::new(model.config().kv, each * sequences, BLOCK_TOKENS, model.device())?;
    let tables = (0..sequences).map(|s| (s * each..(s + 1) * each).map(|b| BlockId(b as u32)).collect()).collect();
    Ok((cache, tables))
}

/// Token ids that differ from run to run.
fn tokens(model: &Llama, count: usize, run: usize) -> Vec<u32> {
    let vocabulary = model.config().vocab_size;
    (0..count).map(|i| ((7919 * (i + 1) + 31 * run) % vocabulary) as u32).collect()
}

fn report(args: &EngineArgs, model: &str, phase: &str, batch: usize, threads: usize, rates: &[f64]) {
    let tenth = |x: f64| (x * 10.0).round() / 10.0;
    let [min, median, max] = [rates.first(), rates.get(rates.len() / 2), rates.last()].map(|r| tenth(r.copied().unwrap_or(0.0)));
    if args.json {
        let line = json!({
            "engine": "overfill", "model": model, "phase": phase, "batch": batch, "threads": threads,
            "tokens_per_second": { "median": median, "min": min, "max": max },
        });
        println!("{line}");
    } else {
        println!("{model:20} {phase:8} batch {batch:3}  {threads} threads  {median:8.1} tokens/s  ({min:.1} to {max:.1})");
    }
}
