//! `overfill prune`: makes a smaller checkpoint of a full model.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use overfill_compress::calibrate::Calibration;
use overfill_compress::checkpoint::Format;
use overfill_compress::prune::{Fit, Keep, Method, Prune, Sizes, quantise};
use overfill_model::GgmlDType;
use overfill_types::PruneStrategy;

use crate::progress::spinner;

#[derive(Clone, Copy, ValueEnum)]
enum MethodName {
    /// Cuts channels and neurons by the importance of their activations
    Minitron,
    /// Rotates the residual stream, keeps its first components, fits every matrix again by least squares
    Pca,
    /// Keeps some layers as they are
    Depth,
    /// Copies a GGUF file in fewer bits
    Quantise,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  overfill prune --full big/ --method pca --hidden 432 --intermediate 1152 --calibration chats.jsonl --out small/\n  overfill prune --full big/ --method minitron --hidden-ratio 0.45 --mlp-ratio 0.45 --calibration text.txt --out small/\n  overfill prune --full big/ --method depth --keep firstlast --layers 20 --out small/\n\nThen `overfill pair --full big/ --decode small/ --kv identity --out my-pair` (the KV transform is printed)."
)]
pub(crate) struct PruneArgs {
    /// The full model: a Hugging Face folder or a .gguf file
    #[arg(long, env = "OVERFILL_FULL")]
    full: PathBuf,
    /// How it is cut
    #[arg(long, value_enum, default_value = "pca")]
    method: MethodName,
    /// Share of the residual stream's width to cut away, e.g. 0.45; rounded to a multiple of the heads
    #[arg(long, conflicts_with = "hidden")]
    hidden_ratio: Option<f64>,
    /// Width of the residual stream to keep; a multiple of the heads
    #[arg(long)]
    hidden: Option<usize>,
    /// Share of the MLP's neurons to cut away, e.g. 0.45; rounded to a multiple of 32 where the full model has one
    #[arg(long, conflicts_with = "intermediate")]
    mlp_ratio: Option<f64>,
    /// MLP neurons to keep
    #[arg(long)]
    intermediate: Option<usize>,
    /// KV heads to keep, each with its query heads; the pair then needs the projection that is written
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Layers to keep, with the method depth
    #[arg(long)]
    layers: Option<usize>,
    /// Which layers depth keeps: firstlast, first or last
    #[arg(long, default_value = "firstlast")]
    keep: PruneStrategy,
    /// What pca fits its matrices to: overfill (answers, with the full model's KV cache of the prompt), decode (the model alone) or none
    #[arg(long, default_value = "overfill")]
    fit: Fit,
    /// How strongly pca's fit is pulled to the rotated weights, relative to the mean square of what they read
    #[arg(long, default_value_t = 0.02)]
    ridge: f64,
    /// Blocks that quantise writes: q4_0, q4_1, q5_0, q5_1 or q8_0
    #[arg(long, default_value = "q4_0", value_parser = blocks)]
    blocks: GgmlDType,
    /// Text, or conversations as JSON lines (its name ends in .jsonl)
    #[arg(long)]
    calibration: Option<PathBuf>,
    /// Most samples to calibrate with
    #[arg(long, default_value_t = 256)]
    samples: usize,
    /// Most samples kept apart to measure losses with, a quarter of all at most
    #[arg(long, default_value_t = 32)]
    held_out: usize,
    /// Most tokens of a sample
    #[arg(long, default_value_t = 512)]
    length: usize,
    /// Which samples are taken
    #[arg(long, default_value_t = 1337)]
    seed: u64,
    /// What the weights are stored as: f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    format: Format,
    /// The folder to make; with quantise the file
    #[arg(long, env = "OVERFILL_OUT")]
    out: PathBuf,
}

fn blocks(name: &str) -> Result<GgmlDType, String> {
    Ok(match name {
        "q4_0" => GgmlDType::Q4_0,
        "q4_1" => GgmlDType::Q4_1,
        "q5_0" => GgmlDType::Q5_0,
        "q5_1" => GgmlDType::Q5_1,
        "q8_0" => GgmlDType::Q8_0,
        other => return Err(format!("'{other}' is no block format: use q4_0, q4_1, q5_0, q5_1 or q8_0")),
    })
}

pub(crate) fn run(args: PruneArgs) -> anyhow::Result<()> {
    let keep = |ratio: Option<f64>, width: Option<usize>| match (ratio, width) {
        (Some(ratio), _) => Keep::Without(ratio),
        (None, Some(width)) => Keep::Exactly(width),
        (None, None) => Keep::All,
    };
    let samples = Calibration { samples: args.samples, held_out: args.held_out, length: args.length, seed: args.seed };
    let sizes = Sizes {
        hidden: keep(args.hidden_ratio, args.hidden),
        intermediate: keep(args.mlp_ratio, args.intermediate),
        kv_heads: keep(None, args.kv_heads),
        layers: keep(None, args.layers),
    };
    let waiting = spinner("reading the full model");
    let progress = &mut |what: &str, done: usize, all: usize| waiting.set_message(format!("{what}: {} of {all}", done + 1));
    let method = match args.method {
        MethodName::Minitron => Some(Method::Minitron),
        MethodName::Pca => Some(Method::Pca { fit: args.fit, ridge: args.ridge }),
        MethodName::Depth => Some(Method::Depth(args.keep)),
        MethodName::Quantise => None,
    };
    let report = match method {
        Some(method) => {
            let pruning = Prune { full: args.full, method, sizes, calibration: args.calibration, samples, format: args.format };
            pruning.run(&args.out, progress)?
        }
        None if sizes != Sizes::ALL => anyhow::bail!("quantise cuts nothing away: leave widths and layers out"),
        None => {
            let calibration = args.calibration.as_deref().map(|path| (path, &samples));
            quantise(&args.full, args.blocks, calibration, &args.out, progress)?
        }
    };
    waiting.finish_and_clear();

    let (full, decode) = (&report.full, &report.decode);
    println!("{:14}{:>12}{:>12}", "", "full model", "decode");
    for (name, of) in [
        ("hidden size", [full.hidden_size, decode.hidden_size]),
        ("MLP width", [full.intermediate_size, decode.intermediate_size]),
        ("heads", [full.heads, decode.heads]),
        ("KV heads", [full.kv.kv_heads, decode.kv.kv_heads]),
        ("layers", [full.kv.layers, decode.kv.layers]),
        ("read a token", [full.decode_weights() / 1000, decode.decode_weights() / 1000]),
    ] {
        println!("{name:14}{:>12}{:>12}{}", of[0], of[1], if name == "read a token" { "  thousand weights" } else { "" });
    }
    if let Some((fit, held_out)) = report.samples {
        println!("\nfitted to {fit} samples, {held_out} held out");
    }
    if let Some(losses) = &report.losses {
        println!("\nloss, nats a token, over {} held-out answer tokens", losses.tokens);
        println!("{:30}{:>8.3}", "full model", losses.full);
        println!("{:30}{:>8.3}", "decode model alone", losses.alone);
        println!("{:30}{:>8.3}", "with the full model's KV cache", losses.overfill);
    }
    println!("\n{}\nKV transform for `overfill pair`: --kv {}", args.out.display(), report.kv);
    Ok(())
}
