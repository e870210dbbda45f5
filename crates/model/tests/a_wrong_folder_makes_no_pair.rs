//! `overfill pair` on a folder that is wrong in one thing: a sentence that names the file and what is wrong in it, and no pair.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod checkpoint;

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;

use checkpoint::Checkpoint;
use overfill_model::{KvSpec, MakePair, ModelError};
use overfill_text::gguf::GgufVocabulary;
use overfill_types::KvFormats;
use overfill_types::pair::WeightFormat;
use serde_json::{Value, json};
use tempfile::TempDir;

fn right() -> TempDir {
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": { "rope_type": "linear", "factor": 2.0 },
        "tie_word_embeddings": false, "eos_token_id": 3,
    });
    let folder = Checkpoint::random(config, 1).save();
    let tokens: Vec<String> = (0..40).map(|id| format!("t{id}")).collect();
    let vocabulary = GgufVocabulary { model: "gpt2".into(), pre: Some("gpt-2".into()), tokens, ..Default::default() };
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("tokenizer.json"), vocabulary.tokenizer().unwrap().to_string(false).unwrap()).unwrap();
    std::fs::write(at("tokenizer_config.json"), json!({ "eos_token": "t3", "chat_template": "{{ messages }}" }).to_string()).unwrap();
    std::fs::write(at("generation_config.json"), json!({ "eos_token_id": [3], "temperature": 0.5 }).to_string()).unwrap();
    folder
}

const INDEX: &str = "model.safetensors.index.json";

/// As two shards with an index.
fn sharded() -> TempDir {
    let folder = right();
    let (whole, at) = (folder.path().join("model.safetensors"), |name: &str| folder.path().join(name));
    let tensors = candle_core::safetensors::load(&whole, &candle_core::Device::Cpu).unwrap();
    let (mut map, mut halves) = (serde_json::Map::new(), [HashMap::new(), HashMap::new()]);
    for (name, tensor) in tensors {
        let half = usize::from(name.contains("layers.1"));
        map.insert(name.clone(), format!("model-{}-of-2.safetensors", half + 1).into());
        halves[half].insert(name, tensor);
    }
    for (i, half) in halves.iter().enumerate() {
        candle_core::safetensors::save(half, at(&format!("model-{}-of-2.safetensors", i + 1))).unwrap();
    }
    std::fs::remove_file(&whole).unwrap();
    std::fs::write(at(INDEX), json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
    folder
}

/// Makes a pair of the folder with itself, as the command does; gives what is said, which is nothing where it is right.
fn said(folder: &Path) -> String {
    // With the cause, as the command tells it.
    let told = |error: &ModelError| error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
    let out = tempfile::tempdir().unwrap();
    let generation = match overfill_model::pair_make::generation(folder) {
        Ok(generation) => generation,
        Err(error) => return told(&error),
    };
    let making = MakePair {
        name: "m".into(),
        full: folder.to_owned(),
        full_weights: WeightFormat::F32,
        decode: folder.to_owned(),
        decode_weights: WeightFormat::F32,
        kv: KvSpec::Identity,
        kv_formats: KvFormats::default(),
        generation,
        provenance: serde_json::Map::new(),
    };
    let made = making.make(&out.path().join("pair"));
    let left = std::fs::read_dir(out.path()).unwrap().count();
    assert_eq!(left, usize::from(made.is_ok()), "nothing is left of a pair that was not made");
    made.err().map_or(String::new(), |error| told(&error))
}

fn changed(folder: &TempDir, file: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.path().join(file);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

fn refused(folder: &TempDir, what: &str, words: &[&str]) {
    let said = said(folder.path());
    assert!(!said.is_empty(), "{what}: a pair was made");
    assert!(words.iter().all(|word| said.contains(word)), "{what}: {said}");
}

#[test]
fn what_is_right_makes_one() {
    assert_eq!(said(right().path()), "");
    assert_eq!(said(sharded().path()), "");
}

#[test]
fn a_key_of_the_configuration() {
    let needed = ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"];
    for key in needed {
        let folder = right();
        changed(&folder, "config.json", |config| {
            config.as_object_mut().unwrap().remove(key);
        });
        refused(&folder, &format!("without {key}"), &["config.json", key]);
    }
    let sizes = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    ];
    for key in sizes {
        for wrong in [json!("8"), json!(8.5), json!(-8), json!([8]), json!(true)] {
            let folder = right();
            changed(&folder, "config.json", |config| config[key] = wrong.clone());
            refused(&folder, &format!("{key} of {wrong}"), &["config.json", key]);
        }
        for wrong in [json!(0), json!(4_294_967_296_u64), json!(u64::MAX)] {
            // A context may be as long as it likes.
            if key == "max_position_embeddings" && wrong != json!(0) {
                continue;
            }
            let folder = right();
            changed(&folder, "config.json", |config| config[key] = wrong.clone());
            refused(&folder, &format!("{key} of {wrong}"), &[]);
        }
    }
    for (key, wrong) in [
        ("model_type", json!("gpt2")),
        ("model_type", json!(7)),
        ("hidden_act", json!("gelu")),
        ("rope_theta", json!("ten thousand")),
        ("rope_theta", json!(0)),
        ("rope_theta", json!(-1.0)),
        ("rms_norm_eps", json!("small")),
        ("rms_norm_eps", json!(-1.0)),
        ("rope_scaling", json!({ "rope_type": "yarn", "factor": 0.0 })),
        ("rope_scaling", json!({ "rope_type": "linear" })),
        ("rope_scaling", json!({ "rope_type": "linear", "factor": 0 })),
        ("rope_scaling", json!("linear")),
        ("tie_word_embeddings", json!("no")),
        ("eos_token_id", json!("t3")),
        ("eos_token_id", json!(-1)),
        ("eos_token_id", json!(400)),
        ("quantization_config", json!({ "quant_method": "awq" })),
        ("attention_bias", json!(true)),
    ] {
        let folder = right();
        changed(&folder, "config.json", |config| config[key] = wrong.clone());
        refused(&folder, &format!("{key} of {wrong}"), &[]);
    }
}

#[test]
fn a_file() {
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = right();
        std::fs::remove_file(folder.path().join(file)).unwrap();
        refused(&folder, &format!("without {file}"), &[file]);
    }
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"] {
        let whole = std::fs::read(right().path().join(file)).unwrap();
        let cut = whole[..whole.len() / 2].to_vec();
        for (what, bytes) in [("cut", cut), ("empty", Vec::new()), ("of zeros", vec![0; 64]), ("a list", b"[1]".to_vec())] {
            let folder = right();
            std::fs::write(folder.path().join(file), bytes).unwrap();
            refused(&folder, &format!("{file} is {what}"), &[]);
        }
        let folder = right();
        std::fs::remove_file(folder.path().join(file)).unwrap();
        std::fs::create_dir(folder.path().join(file)).unwrap();
        refused(&folder, &format!("{file} is a folder"), &[]);
    }
}

#[test]
fn an_index_of_shards() {
    let wrong =
        [("missing", "model-3-of-2.safetensors"), ("above", "../model-1-of-2.safetensors"), ("elsewhere", "/etc/passwd"), ("nothing", "")];
    for (what, wrong) in wrong {
        let folder = sharded();
        changed(&folder, INDEX, |index| {
            let map = index["weight_map"].as_object_mut().unwrap();
            let first = map.keys().next().unwrap().clone();
            map.insert(first, wrong.into());
        });
        refused(&folder, what, &[]);
    }
    for wrong in [json!(null), json!([]), json!({}), json!("x"), json!({ "lm_head.weight": 7 })] {
        let folder = sharded();
        changed(&folder, INDEX, |index| index["weight_map"] = wrong.clone());
        refused(&folder, &format!("a weight_map of {wrong}"), &[]);
    }
    for shard in ["model-1-of-2.safetensors", "model-2-of-2.safetensors"] {
        let folder = sharded();
        std::fs::remove_file(folder.path().join(shard)).unwrap();
        refused(&folder, &format!("without {shard}"), &[shard]);
        let folder = sharded();
        std::fs::write(folder.path().join(shard), b"no tensors").unwrap();
        refused(&folder, &format!("{shard} is none"), &[]);
    }
}

#[test]
fn a_tokenizer() {
    for (what, change) in [
        ("no model", json!({ "model": null })),
        ("no vocabulary", json!({ "model": { "type": "BPE", "vocab": null, "merges": [] } })),
        ("a merge of unknown tokens", json!({ "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": [["x", "y"]] } })),
        ("a merge of one", json!({ "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": [["a"]] } })),
        ("another kind", json!({ "pre_tokenizer": { "type": "Unheard" } })),
        ("a normalizer of numbers", json!({ "normalizer": 7 })),
    ] {
        let folder = right();
        changed(&folder, "tokenizer.json", |json| json.as_object_mut().unwrap().extend(change.as_object().unwrap().clone()));
        refused(&folder, what, &["tokenizer.json"]);
    }
    for change in
        [json!({ "chat_template": "{% for %}" }), json!({ "chat_template": 7 }), json!({ "chat_template": [{ "name": "default" }] })]
    {
        let folder = right();
        changed(&folder, "tokenizer_config.json", |json| json.as_object_mut().unwrap().extend(change.as_object().unwrap().clone()));
        refused(&folder, &change.to_string(), &["template"]);
    }
}
