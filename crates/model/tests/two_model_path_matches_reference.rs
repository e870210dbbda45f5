//! The two-model path against PyTorch, for each KV transform: the full model reads the prompt, its cache goes over layer by
//! layer, the decode model, of another width, writes on. The same greedy tokens, and logits within 1e-3 at every step.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod fixture;
mod sequence;

use std::ops::ControlFlow;

use candle_core::Device;
use fixture::{Fixture, checkpoint, root};
use overfill_model::solo::Solo;
use overfill_model::{Chunk, KvSpec, Llama, MakePair, Pair, ThreadPool, Transform};
use overfill_types::pair::WeightFormat;
use overfill_types::{FinishReason, KvFormats, SamplingParams, StopConditions};
use sequence::{Sequence, difference, same_bits};

fn check(name: &str) {
    let case = Fixture::open(&format!("two_models/{name}"));
    let folder = tempfile::tempdir().unwrap();
    let pair = make_pair(&case, &folder.path().join("pair"));
    let layers: Vec<usize> = serde_json::from_value(case.said["layers"].clone()).unwrap();
    assert_eq!(pair.manifest.kv.source_layers(pair.manifest.decode.kv.layers), layers);

    let pool = ThreadPool::new(2, &[]).unwrap();
    let path = TwoModels {
        full: pair.load_full(&Device::Cpu, &pool).unwrap(),
        decode: pair.load_decode(&Device::Cpu, &pool).unwrap(),
        transform: pair.load_transform(&pool).unwrap(),
    };
    let mut solo = Solo::load(&pair, &Device::Cpu, pool).unwrap();
    for i in 0..3 {
        let [prompt, expected] = ["prompt", "tokens"].map(|what| case.tokens(&format!("{what}.{i}")));
        let whole = path.answer(&prompt, expected.len(), prompt.len(), 64);
        for (step, (got, expected)) in whole.logits.iter().zip(case.logits(&format!("logits.{i}"))).enumerate() {
            let difference = difference(got, &expected);
            assert!(difference < 1e-3, "{name}: {} tokens, step {step}: {difference}", prompt.len());
        }
        assert_eq!(whole.tokens, expected, "{name}: {} tokens", prompt.len());

        for cut in [1, 3, 16] {
            let answer = path.answer(&prompt, expected.len(), cut, 16);
            for (step, (got, whole)) in answer.logits.iter().zip(&whole.logits).enumerate() {
                assert!(same_bits(got, whole), "{name}: {} tokens in chunks of {cut}, step {step}", prompt.len());
            }
            assert_eq!(answer.tokens, expected);
        }

        let stop = StopConditions { max_tokens: expected.len(), stop_token_ids: vec![], ignore_eos: true };
        let mut tokens = Vec::new();
        let answer = solo.generate(&prompt, &SamplingParams::greedy(), &stop, |sampled| {
            tokens.push(sampled.token);
            ControlFlow::Continue(())
        });
        assert_eq!(answer.unwrap().finish, Some(FinishReason::Length));
        assert_eq!(tokens, expected, "{name}: {} tokens in one process", prompt.len());
    }
}

/// The case's pair, made as `overfill pair` makes one.
fn make_pair(case: &Fixture, out: &std::path::Path) -> Pair {
    let (full, decode) = (checkpoint(&case.said["full"]), checkpoint(&case.said["decode"]));
    let kv = match case.said["kv"].as_str().unwrap() {
        "projection" => KvSpec::Projection(root().join("models/projection.safetensors")),
        kv => kv.parse().unwrap(),
    };
    let making = MakePair {
        name: "reference".into(),
        full: full.path().to_owned(),
        full_weights: WeightFormat::F32,
        decode: decode.path().to_owned(),
        decode_weights: WeightFormat::F32,
        kv,
        kv_formats: KvFormats::default(),
        generation: overfill_types::GenerationConfig::default(),
        provenance: serde_json::Map::new(),
    };
    making.make(out).unwrap()
}

struct TwoModels {
    full: Llama,
    decode: Llama,
    transform: Transform,
}

struct Answer {
    tokens: Vec<u32>,
    /// What each token came from.
    logits: Vec<Vec<f32>>,
}

impl TwoModels {
    /// `count` greedy tokens after `prompt`, which is read `cut` tokens at a time.
    fn answer(&self, prompt: &[u32], count: usize, cut: usize, block_tokens: usize) -> Answer {
        let mut full = Sequence::new(self.full.config().kv, prompt.len(), block_tokens, 2);
        let mut decode = Sequence::new(self.decode.config().kv, prompt.len() + count, block_tokens, 1);
        let mut logits = Vec::new();
        for tokens in prompt.chunks(cut) {
            let (start, blocks) = (full.length, &full.blocks);
            let chunk = Chunk { tokens, start, blocks, logits: start + tokens.len() == prompt.len() };
            logits = self
                .full
                .forward(&[chunk], &mut full.cache, &mut full.workspace, &mut |layer, cache, pool| {
                    for &target in self.transform.targets(layer) {
                        let (mut k, mut v) = (Vec::new(), Vec::new());
                        cache.read(layer, blocks, start, tokens.len(), &mut k, &mut v)?;
                        self.transform.apply(pool, target, &mut k)?;
                        self.transform.apply(pool, target, &mut v)?;
                        decode.cache.write(pool, target, &decode.blocks, start, &k, &v)?;
                    }
                    Ok(())
                })
                .unwrap()
                .read()
                .unwrap()
                .to_vec();
            full.length += tokens.len();
        }
        decode.length = prompt.len();
        let mut answer = Answer { tokens: vec![greatest(&logits)], logits: vec![logits] };
        while answer.tokens.len() < count {
            let logits = decode.read(&self.decode, &answer.tokens[answer.tokens.len() - 1..]);
            answer.tokens.push(greatest(&logits));
            answer.logits.push(logits);
        }
        answer
    }
}

fn greatest(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
}

#[test]
fn identity() {
    check("identity");
}

#[test]
fn prune_firstlast() {
    check("prune-firstlast");
}

#[test]
fn prune_first() {
    check("prune-first");
}

#[test]
fn prune_last() {
    check("prune-last");
}

#[test]
fn projection() {
    check("projection");
}
