//! `overfill pair`: makes a pair of two models.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Args;
use overfill_model::pair_make::generation;
use overfill_model::reference::Split;
use overfill_model::{KvSpec, MakePair, Reference, making};
use overfill_types::generation::GenerationSource;
use overfill_types::pair::WeightFormat;
use overfill_types::{GenerationConfig, KvFormat, KvFormats, SamplingParams, WireFormat};

use crate::progress::spinner;

#[derive(Args)]
#[command(
    after_help = "The decode model keeps the full model's tokenizer and rotary embedding. What does not fit is refused, naming both sides.\n\nWith --reference, weights come from a checkpoint of the authors' code (github.com/friendshipkim/overfill). Of --full and --decode, then, only config.json and the tokenizer are read; they may be left out where they lie in teacher/ and student/ of the checkpoint's folder."
)]
pub(crate) struct MakePairArgs {
    /// The full model: a Hugging Face folder or a .gguf file
    #[arg(long, env = "OVERFILL_FULL", required_unless_present = "reference")]
    full: Option<PathBuf>,
    /// The decode model: a Hugging Face folder or a .gguf file
    #[arg(long, env = "OVERFILL_DECODE", required_unless_present = "reference")]
    decode: Option<PathBuf>,
    /// Both models: the folder of a checkpoint that the authors' code saved (pytorch_model.bin with teacher.* and student.*)
    #[arg(long, env = "OVERFILL_REFERENCE")]
    reference: Option<PathBuf>,
    /// From the full model's KV cache to the decode model's: identity, prune:firstlast, prune:first, prune:last or projection:FILE
    #[arg(long, env = "OVERFILL_KV", required_unless_present = "reference")]
    kv: Option<KvSpec>,
    /// How keys and values are stored in the nodes' caches: f32, f16 or int8
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
    /// How tokens are chosen where a request does not say it: auto (as the full model's generation_config.json says), none, or
    /// another such file
    #[arg(long, env = "OVERFILL_GENERATION_CONFIG", default_value = "auto")]
    generation_config: GenerationSource,
    /// What is said there otherwise, as a JSON object: {"temperature": 0.2, "top_p": 0.9}
    #[arg(long, env = "OVERFILL_OVERRIDE_GENERATION_CONFIG", value_parser = parse_generation)]
    override_generation_config: Option<GenerationConfig>,
    /// How the full model's weights are held: native, q8_0, bf16, f16 or f32
    #[arg(long, env = "OVERFILL_FULL_WEIGHTS", default_value = "q8_0")]
    full_weights: WeightFormat,
    /// How the decode model's weights are held: native, q8_0, bf16, f16 or f32
    #[arg(long, env = "OVERFILL_DECODE_WEIGHTS", default_value = "native")]
    decode_weights: WeightFormat,
}

fn parse_generation(text: &str) -> Result<GenerationConfig, String> {
    let config: GenerationConfig = serde_json::from_str(text).map_err(|e| e.to_string())?;
    config.fill(SamplingParams::greedy()).validate().map_err(|e| e.message)?;
    Ok(config)
}

pub(crate) fn run(args: MakePairArgs) -> anyhow::Result<()> {
    let name = match args.name {
        Some(name) => name,
        None => args.out.file_name().context("--out names no folder")?.to_string_lossy().into_owned(),
    };
    let waiting = spinner("hashing weights");
    // What a checkpoint is split into is linked from there into the pair, and gone with it.
    let making;
    let split;
    match &args.reference {
        Some(reference) => {
            ensure!(!args.out.exists(), "{} exists already: name another folder, or remove it", args.out.display());
            let opened = Reference::open(reference, args.full.as_deref(), args.decode.as_deref(), args.kv.as_ref())?;
            let parent = args.out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
            making = making::folder(parent, ".reference-").with_context(|| format!("cannot write to {}", parent.display()))?;
            waiting.set_message("splitting the checkpoint");
            split = opened.split(making.path())?;
        }
        None => {
            let said = (args.full.clone(), args.decode.clone(), args.kv.clone());
            let (Some(full), Some(decode), Some(kv)) = said else { bail!("--full, --decode and --kv are wanted, or --reference") };
            split = Split { full, decode, kv, provenance: serde_json::Map::new() };
        }
    }
    let Split { full, decode, kv, provenance } = split;
    let said = match &args.generation_config {
        GenerationSource::Auto => generation(&full)?,
        GenerationSource::None => GenerationConfig::default(),
        GenerationSource::File(file) => GenerationSource::read(file)?,
    };
    let generation = args.override_generation_config.unwrap_or_default().or(said);
    let pair = MakePair {
        name,
        full,
        full_weights: args.full_weights,
        decode,
        decode_weights: args.decode_weights,
        kv,
        kv_formats: KvFormats { cache: args.kv_cache, wire: args.kv_wire },
        generation,
        provenance,
    };
    waiting.set_message("hashing weights");
    let pair = pair.make(&args.out)?;
    waiting.finish_and_clear();
    println!("{} {}", pair.dir.display(), pair.manifest.fingerprint);
    Ok(())
}
