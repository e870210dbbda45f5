//! `overfill inspect`: what a pair is made of.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use clap::Args;
use overfill_model::pair::{file_sha256, weights_sha256};
use overfill_model::{ModelError, Pair};
use overfill_text::tokenizer::TOKENIZER_FILE;
use overfill_types::pair::{ModelManifest, PAIR_FILE};
use serde_json::Value;

#[derive(Args)]
pub(crate) struct InspectArgs {
    /// The pair's folder
    pair: PathBuf,
    /// Print pair.json's content instead
    #[arg(long, env = "OVERFILL_JSON")]
    json: bool,
    /// Take the hashes as pair.json has them, without reading the files
    #[arg(long)]
    no_hashes: bool,
}

pub(crate) fn run(args: InspectArgs) -> anyhow::Result<()> {
    let Pair { manifest, dir } = Pair::open(&args.pair)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&manifest)?);
        return Ok(());
    }
    println!("{:14}{}", "pair", manifest.name);
    println!("{:14}{}", "fingerprint", manifest.fingerprint);
    println!("{:14}sha256 {}", PAIR_FILE, file_sha256(&dir.join(PAIR_FILE))?);
    println!("{:14}{}", "KV transform", manifest.kv);
    println!("{:14}{} tokens", "context", manifest.max_context());
    println!("{:14}{} tokens, ends with {:?}", "vocabulary", manifest.vocab_size(), manifest.tokenizer.eos_token_ids);
    let mut wrong = Vec::new();
    let mut checked = |name: &'static str, path: &str, said: &str, found: &dyn Fn(&Path) -> Result<String, ModelError>| {
        if args.no_hashes {
            return Ok(said.to_owned());
        }
        let found = found(&dir.join(path))?;
        if found == *said {
            return Ok::<_, ModelError>(format!("{said} (checked)"));
        }
        wrong.push(name);
        Ok(format!("{said} by pair.json, {found} by the file"))
    };
    println!("{:14}{}", "tokenizer", checked("tokenizer", TOKENIZER_FILE, &manifest.tokenizer.sha256, &file_sha256)?);
    for (name, model) in [("full model", &manifest.full), ("decode model", &manifest.decode)] {
        let ModelManifest { path, sha256, weights, architecture, hidden_size, intermediate_size, heads, kv, .. } = model;
        println!("\n{name}");
        println!("  {:18}{} ({weights:?} in memory)", "file", dir.join(path).display());
        println!("  {:18}{}", "sha256", checked(name, path, sha256, &weights_sha256)?);
        println!("  {:18}{architecture}, hidden {hidden_size}, MLP {intermediate_size}, {heads} heads", "shape");
        println!("  {:18}{kv}, {} bytes a token in f32", "KV cache", kv.values_per_token() * size_of::<f32>());
        println!("  {:18}{} million", "weights a token", weights_read(model) / 1_000_000);
    }
    if !manifest.provenance.is_empty() {
        println!("\nprovenance");
        tell(&Value::Object(manifest.provenance), 1);
    }
    ensure!(
        wrong.is_empty(),
        "the {} not what the pair was made of: make it anew with `overfill pair`",
        match wrong.as_slice() {
            [one] => format!("{one} is"),
            several => format!("{} are", several.join(", ")),
        }
    );
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
            Value::String(text) => println!("{key:24} {text}"),
            other => println!("{key:24} {}", short(other)),
        }
    }
}

/// A value on one line: lists within it that are long, or that are made of long ones, by how many values they have.
fn short(value: &Value) -> String {
    fn values(value: &Value) -> usize {
        value.as_array().map_or(1, |list| list.iter().map(values).sum())
    }
    match value {
        Value::Array(list) if list.len() <= LONG && values(value) <= LONG => value.to_string(),
        Value::Array(list) if list.iter().any(Value::is_array) => format!("{} lists of {} values together", list.len(), values(value)),
        Value::Array(list) => format!("{} values", list.len()),
        other => other.to_string(),
    }
}

/// Weights that one decoded token reads: all matrices and the head, not the embedding.
fn weights_read(model: &ModelManifest) -> usize {
    let attention = model.hidden_size * (2 * model.heads * model.kv.head_dim + 2 * model.kv.row());
    let mlp = 3 * model.hidden_size * model.intermediate_size;
    model.kv.layers * (attention + mlp) + model.vocab_size * model.hidden_size
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_is_no_longer_than_a_line() {
        assert_eq!(short(&json!([1, 2])), "[1,2]");
        assert_eq!(short(&json!((0..2000).collect::<Vec<_>>())), "2000 values");
        assert_eq!(short(&json!(vec![vec![0; 900]; 2])), "2 lists of 1800 values together");
        assert_eq!(short(&json!(0.5)), "0.5");
    }
}
