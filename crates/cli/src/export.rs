//! `overfill export`: a decode model for other engines.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, ValueEnum};
use overfill_compress::checkpoint::Format;
use overfill_compress::export::{GgufFormats, Stored, gguf, hugging_face};

use crate::progress::bar;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ExportFormat {
    /// A folder as Hugging Face's transformers load it
    Hf,
    /// One file as llama.cpp loads it
    Gguf,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  overfill export --model small/ --format gguf --quantise q8_0 --out small.gguf\n  overfill export --model small.gguf --format hf --out small/\n\nRows of quantised matrices are blocks of 32 numbers: widths that are no multiple of 32 are padded with zeros, which changes no result."
)]
pub(crate) struct ExportArgs {
    /// A Hugging Face folder or a .gguf file
    #[arg(long, env = "OVERFILL_MODEL")]
    model: PathBuf,
    /// What is made of it
    #[arg(long, value_enum, env = "OVERFILL_FORMAT")]
    format: ExportFormat,
    /// What the layers' matrices are stored as: f32, f16, q8_0, q5_1, q5_0, q4_1 or q4_0 in a GGUF file [default: f16]; f32, bf16 or f16 in a folder [default: f32]
    #[arg(long, env = "OVERFILL_QUANTISE")]
    quantise: Option<String>,
    /// What a GGUF file's embedding is stored as [default: q8_0 where the layers are quantised, else as the layers]
    #[arg(long, env = "OVERFILL_EMBEDDING")]
    embedding: Option<Stored>,
    /// What a GGUF file's output head is stored as [default: q8_0 where the layers are quantised, else as the layers]
    #[arg(long, env = "OVERFILL_HEAD")]
    head: Option<Stored>,
    /// The file or folder to make
    #[arg(long, env = "OVERFILL_OUT")]
    out: PathBuf,
}

pub(crate) fn run(args: ExportArgs) -> anyhow::Result<()> {
    let bar = bar(0, "layers");
    let progress = |done: usize, all: usize| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    };
    let refused = |what: String| anyhow::anyhow!("--quantise: {what}");
    match args.format {
        ExportFormat::Hf => {
            if args.embedding.is_some() || args.head.is_some() {
                bail!("--embedding and --head are for GGUF files: a folder has one number format");
            }
            let format: Format = args.quantise.as_deref().unwrap_or("f32").parse().map_err(refused)?;
            hugging_face(&args.model, format, &args.out, progress)?;
        }
        ExportFormat::Gguf => {
            let layers: Stored = args.quantise.as_deref().unwrap_or("f16").parse().map_err(refused)?;
            let rest = if layers.is_quantised() { Stored::Q8_0 } else { layers };
            let formats = GgufFormats { layers, embedding: args.embedding.unwrap_or(rest), head: args.head.unwrap_or(rest) };
            gguf(&args.model, formats, &args.out, progress)?;
        }
    }
    bar.finish_and_clear();
    println!("{}", args.out.display());
    Ok(())
}
