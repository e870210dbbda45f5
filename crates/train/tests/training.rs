//! A training run is PyTorch's, step for step; it goes on as if it had never stopped; and its loss is the one that is served.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something is not as it should be")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use overfill_compress::checkpoint::Format;
use overfill_compress::export::{GgufFormats, Stored, gguf};
use overfill_compress::product::Precision;
use overfill_compress::repeats::first_repeat;
use overfill_compress::{Arm, Example, Question, Writing, answer, score};
use overfill_model::{Device, Llama, ModelError, ThreadPool, Transform, Weights, Workspace};
use overfill_text::gguf::GgufVocabulary;
use overfill_train::{
    AdamOptions, Carry, Divergence, Event, FullModel, LessonCache, Materials, OnPolicy, Outcome, Reading, Record, Schedule, Set,
    TrainError, TrainOptions, Validation, train,
};
use overfill_types::pair::WeightFormat;
use overfill_types::{KvFormats, KvTransform, SamplingParams};
use serde_json::{Map, Value};

/// Ends an answer.
const END: u32 = 5;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// The fixture's decode model, with the tokenizer files that a checkpoint has.
fn init(folder: &Path) -> PathBuf {
    checkpoint(folder, "narrow")
}

fn checkpoint(folder: &Path, model: &str) -> PathBuf {
    let init = folder.join(format!("init-{model}"));
    if !init.exists() {
        std::fs::create_dir(&init).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(fixtures().join("models").join(model).join(file), init.join(file)).unwrap();
        }
        std::fs::write(init.join("tokenizer.json"), "{}").unwrap();
        std::fs::write(init.join("tokenizer_config.json"), "{}").unwrap();
    }
    init
}

fn load(name: &str, pool: &ThreadPool) -> Llama {
    Llama::load(&fixtures().join("models").join(name), WeightFormat::F32, &Device::Cpu, pool).unwrap()
}

fn full_model(projection: bool) -> FullModel {
    let workspace = Workspace::new(ThreadPool::new(2, &[]).unwrap());
    let model = load("full", workspace.pool());
    let kv = model.config().kv;
    let carry = if projection {
        Carry::Raw((0..kv.layers).collect())
    } else {
        Carry::Handoff(Transform::load(&KvTransform::Identity, Path::new("."), kv, kv, workspace.pool()).unwrap(), kv)
    };
    FullModel { model, carry, formats: KvFormats::default(), workspace }
}

fn set(examples: Vec<Example>) -> Set {
    Set { numbers: (1..=examples.len()).collect(), examples, left_out: 0 }
}

fn examples(n: u32) -> Vec<Example> {
    let tokens = |n: u32, seed: u32| (0..n).map(|i| (i * 37 + seed * 11 + i * i) % 128).collect();
    (0..n).map(|i| Example { prompt: tokens(3 + i * 5 % 17, i), response: tokens(2 + i * 7 % 13, i + 50) }).collect()
}

fn materials(folder: &Path, train: Vec<Example>, valid: Vec<Example>, options: &TrainOptions) -> Materials {
    let cache = LessonCache::open(&folder.join("cache"), "fixture", 1 << 20).unwrap();
    let full = full_model(options.projection);
    let (train, valid) = (set(train), set(valid));
    Materials {
        init: init(folder),
        full: Some(full),
        cache: Some(cache),
        train,
        valid,
        end: END,
        format: Format::F32,
        provenance: Map::new(),
    }
}

fn options() -> TrainOptions {
    TrainOptions {
        reading: Reading::Prompt,
        ce_weight: 0.5,
        distill_weight: 1.0,
        divergence: Divergence::Kl,
        hidden_weight: 0.0,
        top: 8,
        projection: false,
        on_policy: None,
        adam: AdamOptions { weight_decay: 0.01, ..AdamOptions::default() },
        schedule: Schedule { peak: 3e-3, warmup: 0.1, last: 0.1 },
        clip: 1.0,
        epochs: 3,
        most_steps: None,
        batch_tokens: 24,
        accumulate: 2,
        seed: 7,
        validate_every: 5,
        save_every: 2,
        patience: None,
        precision: Precision::F32,
        rounding: None,
    }
}

fn run(options: &TrainOptions, materials: Materials, out: &Path, stop_at: u64) -> (Result<Outcome, TrainError>, Vec<Record>) {
    let mut told = Vec::new();
    let mut observe = |event: Event<'_>| {
        if let Event::Told(record) = event {
            told.push(record.clone());
            // What a kill is to the run: it ends in the middle of whatever it does.
            if let Record::Step(step) = record {
                assert!(step.step != stop_at, "stopped here");
            }
        }
    };
    (train(options, materials, out, &mut observe), told)
}

fn weights(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("model.safetensors")).unwrap()
}

#[test]
fn two_steps_are_pytorchs() {
    let told: Value = serde_json::from_str(&std::fs::read_to_string(fixtures().join("train/steps.json")).unwrap()).unwrap();
    let number = |name: &str| told["options"][name].as_f64().unwrap() as f32;
    let tokens = |value: &Value| value.as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect::<Vec<_>>();
    let examples = told["examples"].as_array().unwrap();
    let examples = examples.iter().map(|e| Example { prompt: tokens(&e["prompt"]), response: tokens(&e["response"]) }).collect();
    let options = TrainOptions {
        ce_weight: number("ce"),
        distill_weight: number("distill"),
        top: number("top") as usize,
        adam: AdamOptions { beta1: number("beta1"), beta2: number("beta2"), eps: number("eps"), weight_decay: number("weight_decay") },
        schedule: Schedule { peak: number("lr"), warmup: 0.0, last: 1.0 },
        clip: number("clip"),
        epochs: 2,
        // The step's batches are added up: the same sum as one batch of all.
        batch_tokens: 8,
        accumulate: 3,
        ..options()
    };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let (outcome, records) = run(&options, materials(folder.path(), examples, Vec::new(), &options), &out, 0);
    let steps = records.iter().filter_map(|r| if let Record::Step(step) = r { Some(step) } else { None });
    for (step, want) in steps.zip(told["steps"].as_array().unwrap()) {
        for (name, got) in [("ce", step.ce), ("kl", step.kl), ("gradient", step.gradient), ("tokens", step.tokens as f64)] {
            let want = want[name].as_f64().unwrap();
            assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "step {}: {name} {got}, PyTorch {want}", step.step);
        }
    }
    let outcome = outcome.unwrap();
    assert_eq!(outcome.steps, 2);
    let ours = Weights::open(&outcome.model).unwrap();
    let bytes = std::fs::read(fixtures().join("train/after.safetensors")).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert!(!theirs.names().is_empty());
    for (name, tensor) in theirs.tensors() {
        let (got, _) = ours.numbers(&name).unwrap();
        for (got, want) in got.iter().zip(tensor.data().chunks_exact(4)) {
            let want = f32::from_le_bytes(want.try_into().unwrap());
            assert!((got - want).abs() < 5e-5, "{name}: {got}, PyTorch {want}");
        }
    }
}

/// In every way of reading: killed twice, at moments that no state was saved at, it ends in the same bits, on another number of threads.
#[test]
fn a_stopped_run_goes_on_as_if_it_had_not() {
    let own = Some(OnPolicy { share: 0.4, temperature: 1.0, tokens: 9 });
    let ways = [
        (Reading::Prompt, false, None),
        (Reading::Random, false, None),
        (Reading::Share(0.5), true, None),
        (Reading::Nothing, false, None),
        (Reading::Prompt, false, own),
        (Reading::Random, false, own),
        (Reading::Nothing, false, own),
    ];
    for (reading, projection, on_policy) in ways {
        let hidden_weight = if projection { 0.3 } else { 0.0 };
        let options = TrainOptions { reading, projection, on_policy, hidden_weight, ..options() };
        let folder = tempfile::tempdir().unwrap();
        let new = || materials(folder.path(), examples(20), examples(4), &options);
        let (outcome, whole) = run(&options, new(), &folder.path().join("whole"), 0);
        let outcome = outcome.unwrap();
        assert!(outcome.steps > 12, "{}", outcome.steps);

        let out = folder.path().join("stopped");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for stop_at in [4, 9] {
            assert!(catch_unwind(AssertUnwindSafe(|| pool.install(|| run(&options, new(), &out, stop_at)))).is_err());
        }
        // What is given must be what was given.
        let other = TrainOptions { seed: 8, ..options.clone() };
        assert!(matches!(run(&other, new(), &out, 0).0, Err(TrainError::Refused(_))));
        let again = pool.install(|| run(&options, new(), &out, 0)).0.unwrap();
        assert_eq!((again.steps, again.best), (outcome.steps, outcome.best));
        assert!(weights(&again.model) == weights(&outcome.model), "{reading:?}, {on_policy:?}");
        if projection {
            let file = |model: &Path| std::fs::read(model.join("projection.safetensors")).unwrap();
            assert!(file(&again.model) == file(&outcome.model));
        }
        let log = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
        let losses = |records: &[Record]| -> Vec<(u64, f64)> {
            let told = records.iter().map(|r| match r {
                Record::Step(s) => (s.step, s.loss),
                Record::Validation(v) => (v.step, v.loss),
            });
            told.collect()
        };
        let logged: Vec<Record> = log.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(losses(&logged), losses(&whole));
        assert!(std::fs::read_to_string(out.join("curve.svg")).unwrap().ends_with("</svg>\n"));
        // It is over, and says so.
        assert!(matches!(run(&options, new(), &out, 0).0, Err(TrainError::Refused(_))));
    }
}

/// What the decode model writes itself is what the pair would answer at that moment; and learning from nothing else brings what it
/// says there nearer to the full model.
#[test]
fn it_learns_from_its_own_answers() {
    let folder = tempfile::tempdir().unwrap();
    let own = OnPolicy { share: 1.0, temperature: 0.0, tokens: 12 };
    let all = examples(20);
    let longest = all.iter().map(|e| e.prompt.len()).max().unwrap() + own.tokens;
    // One step of all examples: its answers are those of the model before the first step.
    let options = TrainOptions { on_policy: Some(own), batch_tokens: 10_000, accumulate: 1, most_steps: Some(1), epochs: 1, ..options() };
    let (_, records) = run(&options, materials(folder.path(), all.clone(), Vec::new(), &options), &folder.path().join("one"), 0);
    let [Record::Step(step)] = records.as_slice() else { panic!("one step: {records:?}") };
    let written = step.written.unwrap();

    let mut workspace = Workspace::new(ThreadPool::new(1, &[]).unwrap());
    let (full, decode) = (load("full", workspace.pool()), load("narrow", workspace.pool()));
    let kv = full.config().kv;
    let transform = Transform::load(&KvTransform::Identity, Path::new("."), kv, kv, workspace.pool()).unwrap();
    let arm = Arm::Overfill { decode: &decode, transform: &transform };
    let writing = Writing { batch: 3, positions: longest, formats: KvFormats::default(), end: vec![END] };
    let asked = all.iter().map(|e| Question { prompt: e.prompt.clone(), sampling: SamplingParams::greedy(), max_tokens: own.tokens });
    let (mut examples, mut circles, mut tokens) = (Vec::new(), 0, 0);
    answer(&full, arm, &writing, &mut workspace, asked, |i, mut answer: Vec<u32>| {
        tokens += answer.len();
        if let Some(again) = first_repeat(&answer) {
            circles += 1;
            answer.truncate(again + 1);
        }
        let response = if answer.len() < 2 { all[i].response.clone() } else { answer };
        examples.push(Example { prompt: all[i].prompt.clone(), response });
        Ok::<_, ModelError>(())
    })
    .unwrap();
    assert_eq!((written.circles, step.tokens), (circles, examples.iter().map(|e| e.response.len() - 1).sum()));
    let theirs: usize = all.iter().map(|e| e.response.len().min(own.tokens)).sum();
    assert!((written.length_ratio - tokens as f64 / theirs as f64).abs() < 1e-9);
    let scored = score(&full, &[arm], KvFormats::default(), &mut workspace, &examples, |_| {}).unwrap();
    let served = scored[0].iter().map(|s| s.loss(false)).sum::<f64>() / step.tokens as f64;
    assert!((step.ce - served).abs() < 1e-4, "training {}, serving {served}", step.ce);
    // Nobody says that its own tokens were the right ones.
    assert!((step.loss - step.kl).abs() < 1e-9);

    for divergence in ["kl", "reverse-kl", "jsd:0.5", "skewed-kl:0.1", "skewed-reverse-kl:0.1"] {
        let sampled = OnPolicy { temperature: 1.0, ..own };
        let divergence = divergence.parse().unwrap();
        let options =
            TrainOptions { on_policy: Some(sampled), divergence, batch_tokens: 60, most_steps: None, epochs: 40, ..options.clone() };
        let materials = materials(folder.path(), all.clone(), Vec::new(), &options);
        let (_, records) = run(&options, materials, &folder.path().join(format!("{divergence:?}")), 0);
        let told: Vec<f64> = records.iter().filter_map(|r| if let Record::Step(s) = r { Some(s.loss) } else { None }).collect();
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let quarter = told.len() / 4;
        let (first, last) = (mean(&told[..quarter]), mean(&told[3 * quarter..]));
        assert!(last < 0.9 * first, "{divergence:?}: {first} at first, {last} at last");
    }
}

/// Hidden states are learned too: those of the full model itself are at no distance, others come nearer; what maps them stays in the run.
#[test]
fn hidden_states_come_nearer() {
    let folder = tempfile::tempdir().unwrap();
    let distances = |init: PathBuf, options: &TrainOptions| {
        let out = folder.path().join(format!("run-{}", init.file_name().unwrap().display()));
        let materials = Materials { init, ..materials(folder.path(), examples(20), examples(6), options) };
        let (outcome, records) = run(options, materials, &out, 0);
        let told = records.iter().filter_map(|r| if let Record::Validation(v) = r { Some(v.states) } else { None }).collect::<Vec<_>>();
        (outcome.unwrap(), told)
    };
    let options = TrainOptions { hidden_weight: 0.5, epochs: 6, ..options() };
    let same = TrainOptions { most_steps: Some(1), ..options.clone() };
    let (_, told) = distances(checkpoint(folder.path(), "full"), &same);
    assert!(told[0] < 1e-3, "{told:?}");
    let (outcome, told) = distances(init(folder.path()), &options);
    assert!(told[0] > 0.1 && *told.last().unwrap() < 0.8 * told[0], "{told:?}");
    let weights = Weights::open(&outcome.model).unwrap();
    assert!(!weights.has("state_map.weight") && weights.has("model.norm.weight"));
    // Without the weight nothing is asked and nothing told.
    let plain = TrainOptions { hidden_weight: 0.0, most_steps: Some(1), ..options };
    let folder = tempfile::tempdir().unwrap();
    let (_, records) = run(&plain, materials(folder.path(), examples(5), examples(2), &plain), &folder.path().join("run"), 0);
    assert!(records.iter().all(|r| !matches!(r, Record::Validation(v) if v.states != 0.0)));
}

/// The validation's loss before the first step is what the engine that serves finds.
#[test]
fn the_loss_is_the_one_that_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let mut workspace = Workspace::new(ThreadPool::new(1, &[]).unwrap());
    let (full, decode) = (load("full", workspace.pool()), load("narrow", workspace.pool()));
    let transform = Transform::load(&KvTransform::Identity, Path::new("."), full.config().kv, full.config().kv, workspace.pool()).unwrap();
    let valid = examples(9);
    for (reading, arm) in
        [(Reading::Prompt, Arm::Overfill { decode: &decode, transform: &transform }), (Reading::Nothing, Arm::Alone(&decode))]
    {
        let options = TrainOptions { reading, most_steps: Some(1), ..options() };
        let out = folder.path().join(format!("{reading:?}"));
        let (_, records) = run(&options, materials(folder.path(), examples(3), valid.clone(), &options), &out, 0);
        let Record::Validation(told) = &records[0] else { panic!("a run begins with a validation") };
        let scored = score(&full, &[arm], KvFormats::default(), &mut workspace, &valid, |_| {}).unwrap();
        let tokens: usize = valid.iter().map(|e| e.response.len() - 1).sum();
        let served = scored[0].iter().map(|s| s.loss(false)).sum::<f64>() / tokens as f64;
        assert_eq!(told.tokens, tokens);
        assert!((told.ce - served).abs() < 1e-4, "{reading:?}: training {}, serving {served}", told.ce);
        let agreeing: usize = scored[0].iter().map(|s| s.agrees.iter().skip(1).filter(|a| **a).count()).sum();
        assert!((told.agreement - agreeing as f64 / tokens as f64).abs() < 1e-9);
        // All but the top is one event: a little less than the whole divergence.
        let whole = scored[0].iter().flat_map(|s| s.divergences.iter().skip(1)).map(|d| f64::from(*d)).sum::<f64>() / tokens as f64;
        assert!(told.kl <= whole + 1e-5 && told.kl > 0.0, "{} of {whole}", told.kl);
    }
}

/// With weights as a quantised file will have them, it learns, and what it reports is the loss of the exported file.
#[test]
fn a_model_that_learns_to_be_rounded_is_the_file_that_is_exported() {
    let formats = GgufFormats { layers: "q4_0".parse().unwrap(), embedding: Stored::Q8_0, head: Stored::Q8_0 };
    let options = TrainOptions { rounding: Some(formats), epochs: 6, ..options() };
    let folder = tempfile::tempdir().unwrap();
    let valid = examples(9);
    let out = folder.path().join("run");
    let materials = materials(folder.path(), examples(20), valid.clone(), &options);
    // A file has its tokenizer in it: one token for each number that the models know.
    let tokens = (0..128).map(|i| format!("token{i}")).collect();
    let token_types = vec![1; 128];
    let vocabulary = GgufVocabulary { model: "gpt2".into(), pre: Some("smollm".into()), tokens, token_types, ..Default::default() };
    std::fs::write(materials.init.join("tokenizer.json"), vocabulary.tokenizer().unwrap().to_string(false).unwrap()).unwrap();
    let (outcome, records) = run(&options, materials, &out, 0);
    let outcome = outcome.unwrap();
    let validations: Vec<&Validation> = records.iter().filter_map(|r| if let Record::Validation(v) = r { Some(v) } else { None }).collect();
    let (step, best) = outcome.best.unwrap();
    assert!(best < validations[0].loss - 0.01, "it learned: {best}, {} before", validations[0].loss);

    let file = folder.path().join("model.gguf");
    gguf(&outcome.model, formats, &file, |_, _| {}).unwrap();
    let mut workspace = Workspace::new(ThreadPool::new(1, &[]).unwrap());
    let full = load("full", workspace.pool());
    let decode = Llama::load(&file, WeightFormat::F32, &Device::Cpu, workspace.pool()).unwrap();
    let kv = full.config().kv;
    let transform = Transform::load(&KvTransform::Identity, Path::new("."), kv, kv, workspace.pool()).unwrap();
    let arm = Arm::Overfill { decode: &decode, transform: &transform };
    let scored = score(&full, &[arm], KvFormats::default(), &mut workspace, &valid, |_| {}).unwrap();
    let tokens: usize = valid.iter().map(|e| e.response.len() - 1).sum();
    let served = scored[0].iter().map(|s| s.loss(false)).sum::<f64>() / tokens as f64;
    let told = validations.iter().find(|v| v.step == step).unwrap().ce;
    assert!((told - served).abs() < 1e-4, "training {told}, the exported file {served}");
}

#[test]
fn learning_stops_when_the_validation_says_so_and_the_best_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    // Far too fast: it gets worse, and patience ends it.
    let schedule = Schedule { peak: 0.3, warmup: 0.0, last: 1.0 };
    let options = TrainOptions { schedule, epochs: 50, validate_every: 2, patience: Some(3), ..options() };
    let (outcome, records) = run(&options, materials(folder.path(), examples(20), examples(5), &options), &folder.path().join("run"), 0);
    let outcome = outcome.unwrap();
    assert!(outcome.stopped_early);
    let validations = records.iter().filter_map(|r| if let Record::Validation(v) = r { Some((v.step, v.loss)) } else { None });
    let best = validations.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(outcome.best, Some(best));
    assert_eq!(outcome.steps, best.0 + 6);
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_and_is_told() {
    let folder = tempfile::tempdir().unwrap();
    // The embedding of one token is broken, and one conversation has that token.
    let file = init(folder.path()).join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let embedding = {
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor("model.embed_tokens.weight").unwrap().data();
        let start = data.as_ptr() as usize - bytes.as_ptr() as usize;
        start..start + data.len()
    };
    let row = embedding.len() / 128;
    bytes[embedding][127 * row..].fill(0xff);
    std::fs::write(&file, bytes).unwrap();
    let mut examples = examples(20);
    for example in &mut examples {
        example.response.iter_mut().for_each(|t| *t %= 127);
    }
    examples[13].response[0] = 127;
    let options = options();
    let out = folder.path().join("run");
    let error = run(&options, materials(folder.path(), examples, Vec::new(), &options), &out, 0).0.unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { what: "loss", conversation: Some(14), .. }), "{error}");
    assert!(error.to_string().contains("conversation 14"), "{error}");
    assert!(!out.join("model").exists() && out.join("state.safetensors").exists());
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |change: &dyn Fn(&mut TrainOptions, &mut Materials), word: &str| {
        let mut options = options();
        let mut materials = materials(folder.path(), examples(3), Vec::new(), &options);
        change(&mut options, &mut materials);
        let error = run(&options, materials, &folder.path().join("run"), 0).0.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    refused(&|o, _| o.schedule.peak = 0.0, "--lr");
    refused(&|o, _| o.epochs = 0, "--epochs");
    refused(&|o, _| o.reading = Reading::Share(1.5), "--prompt-share");
    refused(&|o, _| o.top = 0, "--top");
    refused(&|_, m| m.full = None, "full model");
    let own = |share| Some(OnPolicy { share, temperature: 1.0, tokens: 8 });
    refused(&|o, _| o.on_policy = own(1.5), "--on-policy");
    refused(&|o, _| (o.on_policy, o.ce_weight, o.distill_weight) = (own(0.5), 1.0, 0.0), "--loss distill");
    refused(&|o, _| (o.on_policy, o.projection) = (own(0.5), true), "--projection");
    refused(&|o, _| (o.on_policy, o.reading) = (own(0.5), Reading::Share(0.5)), "--prompt-share");
    refused(&|_, m| m.train.examples[1].prompt[0] = 5000, "conversation 2");
    refused(&|_, m| m.init = PathBuf::from("/nowhere"), "nowhere");
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let options = options();
    let error = run(&options, materials(folder.path(), examples(3), Vec::new(), &options), &file, 0).0.unwrap_err();
    assert!(matches!(error, TrainError::File { .. }), "{error}");
}
