//! Files as people bring them: what a tokenizer's configuration, a GGUF header or a config.json says besides is neither passed over
//! nor misread. The right values are those of transformers and of llama.cpp.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod checkpoint;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use checkpoint::Checkpoint;
use overfill_model::weights::Weights;
use overfill_model::{GgmlDType, GgufWriter, KvSpec, MakePair, ModelError, Pair};
use overfill_text::TextModel;
use overfill_text::gguf::GgufVocabulary;
use overfill_types::pair::WeightFormat;
use overfill_types::{GenerationConfig, KvFormats};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

const VOCABULARY: usize = 272;
/// The base model's end, and that of a turn.
const ENDS: [u32; 2] = [262, 263];

fn llama(more: Value) -> Checkpoint {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "eos_token_id": ENDS[0],
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Checkpoint::random(config, 1)
}

/// Bytes, merges, and special tokens as Llama 3 has them; fewer tokens than the embedding has rows.
fn vocabulary(pre: &str) -> GgufVocabulary {
    let mut tokens: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    tokens.sort_unstable();
    let merges = ["h e", "l l", "he ll", "1 2", "12 3"].map(str::to_owned).to_vec();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    tokens.extend(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"].map(str::to_owned));
    let mut token_types = vec![1; tokens.len() - 3];
    token_types.extend([3; 3]);
    let bos = tokens.len() as u32 - 3;
    GgufVocabulary {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens,
        token_types,
        merges,
        bos: Some(bos),
        eos: Some(ENDS[0]),
        ..Default::default()
    }
}

/// A folder with this tokenizer, and with more in its configuration.
fn folder(checkpoint: &Checkpoint, vocabulary: &GgufVocabulary, config: Value) -> TempDir {
    let folder = checkpoint.save();
    let tokenizer = vocabulary.tokenizer().unwrap().to_string(false).unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

/// The folder's model as a GGUF file with this vocabulary.
fn gguf(folder: &Path, vocabulary: &GgufVocabulary) -> TempDir {
    let weights = Weights::open(folder).unwrap();
    let mut writer = GgufWriter::new("m", weights.config(), vocabulary).unwrap();
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    for name in tensors.keys() {
        let (numbers, shape) = weights.numbers(name).unwrap();
        writer.tensor(name, &shape, &numbers, GgmlDType::F32).unwrap();
    }
    let made = tempfile::tempdir().unwrap();
    writer.write(&made.path().join("m.gguf")).unwrap();
    made
}

fn pair(full: &Path, decode: &Path, out: &Path) -> Result<Pair, ModelError> {
    let making = MakePair {
        name: "m".into(),
        full: full.to_owned(),
        full_weights: WeightFormat::F32,
        decode: decode.to_owned(),
        decode_weights: WeightFormat::F32,
        kv: KvSpec::Identity,
        kv_formats: KvFormats::default(),
        generation: GenerationConfig::default(),
        provenance: serde_json::Map::new(),
    };
    making.make(out)
}

/// Of a pair of this with itself.
fn ends(model: &Path) -> Vec<u32> {
    let out = tempfile::tempdir().unwrap();
    pair(model, model, &out.path().join("pair")).unwrap().manifest.tokenizer.eos_token_ids
}

fn refused(folder: &TempDir) -> String {
    Weights::open(folder.path()).err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn an_answer_ends_where_the_tokenizer_says_too() {
    let config = json!({ "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>" });
    let folder = folder(&llama(json!({})), &vocabulary("llama-bpe"), config);
    assert_eq!(ends(folder.path()), ENDS);
}

#[test]
fn ends_of_turns_are_known_by_their_texts() {
    let whole = folder(&llama(json!({})), &vocabulary("llama-bpe"), json!({}));
    let file = gguf(whole.path(), &vocabulary("llama-bpe"));
    assert_eq!(ends(&file.path().join("m.gguf")), ENDS, "`eos_token_id` names the base model's alone");
    let mut as_text = vocabulary("llama-bpe");
    as_text.token_types[ENDS[1] as usize] = 1;
    let file = gguf(whole.path(), &as_text);
    assert_eq!(ends(&file.path().join("m.gguf")), ENDS[..1], "a token that only looks so is text");
}

#[test]
fn a_pair_has_one_tokenisation() {
    let out = tempfile::tempdir().unwrap();
    let out = |name: &str| out.path().join(name);
    let begins = GgufVocabulary { add_bos: true, ..vocabulary("llama-bpe") };
    let whole = folder(&llama(json!({})), &begins, json!({}));
    let file = |vocabulary: &GgufVocabulary| gguf(whole.path(), vocabulary);

    // Its own export, which has names for all rows of the embedding; with merges as texts or as lists.
    let same = file(&begins);
    pair(whole.path(), &same.path().join("m.gguf"), &out("same")).unwrap();
    let path = whole.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for merge in tokenizer["model"]["merges"].as_array_mut().unwrap() {
        let two: Vec<&str> = merge.as_array().unwrap().iter().map(|part| part.as_str().unwrap()).collect();
        *merge = two.join(" ").into();
    }
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    pair(whole.path(), &same.path().join("m.gguf"), &out("texts")).unwrap();

    // The same tokens, and texts that begin without one of their own, or whose numbers are cut elsewhere.
    for other in [GgufVocabulary { add_bos: false, ..begins.clone() }, GgufVocabulary { pre: Some("qwen2".into()), ..begins.clone() }] {
        let other = file(&other);
        let error = pair(whole.path(), &other.path().join("m.gguf"), &out("other")).err().unwrap().to_string();
        assert!(error.contains("make other tokens of"), "{error}");
    }
}

#[test]
fn templates_lie_in_files_of_their_own() {
    let config = json!({ "chat_template": "{{ messages[0].content }} of the configuration" });
    let folder = folder(&llama(json!({})), &vocabulary("llama-bpe"), config);
    std::fs::write(folder.path().join("chat_template.jinja"), "he").unwrap();
    std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    std::fs::write(folder.path().join("additional_chat_templates/tool_use.jinja"), "{{ tools | length }}").unwrap();
    let out = tempfile::tempdir().unwrap();
    let made = pair(folder.path(), folder.path(), &out.path().join("pair")).unwrap();
    let text = TextModel::open(&made.dir).unwrap();
    let mut chat = overfill_text::Chat { messages: vec![json!({ "role": "assistant", "content": "" })], ..Default::default() };
    assert_eq!(text.decode(&text.encode_whole_chat(&chat).unwrap(), true), "he");
    chat.tools = vec![json!({}), json!({})];
    assert_eq!(text.decode(&text.encode_whole_chat(&chat).unwrap(), true), "2");
}

#[test]
fn what_would_change_the_answers_is_refused() {
    let scaled = |name: &str, dtype| {
        let mut checkpoint = llama(json!({}));
        checkpoint.tensors.insert(name.into(), Tensor::ones(&[1], dtype, &Device::Cpu).unwrap());
        refused(&checkpoint.save())
    };
    for name in ["model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.self_attn.q_norm.weight", "model.layers.1.mlp.up_proj.weight"] {
        assert!(scaled(name, DType::F32).contains(name), "{name}");
    }
    assert_eq!(scaled("model.layers.0.self_attn.rotary_emb.inv_freq", DType::F32), "", "a constant that old files carry along");
    let mut whole = llama(json!({}));
    whole.tensors.insert("model.norm.weight".into(), Tensor::ones(&[32], DType::U8, &Device::Cpu).unwrap());
    assert!(refused(&whole.save()).contains("model.norm.weight holds U8"), "{}", refused(&whole.save()));
    assert!(refused(&llama(json!({ "quantization_config": { "quant_method": "gptq" } })).save()).contains("gptq"));
    // Biases that the configuration speaks of are there, and no others.
    assert!(refused(&llama(json!({ "attention_bias": true })).save()).contains("q_proj.bias is missing"));
    let mut biased = llama(json!({}));
    biased.tensors.insert("model.layers.0.mlp.up_proj.bias".into(), Tensor::ones(&[64], DType::F32, &Device::Cpu).unwrap());
    assert!(refused(&biased.save()).contains("up_proj.bias is none of this model"));
    // A Mistral is a Llama.
    assert_eq!(refused(&llama(json!({ "model_type": "mistral", "sliding_window": null })).save()), "");
}
