//! Files: of checkpoints, of pairs, of tokenizers and templates, of keys.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use overfill_cluster::Discovery;
use overfill_lifecycle::Drain;
use overfill_model::{Device, KvSpec, MakePair, Pair, Reference, ThreadPool};
use overfill_router::{Models, Router, RouterConfig};
use overfill_tests::processes::binary;
use overfill_tests::tiny::{self, TinyPair};
use overfill_text::{Chat, ChatTemplate, ModelText};
use overfill_transport::Connector;
use overfill_types::KvFormats;
use overfill_types::pair::WeightFormat;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Target, about_to_read, mutate};

/// Reads the file, changed.
type Reads = Box<dyn FnMut(&Path) -> Result<(), String>>;

/// One file of a folder.
struct File {
    name: &'static str,
    /// Where it is changed.
    path: PathBuf,
    right: Vec<u8>,
    /// Only so many of its first bytes are changed: behind them are numbers, of which any is right.
    head: usize,
    reads: Reads,
}

impl Target for File {
    fn name(&self) -> &'static str {
        self.name
    }

    fn read(&mut self, draws: &mut StdRng) -> Result<(), String> {
        let (head, rest) = self.right.split_at(self.head.min(self.right.len()));
        let mut changed = match serde_json::from_slice::<Value>(&self.right) {
            Ok(right) if draws.random_range(0..4) > 0 => mutate::value(&right, draws).to_string().into_bytes(),
            _ => [mutate::bytes(head, draws), rest.to_vec()].concat(),
        };
        if draws.random_range(0..16) == 0 {
            changed.truncate(draws.random_range(0..=changed.len()));
        }
        about_to_read(&changed);
        // A file of its own: what is mapped of the last one may still be.
        let _ = fs::remove_file(&self.path);
        fs::write(&self.path, &changed).map_err(|error| error.to_string())?;
        let read = (self.reads)(&self.path);
        let _ = fs::remove_file(&self.path);
        fs::write(&self.path, &self.right).map_err(|error| error.to_string())?;
        read
    }
}

/// A copy of a folder's files.
fn copied(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("the folder is there").flatten() {
        if entry.path().is_dir() {
            copied(&entry.path(), &to.join(entry.file_name()));
        } else {
            fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
        }
    }
}

/// An error is a sentence, which names what it is about.
fn told(error: &dyn std::error::Error) -> Result<(), String> {
    let text = error.to_string();
    if text.is_empty() || text.contains("panicked") { Err(format!("the error says nothing, or too much: '{text}'")) } else { Ok(()) }
}

/// Makes a pair of `full` and the tiny decode model, and loads it.
fn made(full: &Path, decode: &Path) -> Result<(), String> {
    let out = tempfile::tempdir().map_err(|error| error.to_string())?;
    let making = MakePair {
        name: "tiny".into(),
        full: full.to_owned(),
        full_weights: WeightFormat::F32,
        decode: decode.to_owned(),
        decode_weights: WeightFormat::F32,
        kv: KvSpec::Identity,
        kv_formats: KvFormats::default(),
        generation: overfill_types::GenerationConfig::default(),
        provenance: serde_json::Map::new(),
    };
    match making.make(&out.path().join("pair")) {
        Ok(pair) => loaded(&pair),
        Err(error) => told(&error),
    }
}

fn loaded(pair: &Pair) -> Result<(), String> {
    let pool = ThreadPool::new(1, &[]).map_err(|error| error.to_string())?;
    pair.load_full(&Device::Cpu, &pool).map(drop).or_else(|error| told(&error))?;
    pair.load_decode(&Device::Cpu, &pool).map(drop).or_else(|error| told(&error))?;
    pair.load_transform(&pool).map(drop).or_else(|error| told(&error))
}

pub(super) fn all() -> Vec<Box<dyn Target>> {
    let folder = Box::leak(Box::new(tempfile::tempdir().expect("a folder")));
    let tiny = Box::leak(Box::new(tiny::pair_with_tools(tiny::Kind::Identity, 1)));
    let mut all = checkpoints(folder, tiny);
    all.extend(pairs(folder, tiny));
    all.push(reference(folder));
    all.push(keys(folder, tiny));
    all.into_iter().map(|file| Box::new(file) as Box<dyn Target>).chain([Box::new(Templates) as Box<dyn Target>]).collect()
}

fn file(name: &'static str, path: PathBuf, head: usize, reads: Reads) -> File {
    let right = fs::read(&path).expect("the file is there");
    File { name, path, right, head, reads }
}

fn checkpoints(folder: &TempDir, tiny: &TinyPair) -> Vec<File> {
    let made_of = tiny.dir.parent().expect("a pair lies beside what it is made of");
    let decode = made_of.join("decode");
    let full = folder.path().join("full");
    copied(&made_of.join("full"), &full);
    let gguf = folder.path().join("full.gguf");
    let export = Command::new(binary("overfill"))
        .args(["export", "--format", "gguf", "--quantise", "f32", "--model"])
        .arg(&full)
        .arg("--out")
        .arg(&gguf)
        .output();
    assert!(export.is_ok_and(|done| done.status.success()), "a GGUF file is written");
    let of_folder = |decode: PathBuf| -> Reads { Box::new(move |path: &Path| made(path.parent().unwrap_or(path), &decode)) };
    let of_file = |decode: PathBuf| -> Reads { Box::new(move |path: &Path| made(path, &decode)) };
    vec![
        file("config", full.join("config.json"), usize::MAX, of_folder(decode.clone())),
        file("safetensors", full.join("model.safetensors"), 4096, of_folder(decode.clone())),
        file("tokenizer", full.join("tokenizer.json"), usize::MAX, {
            Box::new(move |path: &Path| {
                let (tokenizer, config) = (fs::read(path), fs::read(path.with_file_name("tokenizer_config.json")));
                let (Ok(tokenizer), Ok(config)) = (tokenizer, config) else { return Err("the files are there".into()) };
                match ModelText::from_files("tiny", &tokenizer, &config) {
                    Ok(text) => {
                        let ids = text.encode("hello, <|start|> wörld 👩‍👩‍👧").unwrap_or_default();
                        text.decode(&ids, true);
                        Ok(())
                    }
                    Err(error) => told(&error),
                }
            })
        }),
        file("gguf", gguf, 16_384, of_file(decode)),
    ]
}

/// A checkpoint of the authors' code, split as for a pair: what PyTorch wrote is a zip file with a program in it.
fn reference(folder: &TempDir) -> File {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/torch/identity");
    let copy = folder.path().join("reference");
    for (from, to) in [("teacher.json", "teacher/config.json"), ("student.json", "student/config.json")] {
        let to = copy.join(to);
        fs::create_dir_all(to.parent().expect("it has one")).expect("a folder");
        fs::copy(fixture.join(from), &to).expect("a copy");
        fs::write(to.with_file_name("tokenizer.json"), json!({ "model": { "vocab": {}, "merges": [] } }).to_string()).expect("a file");
    }
    fs::copy(fixture.join("pytorch_model.bin"), copy.join("pytorch_model.bin")).expect("a copy");
    let split = |path: &Path| {
        let into = tempfile::tempdir().map_err(|error| error.to_string())?;
        let opened = Reference::open(path.parent().unwrap_or(path), None, None, None);
        opened.and_then(|reference| reference.split(into.path())).map(drop).or_else(|error| told(&error))
    };
    file("torch", copy.join("pytorch_model.bin"), usize::MAX, Box::new(split))
}

fn pairs(folder: &TempDir, tiny: &TinyPair) -> Vec<File> {
    let copy = folder.path().join("pair");
    copied(&tiny.dir, &copy);
    let opened = |path: &Path| match Pair::open(path.parent().unwrap_or(path)) {
        Ok(pair) => loaded(&pair),
        Err(error) => told(&error),
    };
    vec![file("pair", copy.join("pair.json"), usize::MAX, Box::new(opened))]
}

fn keys(folder: &TempDir, tiny: &TinyPair) -> File {
    let path = folder.path().join("keys.json");
    let right = json!({ "clients": [
        { "name": "a", "keys": ["sk-a"], "weight": 2, "class": 1, "requests_per_second": 1.5, "tokens_per_second": 100, "burst_seconds": 10 },
        { "name": "b", "sha256": ["ab".repeat(32)], "max_requests": 4 },
    ] });
    fs::write(&path, right.to_string()).expect("a file");
    let cli = overfill_router::config::Cli::parse_from(["router", "--pair", tiny.dir.to_str().unwrap_or_default()]);
    let config = RouterConfig::new(cli.pair, cli.bounds);
    let models = Models::open(&config).expect("the pair is whole");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("there is a thread");
    let reads = move |path: &Path| {
        let config = RouterConfig { keys: Some(path.to_owned()), ..config.clone() };
        let made =
            runtime.block_on(async { Router::new(config, models.clone(), &Discovery::memory(), Connector::default(), Drain::new()) });
        made.map(drop).or_else(|error| told(&error))
    };
    file("keys", path, usize::MAX, Box::new(reads))
}

/// Chat templates, and what they are given.
struct Templates;

const TEMPLATE: &str = "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% set ns = namespace(last=0) %}{% for m in messages %}\
    {% if loop.first and m.role != 'system' %}<|start|>be good{% endif %}{% if m.content is string %}{{ m.content | trim }}{% else %}\
    {% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% set ns.last = loop.index0 %}{% for c in m.tool_calls or [] %}\
    {{ c.function.arguments | tojson }}{% endfor %}{% endfor %}{{ strftime_now('%d %b %Y') }}{% macro x(a) %}{{ a[::-1] }}{% endmacro %}\
    {{ x('abc') }}{% if add_generation_prompt %}<|a|>{{ messages[-1]['role'].split('\\n')[0] }}{% endif %}";

impl Target for Templates {
    fn name(&self) -> &'static str {
        "templates"
    }

    fn read(&mut self, draws: &mut StdRng) -> Result<(), String> {
        let source = if draws.random() { mutate::text(TEMPLATE, draws) } else { TEMPLATE.to_owned() };
        let call = json!({ "id": "c", "type": "function", "function": { "name": "f", "arguments": { "a": 1 } } });
        let messages = json!([{ "role": "user", "content": "hello" }, { "role": "assistant", "content": [{ "type": "text", "text": "x" }], "tool_calls": [call] }]);
        let messages = mutate::value(&messages, draws);
        about_to_read(format!("{source}\n{messages}").as_bytes());
        let messages = messages.as_array().cloned().unwrap_or_default();
        let chat = Chat { messages, tools: vec![json!({ "type": "function" })], ..Chat::default() };
        match ChatTemplate::new(source, "<|start|>".into(), "<|end|>".into()) {
            Ok(template) => template.render_chat(&chat).map(drop).or_else(|error| told(&error)),
            Err(error) => told(&error),
        }
    }
}
