//! `overfill eval`: how well a pair answers, next to its halves alone and to baselines.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use overfill_compress::eval::{Measuring, Samples, evaluate, plot};
use overfill_compress::{Arm, data};
use overfill_model::{Device, Llama, Pair, ThreadPool, Workspace};
use overfill_text::TextModel;
use overfill_types::Quality;
use overfill_types::pair::WeightFormat;

use crate::progress::bar;
use crate::threads::ThreadArgs;
use crate::{Home, PairArgs};

#[derive(Args)]
#[command(
    after_help = "Loss, KL divergence and top-1 agreement are over the given answers, scores of greedy answers. Intervals are 95 %, by bootstrap over samples."
)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pair: PairArgs,
    /// JSON lines of conversations (may be given several times)
    #[arg(long, env = "OVERFILL_DATA", value_delimiter = ',', required = true)]
    data: Vec<PathBuf>,
    /// Who answers: any of overfill, decode and full
    #[arg(long, env = "OVERFILL_MODES", value_delimiter = ',', default_value = "overfill,decode,full")]
    modes: Vec<Quality>,
    /// A decode model that reads the prompt itself: a Hugging Face folder or a .gguf file (may be given several times)
    #[arg(long, env = "OVERFILL_BASELINE", value_delimiter = ',')]
    baseline: Vec<PathBuf>,
    /// How the baselines' weights are held: native, q8_0, bf16, f16 or f32
    #[arg(long, env = "OVERFILL_BASELINE_WEIGHTS", default_value = "native")]
    baseline_weights: WeightFormat,
    /// Most tokens of an answer
    #[arg(long, env = "OVERFILL_MAX_TOKENS", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..))]
    max_tokens: u16,
    /// Only the first so many conversations of each task
    #[arg(long, env = "OVERFILL_LIMIT")]
    limit: Option<usize>,
    /// Answers at a time
    #[arg(long, env = "OVERFILL_BATCH", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Print one JSON object instead of tables
    #[arg(long, env = "OVERFILL_JSON")]
    json: bool,
    /// Draw the scores into this SVG file
    #[arg(long, env = "OVERFILL_PLOT")]
    plot: Option<PathBuf>,
}

pub(crate) fn run(args: EvalArgs, home: &Home) -> anyhow::Result<()> {
    let dir = args.pair.dir(home)?;
    let text = TextModel::open(&dir)?;
    let pair = Pair::open(&dir)?;
    let mut conversations = Vec::new();
    for file in &args.data {
        conversations.extend(data::read(file)?);
    }
    if let Some(limit) = args.limit {
        let mut seen = std::collections::HashMap::new();
        conversations.retain(|conversation| {
            let count: &mut usize = seen.entry(conversation.task.clone()).or_default();
            *count += 1;
            *count <= limit
        });
    }
    let how = Measuring {
        formats: pair.manifest.kv_formats,
        max_tokens: args.max_tokens.into(),
        batch: args.batch.into(),
        end: text.manifest.tokenizer.eos_token_ids.clone(),
        max_context: text.manifest.max_context(),
    };
    let samples = Samples::new(conversations, &text, &how)?;
    if samples.count() == 0 {
        bail!("there is nothing to measure: no conversation fits the context, or the files are empty");
    }

    let threads = args.threads.count();
    let mut workspace = Workspace::new(ThreadPool::new(threads, &[])?);
    let pool = workspace.pool();
    let full = pair.load_full(&Device::Cpu, pool)?;
    let decode = pair.load_decode(&Device::Cpu, pool)?;
    let transform = pair.load_transform(pool)?;
    let load = |path: &PathBuf| {
        let name = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
        let model = Llama::load(path, args.baseline_weights, &Device::Cpu, pool).with_context(|| format!("baseline {}", path.display()));
        model.map(|model| (name, model))
    };
    let baselines = args.baseline.iter().map(load).collect::<anyhow::Result<Vec<_>>>()?;
    let mut arms: Vec<(String, Arm<'_>)> = Vec::new();
    for mode in &args.modes {
        let arm = match mode {
            Quality::Overfill => Arm::Overfill { decode: &decode, transform: &transform },
            Quality::Decode => Arm::Alone(&decode),
            Quality::Full => Arm::Full,
        };
        arms.push((mode.as_str().to_owned(), arm));
    }
    arms.extend(baselines.iter().map(|(name, model)| (name.clone(), Arm::Alone(model))));

    let bar = bar(2 * (samples.count() * arms.len()) as u64, "measured");
    let report = evaluate(&full, &arms, &samples, &text, &how, &mut workspace, || bar.inc(1))?;
    bar.finish_and_clear();
    if let Some(path) = &args.plot {
        std::fs::write(path, plot(&report)).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(())
}
