//! The same weights from a GGUF file, laid out as llama.cpp does it, and from a Hugging Face folder.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod checkpoint;
mod sequence;

use std::collections::HashMap;
use std::f64::consts::TAU;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use checkpoint::{Checkpoint, prompt};
use overfill_model::weights::Weights;
use overfill_model::{Llama, ThreadPool};
use overfill_types::pair::WeightFormat;
use sequence::{Sequence, difference, same_bits};
use serde_json::json;

const LLAMA: &str = r#"{
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 160, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0
}"#;

/// A random Llama of this shape, with what `changes` says otherwise.
fn checkpoint(changes: serde_json::Value) -> Checkpoint {
    let mut config: serde_json::Value = serde_json::from_str(LLAMA).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    Checkpoint::random(config, 5)
}

/// Logits after each token of a prompt.
fn logits(path: &Path, format: WeightFormat) -> Vec<Vec<f32>> {
    let model = Llama::load(path, format, &Device::Cpu, &ThreadPool::new(1, &[]).unwrap()).unwrap();
    let tokens = tokens();
    let mut sequence = Sequence::new(model.config().kv, tokens.len(), 64, 2);
    tokens.iter().map(|token| sequence.read(&model, &[*token])).collect()
}

fn tokens() -> Vec<u32> {
    prompt(40, &serde_json::from_str(LLAMA).unwrap(), 6)
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    a.iter().zip(b).map(|(a, b)| difference(a, b)).fold(0.0, f32::max)
}

fn all_same_bits(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    a.iter().zip(b).all(|(a, b)| same_bits(a, b))
}

/// Writes the checkpoint with matrices of type `dtype`.
fn save_gguf(checkpoint: &Checkpoint, dtype: GgmlDType, path: &Path) {
    let config = &checkpoint.config;
    let architecture = config["model_type"].as_str().unwrap();
    let [heads, kv_heads] = ["num_attention_heads", "num_key_value_heads"].map(|key| config[key].as_u64().unwrap() as usize);
    let mut tensors: HashMap<String, QTensor> = checkpoint
        .tensors
        .iter()
        .map(|(name, tensor)| {
            // llama.cpp interleaves the halves of each query and key head for `llama`, and for no other architecture.
            let tensor = match name {
                _ if architecture != "llama" => tensor.clone(),
                _ if name.contains("q_proj") => interleave(tensor, heads),
                _ if name.contains("k_proj") => interleave(tensor, kv_heads),
                _ => tensor.clone(),
            };
            let dtype = if tensor.rank() == 1 { GgmlDType::F32 } else { dtype };
            (gguf_name(name), QTensor::quantize(&tensor, dtype).unwrap())
        })
        .collect();
    if config["rope_scaling"]["rope_type"] == "llama3" {
        let factors = llama3_factors(config);
        let factors = Tensor::from_slice(&factors, factors.len(), &Device::Cpu).unwrap();
        tensors.insert("rope_freqs.weight".into(), QTensor::quantize(&factors, GgmlDType::F32).unwrap());
    }
    let number = |key: &str| Value::U32(config[key].as_u64().unwrap() as u32);
    let float = |key: &str| Value::F32(config[key].as_f64().unwrap() as f32);
    let mut metadata: Vec<(String, Value)> = [
        ("embedding_length", number("hidden_size")),
        ("feed_forward_length", number("intermediate_size")),
        ("block_count", number("num_hidden_layers")),
        ("attention.head_count", number("num_attention_heads")),
        ("attention.head_count_kv", number("num_key_value_heads")),
        ("attention.key_length", number("head_dim")),
        ("attention.value_length", number("head_dim")),
        ("rope.dimension_count", number("head_dim")),
        ("rope.freq_base", float("rope_theta")),
        ("attention.layer_norm_rms_epsilon", float("rms_norm_eps")),
        ("context_length", number("max_position_embeddings")),
    ]
    .map(|(key, value)| (format!("{architecture}.{key}"), value))
    .into();
    metadata.push(("general.architecture".into(), Value::String(architecture.into())));
    if config["rope_scaling"]["rope_type"] == "linear" {
        metadata.push((format!("{architecture}.rope.scaling.type"), Value::String("linear".into())));
        let factor = config["rope_scaling"]["factor"].as_f64().unwrap() as f32;
        metadata.push((format!("{architecture}.rope.scaling.factor"), Value::F32(factor)));
    }
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

fn gguf_name(name: &str) -> String {
    let table = [
        ("model.layers", "blk"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    table.iter().fold(name.to_owned(), |name, (theirs, gguf)| name.replace(theirs, gguf))
}

/// Rows of each head in the order 0, half, 1, half + 1, …
fn interleave(tensor: &Tensor, heads: usize) -> Tensor {
    let rows = tensor.dim(0).unwrap();
    let half = rows / heads / 2;
    let order: Vec<u32> = (0..rows).map(|row| (row - row % (2 * half) + row % 2 * half + row % (2 * half) / 2) as u32).collect();
    tensor.index_select(&Tensor::new(order, &Device::Cpu).unwrap(), 0).unwrap()
}

/// llama.cpp has Llama 3's rope scaling as a divisor for each frequency.
fn llama3_factors(config: &serde_json::Value) -> Vec<f32> {
    let said = |key: &str| config["rope_scaling"][key].as_f64().unwrap();
    let [factor, low, high, original] = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"].map(said);
    let head_dim = config["head_dim"].as_u64().unwrap() as i32;
    let divisor = |i: i32| {
        let wavelength = TAU * config["rope_theta"].as_f64().unwrap().powf(f64::from(2 * i) / f64::from(head_dim));
        let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
    };
    (0..head_dim / 2).map(divisor).collect()
}

/// From Hugging Face's folder, and from a GGUF file in f32.
fn both(checkpoint: &Checkpoint) -> [Vec<Vec<f32>>; 2] {
    let folder = checkpoint.save();
    let file = folder.path().join("model.gguf");
    save_gguf(checkpoint, GgmlDType::F32, &file);
    [logits(folder.path(), WeightFormat::F32), logits(&file, WeightFormat::Native)]
}

#[test]
fn f32_is_the_same_bits() {
    for changes in [
        json!({}),
        json!({ "head_dim": 40, "tie_word_embeddings": true }),
        json!({ "model_type": "qwen2", "num_key_value_heads": 4 }),
        json!({ "rope_scaling": { "rope_type": "linear", "factor": 4.0 } }),
    ] {
        let [folder, file] = both(&checkpoint(changes.clone()));
        assert!(all_same_bits(&folder, &file), "{changes}: {}", worst(&folder, &file));
    }
}

#[test]
fn llama3_scaling_is_in_a_tensor() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
    });
    let [folder, file] = both(&checkpoint(json!({ "rope_scaling": scaling })));
    assert!(worst(&folder, &file) < 1e-3, "{}", worst(&folder, &file));
    let [plain, _] = both(&checkpoint(json!({})));
    assert!(worst(&folder, &plain) > 0.1, "the scaling matters");
}

#[test]
fn quantised_weights() {
    let exact = checkpoint(json!({}));
    for dtype in [
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q8_0,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q4K,
        GgmlDType::Q6K,
    ] {
        // What the file holds, as a folder in f32: rows are quantised one by one, so their order makes no difference.
        let rounded = |tensor: &Tensor| match tensor.rank() {
            1 => tensor.clone(),
            _ => QTensor::quantize(tensor, dtype).unwrap().dequantize(&Device::Cpu).unwrap(),
        };
        let tensors = exact.tensors.iter().map(|(name, tensor)| (name.clone(), rounded(tensor))).collect();
        let folder = Checkpoint { config: exact.config.clone(), tensors }.save();
        let file = folder.path().join("model.gguf");
        save_gguf(&exact, dtype, &file);
        let expected = logits(folder.path(), WeightFormat::F32);
        let dequantised = logits(&file, WeightFormat::F32);
        assert!(all_same_bits(&dequantised, &expected), "{dtype:?}: {}", worst(&dequantised, &expected));

        let native = logits(&file, WeightFormat::Native);
        let theirs = candle_logits(&file);
        if dtype == GgmlDType::BF16 {
            // What is multiplied with bfloat16 is rounded to it, here alone.
            let (ours, size) = (deviation(&native, &expected), size(&expected));
            assert!(ours > 0.0 && ours < 0.01 * size, "{dtype:?}: {ours} of {size}");
        } else if dtype.block_size() == 1 {
            assert!(all_same_bits(&native, &expected), "{dtype:?}: {}", worst(&native, &expected));
            assert!(worst(&native, &theirs) < 1e-4, "{dtype:?}: {}", worst(&native, &theirs));
        } else {
            // Both round activations to 8 bits, each in its own way: ours must not cost more.
            let (ours, theirs) = (deviation(&native, &expected), deviation(&theirs, &expected));
            assert!(ours > 0.0, "{dtype:?} is multiplied as it is");
            assert!(ours < 1.02 * theirs, "{dtype:?}: {ours}, candle's {theirs}");
        }
    }
}

#[test]
fn what_is_rounded_when_it_is_loaded_is_what_candle_rounds() {
    let exact = checkpoint(json!({}));
    for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q4_1, GgmlDType::Q8_0] {
        let held = |tensor: &Tensor| match tensor.rank() {
            1 => tensor.clone(),
            _ => QTensor::quantize(tensor, dtype).unwrap().dequantize(&Device::Cpu).unwrap(),
        };
        let tensors = exact.tensors.iter().map(|(name, tensor)| (name.clone(), held(tensor))).collect();
        let held = Checkpoint { config: exact.config.clone(), tensors };
        let folder = held.save();
        let [file, rounded] = ["model.gguf", "rounded.gguf"].map(|name| folder.path().join(name));
        save_gguf(&exact, dtype, &file);
        save_gguf(&held, GgmlDType::Q8_0, &rounded);
        let expected = logits(&rounded, WeightFormat::Native);
        for path in [folder.path(), &file] {
            let got = logits(path, WeightFormat::Q8_0);
            assert!(all_same_bits(&got, &expected), "{dtype:?}, {}: {}", path.display(), worst(&got, &expected));
        }
    }
}

#[test]
fn a_matrix_of_other_rows_than_whole_groups_is_not_rounded() {
    let checkpoint = checkpoint(json!({ "intermediate_size": 72 }));
    let folder = checkpoint.save();
    let (exact, rounded) = (logits(folder.path(), WeightFormat::F32), logits(folder.path(), WeightFormat::Q8_0));
    let (off, size) = (deviation(&rounded, &exact), size(&exact));
    assert!(off > 0.0 && off < 0.06 * size, "{off} of {size}");
}

#[test]
fn a_file_that_is_cut_short_is_refused() {
    let checkpoint = checkpoint(json!({}));
    let folder = checkpoint.save();
    let file = folder.path().join("model.gguf");
    save_gguf(&checkpoint, GgmlDType::Q8_0, &file);
    let whole = std::fs::read(&file).unwrap();
    // Before any of its tensors is read. The last one may be followed by padding.
    for length in [0, 100, 5000, whole.len() - 32] {
        std::fs::write(&file, &whole[..length]).unwrap();
        let said = Weights::open(&file).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(said.contains("whole"), "{length} of {} bytes: {said}", whole.len());
    }
}

/// candle's reader of GGUF files has another idea of query and key rows: it rotates them as they lie there.
fn candle_logits(path: &Path) -> Vec<Vec<f32>> {
    let mut file = std::fs::File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let mut read = |(position, token): (usize, &u32)| {
        let token = Tensor::new(&[[*token]], &Device::Cpu).unwrap();
        model.forward(&token, position).unwrap().squeeze(0).unwrap().to_vec1().unwrap()
    };
    tokens().iter().enumerate().map(&mut read).collect()
}

/// Root of the mean square.
fn size(a: &[Vec<f32>]) -> f32 {
    deviation(a, &a.iter().map(|a| vec![0.0; a.len()]).collect::<Vec<_>>())
}

/// Root of the mean squared difference.
fn deviation(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let squares: Vec<f32> = a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).powi(2)).collect();
    (squares.iter().sum::<f32>() / squares.len() as f32).sqrt()
}
