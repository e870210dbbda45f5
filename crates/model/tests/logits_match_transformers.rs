//! Logits against Hugging Face transformers on the same weights, at every position; and the same bits however a prompt is
//! cut, wherever its blocks lie, in any company, on any number of threads.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod fixture;
mod sequence;

use candle_core::Device;
use fixture::{Fixture, checkpoint};
use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama, ThreadPool, Workspace};
use overfill_types::KvFormat;
use overfill_types::pair::WeightFormat;
use sequence::{Sequence, difference, same_bits};

const PROMPTS: usize = 3;

fn load(case: &Fixture, format: WeightFormat) -> Llama {
    Llama::load(checkpoint(&case.said).path(), format, &Device::Cpu, &ThreadPool::new(2, &[]).unwrap()).unwrap()
}

fn check(name: &str) {
    let case = Fixture::open(&format!("logits/{name}"));
    // As they are stored too: most are bf16, whose products round what they are multiplied with.
    for format in [WeightFormat::F32, WeightFormat::Native] {
        let model = load(&case, format);
        for prompt in 0..PROMPTS {
            let expected = case.logits(&format!("logits.{prompt}"));
            let prompt = case.tokens(&format!("prompt.{prompt}"));
            let whole = uncut(&model, &prompt);
            assert_eq!(whole.len(), expected.len());
            for (position, (got, expected)) in whole.iter().zip(&expected).enumerate() {
                let difference = difference(got, expected);
                let greatest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let most = if format == WeightFormat::F32 { 1e-3 } else { 0.05 * greatest };
                assert!(difference < most, "{name} as {format:?}: {} tokens, position {position}: {difference}", prompt.len());
            }
            for (cut, threads) in [(1, 2), (3, 1), (16, 3)] {
                let mut sequence = Sequence::new(model.config().kv, prompt.len(), 16, threads);
                for tokens in prompt.chunks(cut) {
                    let got = sequence.read(&model, tokens);
                    let last = sequence.length - 1;
                    assert!(same_bits(&got, &whole[last]), "{name} as {format:?}: position {last} in chunks of {cut}");
                }
            }
        }
    }
}

/// Logits after each of the prompt's tokens, all up to it being read in one chunk.
fn uncut(model: &Llama, prompt: &[u32]) -> Vec<Vec<f32>> {
    (1..=prompt.len()).map(|n| Sequence::new(model.config().kv, n, 64, 1).read(model, &prompt[..n])).collect()
}

#[test]
fn plain() {
    check("plain");
}

#[test]
fn llama3_scaling() {
    check("llama3");
}

#[test]
fn llama3_scaling_as_rope_parameters() {
    check("llama3-parameters");
}

#[test]
fn linear_scaling() {
    check("linear");
}

#[test]
fn tied_with_odd_widths_and_one_kv_head() {
    check("tied");
}

#[test]
fn qwen2_with_biases_in_two_shards() {
    check("qwen2");
}

/// What decides that the tests above could fail: the configs that share weights disagree.
#[test]
fn the_rotary_embedding_matters() {
    let prompt = Fixture::open("logits/plain").tokens("prompt.2");
    let read = |name: &str| {
        let model = load(&Fixture::open(&format!("logits/{name}")), WeightFormat::F32);
        Sequence::new(model.config().kv, prompt.len(), 64, 2).read(&model, &prompt)
    };
    let plain = read("plain");
    for name in ["llama3", "llama3-parameters", "linear"] {
        assert!(difference(&plain, &read(name)) > 0.1, "{name}");
    }
}

#[test]
fn company_changes_no_bit() {
    let case = Fixture::open("logits/plain");
    let model = load(&case, WeightFormat::F32);
    let [one, few, many] = [0, 1, 2].map(|i| case.tokens(&format!("prompt.{i}")));
    let expected = |prompt: &[u32]| uncut(&model, prompt).pop().unwrap();

    let mut cache = KvCache::new(model.config().kv, KvFormat::F32, 8, 16, &Device::Cpu).unwrap();
    let mut workspace = Workspace::new(ThreadPool::new(3, &[]).unwrap());
    let tables = [&[BlockId(5)][..], &[BlockId(1)], &[BlockId(7), BlockId(0), BlockId(3)]];
    let vocabulary = model.config().vocab_size;
    let mut forward = |chunks: &[Chunk<'_>]| -> Vec<Vec<f32>> {
        let logits = model.forward(chunks, &mut cache, &mut workspace, &mut |_, _, _| Ok(())).unwrap().read().unwrap();
        logits.chunks_exact(vocabulary).map(<[f32]>::to_vec).collect()
    };
    let chunk = |sequence: usize, tokens, start, logits| Chunk { tokens, start, blocks: tables[sequence], logits };
    let first = forward(&[chunk(2, &many[..13], 0, false), chunk(0, &one, 0, true), chunk(1, &few, 0, true)]);
    let second = forward(&[chunk(1, &one, few.len(), true), chunk(2, &many[13..], 13, true), chunk(0, &few[..1], 1, true)]);

    let one_then_one = [&one[..], &few[..1]].concat();
    let few_then_one = [&few[..], &one[..]].concat();
    for (got, prompt) in first.iter().chain(&second).zip([&one, &few, &few_then_one, &many, &one_then_one]) {
        assert!(same_bits(got, &expected(prompt)), "after {prompt:?}");
    }
}
