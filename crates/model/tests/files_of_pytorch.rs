//! Models and pairs from files that PyTorch wrote (`tests/reference/torch_files.py`): the same answers as PyTorch's.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod fixture;
mod sequence;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use candle_core::Device;
use fixture::{Fixture, root};
use overfill_model::solo::Solo;
use overfill_model::weights::Weights;
use overfill_model::{KvSpec, Llama, MakePair, ModelError, Pair, Reference, ThreadPool};
use overfill_types::pair::WeightFormat;
use overfill_types::{GenerationConfig, KvFormats, PruneStrategy, SamplingParams, StopConditions};
use sequence::{Sequence, difference};
use serde_json::{Value, json};
use tempfile::TempDir;

const TOKENIZER: &str = r#"{ "model": { "vocab": {}, "merges": [] } }"#;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn write(path: PathBuf, value: &Value) {
    fs::write(path, value.to_string()).unwrap();
}

/// The weights of a fixture in a folder of their own.
fn weights(of: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in fs::read_dir(root().join("torch").join(of)).unwrap() {
        let (path, name) = (file.as_ref().unwrap().path(), file.unwrap().file_name());
        if name.to_str().unwrap().starts_with("pytorch_model") {
            fs::copy(path, folder.path().join(name)).unwrap();
        }
    }
    folder
}

/// The model alone, with its configuration and a tokenizer.
fn plain() -> TempDir {
    let folder = weights("plain");
    write(folder.path().join("config.json"), &json(&root().join("torch/plain/config.json")));
    fs::write(folder.path().join("tokenizer.json"), TOKENIZER).unwrap();
    folder
}

fn pair(full: &Path, decode: &Path, kv: KvSpec, out: &Path) -> Result<Pair, ModelError> {
    let making = MakePair {
        name: "reference".into(),
        full: full.to_owned(),
        full_weights: WeightFormat::F32,
        decode: decode.to_owned(),
        decode_weights: WeightFormat::F32,
        kv,
        kv_formats: KvFormats::default(),
        generation: GenerationConfig::default(),
        provenance: serde_json::Map::new(),
    };
    making.make(out)
}

#[test]
fn a_model_in_files_of_pytorch_gives_the_logits_of_transformers() {
    let folder = plain();
    let case = Fixture::open_tensors("torch/plain/logits");
    let (prompt, expected) = (case.tokens("prompt"), case.logits("logits"));
    let pool = ThreadPool::new(1, &[]).unwrap();
    let model = Llama::load(folder.path(), WeightFormat::F32, &Device::Cpu, &pool).unwrap();
    let mut sequence = Sequence::new(model.config().kv, prompt.len(), 16, 1);
    for (token, expected) in prompt.iter().zip(expected) {
        let difference = difference(&sequence.read(&model, &[*token]), &expected);
        assert!(difference < 1e-3, "{difference}");
    }
}

#[test]
fn a_pair_of_files_of_pytorch_is_one_like_any_other() {
    let (folder, place) = (plain(), tempfile::tempdir().unwrap());
    let out = place.path().join("pair");
    let made = pair(folder.path(), folder.path(), KvSpec::Identity, &out).unwrap();
    let pool = ThreadPool::new(1, &[]).unwrap();
    made.load_full(&Device::Cpu, &pool).unwrap();
    assert!(out.join("full/pytorch_model.bin.index.json").exists() && out.join("decode/pytorch_model-00002-of-00002.bin").exists());
    // Its files are hashed: one number that is another is found.
    let shard = out.join("decode/pytorch_model-00001-of-00002.bin");
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(&shard).unwrap();
    fs::write(&shard, bytes).unwrap();
    assert!(made.load_decode(&Device::Cpu, &pool).err().unwrap().to_string().contains("sha256"));
}

#[test]
fn safetensors_are_taken_where_both_are_there() {
    let folder = plain();
    let weights = Weights::open(folder.path()).unwrap();
    let zeros = |name: &str| {
        let shape = weights.numbers(name).unwrap().1;
        candle_core::Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap()
    };
    let layers = (0..2).flat_map(|i| {
        let modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"];
        let others = ["mlp.down_proj", "input_layernorm", "post_attention_layernorm"];
        modules.into_iter().chain(others).map(move |module| format!("model.layers.{i}.{module}.weight"))
    });
    let rest = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].map(str::to_owned);
    let tensors = layers.chain(rest).map(|name| (name.clone(), zeros(&name))).collect::<std::collections::HashMap<_, _>>();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    let both = Weights::open(folder.path()).unwrap();
    assert!(both.numbers("lm_head.weight").unwrap().0.iter().all(|x| *x == 0.0));
    assert!(weights.numbers("lm_head.weight").unwrap().0.iter().any(|x| *x != 0.0));
}

#[test]
fn shards_that_do_not_go_together_are_refused() {
    let refused = |change: &dyn Fn(&Path)| {
        let folder = plain();
        change(folder.path());
        Weights::open(folder.path()).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let first = "pytorch_model-00001-of-00002.bin";
    assert!(refused(&|folder| fs::remove_file(folder.join(first)).unwrap()).contains(first));
    let twice = refused(&|folder| fs::copy(folder.join(first), folder.join("pytorch_model-00002-of-00002.bin")).map(drop).unwrap());
    assert!(twice.contains("is in another shard too"), "{twice}");
    let without = refused(&|folder| fs::remove_file(folder.join("pytorch_model.bin.index.json")).unwrap());
    assert!(without.contains("model.safetensors or pytorch_model.bin is wanted"), "{without}");
}

/// A checkpoint of the authors' code, as their class saves itself: keywords in `config.json`, both models' folders below.
fn saved_by_the_class(of: &str, case: &str) -> TempDir {
    let folder = weights(of);
    let at = root().join("torch").join(of);
    write(folder.path().join("config.json"), &json(&at.join(format!("{case}.json")))["config"]);
    for part in ["teacher", "student"] {
        fs::create_dir(folder.path().join(part)).unwrap();
        fs::copy(at.join(format!("{part}.json")), folder.path().join(part).join("config.json")).unwrap();
    }
    fs::write(folder.path().join("teacher/tokenizer.json"), TOKENIZER).unwrap();
    folder
}

/// The same, as their training script leaves it: the full model's configuration and tokenizer beside the weights, and nothing of
/// the transform. Gives the decode model's folder too.
fn left_by_the_trainer(of: &str) -> (TempDir, TempDir) {
    let (folder, student) = (weights(of), tempfile::tempdir().unwrap());
    let at = root().join("torch").join(of);
    let mut config = json(&at.join("teacher.json"));
    config.as_object_mut().unwrap().extend(json!({ "n_layer": 3, "kv_dim": 8, "num_kv_heads": 1 }).as_object().unwrap().clone());
    write(folder.path().join("config.json"), &config);
    fs::write(folder.path().join("tokenizer.json"), TOKENIZER).unwrap();
    fs::copy(at.join("student.json"), student.path().join("config.json")).unwrap();
    (folder, student)
}

/// Makes the pair, as the command does.
fn of_reference(reference: &Reference, out: &Path) -> Result<Pair, ModelError> {
    let split = tempfile::tempdir_in(out.parent().unwrap()).unwrap();
    let parts = reference.split(split.path())?;
    pair(&parts.full, &parts.decode, parts.kv, out)
}

fn check(of: &str, case: &str) {
    let place = tempfile::tempdir().unwrap();
    let kv: String = json(&root().join("torch").join(of).join(format!("{case}.json")))["kv"].as_str().unwrap().into();
    let saved = saved_by_the_class(of, case);
    let by_class = Reference::open(saved.path(), None, None, None).unwrap();
    let (left, student) = left_by_the_trainer(of);
    let said = kv.starts_with("prune").then(|| kv.parse::<KvSpec>().unwrap());
    let by_trainer = Reference::open(left.path(), None, Some(student.path()), said.as_ref()).unwrap();
    let expected = Fixture::open_tensors(&format!("torch/{of}/{case}"));
    for (how, reference) in [("class", by_class), ("trainer", by_trainer)] {
        let made = of_reference(&reference, &place.path().join(how)).unwrap();
        let mut solo = Solo::load(&made, &Device::Cpu, ThreadPool::new(1, &[]).unwrap()).unwrap();
        for i in 0..2 {
            let [prompt, expected] = ["prompt", "tokens"].map(|what| expected.tokens(&format!("{what}.{i}")));
            let stop = StopConditions { max_tokens: expected.len(), stop_token_ids: vec![], ignore_eos: true };
            let mut tokens = Vec::new();
            let answer = solo.generate(&prompt, &SamplingParams::greedy(), &stop, |sampled| {
                tokens.push(sampled.token);
                ControlFlow::Continue(())
            });
            answer.unwrap();
            assert_eq!(tokens, expected, "{case}, {} tokens, as the {how} leaves it", prompt.len());
        }
    }
    let modes = ["full/model.safetensors", "decode/model.safetensors", "pair.json"]
        .map(|file| fs::metadata(place.path().join("class").join(file)).unwrap().permissions().mode());
    assert_eq!(modes[0], modes[2]);
    assert_eq!(modes[1], modes[2], "files have the umask's rights");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2, "nothing is left of what they were split into");
}

#[test]
fn identity() {
    check("identity", "identity");
}

#[test]
fn prune() {
    for case in ["prune-firstlast", "prune-first", "prune-last"] {
        check("prune", case);
    }
}

#[test]
fn projection() {
    check("projection", "projection");
}

/// What is said of a checkpoint that was changed.
fn refused(of: &str, case: &str, kv: Option<KvSpec>, change: impl FnOnce(&Path)) -> String {
    let folder = saved_by_the_class(of, case);
    change(folder.path());
    let error = Reference::open(folder.path(), None, None, kv.as_ref()).err();
    error.map(|error| error.to_string()).unwrap_or_default()
}

fn config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config = json(&path);
    change(&mut config);
    write(path, &config);
}

#[test]
fn what_a_pair_cannot_do_is_refused() {
    let (identity, prune) = (|change: Value| said("identity", "identity", change), |change: Value| said("prune", "prune-first", change));
    fn said(of: &str, case: &str, change: Value) -> String {
        refused(of, case, None, |folder| {
            config(folder, |config| config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone()))
        })
    }
    for (said, words) in [
        (identity(json!({ "embedding_transform_strategy": "past_kv_mlp_layer" })), &["past_kv_mlp_layer", "kv_proj_layer"][..]),
        (identity(json!({ "embedding_transform_strategy": "kv_proj_layer" })), &["kv_proj_layer", "no embedding_proj"]),
        (identity(json!({ "refresh_interval": 16 })), &["refresh_interval is 16", "prompt alone"]),
        (identity(json!({ "student_lora": true })), &["student_lora", "merge"]),
        (prune(json!({ "depth_prune_ratio": 0.5 })), &["0.5", "keeps 1 of 3", "has 2"]),
        (prune(json!({ "depth_prune_strategy": "middle" })), &["depth_prune_strategy", "middle"]),
        (
            refused("projection", "projection", None, |folder| {
                config(folder, |c| c["embedding_transform_strategy"] = "kv_identity".into())
            }),
            &["embedding_proj"],
        ),
        (refused("projection", "projection", Some(KvSpec::Projection("x".into())), |_| ()), &["leave --kv out"]),
        (refused("prune", "prune-first", Some(KvSpec::Prune(PruneStrategy::Last)), |_| ()), &["prune:first", "--kv prune:last"]),
        (refused("prune", "prune-first", None, |folder| fs::remove_file(folder.join("config.json")).unwrap()), &["--kv prune:firstlast"]),
        (refused("identity", "identity", None, |folder| fs::remove_dir_all(folder.join("student")).unwrap()), &["--decode"]),
        (refused("identity", "identity", None, |folder| fs::remove_dir_all(folder.join("teacher")).unwrap()), &["--full"]),
        (
            refused("identity", "identity", None, |folder| config(&folder.join("student"), |c| c["hidden_size"] = 32.into())),
            &["of student.*", "hidden size 32"],
        ),
        (
            refused("identity", "identity", None, |folder| config(&folder.join("student"), |c| c["num_hidden_layers"] = 4.into())),
            &["of student.*", "layers.3", "missing"],
        ),
        (
            refused("identity", "identity", None, |folder| {
                fs::remove_file(folder.join("pytorch_model.bin")).unwrap();
                for entry in fs::read_dir(weights("plain").path()).unwrap() {
                    fs::copy(entry.as_ref().unwrap().path(), folder.join(entry.unwrap().file_name())).unwrap();
                }
            }),
            &["teacher.*", "authors' code"],
        ),
    ] {
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    }
    let named = refused("identity", "identity", None, |folder| {
        fs::remove_dir_all(folder.join("student")).unwrap();
        config(folder, |config| config["student_model_name_or_path"] = "someone/pruned".into());
    });
    assert!(named.contains("someone/pruned"), "{named}");
}

#[test]
fn a_pair_that_cannot_be_made_leaves_nothing() {
    let folder = saved_by_the_class("prune", "prune-first");
    // The rows go over, and the keys in them were turned otherwise.
    config(&folder.path().join("student"), |config| config["rope_theta"] = 500.0.into());
    let reference = Reference::open(folder.path(), None, None, None).unwrap();
    let place = tempfile::tempdir().unwrap();
    let error = of_reference(&reference, &place.path().join("pair")).err().unwrap().to_string();
    assert!(error.contains("rotary"), "{error}");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
}
