//! `overfill inspect`: what a pair is made of.

use std::path::PathBuf;

use clap::Args;
use overfill_model::Pair;
use overfill_types::pair::ModelManifest;
use serde_json::Value;

#[derive(Args)]
pub(crate) struct InspectArgs {
    /// The pair's folder
    pair: PathBuf,
    /// Print pair.json's content instead
    #[arg(long, env = "OVERFILL_JSON")]
    json: bool,
}

pub(crate) fn run(args: InspectArgs) -> anyhow::Result<()> {
    let Pair { manifest, dir } = Pair::open(&args.pair)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&manifest)?);
        return Ok(());
    }
    println!("{:14}{}", "pair", manifest.name);
    println!("{:14}{}", "fingerprint", manifest.fingerprint);
    println!("{:14}{}", "KV transform", manifest.kv);
    println!("{:14}{} tokens", "context", manifest.max_context());
    println!("{:14}{} tokens, ends with {:?}", "vocabulary", manifest.vocab_size(), manifest.tokenizer.eos_token_ids);
    for (name, model) in [("full model", &manifest.full), ("decode model", &manifest.decode)] {
        let ModelManifest { path, sha256, weights, architecture, hidden_size, intermediate_size, heads, kv, .. } = model;
        println!("\n{name}");
        println!("  {:18}{} ({weights:?} in memory)", "file", dir.join(path).display());
        println!("  {:18}{sha256}", "sha256");
        println!("  {:18}{architecture}, hidden {hidden_size}, MLP {intermediate_size}, {heads} heads", "shape");
        println!("  {:18}{kv}, {} bytes a token in f32", "KV cache", kv.values_per_token() * size_of::<f32>());
        println!("  {:18}{} million", "weights a token", weights_read(model) / 1_000_000);
    }
    if !manifest.provenance.is_empty() {
        println!("\nprovenance");
        tell(&Value::Object(manifest.provenance), 1);
    }
    Ok(())
}

/// Lists longer than this are told by their length: kept channels are hundreds.
const LONG: usize = 12;

/// An object, a line for each value, what is inside another indented under it.
fn tell(value: &Value, depth: usize) {
    let Value::Object(all) = value else { return };
    for (key, value) in all {
        let key = format!("{:indent$}{key}", "", indent = 2 * depth);
        match value {
            Value::Object(_) => {
                println!("{key}");
                tell(value, depth + 1);
            }
            Value::String(text) => println!("{key:24}{text}"),
            Value::Array(list) if list.len() > LONG => println!("{key:24}{} values", list.len()),
            other => println!("{key:24}{other}"),
        }
    }
}

/// Weights that one decoded token reads: all matrices and the head, not the embedding.
fn weights_read(model: &ModelManifest) -> usize {
    let attention = model.hidden_size * (2 * model.heads * model.kv.head_dim + 2 * model.kv.row());
    let mlp = 3 * model.hidden_size * model.intermediate_size;
    model.kv.layers * (attention + mlp) + model.vocab_size * model.hidden_size
}
