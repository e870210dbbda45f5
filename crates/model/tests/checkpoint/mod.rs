//! Random checkpoints, made anew for each test.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use tempfile::TempDir;

/// `config.json`, and tensors under Hugging Face's names.
pub(crate) struct Checkpoint {
    pub(crate) config: Value,
    pub(crate) tensors: HashMap<String, Tensor>,
}

impl Checkpoint {
    /// Weights large enough that logits vary and errors show. A Qwen2 has biases.
    pub(crate) fn random(config: Value, seed: u64) -> Self {
        let size = |key: &str| config[key].as_u64().unwrap() as usize;
        let [hidden, mlp, vocabulary, heads, kv_heads] =
            ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads"].map(size);
        let head_dim = config["head_dim"].as_u64().map_or(hidden / heads, |d| d as usize);
        let mut random = StdRng::seed_from_u64(seed);
        let mut noise = move |shape: &[usize], centre: f32, scale: f32| {
            let values = (0..shape.iter().product()).map(|_| centre + random.random_range(-1.7..1.7) * scale).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let mut tensors = HashMap::new();
        let mut matrix = |name: &str, outputs: usize, inputs: usize| {
            tensors.insert(format!("{name}.weight"), noise(&[outputs, inputs], 0.0, 1.6 / (inputs as f32).sqrt()));
            if config["model_type"] == "qwen2" && ["q_proj", "k_proj", "v_proj"].iter().any(|n| name.ends_with(n)) {
                tensors.insert(format!("{name}.bias"), noise(&[outputs], 0.0, 0.5));
            }
        };
        matrix("model.embed_tokens", vocabulary, hidden);
        if config["tie_word_embeddings"] != true {
            matrix("lm_head", vocabulary, hidden);
        }
        let layers: Vec<String> = (0..size("num_hidden_layers")).map(|i| format!("model.layers.{i}")).collect();
        for layer in &layers {
            matrix(&format!("{layer}.self_attn.q_proj"), heads * head_dim, hidden);
            matrix(&format!("{layer}.self_attn.k_proj"), kv_heads * head_dim, hidden);
            matrix(&format!("{layer}.self_attn.v_proj"), kv_heads * head_dim, hidden);
            matrix(&format!("{layer}.self_attn.o_proj"), hidden, heads * head_dim);
            matrix(&format!("{layer}.mlp.gate_proj"), mlp, hidden);
            matrix(&format!("{layer}.mlp.up_proj"), mlp, hidden);
            matrix(&format!("{layer}.mlp.down_proj"), hidden, mlp);
        }
        let norms = layers.iter().flat_map(|l| ["input_layernorm", "post_attention_layernorm"].map(|n| format!("{l}.{n}")));
        for name in norms.chain(["model.norm".to_owned()]) {
            tensors.insert(format!("{name}.weight"), noise(&[hidden], 1.0, 0.3));
        }
        Self { config, tensors }
    }

    /// As a Hugging Face folder.
    pub(crate) fn save(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        candle_core::safetensors::save(&self.tensors, folder.path().join("model.safetensors")).unwrap();
        folder
    }
}

/// `count` random tokens.
#[allow(dead_code, reason = "not every test that makes checkpoints reads anything with them")]
pub(crate) fn prompt(count: usize, config: &Value, seed: u64) -> Vec<u32> {
    let mut random = StdRng::seed_from_u64(seed);
    let vocabulary = config["vocab_size"].as_u64().unwrap() as u32;
    (0..count).map(|_| random.random_range(0..vocabulary)).collect()
}
