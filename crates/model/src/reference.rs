//! Checkpoints of the authors' own code: both models, and what leads from the one's KV cache to the other's, in one file or in
//! shards. They are split into what a pair is made of, one tensor in memory at a time.
//!
//! Their class saves its weights as `teacher.*` (the full model), `student.*` (the decode model) and `embedding_proj.*`. It is
//! opened with the two models' folders and the keywords of the transform, which its `config.json` has only where the class itself
//! wrote it: the training script leaves the full model's there.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use overfill_text::tokenizer::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};
use overfill_types::PruneStrategy;
use safetensors::Dtype;
use safetensors::tensor::View;
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::hugging_face::{HuggingFaceFolder, read};
use crate::making;
use crate::pair_make::{KvSpec, TokenizerFiles};
use crate::stored::{Stored, WeightFiles};
use crate::weights::Weights;

const FULL: &str = "teacher.";
const DECODE: &str = "student.";
const PROJECTIONS: &str = "embedding_proj.";

/// Keys of `config.json` that name the two models, in the spellings of the authors' scripts.
const FULL_NAMES: [&str; 3] = ["teacher_model_name_or_path", "teacher_model_name", "model_name_or_path"];
const DECODE_NAMES: [&str; 3] = ["student_model_name_or_path", "student_model_name", "student_model"];

/// An opened checkpoint of the authors' code.
pub struct Reference {
    path: PathBuf,
    config: Value,
    tensors: Arc<Stored>,
    full: Part,
    decode: Part,
    kv: Transform,
}

/// One of the two models.
struct Part {
    weights: Weights,
    /// Where its `config.json` lies.
    folder: PathBuf,
    /// Where its tokenizer lies.
    tokenizer: PathBuf,
    prefix: &'static str,
}

/// The transform, as far as it is known before the projections have a file.
#[derive(Clone, Copy)]
enum Transform {
    Identity,
    Prune(PruneStrategy),
    Projection,
}

/// What a reference checkpoint became: all that [`crate::MakePair`] is made of.
pub struct Split {
    /// The full model's folder.
    pub full: PathBuf,
    /// The decode model's folder.
    pub decode: PathBuf,
    /// From the one's KV cache to the other's.
    pub kv: KvSpec,
    /// Where it comes from, for people.
    pub provenance: Map<String, Value>,
}

impl Reference {
    /// Opens the checkpoint in `path`. `full` and `decode` are folders of which `config.json` and the tokenizer are read; without
    /// them these lie in `teacher` and `student` below `path`, or the full model's in `path` itself. `kv` is needed where the
    /// checkpoint does not say it.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] saying what a pair cannot do, or what has to be said; [`ModelError::Read`] and
    /// [`ModelError::Format`] where a file is not there or not what it should be.
    pub fn open(path: &Path, full: Option<&Path>, decode: Option<&Path>, kv: Option<&KvSpec>) -> Result<Self, ModelError> {
        let config = config(path)?;
        let (full, decode) = (full_folder(path, full, &config)?, decode_folder(path, decode, &config)?);
        let tensors = Arc::new(Stored::open(path, &WeightFiles::of(path)?)?);
        check_names(path, &tensors)?;
        // The trainer saves one tokenizer, the full model's, beside the weights.
        let tokenizer = |of: &[&Path]| of.iter().find(|at| at.join(TOKENIZER_FILE).exists()).unwrap_or(&of[0]).to_path_buf();
        let of_full = tokenizer(&[&full, path]);
        let of_decode = tokenizer(&[&decode, &of_full]);
        let full = Part::open(path, &tensors, full, of_full, FULL)?;
        let decode = Part::open(path, &tensors, decode, of_decode, DECODE)?;
        let kv = transform(path, &config, kv, &tensors, &full, &decode)?;
        Ok(Self { path: path.to_owned(), config, tensors, full, decode, kv })
    }

    /// Writes both models, and the projections where there are any, into `into`, an empty folder.
    ///
    /// # Errors
    /// [`ModelError::Read`] where a file cannot be written; [`ModelError::Format`] where a tokenizer cannot be read.
    pub fn split(&self, into: &Path) -> Result<Split, ModelError> {
        let (full, decode) = (into.join("full"), into.join("decode"));
        self.full.write(&self.tensors, &full)?;
        self.decode.write(&self.tensors, &decode)?;
        let kv = match self.kv {
            Transform::Identity => KvSpec::Identity,
            Transform::Prune(strategy) => KvSpec::Prune(strategy),
            Transform::Projection => {
                let file = into.join("projection.safetensors");
                let names = self.tensors.names().into_iter().filter(|name| name.starts_with(PROJECTIONS));
                write_tensors(&self.tensors, names.map(|name| (name.clone(), name)), &file)?;
                KvSpec::Projection(file)
            }
        };
        Ok(Split { full, decode, kv, provenance: self.provenance() })
    }

    /// What the checkpoint says of itself.
    fn provenance(&self) -> Map<String, Value> {
        let mut said = Map::new();
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        said.insert("made from".into(), "a checkpoint of the authors' code".into());
        said.insert("checkpoint".into(), name.into());
        let keys = ["embedding_transform_strategy", "depth_prune_ratio", "depth_prune_strategy", "freeze_strategy"];
        for key in keys.iter().chain(&FULL_NAMES).chain(&DECODE_NAMES) {
            if let value @ (Value::String(_) | Value::Number(_)) = &self.config[*key] {
                said.insert((*key).to_owned(), value.clone());
            }
        }
        Map::from_iter([("reference".to_owned(), Value::Object(said))])
    }
}

impl Part {
    fn open(path: &Path, tensors: &Arc<Stored>, folder: PathBuf, tokenizer: PathBuf, prefix: &'static str) -> Result<Self, ModelError> {
        let weights = HuggingFaceFolder::part(&folder, Arc::clone(tensors), prefix).map(Weights::HuggingFace);
        let weights = weights.and_then(|weights| weights.check().map(|()| weights)).map_err(|error| match error {
            // What is wrong is wrong in the checkpoint, under a longer name.
            ModelError::Format { path: of, what } if of == folder => {
                ModelError::Format { path: path.to_owned(), what: format!("of {prefix}*, by {}: {what}", of.join("config.json").display()) }
            }
            other => other,
        })?;
        let part = Self { weights, folder, tokenizer, prefix };
        part.check_head(path, tensors)?;
        Ok(part)
    }

    /// The authors' code ties the head to the embedding after loading: two that differ would be one of two models.
    fn check_head(&self, path: &Path, tensors: &Stored) -> Result<(), ModelError> {
        let names = ["lm_head.weight", "model.embed_tokens.weight"].map(|name| format!("{}{name}", self.prefix));
        let [head, embedding] = names.each_ref().map(|name| tensors.get(name).zip(tensors.bytes(name)));
        if self.weights.config().tied_embeddings && head.is_some() && head != embedding {
            let what = format!("config.json ties {} to {}, and they differ", names[0], names[1]);
            return Err(ModelError::Format { path: path.to_owned(), what });
        }
        Ok(())
    }

    /// Writes the model as a Hugging Face folder.
    fn write(&self, tensors: &Stored, folder: &Path) -> Result<(), ModelError> {
        std::fs::create_dir(folder).map_err(|source| ModelError::Read { path: folder.to_owned(), source })?;
        let tied = self.weights.config().tied_embeddings;
        let names = tensors.names().into_iter().filter_map(|stored| {
            let name = stored.strip_prefix(self.prefix)?.to_owned();
            // The head that is the embedding, and constants that old files carry along.
            let left_out = tied && name == "lm_head.weight" || name.ends_with("rotary_emb.inv_freq");
            (!left_out).then_some((name, stored))
        });
        write_tensors(tensors, names, &folder.join("model.safetensors"))?;
        for file in ["config.json", "generation_config.json"] {
            let from = self.folder.join(file);
            if from.exists() {
                write(&folder.join(file), read(&from)?.as_bytes())?;
            }
        }
        let tokenizer = TokenizerFiles::of(&self.tokenizer, &self.weights)?;
        write(&folder.join(TOKENIZER_FILE), &tokenizer.tokenizer)?;
        write(&folder.join(TOKENIZER_CONFIG_FILE), tokenizer.config.to_string().as_bytes())
    }
}

/// What `config.json` beside the weights says, if there is one.
fn config(path: &Path) -> Result<Value, ModelError> {
    let file = path.join("config.json");
    if !file.exists() {
        return Ok(Value::Null);
    }
    let config: Value =
        serde_json::from_str(&read(&file)?).map_err(|e| ModelError::Format { path: file.clone(), what: format!("no JSON: {e}") })?;
    let adapters = ["teacher_lora", "student_lora"].into_iter().find(|key| config[*key] == true);
    if let Some(key) = adapters {
        return Err(ModelError::Mismatch(format!("{}: {key} is true: adapters are not read; merge them first", file.display())));
    }
    if config["refresh_interval"].as_i64().is_some_and(|tokens| tokens > 0) {
        return Err(ModelError::Mismatch(format!(
            "{}: refresh_interval is {}: a pair's full model reads the prompt alone, never the answer",
            file.display(),
            config["refresh_interval"]
        )));
    }
    Ok(config)
}

/// How `config.json` calls a model, for a sentence.
fn called(config: &Value, keys: [&str; 3]) -> String {
    let name = keys.iter().find_map(|key| config[*key].as_str());
    name.map_or(String::new(), |name| format!(" (config.json calls it {:?})", name.chars().take(200).collect::<String>()))
}

fn full_folder(path: &Path, given: Option<&Path>, config: &Value) -> Result<PathBuf, ModelError> {
    let below = path.join("teacher");
    match given {
        Some(given) => Ok(given.to_owned()),
        None if below.join("config.json").exists() => Ok(below),
        None if !config["model_type"].is_null() => Ok(path.to_owned()),
        None => Err(ModelError::Mismatch(format!(
            "{} does not say what shape its full model has: name that model's folder{} with --full; its config.json and its tokenizer \
             are read, its weights are not",
            path.display(),
            called(config, FULL_NAMES)
        ))),
    }
}

fn decode_folder(path: &Path, given: Option<&Path>, config: &Value) -> Result<PathBuf, ModelError> {
    let below = path.join("student");
    match given {
        Some(given) => Ok(given.to_owned()),
        None if below.join("config.json").exists() => Ok(below),
        None => Err(ModelError::Mismatch(format!(
            "{} does not say what shape its decode model has: name the folder of the pruned model that its training began from{} with \
             --decode; its config.json is read, its weights are not",
            path.display(),
            called(config, DECODE_NAMES)
        ))),
    }
}

/// Refuses what belongs to none of the three parts.
fn check_names(path: &Path, tensors: &Stored) -> Result<(), ModelError> {
    let mut names = tensors.names();
    names.sort_unstable();
    let strange = names.iter().find(|name| ![FULL, DECODE, PROJECTIONS].iter().any(|part| name.starts_with(part)));
    let adapter = names.iter().find(|name| name.contains(".lora_") || name.contains(".base_model."));
    let what = match (adapter, strange) {
        (Some(name), _) => format!("tensor {name} is one of an adapter: merge adapters first"),
        (None, Some(name)) => {
            format!("tensor {name} is none of teacher.*, student.* and embedding_proj.*: is it a checkpoint of the authors' code?")
        }
        (None, None) => return Ok(()),
    };
    Err(ModelError::Format { path: path.to_owned(), what })
}

fn transform(
    path: &Path,
    config: &Value,
    given: Option<&KvSpec>,
    tensors: &Stored,
    full: &Part,
    decode: &Part,
) -> Result<Transform, ModelError> {
    let wrong = |what: String| ModelError::Mismatch(format!("{}: {what}", path.display()));
    let layers = |part: &Part| part.weights.config().kv.layers;
    let (full, decode) = (layers(full), layers(decode));
    let projections = tensors.names().iter().any(|name| name.starts_with(PROJECTIONS));
    let said = match config["embedding_transform_strategy"].as_str() {
        None => None,
        Some("kv_identity") => Some(Transform::Identity),
        Some("kv_prune") => Some(Transform::Prune(pruned(config, full, decode).map_err(wrong)?)),
        Some("kv_proj_layer") => Some(Transform::Projection),
        Some(other) => {
            return Err(wrong(format!(
                "embedding_transform_strategy is {:?}: a pair can do kv_identity, kv_prune and kv_proj_layer",
                other.chars().take(100).collect::<String>()
            )));
        }
    };
    let given = match given {
        None => None,
        Some(KvSpec::Identity) => Some(Transform::Identity),
        Some(KvSpec::Prune(strategy)) => Some(Transform::Prune(*strategy)),
        Some(KvSpec::Projection(_)) => return Err(wrong("its projections are its own: leave --kv out".into())),
    };
    let kv = match (said, given) {
        (Some(said), Some(given)) if said.name() != given.name() => {
            return Err(wrong(format!("config.json says {}, and --kv {}", said.name(), given.name())));
        }
        (Some(kv), _) | (None, Some(kv)) => kv,
        (None, None) if projections => Transform::Projection,
        (None, None) if full == decode => Transform::Identity,
        (None, None) => {
            return Err(wrong(format!(
                "it does not say which of the full model's {full} layers the decode model's {decode} are: say it with --kv \
                 prune:firstlast, prune:first or prune:last"
            )));
        }
    };
    match kv {
        Transform::Projection if !projections => Err(wrong("it says kv_proj_layer, and has no embedding_proj.*".into())),
        Transform::Projection if decode > full => Err(wrong(format!("{full} layers cannot be projected to {decode}"))),
        Transform::Identity | Transform::Prune(_) if projections => {
            Err(wrong(format!("the transform is {}, and it has embedding_proj.*", kv.name())))
        }
        kv => Ok(kv),
    }
}

impl Transform {
    fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Prune(PruneStrategy::FirstLast) => "prune:firstlast",
            Self::Prune(PruneStrategy::First) => "prune:first",
            Self::Prune(PruneStrategy::Last) => "prune:last",
            Self::Projection => "a projection",
        }
    }
}

/// What `kv_prune` keeps, by its keywords; their defaults are those of the authors' class.
fn pruned(config: &Value, full: usize, decode: usize) -> Result<PruneStrategy, String> {
    let ratio = match &config["depth_prune_ratio"] {
        Value::Null => 0.0,
        value => value.as_f64().ok_or_else(|| format!("depth_prune_ratio is {value}, not a number"))?,
    };
    // Cut to a whole number, as they do.
    let kept = (full as f64 * (1.0 - ratio)) as usize;
    if kept != decode {
        return Err(format!("depth_prune_ratio is {ratio}, which keeps {kept} of {full} layers, and the decode model has {decode}"));
    }
    match &config["depth_prune_strategy"] {
        Value::Null => Ok(PruneStrategy::FirstLast),
        value => value.as_str().unwrap_or_default().parse().map_err(|what| format!("depth_prune_strategy: {what}")),
    }
}

/// A tensor that is read when it is written.
struct Later<'s> {
    tensors: &'s Stored,
    stored: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl View for Later<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // It is there: its shape was found under the same name.
        self.tensors.bytes(&self.stored).unwrap_or_default()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes tensors under new names, each as it is, one in memory at a time.
fn write_tensors(tensors: &Stored, names: impl Iterator<Item = (String, String)>, to: &Path) -> Result<(), ModelError> {
    let views = names.filter_map(|(name, stored)| {
        let (dtype, shape) = tensors.get(&stored)?;
        Some((name, Later { tensors, stored, dtype, shape }))
    });
    let failed = |source| ModelError::Read { path: to.to_owned(), source };
    // transformers refuses a file that does not say this.
    let said = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(said), to).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(source) => failed(source),
        other => failed(std::io::Error::other(other)),
    })?;
    making::as_its_folder(to).map_err(failed)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    std::fs::write(path, bytes).map_err(|source| ModelError::Read { path: path.to_owned(), source })
}
