//! The forward pass against candle-transformers' own Llama on the same weights, over prompts longer than the fixtures'.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod checkpoint;
mod sequence;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama as theirs;
use checkpoint::{Checkpoint, prompt};
use overfill_model::{Llama, ThreadPool};
use overfill_types::pair::WeightFormat;
use sequence::{Sequence, difference, same_bits};
use serde_json::{Value, json};

const PROMPT: usize = 600;
const STEPS: usize = 24;

fn check(config: Value) {
    let checkpoint = Checkpoint::random(config, 17);
    let tokens = prompt(PROMPT + STEPS, &checkpoint.config, 18);
    let ours = Llama::load(checkpoint.save().path(), WeightFormat::F32, &Device::Cpu, &ThreadPool::new(1, &[]).unwrap()).unwrap();
    let config = serde_json::from_value::<theirs::LlamaConfig>(checkpoint.config).unwrap().into_config(false);
    let weights = VarBuilder::from_tensors(checkpoint.tensors, DType::F32, &Device::Cpu);
    let model = theirs::Llama::load(weights, &config).unwrap();

    for length in [1, 2, 17, 100, PROMPT] {
        let mut cache = theirs::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        let mut expected = |tokens: &[u32], start: usize| -> Vec<f32> {
            let tokens = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            model.forward(&tokens, start, &mut cache).unwrap().squeeze(0).unwrap().to_vec1().unwrap()
        };
        let mut sequence = Sequence::new(ours.config().kv, length + STEPS, 32, 2);
        let logits = sequence.read(&ours, &tokens[..length]);
        let d = difference(&logits, &expected(&tokens[..length], 0));
        assert!(d < 1e-3, "a prompt of {length}: {d}");
        let mut cut = Sequence::new(ours.config().kv, length, 16, 1);
        let last = tokens[..length].chunks(37).map(|tokens| cut.read(&ours, tokens)).last();
        assert!(same_bits(&last.unwrap(), &logits), "a prompt of {length} in chunks");
        for position in length..length + STEPS {
            let token = &tokens[position..=position];
            let d = difference(&sequence.read(&ours, token), &expected(token, position));
            assert!(d < 1e-3, "position {position} after a prompt of {length}: {d}");
        }
    }
}

#[test]
fn grouped_queries_and_llama3_scaling() {
    check(json!({
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128
        },
    }));
}

#[test]
fn a_kv_head_for_each_head_and_tied_embeddings() {
    check(json!({
        "model_type": "llama", "hidden_size": 120, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 3, "vocab_size": 260, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 500000.0,
        "tie_word_embeddings": true,
    }));
}
