//! `overfill train`: the decode model learns to write after prompts that the full model has read.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use overfill_compress::checkpoint::{Checkpoint, Format};
use overfill_compress::export::{GgufFormats, Stored};
use overfill_compress::product::Precision;
use overfill_model::pair::weights_sha256;
use overfill_model::{Device, Llama, LlamaConfig, Pair, ThreadPool, Transform, Weights, Workspace};
use overfill_text::ModelText;
use overfill_train::{
    AdamOptions, Carry, Divergence, Event, FullModel, LessonCache, Materials, OnPolicy, Outcome, Reading, Record, Schedule, Set,
    TrainOptions, Written, train,
};
use overfill_types::pair::WeightFormat;
use overfill_types::{KvFormat, KvFormats, KvTransform, PruneStrategy, WireFormat};
use serde_json::{Map, json};

use crate::progress::bar;
use crate::threads::ThreadArgs;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// The decode model goes on from the full model's KV cache of the prompt
    Overfill,
    /// The baseline: the decode model reads the prompt itself, and learns to
    Decode,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Loss {
    /// Cross-entropy with the responses' own tokens
    Ce,
    /// Divergence from the full model's distribution, mixed with cross-entropy
    Distill,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  overfill train --full big/ --init small/ --data train.jsonl --valid valid.jsonl --out run/\n  overfill train --full big/ --init small/ --mode decode --data train.jsonl --valid valid.jsonl --out baseline/\n\nThe same command goes on where a stopped run was. The trained model is run/model; run/log.jsonl and run/curve.svg tell how it went."
)]
pub(crate) struct TrainArgs {
    /// A pair: its full model, KV transform and number formats
    #[arg(long, env = "OVERFILL_PAIR", required_unless_present = "full", conflicts_with = "full")]
    pair: Option<PathBuf>,
    /// The full model instead of a pair: a Hugging Face folder or a .gguf file
    #[arg(long, env = "OVERFILL_FULL")]
    full: Option<PathBuf>,
    /// How the full model's weights are held, without a pair
    #[arg(long, default_value = "bf16")]
    full_weights: WeightFormat,
    /// Which of the full model's layers go over, without a pair, where the decode model has fewer: firstlast, first or last
    #[arg(long, default_value = "firstlast")]
    keep: PruneStrategy,
    /// Numbers of the KV caches, without a pair: f32, f16 or int8
    #[arg(long, default_value = "f16")]
    kv: KvFormat,
    /// Numbers of a handoff, without a pair: f32, f16, bf16 or int8
    #[arg(long, default_value = "f16")]
    wire: WireFormat,
    /// The decode model to begin with: a Hugging Face folder [default: the pair's]
    #[arg(long, env = "OVERFILL_INIT", required_unless_present = "pair")]
    init: Option<PathBuf>,
    /// Conversations to learn from, as JSON lines
    #[arg(long, env = "OVERFILL_DATA")]
    data: PathBuf,
    /// Conversations to measure with
    #[arg(long, env = "OVERFILL_VALID")]
    valid: Option<PathBuf>,
    /// The folder of the run
    #[arg(long, env = "OVERFILL_OUT")]
    out: PathBuf,
    /// Who reads the prompt
    #[arg(long, value_enum, default_value = "overfill")]
    mode: Mode,
    /// What is minimised
    #[arg(long, value_enum, default_value = "distill")]
    loss: Loss,
    /// Weight of the cross-entropy beside the divergence
    #[arg(long, default_value_t = 0.5)]
    ce_weight: f32,
    /// Which divergence from the full model is minimised: kl, reverse-kl, jsd:B, skewed-kl:A or skewed-reverse-kl:A
    #[arg(long, default_value = "kl")]
    divergence: Divergence,
    /// Share of the batches whose answers the decode model writes itself, as it is at that moment
    #[arg(long)]
    on_policy: Option<f32>,
    /// Most tokens of such an answer
    #[arg(long, default_value_t = 128, requires = "on_policy")]
    rollout_tokens: usize,
    /// Temperature at which they are written
    #[arg(long, default_value_t = 1.0, requires = "on_policy")]
    rollout_temperature: f32,
    /// Weight of the distance from the full model's last hidden states beside the other losses; a map to them is trained too
    #[arg(long, default_value_t = 0.0)]
    hidden_weight: f32,
    /// How many of the full model's most likely tokens are learned from at each place
    #[arg(long, default_value_t = 32)]
    top: usize,
    /// The full model's reading ends anywhere, drawn anew for each conversation
    #[arg(long, conflicts_with = "prompt_share")]
    random_cutoff: bool,
    /// Share of the prompt that the full model reads; the decode model reads the rest
    #[arg(long)]
    prompt_share: Option<f32>,
    /// Train a projection of the full model's keys and values too
    #[arg(long)]
    projection: bool,
    /// What the large products read: f32, or bf16, rounded, which is faster on CPUs that multiply it (AMX, AVX-512 BF16)
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// Learn with the layers' matrices rounded as `overfill export` will store them: q4_0, q4_1, q5_0, q5_1 or q8_0 [default: not rounded]
    #[arg(long)]
    quantise: Option<Stored>,
    /// With --quantise: what the embedding will be stored as
    #[arg(long, default_value = "q8_0")]
    embedding: Stored,
    /// With --quantise: what the output head will be stored as, unless it is the embedding
    #[arg(long, default_value = "q8_0")]
    head: Stored,
    /// Highest learning rate; docs/training.md tells how the default was found
    #[arg(long, default_value_t = 1e-4)]
    lr: f32,
    /// Share of the steps in which the learning rate rises
    #[arg(long, default_value_t = 0.03)]
    warmup: f32,
    /// Share of the learning rate that is left at the end
    #[arg(long, default_value_t = 0.0)]
    last_lr: f32,
    /// Decay of the mean of gradients
    #[arg(long, default_value_t = 0.9)]
    beta1: f32,
    /// Decay of the mean of their squares
    #[arg(long, default_value_t = 0.999)]
    beta2: f32,
    /// Added to the root of the squares' mean
    #[arg(long, default_value_t = 1e-8)]
    eps: f32,
    /// Share of the matrices that is taken away in each step, times the learning rate
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f32,
    /// Longest gradient of a step
    #[arg(long, default_value_t = 1.0)]
    clip: f32,
    /// Times through the data
    #[arg(long, default_value_t = 1)]
    epochs: u64,
    /// Most steps
    #[arg(long)]
    steps: Option<u64>,
    /// Response tokens in a batch
    #[arg(long, default_value_t = 1536)]
    batch_tokens: usize,
    /// Batches in a step
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// Longest conversation in tokens; longer ones are left out and counted
    #[arg(long, default_value_t = 2048)]
    max_tokens: usize,
    /// Most conversations of the validation set
    #[arg(long, default_value_t = 200)]
    valid_samples: usize,
    /// Decides the order of conversations and all that is drawn
    #[arg(long, env = "OVERFILL_SEED", default_value_t = 0)]
    seed: u64,
    /// Steps from one validation to the next
    #[arg(long, default_value_t = 200)]
    validate_every: u64,
    /// Steps from one saved state to the next
    #[arg(long, default_value_t = 100)]
    save_every: u64,
    /// Validations in a row without a lower loss after which the run ends
    #[arg(long)]
    patience: Option<u64>,
    /// What the trained weights are stored as: f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    format: Format,
    /// Where the full model's reading is kept, for this run's next epochs and for other runs [default: not kept]
    #[arg(long, env = "OVERFILL_CACHE")]
    cache: Option<PathBuf>,
    /// Most of it, in GiB
    #[arg(long, default_value_t = 16.0)]
    cache_size: f64,
    #[command(flatten)]
    threads: ThreadArgs,
}

pub(crate) fn run(args: TrainArgs) -> anyhow::Result<()> {
    let options = args.options();
    options.check()?;
    let threads = args.threads.count();
    let source = args.source()?;
    let (text, end) = source.text()?;
    let load = |path: &Path, most: usize| Set::load(path, &text, end, args.max_tokens.min(source.longest), most);
    let train_set = load(&args.data, usize::MAX)?;
    let valid_set = args.valid.as_deref().map_or(Ok(Set::default()), |path| load(path, args.valid_samples))?;
    for (name, path, set) in [("data", Some(&args.data), &train_set), ("valid", args.valid.as_ref(), &valid_set)] {
        if let Some(path) = path {
            let (examples, tokens, left_out) = (set.examples.len(), set.response_tokens(), set.left_out);
            eprintln!("{name}: {examples} conversations with {tokens} response tokens, {left_out} left out ({})", path.display());
        }
    }
    if args.valid.is_none() {
        eprintln!("no --valid: nothing tells whether training helps, and the last weights are kept, not the best");
    }
    let provenance = args.provenance(&source, &train_set, &valid_set)?;
    let full = if options.needs_full() { Some(source.full_model(options.projection, threads)?) } else { None };
    let cache = match (&args.cache, &full) {
        (Some(folder), Some(_)) => {
            Some(LessonCache::open(folder, &source.name(options.projection)?, (args.cache_size * (1u64 << 30) as f64) as u64)?)
        }
        _ => None,
    };
    let materials =
        Materials { init: source.init.clone(), full, cache, train: train_set, valid: valid_set, end, format: args.format, provenance };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("threads cannot be started")?;
    let mut shown = Shown::default();
    let outcome = pool.install(|| train(&options, materials, &args.out, &mut |event| shown.tell(&event)))?;
    shown.end(&outcome);
    Ok(())
}

impl TrainArgs {
    fn options(&self) -> TrainOptions {
        let reading = match (self.mode, self.prompt_share, self.random_cutoff) {
            (Mode::Decode, ..) => Reading::Nothing,
            (Mode::Overfill, Some(share), _) => Reading::Share(share),
            (Mode::Overfill, None, true) => Reading::Random,
            (Mode::Overfill, None, false) => Reading::Prompt,
        };
        let distill = self.loss == Loss::Distill;
        TrainOptions {
            reading,
            ce_weight: if distill { self.ce_weight } else { 1.0 },
            distill_weight: if distill { 1.0 } else { 0.0 },
            divergence: self.divergence,
            hidden_weight: self.hidden_weight,
            // Asked also where only cross-entropy is minimised: validations then tell the divergence.
            top: self.top,
            projection: self.projection,
            on_policy: self.on_policy.map(|share| OnPolicy { share, temperature: self.rollout_temperature, tokens: self.rollout_tokens }),
            adam: AdamOptions { beta1: self.beta1, beta2: self.beta2, eps: self.eps, weight_decay: self.weight_decay },
            schedule: Schedule { peak: self.lr, warmup: self.warmup, last: self.last_lr },
            clip: self.clip,
            epochs: self.epochs,
            most_steps: self.steps,
            batch_tokens: self.batch_tokens,
            accumulate: self.accumulate,
            seed: self.seed,
            validate_every: self.validate_every,
            save_every: self.save_every,
            patience: self.patience,
            precision: self.precision,
            rounding: self.quantise.map(|layers| GgufFormats { layers, embedding: self.embedding, head: self.head }),
        }
    }

    /// Where the models come from.
    fn source(&self) -> anyhow::Result<Source> {
        if let Some(dir) = &self.pair {
            let pair = Pair::open(dir)?;
            let manifest = &pair.manifest;
            let init = match &self.init {
                Some(init) => init.clone(),
                None => dir.join(&manifest.decode.path),
            };
            let (full, weights, formats, kv) =
                (dir.join(&manifest.full.path), manifest.full.weights, manifest.kv_formats, manifest.kv.clone());
            return Source::new(full, weights, init, formats, |_, _| Ok(kv), dir.clone());
        }
        let (Some(full), Some(init)) = (&self.full, &self.init) else { bail!("name a pair, or the full model and --init") };
        let formats = KvFormats { cache: self.kv, wire: self.wire };
        let (keep, projection) = (self.keep, self.projection);
        let transform = |full: &LlamaConfig, init: &LlamaConfig| {
            if full.kv == init.kv || projection {
                return Ok(KvTransform::Identity);
            }
            let layers = keep.kept(full.kv.layers, init.kv.layers).context("the decode model has more layers than the full model")?;
            Ok(KvTransform::Prune { strategy: keep, layers })
        };
        Source::new(full.clone(), self.full_weights, init.clone(), formats, transform, PathBuf::from("."))
    }

    /// How the run came to be: for the model's folder, so without a path of this machine.
    fn provenance(&self, source: &Source, train: &Set, valid: &Set) -> anyhow::Result<Map<String, serde_json::Value>> {
        let name = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned());
        let set = |path: &Path, set: &Set| json!({ "file": name(path), "tokens_sha256": set.sha256(), "conversations": set.examples.len(), "response_tokens": set.response_tokens() });
        let mut all = Map::new();
        all.insert("made_by".into(), json!("overfill train"));
        all.insert("full_sha256".into(), json!(weights_sha256(&source.full)?));
        all.insert("init_sha256".into(), json!(weights_sha256(&source.init)?));
        if let Ok(text) = std::fs::read_to_string(source.init.join("provenance.json")) {
            let init: serde_json::Value = serde_json::from_str(&text).context("the decode model's provenance.json is no JSON")?;
            all.insert("init".into(), init);
        }
        all.insert("data".into(), set(&self.data, train));
        if let Some(path) = &self.valid {
            all.insert("valid".into(), set(path, valid));
        }
        Ok(all)
    }
}

/// Where a run's models come from.
struct Source {
    full: PathBuf,
    weights: WeightFormat,
    init: PathBuf,
    formats: KvFormats,
    transform: KvTransform,
    /// Where the transform's file lies.
    dir: PathBuf,
    full_config: LlamaConfig,
    init_config: LlamaConfig,
    /// Longest sequence that both models take.
    longest: usize,
}

impl Source {
    fn new(
        full: PathBuf,
        weights: WeightFormat,
        init: PathBuf,
        formats: KvFormats,
        transform: impl FnOnce(&LlamaConfig, &LlamaConfig) -> anyhow::Result<KvTransform>,
        dir: PathBuf,
    ) -> anyhow::Result<Self> {
        let (full_config, init_config) = (Weights::open(&full)?.config().clone(), Weights::open(&init)?.config().clone());
        let transform = transform(&full_config, &init_config)?;
        let longest = full_config.max_context.min(init_config.max_context);
        Ok(Self { full, weights, init, formats, transform, dir, full_config, init_config, longest })
    }

    /// The text side, and the token that ends a turn.
    fn text(&self) -> anyhow::Result<(ModelText, u32)> {
        let files = Checkpoint::open(&self.full)?.tokenizer()?;
        let config = serde_json::to_vec(&files.config)?;
        let text = ModelText::from_files("full model", &files.tokenizer, &config)?;
        let end = text.eos().or_else(|| self.full_config.eos_token_ids.first().copied());
        Ok((text, end.context("the full model does not say which token ends an answer")?))
    }

    fn full_model(&self, projection: bool, threads: usize) -> anyhow::Result<FullModel> {
        let workspace = Workspace::new(ThreadPool::new(threads, &[])?);
        let model = Llama::load(&self.full, self.weights, &Device::Cpu, workspace.pool())?;
        let (full, decode) = (self.full_config.kv, self.init_config.kv);
        let carry = if projection {
            Carry::Raw(KvTransform::projection_layers(full.layers, decode.layers))
        } else {
            Carry::Handoff(Transform::load(&self.transform, &self.dir, full, decode, workspace.pool())?, decode)
        };
        Ok(FullModel { model, carry, formats: self.formats, workspace })
    }

    /// All that decides what the full model says and how its keys and values go over.
    fn name(&self, projection: bool) -> anyhow::Result<String> {
        let transform = if projection { format!("raw {}", self.init_config.kv) } else { format!("{:?}", self.transform) };
        Ok(format!("{} {:?} {:?} {transform} {}", weights_sha256(&self.full)?, self.weights, self.formats, self.init_config.kv))
    }
}

/// How often a line tells of the steps where there is no terminal to show a bar on.
const LINE: Duration = Duration::from_secs(60);

/// What is shown while a run goes on: a bar on a terminal, else a line now and then; and a line for each validation.
#[derive(Default)]
struct Shown {
    bar: Option<ProgressBar>,
    steps: u64,
    tokens: usize,
    begun: Option<Instant>,
    told: Option<Instant>,
}

impl Shown {
    fn tell(&mut self, event: &Event<'_>) {
        match event {
            Event::Begun(step, steps) => {
                let bar = bar(*steps, "training");
                bar.set_position(*step);
                self.bar = Some(bar);
                self.steps = *steps;
                (self.begun, self.told) = (Some(Instant::now()), Some(Instant::now()));
            }
            Event::Told(Record::Step(step)) => {
                self.tokens += step.tokens;
                let seconds = self.begun.map_or(0.0, |b| b.elapsed().as_secs_f64());
                let mut message = format!("loss {:.3}, {:.0} tokens/s", step.loss, self.tokens as f64 / seconds.max(1e-9));
                if let Some(Written { answers, circles, length_ratio, .. }) = step.written {
                    message += &format!(", own answers {length_ratio:.2} as long as the data's, {circles} of {answers} cut off");
                }
                if let Some(bar) = &self.bar {
                    if bar.is_hidden() && self.told.is_some_and(|told| told.elapsed() >= LINE) {
                        println!("step {} of {}: {message}", step.step, self.steps);
                        self.told = Some(Instant::now());
                    }
                    bar.set_message(message);
                    bar.set_position(step.step);
                }
            }
            Event::Told(Record::Validation(v)) => {
                let line = format!(
                    "step {}: validation loss {:.4}, cross-entropy {:.4}, divergence {:.4}, agreement {:.1} %",
                    v.step,
                    v.loss,
                    v.ce,
                    v.kl,
                    100.0 * v.agreement
                );
                match &self.bar {
                    Some(bar) => bar.suspend(|| println!("{line}")),
                    None => println!("{line}"),
                }
            }
        }
    }

    fn end(&self, outcome: &Outcome) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let why = if outcome.stopped_early { ", ended by the validation loss" } else { "" };
        println!("{} steps{why}", outcome.steps);
        if let Some((step, loss)) = outcome.best {
            println!("kept: the weights after step {step}, validation loss {loss:.4}");
            if step == 0 {
                println!(
                    "training has not helped: no validation was better than the one before the first step; try a lower --lr or larger batches"
                );
            }
        }
        println!("{}", outcome.model.display());
    }
}
