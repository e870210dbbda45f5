//! Logits of the forward pass against Hugging Face transformers on the same weights, at every position, and bit for bit
//! the same however the prompt is cut and wherever its blocks lie.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama};
use overfill_types::pair::WeightFormat;

const BLOCK: usize = 4;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logits")
}

/// Logits after each of the prompt's tokens, which are read `cut` at a time.
fn logits(model: &Llama, prompt: &[u32], cut: usize) -> Vec<Vec<f32>> {
    let needed = prompt.len().div_ceil(BLOCK);
    let mut cache = KvCache::new(model.config().kv, needed + 3, BLOCK, &Device::Cpu).unwrap();
    // Not in order, and not from the beginning of the pool.
    let blocks: Vec<BlockId> = (0..needed as u32).map(|i| BlockId(needed as u32 + 2 - i)).collect();
    let mut all = Vec::new();
    for (i, tokens) in prompt.chunks(cut).enumerate() {
        // One token more at a time, from the chunk's beginning: rows that are written again are the same.
        for end in 1..=tokens.len() {
            let chunk = Chunk { tokens: &tokens[..end], start: i * cut, blocks: &blocks, logits: true };
            all.extend(model.forward(&[chunk], &mut cache, &mut |_, _| Ok(())).unwrap());
        }
    }
    all
}

fn check(name: &str) {
    let folder = fixtures().join(name);
    let model = Llama::load(&folder, WeightFormat::F32, &Device::Cpu).unwrap();
    let expected: HashMap<String, Tensor> = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
    for n in [1, 7, 40] {
        let prompt: Vec<u32> = expected[&format!("prompt.{n}")].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
        let want: Vec<Vec<f32>> = expected[&format!("logits.{n}")].to_vec2().unwrap();
        let got = logits(&model, &prompt, prompt.len());
        let difference = got.iter().flatten().zip(want.iter().flatten()).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-3, "{name}, {n} tokens: logits differ by {difference}");
        for cut in [1, 3, 16] {
            assert_eq!(logits(&model, &prompt, cut), got, "{name}, {n} tokens in chunks of {cut}");
        }
    }
}

#[test]
fn llama_plain() {
    check("llama_plain");
}

#[test]
fn llama3_scaling() {
    check("llama3_scaling");
}

#[test]
fn llama_rope_parameters() {
    check("llama_rope_parameters");
}

#[test]
fn llama_linear_wide_heads() {
    check("llama_linear_wide_heads");
}

#[test]
fn qwen2_biases() {
    check("qwen2_biases");
}
