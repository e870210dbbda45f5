//! A checkpoint whose tensors do not go with its configuration is refused when it is opened, by the tensor's name.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod checkpoint;

use candle_core::Tensor;
use checkpoint::Checkpoint;
use overfill_model::weights::Weights;
use serde_json::{Value, json};

fn random(kind: &str) -> Checkpoint {
    let config = json!({
        "model_type": kind, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": false
    });
    Checkpoint::random(config, 1)
}

fn refused(checkpoint: &Checkpoint) -> String {
    let folder = checkpoint.save();
    Weights::open(folder.path()).err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn a_tensor_that_is_missing_is_named() {
    for kind in ["llama", "qwen2"] {
        let whole = random(kind);
        assert_eq!(refused(&whole), "");
        // Biases and an own head may be there or not.
        for name in whole.tensors.keys().filter(|n| n.ends_with(".weight") && !n.starts_with("lm_head")) {
            let mut checkpoint = random(kind);
            checkpoint.tensors.remove(name);
            assert!(refused(&checkpoint).ends_with(&format!("tensor {name} is missing")), "{name}: {}", refused(&checkpoint));
        }
    }
}

#[test]
fn a_tensor_of_another_shape_is_named() {
    for name in random("qwen2").tensors.keys() {
        let mut checkpoint = random("qwen2");
        let tensor = checkpoint.tensors.get_mut(name).unwrap();
        let last = tensor.rank() - 1;
        *tensor = Tensor::cat(&[&*tensor, &*tensor], last).unwrap().contiguous().unwrap();
        let said = refused(&checkpoint);
        assert!(said.contains(&format!("tensor {name} has shape")) && said.contains("hidden size 32, MLP 64, 4 heads"), "{name}: {said}");
    }
}

#[test]
fn a_configuration_of_another_model_is_refused() {
    let keys =
        ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"];
    for key in keys {
        let mut checkpoint = random("llama");
        checkpoint.config[key] = Value::from(checkpoint.config[key].as_u64().unwrap() * 2);
        assert!(refused(&checkpoint).contains("tensor "), "{key}: {}", refused(&checkpoint));
    }
}
