//! `overfill pair`: makes a pair of two models.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use overfill_model::{KvSpec, MakePair};
use overfill_types::pair::WeightFormat;
use overfill_types::{KvFormat, KvFormats, WireFormat};

use crate::progress::spinner;

#[derive(Args)]
#[command(
    after_help = "The decode model keeps the full model's tokenizer and rotary embedding. What does not fit is refused, naming both sides."
)]
pub(crate) struct MakePairArgs {
    /// The full model: a Hugging Face folder or a .gguf file
    #[arg(long, env = "OVERFILL_FULL")]
    full: PathBuf,
    /// The decode model: a Hugging Face folder or a .gguf file
    #[arg(long, env = "OVERFILL_DECODE")]
    decode: PathBuf,
    /// From the full model's KV cache to the decode model's: identity, prune:firstlast, prune:first, prune:last or projection:FILE
    #[arg(long, env = "OVERFILL_KV")]
    kv: KvSpec,
    /// How keys and values are stored in the nodes' caches: f32 or f16
    #[arg(long, env = "OVERFILL_KV_CACHE", default_value_t = KvFormat::F16)]
    kv_cache: KvFormat,
    /// How they go from prefill to decode node: f32, f16, bf16 or int8
    #[arg(long, env = "OVERFILL_KV_WIRE", default_value_t = WireFormat::F16)]
    kv_wire: WireFormat,
    /// The folder to make
    #[arg(long, env = "OVERFILL_OUT")]
    out: PathBuf,
    /// Name that clients ask for [default: the folder's]
    #[arg(long, env = "OVERFILL_NAME")]
    name: Option<String>,
    /// How the full model's weights are held: native, f32, bf16 or f16
    #[arg(long, env = "OVERFILL_FULL_WEIGHTS", default_value = "native")]
    full_weights: WeightFormat,
    /// How the decode model's weights are held: native, f32, bf16 or f16
    #[arg(long, env = "OVERFILL_DECODE_WEIGHTS", default_value = "native")]
    decode_weights: WeightFormat,
}

pub(crate) fn run(args: MakePairArgs) -> anyhow::Result<()> {
    let name = match args.name {
        Some(name) => name,
        None => args.out.file_name().context("--out names no folder")?.to_string_lossy().into_owned(),
    };
    let MakePairArgs { full, decode, kv, out, full_weights, decode_weights, .. } = args;
    let making = MakePair {
        name,
        full,
        full_weights,
        decode,
        decode_weights,
        kv,
        kv_formats: KvFormats { cache: args.kv_cache, wire: args.kv_wire },
        provenance: serde_json::Map::new(),
    };
    let waiting = spinner("hashing weights");
    let pair = making.make(&out)?;
    waiting.finish_and_clear();
    println!("{} {}", pair.dir.display(), pair.manifest.fingerprint);
    Ok(())
}
