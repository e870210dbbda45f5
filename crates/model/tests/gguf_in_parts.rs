//! A GGUF file that was split is the file that it was: all parts are read when the first is named, and what does not belong
//! together is refused.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod checkpoint;

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{self, Content, Value};
use checkpoint::Checkpoint;
use overfill_model::gguf::quantise;
use overfill_model::pair::weights_sha256;
use overfill_model::weights::Weights;
use overfill_model::{GgmlDType, GgufWriter, KvSpec, MakePair, ThreadPool};
use overfill_text::gguf::GgufVocabulary;
use overfill_types::KvFormats;
use overfill_types::pair::WeightFormat;
use serde_json::json;
use tempfile::TempDir;

const PARTS: usize = 3;

/// `whole.gguf`, and the same in three parts: the first has the values alone, as `--no-tensor-first-split` leaves it.
fn files() -> TempDir {
    let config = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "eos_token_id": 3,
    });
    let checkpoint = Checkpoint::random(config, 1);
    let folder = checkpoint.save();
    let weights = Weights::open(folder.path()).unwrap();
    let tokens: Vec<String> = (0..40).map(|id| format!("t{id}")).collect();
    let vocabulary = GgufVocabulary { model: "gpt2".into(), pre: Some("gpt-2".into()), tokens, ..Default::default() };
    let mut writer = GgufWriter::new("m", weights.config(), &vocabulary).unwrap();
    for name in checkpoint.tensors.keys() {
        let (numbers, shape) = weights.numbers(name).unwrap();
        writer.tensor(name, &shape, &numbers, GgmlDType::F32).unwrap();
    }
    let whole = folder.path().join("whole.gguf");
    writer.write(&whole).unwrap();
    split(folder.path(), |_, _| ());
    folder
}

fn part(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("m-{number:05}-of-{PARTS:05}.gguf"))
}

/// Splits `whole.gguf`; `change` changes what a part says and has.
fn split(folder: &Path, change: impl Fn(usize, &mut (HashMap<String, Value>, Vec<(String, QTensor)>))) {
    let mut file = File::open(folder.join("whole.gguf")).unwrap();
    let whole = Content::read(&mut file).unwrap();
    let mut names: Vec<&String> = whole.tensor_infos.keys().collect();
    names.sort_unstable();
    for number in 0..PARTS {
        let mut said = HashMap::from([
            ("split.no".to_owned(), Value::U16(number as u16)),
            ("split.count".to_owned(), Value::U16(PARTS as u16)),
            ("split.tensors.count".to_owned(), Value::I32(names.len() as i32)),
        ]);
        if number == 0 {
            said.extend(whole.metadata.clone());
        }
        let own = names.iter().enumerate().filter(|(i, _)| number > 0 && i % (PARTS - 1) == number - 1);
        let tensors = own.map(|(_, name)| ((*name).clone(), whole.tensor(&mut file, name, &Device::Cpu).unwrap())).collect();
        let mut part = (said, tensors);
        change(number, &mut part);
        let said: Vec<(&str, &Value)> = part.0.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<(&str, &QTensor)> = part.1.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut File::create(self::part(folder, number + 1)).unwrap(), &said, &tensors).unwrap();
    }
}

fn refused(path: &Path) -> String {
    use std::error::Error;
    let error = Weights::open(path).err();
    error.map(|error| format!("{error}: {}", error.source().map(ToString::to_string).unwrap_or_default())).unwrap_or_default()
}

#[test]
fn all_parts_are_read() {
    let folder = files();
    let (whole, parts) = (Weights::open(&folder.path().join("whole.gguf")).unwrap(), Weights::open(&part(folder.path(), 1)).unwrap());
    assert_eq!(whole.config(), parts.config());
    let layers =
        (0..2).flat_map(|i| ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"].map(|m| format!("model.layers.{i}.{m}.weight")));
    for name in layers.chain(["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"].map(str::to_owned)) {
        assert_eq!(whole.numbers(&name).unwrap(), parts.numbers(&name).unwrap(), "{name}");
    }
}

#[test]
fn a_pair_has_all_parts() {
    let folder = files();
    let out = folder.path().join("pair");
    let making = MakePair {
        name: "m".into(),
        full: part(folder.path(), 1),
        full_weights: WeightFormat::F32,
        decode: folder.path().join("whole.gguf"),
        decode_weights: WeightFormat::F32,
        kv: KvSpec::Identity,
        kv_formats: KvFormats::default(),
        generation: overfill_types::GenerationConfig::default(),
        provenance: serde_json::Map::new(),
    };
    let pair = making.make(&out).unwrap();
    assert_eq!(pair.manifest.full.path, "full-00001-of-00003.gguf");
    let pool = ThreadPool::new(1, &[]).unwrap();
    pair.load_full(&Device::Cpu, &pool).unwrap();
    // A number of the last part that is another is found.
    let last = out.join("full-00003-of-00003.gguf");
    let mut bytes = fs::read(&last).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::remove_file(&last).unwrap();
    fs::write(&last, bytes).unwrap();
    assert!(pair.load_full(&Device::Cpu, &pool).err().unwrap().to_string().contains("sha256"));
}

#[test]
fn a_copy_in_fewer_bits_is_one_file() {
    let folder = files();
    let (copy, of_whole) = (folder.path().join("copy.gguf"), folder.path().join("copy-of-whole.gguf"));
    quantise(&part(folder.path(), 1), &copy, GgmlDType::Q8_0, |_, _| ()).unwrap();
    quantise(&folder.path().join("whole.gguf"), &of_whole, GgmlDType::Q8_0, |_, _| ()).unwrap();
    assert_eq!(refused(&copy), "");
    assert_eq!(weights_sha256(&copy).unwrap(), weights_sha256(&of_whole).unwrap());
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let folder = files();
    let at = folder.path();
    let named = refused(&part(at, 2));
    assert!(named.contains("part 2 of 3: name the first, m-00001-of-00003.gguf"), "{named}");
    let missing = |number: usize| {
        split(at, |_, _| ());
        fs::remove_file(part(at, number)).unwrap();
        refused(&part(at, 1))
    };
    for number in 2..=PARTS {
        assert!(missing(number).contains(&format!("m-0000{number}-of-00003.gguf: No such file")), "{}", missing(number));
    }
    let changed = |of: usize, key: &str, value: Option<Value>| {
        split(at, |number, (said, _)| {
            if number == of {
                said.remove(key);
                said.extend(value.clone().map(|value| (key.to_owned(), value)));
            }
        });
        refused(&part(at, 1))
    };
    for (said, words) in [
        (changed(1, "split.no", Some(Value::U16(2))), ["m-00002-of-00003.gguf", "part 2 of 3", "it is 3 of 3"]),
        (changed(2, "split.count", Some(Value::U16(4))), ["m-00003-of-00003.gguf", "part 3 of 3", "3 of 4"]),
        (changed(0, "split.count", None), ["m-00001-of-00003.gguf", "part 1 of 3", "1 of none"]),
        (changed(0, "split.tensors.count", Some(Value::I32(30))), ["m-00001-of-00003.gguf", "have 21 tensors", "have 30"]),
    ] {
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    }
    split(at, |number, (_, tensors)| {
        if number == 2 {
            tensors.clear();
        }
    });
    assert!(refused(&part(at, 1)).contains("tensors, and should have 21"), "{}", refused(&part(at, 1)));
    split(at, |number, (_, tensors)| {
        if number == 2 {
            tensors[0].0 = "token_embd.weight".into();
        }
    });
    assert!(refused(&part(at, 1)).contains("tensor token_embd.weight is in an earlier part too"), "{}", refused(&part(at, 1)));
    split(at, |_, _| ());
    let alone = at.join("first.gguf");
    fs::copy(part(at, 1), &alone).unwrap();
    assert!(refused(&alone).contains("must be called first-00001-of-00003.gguf"), "{}", refused(&alone));
    let cut = fs::read(part(at, 3)).unwrap();
    fs::write(part(at, 3), &cut[..cut.len() - 10]).unwrap();
    assert!(refused(&part(at, 1)).contains("m-00003-of-00003.gguf: the file ends before"), "{}", refused(&part(at, 1)));
}
