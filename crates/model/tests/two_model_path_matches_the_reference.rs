//! The two-model path against PyTorch, for each KV transform: the same greedy tokens, logits within 1e-3 at every step.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama, Transform};
use overfill_types::pair::WeightFormat;
use overfill_types::{KvTransform, PruneStrategy};

const BLOCK: usize = 4;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pairs")
}

fn check(name: &str, spec: impl Fn(usize, usize) -> KvTransform) {
    let folder = fixtures().join(name);
    let load = |path: &Path| Llama::load(path, WeightFormat::F32, &Device::Cpu).unwrap();
    let (full, decode) = (load(&fixtures().join("full")), load(&folder));
    let (from, to) = (full.config().kv, decode.config().kv);
    let transform = Transform::load(&spec(from.layers, to.layers), &folder, from, to).unwrap();
    let expected: HashMap<String, Tensor> = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
    let ids = |key: String| expected[&key].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    for n in [1, 5, 37] {
        let (prompt, written) = (ids(format!("prompt.{n}")), ids(format!("written.{n}")));
        let want: Vec<Vec<f32>> = expected[&format!("logits.{n}")].to_vec2().unwrap();
        for cut in [prompt.len(), 3] {
            let mut step = 0;
            let mut compare = |logits: &[f32]| {
                let difference = logits.iter().zip(&want[step]).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
                assert!(difference < 1e-3, "{name}, {n} tokens, step {step}: logits differ by {difference}");
                let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
                assert_eq!(best as u32, written[step], "{name}, {n} tokens, step {step}");
                step += 1;
            };
            let needed = (prompt.len() + written.len()).div_ceil(BLOCK);
            let blocks: Vec<BlockId> = (0..needed as u32).rev().map(BlockId).collect();
            let mut ours = KvCache::new(from, needed, BLOCK, &Device::Cpu).unwrap();
            let mut theirs = KvCache::new(to, needed, BLOCK, &Device::Cpu).unwrap();
            let mut logits = Vec::new();
            for (i, tokens) in prompt.chunks(cut).enumerate() {
                let start = i * cut;
                let chunk = Chunk { tokens, start, blocks: &blocks, logits: true };
                logits = full
                    .forward(&[chunk], &mut ours, &mut |layer, cache| {
                        for &target in transform.targets(layer) {
                            let (k, v) = cache.read(layer, &blocks, start, tokens.len())?;
                            theirs.write(target, &blocks, start, &transform.apply(target, k)?, &transform.apply(target, v)?)?;
                        }
                        Ok(())
                    })
                    .unwrap();
            }
            compare(&logits[0]);
            for (i, token) in written[..written.len() - 1].iter().enumerate() {
                let chunk = Chunk { tokens: &[*token], start: prompt.len() + i, blocks: &blocks, logits: true };
                compare(&decode.forward(&[chunk], &mut theirs, &mut |_, _| Ok(())).unwrap()[0]);
            }
            assert_eq!(step, written.len());
        }
    }
}

fn prune(strategy: PruneStrategy) -> impl Fn(usize, usize) -> KvTransform {
    move |full, keep| KvTransform::Prune { strategy, layers: strategy.kept(full, keep).unwrap() }
}

#[test]
fn identity() {
    check("identity", |_, _| KvTransform::Identity);
}

#[test]
fn prune_firstlast() {
    check("prune_firstlast", prune(PruneStrategy::FirstLast));
}

#[test]
fn prune_first() {
    check("prune_first", prune(PruneStrategy::First));
}

#[test]
fn prune_last() {
    check("prune_last", prune(PruneStrategy::Last));
}

#[test]
fn projection() {
    check("projection", |full, keep| KvTransform::Projection {
        file: "projection.safetensors".into(),
        sha256: String::new(),
        layers: KvTransform::projection_layers(full, keep),
    });
}
