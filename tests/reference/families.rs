//! Tiny models of each family, and what transformers computes of them: `tests/fixtures/families.json`, which `families.py` makes.
//! A file of the unit tests of several crates.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

/// What is stored of all cases.
pub(crate) struct Fixture(Value);

impl Fixture {
    pub(crate) fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/families.json");
        Self(serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
    }

    pub(crate) fn tokens(&self) -> Vec<u32> {
        serde_json::from_value(self.0["tokens"].clone()).unwrap()
    }

    pub(crate) fn rows(&self) -> Vec<usize> {
        serde_json::from_value(self.0["rows"].clone()).unwrap()
    }

    /// Name, `config.json`, logits after [`Fixture::rows`].
    pub(crate) fn cases(&self) -> impl Iterator<Item = (&str, &Value, Vec<f32>)> {
        self.0["cases"].as_object().unwrap().iter().map(|(name, case)| {
            let logits: Vec<Vec<f32>> = serde_json::from_value(case["logits"].clone()).unwrap();
            (name.as_str(), &case["config"], logits.concat())
        })
    }
}

/// A tensor's numbers, as `families.py` makes them.
fn numbers(name: &str, shape: &[usize]) -> Vec<f32> {
    let seed = name.bytes().fold(0u32, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let number = |place: u64| {
        let mut mixed = place.wrapping_add(seed.into()).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed ^= mixed >> 29;
        mixed = mixed.wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let uniform = (mixed >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
        match shape.len() {
            _ if name.ends_with("norm.weight") => uniform * 0.5 + 0.75,
            2 => uniform * 0.5,
            _ => uniform,
        }
    };
    (1..=shape.iter().product::<usize>() as u64).map(number).collect()
}

/// The tensors of a checkpoint, as transformers names them.
pub(crate) fn tensors(config: &Value) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let truth = |key: &str| config[key].as_bool().unwrap_or(false);
    let kind = config["model_type"].as_str().unwrap();
    let (hidden, mlp) = (size("hidden_size"), size("intermediate_size"));
    let head_dim = config["head_dim"].as_u64().map_or(hidden / size("num_attention_heads"), |n| n as usize);
    let (q, kv) = (size("num_attention_heads") * head_dim, size("num_key_value_heads") * head_dim);
    let mut shapes =
        vec![("model.embed_tokens.weight".to_owned(), vec![size("vocab_size"), hidden]), ("model.norm.weight".to_owned(), vec![hidden])];
    if !truth("tie_word_embeddings") {
        shapes.push(("lm_head.weight".to_owned(), vec![size("vocab_size"), hidden]));
    }
    let norms: &[&str] = match kind {
        "olmo2" => &["post_attention_layernorm", "post_feedforward_layernorm"],
        "gemma2" | "gemma3_text" => {
            &["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
        }
        _ => &["input_layernorm", "post_attention_layernorm"],
    };
    let [attention_bias, mlp_bias] = ["attention_bias", "mlp_bias"].map(truth);
    let qkv_bias = attention_bias || kind == "qwen2";
    let mut matrices = vec![("self_attn.o_proj", [hidden, q], attention_bias), ("mlp.down_proj", [hidden, mlp], mlp_bias)];
    if kind == "phi3" {
        matrices.extend([("self_attn.qkv_proj", [q + 2 * kv, hidden], false), ("mlp.gate_up_proj", [2 * mlp, hidden], false)]);
    } else {
        matrices.extend([("self_attn.q_proj", [q, hidden], qkv_bias), ("self_attn.k_proj", [kv, hidden], qkv_bias)]);
        matrices.extend([("self_attn.v_proj", [kv, hidden], qkv_bias)]);
        matrices.extend([("mlp.gate_proj", [mlp, hidden], mlp_bias), ("mlp.up_proj", [mlp, hidden], mlp_bias)]);
    }
    for layer in 0..size("num_hidden_layers") {
        let name = |module: &str, what: &str| format!("model.layers.{layer}.{module}.{what}");
        shapes.extend(norms.iter().map(|norm| (name(norm, "weight"), vec![hidden])));
        match kind {
            "qwen3" | "gemma3_text" => {
                shapes.extend(["q_norm", "k_norm"].map(|norm| (name(&format!("self_attn.{norm}"), "weight"), vec![head_dim])))
            }
            "olmo2" => {
                shapes.extend([("q_norm", q), ("k_norm", kv)].map(|(norm, n)| (name(&format!("self_attn.{norm}"), "weight"), vec![n])))
            }
            _ => {}
        }
        for (module, shape, bias) in &matrices {
            shapes.push((name(module, "weight"), shape.to_vec()));
            if *bias {
                shapes.push((name(module, "bias"), vec![shape[0]]));
            }
        }
    }
    shapes.into_iter().map(|(name, shape)| (name.clone(), (shape.clone(), numbers(&name, &shape)))).collect()
}

/// A Hugging Face folder in `at`, without a tokenizer.
pub(crate) fn folder(config: &Value, at: &Path) {
    std::fs::write(at.join("config.json"), config.to_string()).unwrap();
    let bytes = |numbers: &[f32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let tensors: Vec<_> = tensors(config).into_iter().map(|(name, (shape, numbers))| (name, shape, bytes(&numbers))).collect();
    let views = tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &at.join("model.safetensors")).unwrap();
}
