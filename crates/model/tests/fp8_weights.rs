//! Weights of eight bits with scales (`tests/reference/torch_files.py`): the numbers that PyTorch says they are.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use overfill_model::weight::Weight;
use overfill_model::weights::Weights;
use overfill_types::pair::WeightFormat;
use serde_json::Value;
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/torch")
}

const SCHEMES: [&str; 4] = ["fp8-tensor", "fp8-row", "fp8-blocks", "fp8-compressed"];

#[test]
fn scaled_weights_are_what_pytorch_says() {
    for scheme in SCHEMES {
        let folder = fixtures().join(scheme);
        let weights = Weights::open(&folder).unwrap();
        let meant = candle_core::safetensors::load(folder.join("meant.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(meant.len(), 7);
        for (name, meant) in meant {
            let (numbers, shape) = weights.numbers(&name).unwrap();
            assert_eq!(shape, meant.dims(), "{name} of {scheme}");
            assert_eq!(numbers, meant.flatten_all().unwrap().to_vec1::<f32>().unwrap(), "{name} of {scheme}: not one bit is another");
            // Where the file's own format is asked for: as unquantised models are.
            let Weight::Dense(native) = weights.matrix(&name, WeightFormat::Native, &Device::Cpu).unwrap() else { unreachable!() };
            assert_eq!(native.dtype(), DType::BF16);
        }
        let (norm, _) = weights.numbers("model.norm.weight").unwrap();
        assert!(norm.iter().all(|x| (0.4..1.6).contains(x)), "what has no scale is as it is");
    }
}

/// The fixture with its tensors changed.
fn refused(scheme: &str, change: impl FnOnce(&mut HashMap<String, Tensor>, &mut Value)) -> String {
    let (from, to) = (fixtures().join(scheme), tempfile::tempdir().unwrap());
    let mut tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    change(&mut tensors, &mut config);
    save(&to, &tensors, &config);
    opened(to.path())
}

fn save(folder: &TempDir, tensors: &HashMap<String, Tensor>, config: &Value) {
    candle_core::safetensors::save(tensors, folder.path().join("model.safetensors")).unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
}

fn opened(folder: &Path) -> String {
    Weights::open(folder).err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn scales_that_do_not_fit_are_named() {
    const WEIGHT: &str = "model.layers.0.mlp.up_proj.weight";
    let scale = format!("{WEIGHT}_scale");
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    for (said, words) in [
        (refused("fp8-tensor", |_, _| ()), &[][..]),
        (refused("fp8-tensor", |tensors, _| drop(tensors.remove(&scale))), &[WEIGHT, "its scale", "is missing"]),
        (refused("fp8-tensor", |tensors, _| drop(tensors.insert(scale.clone(), ones(&[7])))), &[&scale, "[7]", "each of its 20 rows"]),
        (refused("fp8-row", |tensors, _| drop(tensors.insert(scale.clone(), ones(&[16, 1])))), &[&scale, "[16, 1]", "20 rows"]),
        (refused("fp8-row", |tensors, _| drop(tensors.insert(format!("{scale}_inv"), ones(&[1])))), &[WEIGHT, "both"]),
        (refused("fp8-row", |tensors, _| drop(tensors.insert(scale.clone(), ones(&[20]).to_dtype(DType::I64).unwrap()))), &[&scale, "I64"]),
        (
            refused("fp8-blocks", |tensors, _| drop(tensors.insert(format!("{scale}_inv"), ones(&[2, 1])))),
            &["_scale_inv", "[3, 1], for blocks of 8 x 16"],
        ),
        (refused("fp8-blocks", |_, config| config["quantization_config"]["weight_block_size"] = 128.into()), &["blocks of 128"]),
        (refused("fp8-tensor", |_, config| config["quantization_config"]["quant_method"] = "modelopt".into()), &["modelopt"]),
        (refused("fp8-tensor", |_, config| drop(config.as_object_mut().unwrap().remove("quantization_config"))), &["none of this model"]),
        // Another tensor beside the weights is not passed over.
        (refused("fp8-row", |tensors, _| drop(tensors.insert(format!("{WEIGHT}_zero_point"), ones(&[1])))), &["_zero_point", "none of"]),
        // A scale of what has no eight bits.
        (refused("fp8-row", |tensors, _| drop(tensors.insert(WEIGHT.into(), ones(&[20, 16])))), &[&scale, "none of this model"]),
    ] {
        let right = if words.is_empty() { said.is_empty() } else { words.iter().all(|word| said.contains(word)) };
        assert!(right, "{words:?}: {said}");
    }
}

#[test]
fn blocks_of_128_end_where_the_matrix_does() {
    // 200 x 150 in blocks of 128 x 128: two by two, of which all but the first are cut.
    let scales = [0.5_f32, 2.0, 3.0, 4.0];
    let (hidden, mlp) = (150, 200);
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 8, "max_position_embeddings": 16, "tie_word_embeddings": true,
        "quantization_config": { "quant_method": "fp8", "weight_block_size": [128, 128] },
    });
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    let layer = |module: &str| format!("model.layers.0.{module}.weight");
    let mut tensors =
        HashMap::from([("model.embed_tokens.weight".to_owned(), ones(&[8, hidden])), ("model.norm.weight".into(), ones(&[hidden]))]);
    for (module, shape) in [
        ("input_layernorm", &[hidden][..]),
        ("post_attention_layernorm", &[hidden]),
        ("self_attn.q_proj", &[8, hidden]),
        ("self_attn.k_proj", &[4, hidden]),
        ("self_attn.v_proj", &[4, hidden]),
        ("self_attn.o_proj", &[hidden, 8]),
        ("mlp.gate_proj", &[mlp, hidden]),
        ("mlp.down_proj", &[hidden, mlp]),
    ] {
        tensors.insert(layer(module), ones(shape));
    }
    let up = ones(&[mlp, hidden]).to_dtype(DType::F8E4M3).unwrap();
    tensors.insert(layer("mlp.up_proj"), up);
    tensors.insert(layer("mlp.up_proj") + "_scale_inv", Tensor::new(&scales, &Device::Cpu).unwrap().reshape((2, 2)).unwrap());
    let folder = tempfile::tempdir().unwrap();
    save(&folder, &tensors, &config);
    let (numbers, _) = Weights::open(folder.path()).unwrap().numbers(&layer("mlp.up_proj")).unwrap();
    for row in 0..mlp {
        for column in 0..hidden {
            assert_eq!(numbers[row * hidden + column], scales[row / 128 * 2 + column / 128], "{row}, {column}");
        }
    }
}
