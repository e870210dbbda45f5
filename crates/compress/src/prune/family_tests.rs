//! What can be cut of models of each family.

use std::path::{Path, PathBuf};

use overfill_kv::BlockId;
use overfill_model::{Chunk, Device, KvCache, KvSpec, Llama, MakePair, ThreadPool, Workspace};
use overfill_types::pair::WeightFormat;
use overfill_types::{KvFormat, PruneStrategy};

use super::*;
use crate::fixture::{self, families::Fixture};

fn prune(full: &Path, method: Method, sizes: Sizes) -> Prune {
    let calibration = full.join("calibration.txt");
    let text: String = (0..600).map(|i| format!("{} {}\n", i * i % 977, ["THE CAT SAT", "A DOG RAN", "IT IS 5 PM"][i % 3])).collect();
    std::fs::write(&calibration, text).unwrap();
    let samples = Calibration { samples: 24, held_out: 4, length: 24, seed: 7 };
    Prune { full: full.to_owned(), method, sizes, calibration: Some(calibration), samples, format: Format::F32 }
}

fn logits(path: &Path) -> Vec<f32> {
    let mut workspace = Workspace::new(ThreadPool::new(1, &[]).unwrap());
    let model = Llama::load(path, WeightFormat::F32, &Device::Cpu, workspace.pool()).unwrap();
    let mut cache = KvCache::new(model.config().kv, KvFormat::F32, 2, 16, &Device::Cpu).unwrap();
    let tokens: Vec<u32> = (0..30).map(|i| i * 29 % 60).collect();
    let chunk = Chunk { tokens: &tokens, start: 0, blocks: &[BlockId(0), BlockId(1)], logits: true };
    model.forward_each(&[chunk], &mut cache, &mut workspace).unwrap().read().unwrap().to_vec()
}

fn far(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Models without biases that are only served.
fn cases(fixture: &Fixture) -> impl Iterator<Item = (&str, &Value)> {
    fixture.cases().map(|(name, config, _)| (name, config)).filter(|(name, _)| !name.ends_with("biases"))
}

#[test]
fn whole_layers_go_in_every_family_and_those_that_stay_see_what_they_saw() {
    let fixture = Fixture::open();
    for (name, config) in cases(&fixture) {
        let full = fixture::family(config);
        let out = full.path().join("decode");
        let sizes = Sizes { layers: Keep::Exactly(3), ..Sizes::ALL };
        let report = prune(full.path(), Method::Depth(PruneStrategy::First), sizes).run(&out, &mut |_, _, _| ()).unwrap();
        let kept = PruneStrategy::First.kept(report.full.kv.layers, 3).unwrap();
        let (whole, made) = (Checkpoint::open(full.path()).unwrap(), Checkpoint::open(&out).unwrap());
        let expected: Vec<_> = kept.iter().map(|&layer| whole.config().layers[layer]).collect();
        assert_eq!(made.config().layers, expected, "{name}");
        let losses = report.losses.unwrap();
        assert!([losses.full, losses.alone, losses.overfill].iter().all(|loss| loss.is_finite()), "{name}: {losses:?}");
        // Keys go over as they are: a pair is made.
        let pair = MakePair {
            name: "a pair".into(),
            full: full.path().into(),
            full_weights: WeightFormat::Native,
            decode: out,
            decode_weights: WeightFormat::Native,
            kv: KvSpec::Prune(PruneStrategy::First),
            kv_formats: Default::default(),
            generation: Default::default(),
            provenance: Map::new(),
        };
        pair.make(&full.path().join("pair")).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn widths_are_cut_where_the_maths_allows_it() {
    let fixture = Fixture::open();
    let cut = Sizes { intermediate: Keep::Exactly(32), kv_heads: Keep::Exactly(1), ..Sizes::ALL };
    for (name, config) in cases(&fixture) {
        let full = fixture::family(config);
        let place = |what: &str| -> PathBuf { full.path().join(what) };
        let run = |method: Method, sizes: Sizes, out: &str| prune(full.path(), method, sizes).run(&place(out), &mut |_, _, _| ());
        let family = Checkpoint::open(full.path()).unwrap().config().family;
        if family.norms().after_attention.is_some() {
            let told = run(Method::Minitron, cut, "refused").unwrap_err().to_string();
            assert!(told.contains("only the method depth") && !place("refused").exists(), "{name}: {told}");
            continue;
        }
        run(Method::Minitron, Sizes::ALL, "same").unwrap();
        assert!(far(&logits(&place("same")), &logits(full.path())) < 1e-4, "{name}: nothing was cut");
        let fitted = run(Method::Pca { fit: Fit::Overfill, ridge: 1e-2 }, cut, "fitted").unwrap();
        let losses = fitted.losses.unwrap();
        assert!(losses.overfill.is_finite() && logits(&place("fitted")).iter().all(|x| x.is_finite()), "{name}");
        assert_eq!((fitted.decode.intermediate_size, fitted.decode.kv.kv_heads), (32, 1));
        let narrower = run(Method::Pca { fit: Fit::None, ridge: 1e-2 }, Sizes { hidden: Keep::Exactly(28), ..Sizes::ALL }, "narrower");
        match narrower {
            Err(e) => assert!(family.is_gemma() && e.to_string().contains("root of the hidden size"), "{name}: {e}"),
            Ok(_) => assert!(!family.is_gemma() && logits(&place("narrower")).iter().all(|x| x.is_finite()), "{name}"),
        }
    }
}
