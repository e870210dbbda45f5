//! A training run: steps, validations, saved states, and the folder that comes out.

use std::path::{Path, PathBuf};
use std::time::Instant;

use overfill_compress::Example;
use overfill_compress::checkpoint::{Checkpoint, Format, Writer};
use overfill_model::config::LlamaConfig;
use overfill_model::{Llama, Weights, making};
use overfill_types::pair::WeightFormat;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::adam::{Adam, norm};
use crate::batches::{Plan, Reading, in_order};
use crate::cache::LessonCache;
use crate::curve;
use crate::error::TrainError;
use crate::lesson::{FullModel, Lesson, Question};
use crate::log::{Log, Record, Step, Validation};
use crate::net::{Batch, Entry, Net, Objective, RowLoss, STATE_MAP, Sequence, Shape, State, Target, Teacher};
use crate::options::{Set, TrainOptions};
use crate::rollout::{self, OnPolicy, Written};
use crate::rounding::Rounded;
use crate::state::{self, Progress, STATE_FILE};

/// File name of the loss curve.
pub(super) const CURVE_FILE: &str = "curve.svg";
/// The folder of the trained model.
pub(super) const MODEL_FOLDER: &str = "model";
/// File name of a trained projection, in the model's folder.
pub(super) const PROJECTION_FILE: &str = "projection.safetensors";

/// What a run works with.
pub struct Materials {
    /// The decode model as it is before the first step, as it is told in provenances.
    pub init: PathBuf,
    /// The full model; none where nothing of it is asked.
    pub full: Option<FullModel>,
    /// Where its reading is kept.
    pub cache: Option<LessonCache>,
    /// What is learned from.
    pub train: Set,
    /// What the learning is measured with; may be empty.
    pub valid: Set,
    /// Token that ends an answer.
    pub end: u32,
    /// What the written weights are stored as.
    pub format: Format,
    /// How the run came to be, for people.
    pub provenance: Map<String, Value>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Steps taken.
    pub steps: u64,
    /// Whether the validation loss ended it.
    pub stopped_early: bool,
    /// The step whose weights were kept, and its validation loss, where there is a validation set.
    pub best: Option<(u64, f64)>,
    /// Where the model lies.
    pub model: PathBuf,
}

/// What the caller is told while a run goes on.
pub enum Event<'a> {
    /// The run begins, or goes on after so many steps of so many.
    Begun(u64, u64),
    /// A step or a validation.
    Told(&'a Record),
}

/// Trains and writes the model to `out/model`; everything else of the run lies in `out` too. A run that was stopped goes
/// on where its last state is. Runs on the rayon pool that it is called in.
///
/// # Errors
/// See [`TrainError`]; the last saved state stays.
pub fn train(options: &TrainOptions, materials: Materials, out: &Path, observe: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, TrainError> {
    options.check()?;
    let mut run = Run::begin(options, materials, out)?;
    observe(Event::Begun(run.progress.step, run.plan.steps.len() as u64));
    if run.progress.step == 0 {
        run.validate(observe)?;
    }
    while let Some((epoch, batches)) = run.plan.steps.get(run.progress.step as usize).cloned() {
        if run.patience_is_over() {
            break;
        }
        run.step(epoch, &batches, observe)?;
        let (step, last) = (run.progress.step, run.plan.steps.len() as u64);
        if step.is_multiple_of(options.validate_every) || step == last {
            run.validate(observe)?;
        } else if step.is_multiple_of(options.save_every) {
            run.save()?;
        }
    }
    run.end()
}

struct Run<'o> {
    options: &'o TrainOptions,
    materials: Materials,
    out: PathBuf,
    init: Checkpoint,
    net: Net,
    entries: Vec<Entry>,
    parameters: Vec<f32>,
    /// What is computed with instead, where the model learns to be rounded.
    rounded: Option<Rounded>,
    gradients: Vec<f32>,
    adam: Adam,
    plan: Plan,
    progress: Progress,
    log: Log,
    /// Buffers of steps, and of validations, which keep less.
    training: State,
    validating: State,
    begun: Instant,
    seconds_before: f64,
}

impl<'o> Run<'o> {
    fn begin(options: &'o TrainOptions, materials: Materials, out: &Path) -> Result<Self, TrainError> {
        std::fs::create_dir_all(out).map_err(TrainError::file(out))?;
        if out.join(MODEL_FOLDER).exists() {
            let done = out.join(MODEL_FOLDER);
            return Err(TrainError::Refused(format!("{} exists already: the run is over; name another folder", done.display())));
        }
        let weights = Weights::open(&materials.init)?;
        let mut shape = Shape::of(&weights, &materials.init)?;
        if options.projection {
            let rows = materials.full.as_ref().map(|full| full.rows().0);
            shape.projected = rows;
        }
        if options.hidden_weight > 0.0 {
            shape.taught = materials.full.as_ref().map(|full| full.model.config().hidden_size);
        }
        if options.needs_full() && materials.full.is_none() {
            return Err(TrainError::Refused("these options ask for the full model: name the pair or the full model".into()));
        }
        let config = weights.config().clone();
        check_tokens(&config, [&materials.train, &materials.valid])?;
        let mut parameters = shape.read(&weights, &materials.init)?;
        begin_projection(&shape, &mut parameters);
        begin_state_map(&shape, &mut parameters);
        drop(weights);
        let (train, valid) = (&materials.train, &materials.valid);
        let plan = Plan::new(&train.examples, options.batch_tokens, options.accumulate, options.epochs, options.most_steps, options.seed);
        let mut adam = Adam::new(options.adam, parameters.len());
        let decides = json!([options, train.sha256(), valid.sha256(), overfill_model::pair::weights_sha256(&materials.init)?]);
        let name = hex::encode(Sha256::digest(decides.to_string()));
        let progress = state::load(out, &name, &mut parameters, &mut adam)?.unwrap_or(Progress { run: name, ..Progress::default() });
        let log = Log::open(out, progress.step)?;
        let init = Checkpoint::open(&materials.init)?;
        let run = Self {
            options,
            out: out.to_owned(),
            init,
            entries: shape.entries(),
            rounded: options.rounding.map(Rounded::new),
            gradients: vec![0.0; parameters.len()],
            net: Net::new(shape, &config),
            parameters,
            adam,
            plan,
            log,
            training: State::new(options.precision),
            validating: State::default(),
            begun: Instant::now(),
            seconds_before: progress.seconds,
            progress,
            materials,
        };
        run.clear_stale()?;
        Ok(run)
    }

    /// Takes away what a stopped run left: models of validations that its state does not know of.
    fn clear_stale(&self) -> Result<(), TrainError> {
        let known = self.progress.best.map(|(step, _)| best_folder(step));
        for entry in std::fs::read_dir(&self.out).map_err(TrainError::file(&self.out))? {
            let entry = entry.map_err(TrainError::file(&self.out))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let left = [".checkpoint-", ".state-", ".log-"].iter().any(|p| name.starts_with(p));
            if left || (name.starts_with("best-") && Some(&name) != known.as_ref()) {
                let path = entry.path();
                let gone = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                gone.map_err(TrainError::file(&path))?;
            }
        }
        Ok(())
    }

    fn patience_is_over(&self) -> bool {
        self.options.patience.is_some_and(|patience| self.progress.stale >= patience)
    }

    /// What the full model says about an example.
    fn lesson(materials: &mut Materials, example: &Example, question: Question) -> Result<Lesson, TrainError> {
        match (&mut materials.full, &mut materials.cache) {
            (Some(full), Some(cache)) => cache.lesson(full, example, question),
            (Some(full), None) => full.read(example, question),
            (None, _) => Ok(Lesson::default()),
        }
    }

    /// Reads what a batch is made of.
    fn fetch(&mut self, batch: &[Taken], valid: bool) -> Result<Vec<Part>, TrainError> {
        let (top, states) = (self.options.top, self.options.hidden_weight > 0.0);
        let mut parts = Vec::with_capacity(batch.len());
        for Taken { index, example, cut, own } in batch {
            let all = example.prompt.len() + example.response.len();
            let kept = if !valid && self.options.reading.wants_response() { all - 1 } else { *cut };
            let question = Question { kept, top, states };
            let mut lesson = match &mut self.materials.full {
                _ if kept == 0 && top == 0 => Lesson::default(),
                // What was written a moment ago is never read again.
                Some(full) if *own => full.read(example, question)?,
                _ => Self::lesson(&mut self.materials, example, question)?,
            };
            lesson.context.truncate(*cut);
            parts.push(Part::new(*index, example, *cut, lesson));
        }
        Ok(parts)
    }

    /// What the step's batches are made of: the data's answers, or the decode model's own, as it is now.
    fn take(&mut self, epoch: u64, batches: &[Vec<usize>]) -> Result<(Vec<Vec<Taken>>, Option<Written>), TrainError> {
        let options = self.options;
        let first = self.progress.step * options.accumulate as u64;
        let on_policy = |at: usize| options.on_policy.is_some_and(|how| how.takes(first + at as u64));
        let examples = &self.materials.train.examples;
        let mut taken: Vec<Vec<Taken>> = batches
            .iter()
            .enumerate()
            .map(|(at, batch)| {
                let new = |&index: &usize| Taken { index, example: examples[index].clone(), cut: 0, own: on_policy(at) };
                batch.iter().map(new).collect()
            })
            .collect();
        let own: Vec<(&mut Example, u64)> = taken
            .iter_mut()
            .flatten()
            .filter(|taken| taken.own)
            .map(|taken| (&mut taken.example, draw_key(options.seed, epoch, taken.index)))
            .collect();
        let written = match options.on_policy {
            Some(how) if !own.is_empty() => Some(self.write_own(how, own)?),
            _ => None,
        };
        for taken in taken.iter_mut().flatten() {
            taken.cut = options.reading.cut(&taken.example, options.seed, epoch, taken.index);
        }
        Ok((taken, written))
    }

    /// Has the decode model of this moment answer.
    fn write_own(&mut self, how: OnPolicy, mut examples: Vec<(&mut Example, u64)>) -> Result<Written, TrainError> {
        let Some(full) = &mut self.materials.full else {
            return Err(TrainError::Refused("--on-policy asks the full model: name the pair or the full model".into()));
        };
        let weights = self.rounded.as_ref().map_or(self.parameters.as_slice(), Rounded::weights);
        let tensors = self.entries.iter().filter(|e| e.of_model()).map(|e| (e.name.clone(), e.shape.clone(), &weights[e.range.clone()]));
        let config = LlamaConfig { tied_embeddings: self.net.shape.tied, ..self.init.config().clone() };
        let weights = Weights::of_numbers(config, tensors)?;
        let decode = Llama::of(&weights, WeightFormat::F32, full.model.device(), full.workspace.pool())?;
        rollout::write(full, &decode, self.options.reading, how, &[self.materials.end], &mut examples)
    }

    fn step(&mut self, epoch: u64, batches: &[Vec<usize>], observe: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        let begun = Instant::now();
        let number = self.progress.step + 1;
        let options = self.options;
        self.round();
        let (batches, written) = self.take(epoch, batches)?;
        let tokens: usize = batches.iter().flatten().map(|taken| learned(&taken.example, taken.cut).len()).sum();
        let mut reading = 0.0;
        let mut sums = [0.0f64; 4];
        for (i, batch) in batches.iter().enumerate() {
            let fetching = Instant::now();
            let parts = self.fetch(batch, false)?;
            reading += fetching.elapsed().as_secs_f64();
            let own = batch.iter().any(|taken| taken.own);
            let objective = Objective { mix: if own { options.mix_on_policy() } else { options.mix() }, scale: 1.0 / tokens as f32 };
            let (sequences, targets, owners) = laid_out(&parts, options.top, 0);
            let batch = Batch { sequences: &sequences, targets: &targets };
            let weights = self.rounded.as_ref().map_or(self.parameters.as_slice(), Rounded::weights);
            let losses = self.net.train(weights, &batch, objective, &mut self.training, &mut self.gradients, i > 0);
            if let Some(at) = losses.iter().position(|l| !l.mixed(objective.mix).is_finite()) {
                let conversation = self.materials.train.numbers[parts[owners[at]].index];
                return Err(TrainError::NotFinite { step: number, what: "loss", conversation: Some(conversation) });
            }
            add(&mut sums, &losses, objective.mix);
        }
        let gradient = norm(&self.gradients);
        if !gradient.is_finite() {
            return Err(TrainError::NotFinite { step: number, what: "gradient", conversation: None });
        }
        let rate = options.schedule.rate(self.progress.step, self.plan.steps.len() as u64);
        let scale = if gradient > f64::from(options.clip) { (f64::from(options.clip) / gradient) as f32 } else { 1.0 };
        self.adam.step(&mut self.parameters, &self.gradients, &self.entries, rate, scale);
        self.progress.step = number;
        self.progress.tokens += tokens as u64;
        let [loss, ce, kl, states] = sums.map(|s| s / tokens as f64);
        let seconds = begun.elapsed().as_secs_f64();
        let record = Record::Step(Step { step: number, epoch, loss, ce, kl, states, rate, gradient, tokens, written, seconds, reading });
        observe(Event::Told(&record));
        self.log.write(record)
    }

    /// Measures the validation set, keeps the model if it is the best so far, and saves the state.
    fn validate(&mut self, observe: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        if self.materials.valid.examples.is_empty() {
            return self.save();
        }
        let reading = if self.options.reading == Reading::Random { Reading::Prompt } else { self.options.reading };
        let (mut sums, mut tokens, mut agreeing) = ([0.0; 4], 0, 0);
        let mix = self.options.mix();
        self.round();
        for batch in in_order(&self.materials.valid.examples, self.options.batch_tokens) {
            let valid = &self.materials.valid.examples;
            let new =
                |&index: &usize| Taken { index, example: valid[index].clone(), cut: reading.cut(&valid[index], 0, 0, index), own: false };
            let batch: Vec<Taken> = batch.iter().map(new).collect();
            let parts = self.fetch(&batch, true)?;
            let (sequences, targets, _) = laid_out(&parts, self.options.top, 1);
            let weights = self.rounded.as_ref().map_or(self.parameters.as_slice(), Rounded::weights);
            self.net.run(weights, &sequences, &mut self.validating, &mut |_, _, _| {});
            let losses = self.net.loss(weights, &targets, mix.divergence, &mut self.validating);
            add(&mut sums, &losses, mix);
            tokens += losses.len();
            agreeing += losses.iter().filter(|l| l.agrees).count();
        }
        let [loss, ce, kl, states] = sums.map(|s| s / tokens as f64);
        let step = self.progress.step;
        let record = Record::Validation(Validation { step, loss, ce, kl, states, agreement: agreeing as f64 / tokens as f64, tokens });
        observe(Event::Told(&record));
        self.log.write(record)?;
        let before = self.progress.best;
        // A loss that is no number is not lower than any.
        if before.is_none_or(|(_, best)| loss < best) {
            self.progress.best = Some((step, loss));
            self.progress.stale = 0;
            let folder = self.out.join(best_folder(step));
            if folder.exists() {
                std::fs::remove_dir_all(&folder).map_err(TrainError::file(&folder))?;
            }
            self.write_model(&folder)?;
        } else {
            self.progress.stale += 1;
        }
        self.save()?;
        if let Some((old, _)) = before.filter(|_| self.progress.stale == 0) {
            let folder = self.out.join(best_folder(old));
            std::fs::remove_dir_all(&folder).map_err(TrainError::file(&folder))?;
        }
        let path = self.out.join(CURVE_FILE);
        std::fs::write(&path, curve::svg(&self.log.records)).map_err(TrainError::file(&path))
    }

    fn round(&mut self) {
        if let Some(rounded) = &mut self.rounded {
            rounded.update(&self.parameters, &self.entries);
        }
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.progress.seconds = self.seconds_before + self.begun.elapsed().as_secs_f64();
        state::save(&self.out, &self.parameters, &self.adam, &self.progress)
    }

    /// Writes the model as it is now to `folder`, with how it was made.
    fn write_model(&self, folder: &Path) -> Result<(), TrainError> {
        let config = LlamaConfig { tied_embeddings: self.net.shape.tied, ..self.init.config().clone() };
        let mut writer = Writer::create(folder, self.materials.format, &config)?;
        for entry in &self.entries {
            if entry.of_model() {
                writer.tensor(entry.name.clone(), entry.shape.clone(), &self.parameters[entry.range.clone()])?;
            }
        }
        if self.options.projection {
            self.write_projection(&writer.folder().join(PROJECTION_FILE))?;
        }
        let closed = writer.close(&self.init)?;
        let mut provenance = self.materials.provenance.clone();
        provenance.insert("options".into(), json!(self.options));
        provenance.insert("steps".into(), json!(self.progress.step));
        provenance.insert("of_steps".into(), json!(self.plan.steps.len()));
        provenance.insert("response_tokens".into(), json!(self.progress.tokens));
        let validations = self.log.records.iter().filter(|r| matches!(r, Record::Validation(_)));
        provenance.insert("validations".into(), json!(validations.collect::<Vec<_>>()));
        Ok(closed.appear(&provenance)?)
    }

    fn write_projection(&self, path: &Path) -> Result<(), TrainError> {
        use safetensors::tensor::{Dtype, TensorView};
        let failed = |e: safetensors::SafeTensorError| TrainError::File { path: path.to_owned(), source: std::io::Error::other(e) };
        let views = self.entries.iter().filter(|e| e.of_projection()).map(|entry| {
            let bytes = bytemuck::cast_slice(&self.parameters[entry.range.clone()]);
            Ok((entry.name.clone(), TensorView::new(Dtype::F32, entry.shape.clone(), bytes)?))
        });
        let views = views.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        safetensors::serialize_to_file(views, None, path).map_err(failed)?;
        making::as_its_folder(path).map_err(TrainError::file(path))
    }

    /// Puts the model at its place. The state is taken away: the run is over.
    fn end(self) -> Result<Outcome, TrainError> {
        let model = self.out.join(MODEL_FOLDER);
        match self.progress.best {
            Some((step, _)) => {
                let folder = self.out.join(best_folder(step));
                std::fs::rename(&folder, &model).map_err(TrainError::file(&folder))?;
            }
            None => self.write_model(&model)?,
        }
        let state = self.out.join(STATE_FILE);
        std::fs::remove_file(&state).map_err(TrainError::file(&state))?;
        let stopped_early = self.progress.step < self.plan.steps.len() as u64;
        Ok(Outcome { steps: self.progress.step, stopped_early, best: self.progress.best, model })
    }
}

impl TrainOptions {
    /// Whether the full model is asked for anything.
    pub fn needs_full(&self) -> bool {
        self.top > 0 || self.reading != Reading::Nothing
    }
}

fn best_folder(step: u64) -> String {
    format!("best-{step:06}")
}

/// A projection begins as the identity, as far as both sides go.
fn begin_projection(shape: &Shape, parameters: &mut [f32]) {
    for entry in shape.entries().iter().filter(|e| e.of_projection() && e.shape.len() == 2) {
        let (outputs, inputs) = (entry.shape[0], entry.shape[1]);
        (0..outputs.min(inputs)).for_each(|i| parameters[entry.range.start + i * inputs + i] = 1.0);
    }
}

/// The map to the full model's states begins as the identity, as far as both sides go, of states without the last norm's weight.
fn begin_state_map(shape: &Shape, parameters: &mut [f32]) {
    let Some(map) = shape.entries().into_iter().find(|e| e.name == STATE_MAP) else { return };
    let (outputs, inputs) = (map.shape[0], map.shape[1]);
    for i in 0..outputs.min(inputs) {
        let weight = parameters[shape.norm_range().start + i];
        parameters[map.range.start + i * inputs + i] = if weight.abs() > 1e-3 { 1.0 / weight } else { 0.0 };
    }
}

fn check_tokens(config: &LlamaConfig, sets: [&Set; 2]) -> Result<(), TrainError> {
    for (example, number) in sets.iter().flat_map(|s| s.examples.iter().zip(&s.numbers)) {
        if let Some(id) = example.prompt.iter().chain(&example.response).find(|id| **id as usize >= config.vocab_size) {
            let vocab = config.vocab_size;
            return Err(TrainError::Refused(format!(
                "conversation {number} has token id {id}, the model knows {vocab}: another tokenizer?"
            )));
        }
    }
    Ok(())
}

/// Which response tokens are learned when the decode model begins to read at `cut`: those that something is read before.
fn learned(example: &Example, cut: usize) -> std::ops::Range<usize> {
    (cut + 1).saturating_sub(example.prompt.len())..example.response.len()
}

/// Key of what is drawn for an example in an epoch.
fn draw_key(seed: u64, epoch: u64, index: usize) -> u64 {
    seed ^ (epoch << 40 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// An example as a batch has it.
struct Taken {
    index: usize,
    /// With the data's answer or the decode model's own.
    example: Example,
    /// How much of it the full model reads.
    cut: usize,
    /// Whether the answer is the decode model's own.
    own: bool,
}

/// What is learned from one example of a batch.
struct Part {
    index: usize,
    lesson: Lesson,
    /// What the decode model reads.
    tokens: Vec<u32>,
    /// Row among these, token, and its place in the response.
    targets: Vec<(usize, u32, usize)>,
}

impl Part {
    fn new(index: usize, example: &Example, cut: usize, lesson: Lesson) -> Self {
        let all: Vec<u32> = example.prompt.iter().chain(&example.response).copied().collect();
        let tokens = all[cut..all.len() - 1].to_vec();
        let prompt = example.prompt.len();
        let targets = learned(example, cut).map(|place| (prompt + place - 1 - cut, example.response[place], place));
        Self { index, lesson, targets: targets.collect(), tokens }
    }
}

/// Lays parts out as rows; response tokens before `first` are no targets. Also tells whose each target is.
fn laid_out(parts: &[Part], top: usize, first: usize) -> (Vec<Sequence<'_>>, Vec<Target<'_>>, Vec<usize>) {
    let mut rows = 0;
    let (mut targets, mut owners) = (Vec::new(), Vec::new());
    let mut sequences = Vec::with_capacity(parts.len());
    for (owner, part) in parts.iter().enumerate() {
        let Lesson { context, ids, log_probs, states } = &part.lesson;
        let width = states.len() / (ids.len() / top.max(1)).max(1);
        for &(row, token, place) in part.targets.iter().filter(|t| t.2 >= first) {
            let at = place * top..(place + 1) * top;
            let teacher = (top > 0).then(|| Teacher {
                ids: &ids[at.clone()],
                log_probs: &log_probs[at],
                state: &states[place * width..(place + 1) * width],
            });
            targets.push(Target { row: rows + row, token, teacher });
            owners.push(owner);
        }
        rows += part.tokens.len();
        sequences.push(Sequence { context: (context.tokens > 0).then_some(context), tokens: &part.tokens });
    }
    (sequences, targets, owners)
}

fn add(sums: &mut [f64; 4], losses: &[RowLoss], mix: crate::net::Mix) {
    for loss in losses {
        sums[0] += f64::from(loss.mixed(mix));
        sums[1] += f64::from(loss.ce);
        sums[2] += f64::from(loss.kl);
        sums[3] += f64::from(loss.states);
    }
}
