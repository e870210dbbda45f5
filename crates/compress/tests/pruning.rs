//! `overfill prune` on small random checkpoints: exact where it can be, PyTorch's where PyTorch says something, and refused
//! with a sentence where it is not possible.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something is not as it should be")]

use std::path::{Path, PathBuf};

use overfill_compress::calibrate::Calibration;
use overfill_compress::checkpoint::{Checkpoint, Format};
use overfill_compress::prune::{Fit, Keep, Method, Prune, Report, Sizes};
use overfill_kv::BlockId;
use overfill_model::{Chunk, Device, KvCache, KvSpec, Llama, MakePair, ThreadPool, Workspace};
use overfill_types::pair::WeightFormat;
use overfill_types::{KvFormat, KvFormats, PruneStrategy};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

const ALL: Sizes = Sizes::ALL;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// A checkpoint whose words are the numbers of its tokens.
fn full(model: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(fixtures().join("models").join(model)).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    std::fs::copy(fixtures().join("pruning/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    folder
}

fn prune(full: &Path, method: Method, sizes: Sizes) -> Prune {
    Prune {
        full: full.to_owned(),
        method,
        sizes,
        calibration: Some(fixtures().join("pruning/calibration.txt")),
        samples: Calibration { samples: 512, held_out: 0, length: 24, seed: 1337 },
        format: Format::F32,
    }
}

struct Made {
    folder: TempDir,
    report: Report,
}

impl Made {
    fn of(prune: &Prune) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let report = prune.run(&folder.path().join("made"), &mut |_, _, _| ()).unwrap();
        Self { folder, report }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("made")
    }

    fn provenance(&self) -> Value {
        serde_json::from_str(&std::fs::read_to_string(self.path().join("provenance.json")).unwrap()).unwrap()
    }
}

fn cases() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixtures().join("pruning/cases.json")).unwrap()).unwrap()
}

fn numbers(list: &Value) -> Vec<usize> {
    list.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
}

fn prompt() -> Vec<u32> {
    numbers(&cases()["prompt"]).into_iter().map(|n| n as u32).collect()
}

/// Logits after each token, from the engine that serves.
fn logits(model: &Path) -> Vec<Vec<f32>> {
    let mut workspace = Workspace::new(ThreadPool::new(1, &[]).unwrap());
    let model = Llama::load(model, WeightFormat::F32, &Device::Cpu, workspace.pool()).unwrap();
    let prompt = prompt();
    let blocks: Vec<BlockId> = (0..prompt.len().div_ceil(16) as u32).map(BlockId).collect();
    let mut cache = KvCache::new(model.config().kv, KvFormat::F32, blocks.len(), 16, &Device::Cpu).unwrap();
    let each = prompt.iter().enumerate().map(|(start, &token)| {
        let chunk = Chunk { tokens: &[token], start, blocks: &blocks, logits: true };
        model.forward(&[chunk], &mut cache, &mut workspace, &mut |_, _, _| Ok(())).unwrap().read().unwrap().to_vec()
    });
    each.collect()
}

fn difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |most, d| if d.is_nan() { f32::INFINITY } else { d.max(most) })
}

#[test]
fn a_rotation_alone_changes_nothing() {
    for model in ["wide", "tied", "qwen2"] {
        let full = full(model);
        let expected = logits(full.path());
        for fit in [Fit::None, Fit::Overfill, Fit::Decode] {
            let method = Method::Pca { fit, ridge: 0.02 };
            let made = Made::of(&prune(full.path(), method, Sizes { hidden: Keep::Without(0.0), ..ALL }));
            let difference = difference(&logits(&made.path()), &expected);
            assert!(difference < 1e-3, "{model} fitted for {fit:?}: {difference}");
            let embedding = |p: &Path| Checkpoint::open(p).unwrap().embedding().unwrap();
            assert_ne!(embedding(&made.path()), embedding(full.path()), "it was not even rotated");
        }
    }
}

#[test]
fn a_stream_that_is_kept_whole_is_not_rotated() {
    for model in ["wide", "tied"] {
        let folder = full(model);
        let full = Checkpoint::open(folder.path()).unwrap();
        for hidden in [Keep::All, Keep::Exactly(full.config().hidden_size)] {
            let sizes = Sizes { hidden, intermediate: Keep::Without(0.5), ..ALL };
            let made = Made::of(&prune(folder.path(), Method::Pca { fit: Fit::Overfill, ridge: 0.02 }, sizes));
            let made = Checkpoint::open(&made.path()).unwrap();
            assert_eq!(made.tied(), full.tied(), "{model}");
            assert_eq!(made.embedding().unwrap(), full.embedding().unwrap(), "{model}");
            assert_eq!(made.head().unwrap(), full.head().unwrap(), "{model}");
            assert_eq!(made.norm().unwrap(), full.norm().unwrap(), "{model}");
            assert_ne!(made.layer(0).unwrap().down, full.layer(0).unwrap().down, "{model}: nothing was cut");
        }
    }
}

#[test]
fn minitron_keeps_what_pytorch_says() {
    let cases = cases();
    for (name, sizes) in [
        ("minitron", Sizes { hidden: Keep::Exactly(40), intermediate: Keep::Exactly(56), ..ALL }),
        ("minitron-qwen2", Sizes { hidden: Keep::Exactly(48), intermediate: Keep::Exactly(72), kv_heads: Keep::Exactly(2), ..ALL }),
    ] {
        let case = &cases["cases"][name];
        let full = full(case["full"].as_str().unwrap());
        let made = Made::of(&prune(full.path(), Method::Minitron, sizes));
        let kept = &made.provenance()["kept"];
        assert_eq!(kept["channels"], case["kept"]["channels"], "{name}");
        assert_eq!(kept["neurons"], case["kept"]["neurons"], "{name}");
    }
}

#[test]
fn kept_weights_are_the_originals() {
    let full = full("qwen2");
    let sizes = Sizes { hidden: Keep::Exactly(48), intermediate: Keep::Exactly(72), kv_heads: Keep::Exactly(2), ..ALL };
    let made = Made::of(&prune(full.path(), Method::Minitron, sizes));
    let kept = &made.provenance()["kept"];
    let channels = numbers(&kept["channels"]);
    let (old, new) = (Checkpoint::open(full.path()).unwrap(), Checkpoint::open(&made.path()).unwrap());
    assert_eq!(new.embedding().unwrap(), old.embedding().unwrap().select_columns(&channels));
    assert_eq!(new.head().unwrap(), old.head().unwrap().select_columns(&channels));
    for i in 0..2 {
        let (old, new) = (old.layer(i).unwrap(), new.layer(i).unwrap());
        let neurons = numbers(&kept["neurons"][i]);
        let heads = numbers(&kept["kv_heads"][i]);
        assert_eq!(heads.len(), 2);
        let rows = |group: usize| heads.iter().flat_map(|h| h * group * 12..(h + 1) * group * 12).collect::<Vec<usize>>();
        for (part, group) in [(0, 2), (1, 1), (2, 1)] {
            assert_eq!(new.qkv[part], old.qkv[part].select_rows(rows(group)).select_columns(&channels));
            assert_eq!(new.qkv_bias[part], rows(group).iter().map(|&r| old.qkv_bias[part][r]).collect::<Vec<f32>>());
        }
        assert_eq!(new.output, old.output.select_columns(&rows(2)).select_rows(channels.iter().copied()));
        assert_eq!(new.up, old.up.select_rows(neurons.iter().copied()).select_columns(&channels));
        assert_eq!(new.down, old.down.select_columns(&neurons).select_rows(channels.iter().copied()));
        assert_eq!(new.mlp_norm, channels.iter().map(|&c| old.mlp_norm[c]).collect::<Vec<f32>>());
    }
}

#[test]
fn depth_keeps_whole_layers() {
    let full = full("full");
    let asked = prune(full.path(), Method::Depth(PruneStrategy::FirstLast), Sizes { layers: Keep::Exactly(3), ..ALL });
    let made = Made::of(&Prune { calibration: None, ..asked });
    assert_eq!(made.report.kv, "prune:firstlast");
    assert!(made.report.losses.is_none());
    let (old, new) = (Checkpoint::open(full.path()).unwrap(), Checkpoint::open(&made.path()).unwrap());
    assert_eq!(new.config().kv.layers, 3);
    for (j, i) in [0, 3, 4].into_iter().enumerate() {
        assert_eq!(new.layer(j).unwrap().gate, old.layer(i).unwrap().gate);
        assert_eq!(new.layer(j).unwrap().input_norm, old.layer(i).unwrap().input_norm);
    }
}

/// What `tests/reference/pruning.py` had made by the same flags, loaded by transformers.
#[test]
fn transformers_computes_the_same() {
    let bytes = std::fs::read(fixtures().join("pruning/logits.safetensors")).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    let widths = |hidden, intermediate| Sizes { hidden: Keep::Exactly(hidden), intermediate: Keep::Exactly(intermediate), ..ALL };
    let pca = |fit| Method::Pca { fit, ridge: 0.02 };
    for (name, model, method, sizes, format) in [
        ("minitron", "wide", Method::Minitron, widths(40, 56), Format::F32),
        ("minitron-qwen2", "qwen2", Method::Minitron, Sizes { kv_heads: Keep::Exactly(2), ..widths(48, 72) }, Format::F32),
        ("depth", "full", Method::Depth(PruneStrategy::FirstLast), Sizes { layers: Keep::Exactly(3), ..ALL }, Format::F32),
        ("pca", "tied", pca(Fit::Overfill), widths(32, 72), Format::Bf16),
        ("pca-alone", "full", pca(Fit::Decode), Sizes { kv_heads: Keep::Exactly(1), ..widths(40, 80) }, Format::F32),
    ] {
        let full = full(model);
        let made = Made::of(&Prune { format, ..prune(full.path(), method, sizes) });
        let tensor = theirs.tensor(name).unwrap();
        let numbers: Vec<f32> = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let expected: Vec<Vec<f32>> = numbers.chunks(128).map(<[f32]>::to_vec).collect();
        let difference = difference(&logits(&made.path()), &expected);
        // A weight that another CPU rounds to the next bfloat16 is one of some thousand.
        let most = if format == Format::Bf16 { 0.05 } else { 1e-3 };
        assert!(difference < most, "{name}: {difference}");
    }
}

#[test]
fn every_method_makes_half_a_pair() {
    let full = full("full");
    let pca = Method::Pca { fit: Fit::Overfill, ridge: 0.02 };
    for (method, sizes) in [
        (Method::Minitron, Sizes { hidden: Keep::Without(0.3), kv_heads: Keep::Exactly(1), ..ALL }),
        (pca, Sizes { hidden: Keep::Without(0.3), intermediate: Keep::Without(0.45), kv_heads: Keep::Exactly(1), ..ALL }),
        (pca, Sizes { intermediate: Keep::Without(0.45), ..ALL }),
        (Method::Depth(PruneStrategy::Last), Sizes { layers: Keep::Exactly(2), ..ALL }),
    ] {
        let asked = prune(full.path(), method, sizes);
        let made = Made::of(&Prune { samples: Calibration { held_out: 4, ..asked.samples.clone() }, ..asked });
        let losses = made.report.losses.unwrap();
        assert_eq!(losses.tokens, 4 * 11);
        let kv = match made.report.kv.strip_prefix("projection:") {
            Some(file) => KvSpec::Projection(made.path().join(file)),
            None => made.report.kv.parse().unwrap(),
        };
        let making = MakePair {
            name: "made".into(),
            full: full.path().into(),
            full_weights: WeightFormat::Native,
            decode: made.path(),
            decode_weights: WeightFormat::Native,
            kv,
            kv_formats: KvFormats::default(),
            generation: overfill_types::GenerationConfig::default(),
            provenance: serde_json::Map::new(),
        };
        making.make(&made.folder.path().join("pair")).unwrap();
    }
}

#[test]
fn losses_of_the_same_model_are_the_same_alone_and_with_its_own_cache() {
    let full = full("wide");
    let asked = prune(full.path(), Method::Minitron, ALL);
    let losses = Made::of(&Prune { samples: Calibration { held_out: 8, ..asked.samples.clone() }, ..asked }).report.losses.unwrap();
    assert!((losses.full - losses.alone).abs() < 1e-5 && (losses.full - losses.overfill).abs() < 1e-5, "{losses:?}");
}

#[test]
fn a_fit_is_nearer_to_the_full_model() {
    let full = full("wide");
    let loss = |fit| {
        let sizes = Sizes { hidden: Keep::Exactly(48), intermediate: Keep::Exactly(72), ..ALL };
        let asked = prune(full.path(), Method::Pca { fit, ridge: 0.02 }, sizes);
        let made = Made::of(&asked);
        let (ours, theirs) = (logits(&made.path()), logits(full.path()));
        ours.iter().flatten().zip(theirs.iter().flatten()).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
    };
    let (none, decode) = (loss(Fit::None), loss(Fit::Decode));
    assert!(decode < 0.9 * none, "fitted {decode}, rotated {none}");
}

#[test]
fn what_is_not_possible_is_refused() {
    let full = full("wide");
    let pca = Method::Pca { fit: Fit::Overfill, ridge: 0.02 };
    let refused = |prune: &Prune, words: &str| {
        let folder = tempfile::tempdir().unwrap();
        let error = prune.run(&folder.path().join("made"), &mut |_, _, _| ()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something was left behind after: {error}");
    };
    let with = |sizes| prune(full.path(), pca, sizes);
    refused(&with(Sizes { hidden: Keep::Exactly(42), ..ALL }), "not a multiple of the 4 heads, which transformers asks for: use 40 or 44");
    refused(&with(Sizes { hidden: Keep::Without(1.0), ..ALL }), "at least 0 and less than 1");
    refused(&with(Sizes { intermediate: Keep::Without(-0.1), ..ALL }), "at least 0 and less than 1");
    refused(&with(Sizes { intermediate: Keep::Exactly(97), ..ALL }), "1 to 96 can be kept");
    refused(&with(Sizes { kv_heads: Keep::Exactly(0), ..ALL }), "1 to 2 can be kept");
    refused(&with(Sizes { layers: Keep::Exactly(2), ..ALL }), "only the method depth cuts layers");
    refused(&prune(full.path(), Method::Depth(PruneStrategy::First), ALL), "depth needs --layers");
    refused(&Prune { calibration: None, ..with(ALL) }, "needs --calibration");
    let few = |samples, held_out| Prune { samples: Calibration { samples, held_out, length: 24, seed: 1 }, ..with(ALL) };
    refused(&few(4, 0), "the calibration has 44 tokens that the decode model reads, a fit of this width needs 96");
    // A quarter of two is none: nothing could be measured.
    let short = tempfile::Builder::new().suffix(".txt").tempfile().unwrap();
    let text: String = std::fs::read_to_string(few(4, 40).calibration.unwrap()).unwrap().chars().take(60).collect();
    std::fs::write(short.path(), text).unwrap();
    refused(&Prune { calibration: Some(short.path().to_owned()), ..few(4, 40) }, "usable samples: that is too short");
    refused(&Prune { full: "/nowhere".into(), ..with(ALL) }, "/nowhere");

    let broken = |change: fn(&Path)| {
        let folder = crate::full("tied");
        change(folder.path());
        folder
    };
    let missing = broken(|folder| {
        let path = folder.join("config.json");
        let config = std::fs::read_to_string(&path).unwrap().replace("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4");
        std::fs::write(path, config).unwrap();
    });
    refused(&prune(missing.path(), Method::Minitron, ALL), "tensor model.layers.3.");
    let other = broken(|folder| {
        let path = folder.join("config.json");
        let config = std::fs::read_to_string(&path).unwrap().replace("\"intermediate_size\": 104", "\"intermediate_size\": 88");
        std::fs::write(path, config).unwrap();
    });
    refused(&prune(other.path(), Method::Minitron, ALL), "has shape [104, 48], which must be [88, 48] by the configuration");
}

#[test]
fn what_exists_is_not_written_over() {
    let full = full("wide");
    let error = prune(full.path(), Method::Minitron, ALL).run(full.path(), &mut |_, _, _| ()).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
}
