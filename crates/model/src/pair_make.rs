//! Making a pair: two checkpoints and a KV transform become a folder that every node can open.
//!
//! Everything that would make the two unfit for each other is refused here, by name, before anything is written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use overfill_kernels::ThreadPool;
use overfill_text::gguf::GgufVocabulary;
use overfill_text::tokenizer::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};
use overfill_text::{ModelText, probe};
use overfill_types::pair::{PAIR_FILE, PAIR_FORMAT, TokenizerManifest, WeightFormat};
use overfill_types::pair_files::Part;
use overfill_types::{Fingerprint, GenerationConfig, KvFormats, KvTransform, PairManifest, PruneStrategy};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::config::{LlamaConfig, Rope};
use crate::error::ModelError;
use crate::gguf::GgufFile;
use crate::gguf_config::whole;
use crate::gguf_parts;
use crate::gguf_write::PROVENANCE_KEY;
use crate::hugging_face;
use crate::making;
use crate::pair::{Pair, describe, file_sha256};
use crate::pair_files;
use crate::transform::Transform;
use crate::weights::Weights;

/// Name of the projection's file in a pair's folder.
const PROJECTION_FILE: &str = "projection.safetensors";

/// The KV transform as it is asked for: `identity`, `prune:firstlast`, `prune:first`, `prune:last`, `projection:FILE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvSpec {
    /// Both models have the same KV geometry.
    Identity,
    /// The decode model has fewer layers.
    Prune(PruneStrategy),
    /// A linear map per layer, from this file.
    Projection(PathBuf),
}

impl FromStr for KvSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "identity" => Ok(Self::Identity),
            Some(("prune", strategy)) => Ok(Self::Prune(strategy.parse()?)),
            Some(("projection", file)) if !file.is_empty() => Ok(Self::Projection(file.into())),
            _ => Err(format!("'{text}' is no KV transform: use identity, prune:firstlast, prune:first, prune:last or projection:FILE")),
        }
    }
}

/// What a pair is made of.
#[derive(Clone, Debug)]
pub struct MakePair {
    /// Name that clients ask for.
    pub name: String,
    /// Hugging Face folder or GGUF file of the full model.
    pub full: PathBuf,
    /// How its weights are held.
    pub full_weights: WeightFormat,
    /// Hugging Face folder or GGUF file of the decode model.
    pub decode: PathBuf,
    /// How its weights are held.
    pub decode_weights: WeightFormat,
    /// From the one's KV cache to the other's.
    pub kv: KvSpec,
    /// What its numbers are stored and sent as.
    pub kv_formats: KvFormats,
    /// How tokens are chosen where a request does not say it.
    pub generation: GenerationConfig,
    /// How the decode model was made, for people.
    pub provenance: Map<String, Value>,
}

impl MakePair {
    /// Makes the pair in `out`, which must not exist. Weights are linked where the file system allows it, else copied.
    /// The folder appears whole or not at all.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] naming both sides where the two do not fit together; [`ModelError::Read`] and
    /// [`ModelError::Format`] where a file is not there or not whole.
    pub fn make(&self, out: &Path) -> Result<Pair, ModelError> {
        if out.exists() {
            return Err(ModelError::Mismatch(format!("{} exists already: name another folder, or remove it", out.display())));
        }
        let (full, decode) = (Weights::open(&self.full)?, Weights::open(&self.decode)?);
        let kv = self.transform(full.config(), decode.config())?;
        check_rope(full.config(), decode.config(), &kv)?;
        let tokenizer = TokenizerFiles::of(&self.full, &full)?;
        let other = TokenizerFiles::of(&self.decode, &decode)?;
        let both = format!("the full model's tokenizer ({}) and the decode model's ({})", self.full.display(), self.decode.display());
        if tokenizer.vocabulary()? != other.vocabulary()? {
            return Err(ModelError::Mismatch(format!("{both} have different vocabularies: a pair needs one tokenizer")));
        }
        let texts = (tokenizer.text("full model")?, other.text("decode model")?);
        if let Some(text) = probe::first_difference(&texts.0, &texts.1) {
            return Err(ModelError::Mismatch(format!("{both} make other tokens of {text:?}: a pair needs one tokenizer")));
        }

        // Beside the target, so that the last step is a rename within one file system.
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(|source| ModelError::Read { path: parent.to_owned(), source })?;
        let making = making::folder(parent, ".pair-").map_err(|source| ModelError::Read { path: parent.to_owned(), source })?;
        let dir = making.path();
        let full_path = install(&self.full, dir, "full")?;
        let decode_path = install(&self.decode, dir, "decode")?;
        if let KvSpec::Projection(file) = &self.kv {
            link_or_copy(file, &dir.join(PROJECTION_FILE))?;
        }
        write(&dir.join(TOKENIZER_FILE), &tokenizer.tokenizer)?;
        write(&dir.join(TOKENIZER_CONFIG_FILE), &pair_files::text(&tokenizer.config))?;

        let mut eos_token_ids = full.config().eos_token_ids.clone();
        eos_token_ids.extend(&decode.config().eos_token_ids);
        // A base model's file may name its own end only, and not that of a turn.
        eos_token_ids.extend(texts.0.eos().into_iter().chain(texts.1.eos()));
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        let files = pair_files::list(dir, &full_path, &decode_path, &kv)?;
        let mut manifest = PairManifest {
            format: PAIR_FORMAT,
            name: self.name.clone(),
            fingerprint: Fingerprint::new(""),
            full: describe(full.config(), full_path, pair_files::weights_sha256(&files, Part::Full), self.full_weights),
            decode: describe(decode.config(), decode_path, pair_files::weights_sha256(&files, Part::Decode), self.decode_weights),
            kv,
            kv_formats: self.kv_formats,
            tokenizer: TokenizerManifest { sha256: hex::encode(Sha256::digest(&tokenizer.tokenizer)), eos_token_ids },
            generation: self.generation,
            provenance: self.provenance.clone(),
            files,
        };
        if let Some(made) = provenance(&self.decode)? {
            manifest.provenance.insert("decode".into(), Value::Object(made));
        }
        manifest.fingerprint = manifest.compute_fingerprint();
        let pool = ThreadPool::new(1, &[]).map_err(|e| ModelError::Device(format!("no thread could be started: {e}")))?;
        Transform::load(&manifest.kv, dir, manifest.full.kv, manifest.decode.kv, &pool)?;
        write(&dir.join(PAIR_FILE), &pair_files::text(&manifest))?;

        let made = making.keep();
        if let Err(source) = std::fs::rename(&made, out) {
            // Best effort: what is left over is hidden and harmless.
            let _ = std::fs::remove_dir_all(&made);
            return Err(ModelError::Read { path: out.to_owned(), source });
        }
        Pair::open(out)
    }

    fn transform(&self, full: &LlamaConfig, decode: &LlamaConfig) -> Result<KvTransform, ModelError> {
        let unfit = |why: &str| ModelError::Mismatch(format!("the full model has {}, the decode model {}: {why}", full.kv, decode.kv));
        let same_rows = (full.kv.kv_heads, full.kv.head_dim) == (decode.kv.kv_heads, decode.kv.head_dim);
        match &self.kv {
            KvSpec::Identity if full.kv != decode.kv => {
                Err(unfit("`identity` needs equal KV geometries; try `prune:…` or `projection:FILE`"))
            }
            KvSpec::Identity => Ok(KvTransform::Identity),
            KvSpec::Prune(_) if !same_rows => Err(unfit("`prune` cuts layers only and needs equal KV heads and head sizes")),
            KvSpec::Prune(strategy) => match strategy.kept(full.kv.layers, decode.kv.layers) {
                Some(layers) => Ok(KvTransform::Prune { strategy: *strategy, layers }),
                None => Err(unfit("`prune` needs a decode model with at most as many layers")),
            },
            KvSpec::Projection(file) => Ok(KvTransform::Projection {
                file: PROJECTION_FILE.into(),
                sha256: file_sha256(file)?,
                layers: KvTransform::projection_layers(full.kv.layers, decode.kv.layers),
            }),
        }
    }
}

/// Keys that go over as they are were rotated by the full model: the decode model must rotate alike, layer by layer.
fn check_rope(full: &LlamaConfig, decode: &LlamaConfig, kv: &KvTransform) -> Result<(), ModelError> {
    let all: Vec<usize> = (0..decode.kv.layers).collect();
    let from = match kv {
        KvTransform::Projection { .. } => return Ok(()),
        KvTransform::Prune { layers, .. } => layers,
        KvTransform::Identity => &all,
    };
    for (to, &from) in from.iter().enumerate() {
        let (there, here) = (full.rope_of(from), decode.rope_of(to));
        if there != here {
            let told = |rope: Option<&Rope>| rope.map_or("none".to_owned(), |rope| format!("{rope:?}"));
            return Err(ModelError::Mismatch(format!(
                "the rotary embedding of the full model's layer {from} is {}, that of the decode model's layer {to} {}: keys cannot go over",
                told(there),
                told(here)
            )));
        }
    }
    Ok(())
}

/// What a checkpoint says of how its tokens are chosen: a folder's `generation_config.json`. Nothing where there is none, as
/// in a GGUF file.
///
/// # Errors
/// [`ModelError::Read`] and [`ModelError::Format`] where the file cannot be read.
pub fn generation(checkpoint: &Path) -> Result<GenerationConfig, ModelError> {
    let path = checkpoint.join("generation_config.json");
    if !path.exists() {
        return Ok(GenerationConfig::default());
    }
    let text = hugging_face::read(&path)?;
    GenerationConfig::from_hugging_face(&text).map_err(|e| ModelError::Format { path, what: e.message })
}

/// The files that the text side opens.
pub struct TokenizerFiles {
    /// Content of `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// Content of `tokenizer_config.json`, the chat template inside.
    pub config: Value,
}

impl TokenizerFiles {
    /// A checkpoint's: those of its folder, or made of what a GGUF file at `path` holds.
    ///
    /// # Errors
    /// [`ModelError::Read`] and [`ModelError::Format`] where they are not there or malformed.
    pub fn of(path: &Path, weights: &Weights) -> Result<Self, ModelError> {
        match weights {
            Weights::HuggingFace(_) => Self::from_folder(path),
            Weights::Gguf(file) => Self::from_gguf(path, file),
            Weights::Memory(..) => Err(ModelError::Format { path: path.to_owned(), what: "numbers in memory have no tokenizer".into() }),
        }
    }

    fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join(TOKENIZER_FILE);
        let tokenizer = std::fs::read(&path).map_err(|source| ModelError::Read { path, source })?;
        let config = folder.join(TOKENIZER_CONFIG_FILE);
        let mut config: Value = if config.exists() {
            serde_json::from_str(&hugging_face::read(&config)?)
                .map_err(|e| ModelError::Format { path: config, what: format!("no JSON: {e}") })?
        } else {
            json!({})
        };
        if let Some(templates) = templates(folder)? {
            config["chat_template"] = templates;
        }
        Ok(Self { tokenizer, config })
    }

    fn from_gguf(path: &Path, file: &GgufFile) -> Result<Self, ModelError> {
        let format = |what: String| ModelError::Format { path: path.to_owned(), what };
        let vocabulary = vocabulary(file);
        let tokenizer = vocabulary.tokenizer().map_err(|e| format(e.message))?;
        let tokenizer = tokenizer.to_string(true).map_err(|e| format(e.to_string()))?.into_bytes();
        let token = |id: Option<u32>| id.and_then(|id| vocabulary.token(id).ok());
        let mut config = json!({ "bos_token": token(vocabulary.bos), "eos_token": token(vocabulary.eos) });
        if let Some(template) = vocabulary.chat_template {
            config["chat_template"] = Value::String(template);
        }
        Ok(Self { tokenizer, config })
    }

    /// What two tokenizers must have in common: tokens, and merges where they are more than what follows from the tokens' scores.
    fn vocabulary(&self) -> Result<(BTreeMap<String, u64>, Value), ModelError> {
        let json: Value =
            serde_json::from_slice(&self.tokenizer).map_err(|e| ModelError::Mismatch(format!("{TOKENIZER_FILE} is no JSON: {e}")))?;
        // Special tokens are among the others in some files, and beside them in others.
        let of_model = json["model"]["vocab"].as_object().into_iter().flatten().map(|(token, id)| (token.as_str(), id));
        let added = json["added_tokens"].as_array().into_iter().flatten();
        let added = added.filter_map(|token| Some((token["content"].as_str()?, &token["id"])));
        let tokens = of_model.chain(added).filter_map(|(token, id)| Some((token.to_owned(), id.as_u64()?))).collect();
        let mut merges = json["model"]["merges"].clone();
        if json["model"]["byte_fallback"] == true {
            merges = Value::Null;
        }
        // Files have them as two texts, and older ones as one with a space between.
        for merge in merges.as_array_mut().into_iter().flatten() {
            let two = merge.as_str().and_then(|text| text.split_once(' ')).filter(|(_, second)| !second.contains(' '));
            if let Some((first, second)) = two {
                *merge = json!([first, second]);
            }
        }
        Ok((tokens, merges))
    }

    /// The text side that they make.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where they are malformed.
    fn text(&self, name: &str) -> Result<ModelText, ModelError> {
        let config = self.config.to_string();
        ModelText::from_files(name, &self.tokenizer, config.as_bytes()).map_err(|e| ModelError::Mismatch(format!("the {name}: {e}")))
    }
}

/// The chat templates that lie in a folder as files of their own, which count before that of `tokenizer_config.json`:
/// `chat_template.jinja`, and others by their names in `additional_chat_templates`.
fn templates(folder: &Path) -> Result<Option<Value>, ModelError> {
    let default = folder.join("chat_template.jinja");
    let default = if default.exists() { Some(hugging_face::read(&default)?) } else { None };
    let more = folder.join("additional_chat_templates");
    let mut named = Vec::new();
    if more.is_dir() {
        let failed = |source| ModelError::Read { path: more.clone(), source };
        for entry in std::fs::read_dir(&more).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_stem().and_then(|name| name.to_str()).filter(|_| path.extension().is_some_and(|e| e == "jinja"));
            if let Some(name) = name {
                named.push(json!({ "name": name, "template": hugging_face::read(&path)? }));
            }
        }
    }
    named.sort_unstable_by_key(|named| named["name"].to_string());
    Ok(match default {
        default if !named.is_empty() => {
            named.extend(default.map(|template| json!({ "name": "default", "template": template })));
            Some(named.into())
        }
        default => default.map(Value::String),
    })
}

fn vocabulary(file: &GgufFile) -> GgufVocabulary {
    use candle_core::quantized::gguf_file::Value;
    let get = |key: &str| file.metadata(&format!("tokenizer.{key}"));
    let text = |key: &str| get(key).and_then(|v| v.to_string().ok()).cloned();
    let id = |key: &str| get(key).and_then(whole).and_then(|id| u32::try_from(id).ok());
    let list = |key: &str| get(key).and_then(|v| v.to_vec().ok()).map_or(&[][..], Vec::as_slice);
    let texts = |key: &str| list(key).iter().filter_map(|v: &Value| v.to_string().ok().cloned()).collect();
    let model = text("ggml.model").unwrap_or_default();
    let flag = |key: &str, default: bool| get(key).and_then(|v| v.to_bool().ok()).unwrap_or(default);
    let pre = text("ggml.pre");
    GgufVocabulary {
        tokens: texts("ggml.tokens"),
        token_types: list("ggml.token_type").iter().map(|v| whole(v).unwrap_or(1) as u32).collect(),
        merges: texts("ggml.merges"),
        scores: list("ggml.scores").iter().filter_map(|v| v.to_f32().ok()).collect(),
        bos: id("ggml.bos_token_id"),
        eos: id("ggml.eos_token_id"),
        unknown: id("ggml.unknown_token_id"),
        // llama.cpp's defaults where a file is silent: SentencePiece models begin with both, byte-level ones with neither, but for
        // Llama 3's and Mistral's.
        add_bos: flag(
            "ggml.add_bos_token",
            model == "llama" || matches!(pre.as_deref(), Some("llama-bpe" | "llama3" | "llama-v3" | "tekken")),
        ),
        add_space_prefix: flag("ggml.add_space_prefix", model == "llama"),
        chat_template: text("chat_template"),
        model,
        pre,
    }
}

/// Name of the file in a checkpoint's folder that says how it was made.
pub const PROVENANCE_FILE: &str = "provenance.json";

/// How a checkpoint was made, where it says so: a folder in [`PROVENANCE_FILE`], a GGUF file in its header.
///
/// # Errors
/// [`ModelError::Read`] and [`ModelError::Format`] where it cannot be read.
pub fn provenance(checkpoint: &Path) -> Result<Option<Map<String, Value>>, ModelError> {
    let (path, text) = if checkpoint.is_file() {
        let said = GgufFile::open(checkpoint)?.metadata(PROVENANCE_KEY).and_then(|said| said.to_string().ok().cloned());
        (checkpoint.to_owned(), said)
    } else {
        let path = checkpoint.join(PROVENANCE_FILE);
        let said = if path.exists() { Some(hugging_face::read(&path)?) } else { None };
        (path, said)
    };
    let parse = |text: String| {
        serde_json::from_str(&text).map_err(|e| ModelError::Format { path, what: format!("its provenance is no JSON object: {e}") })
    };
    text.map(parse).transpose()
}

/// Puts a model into the pair's folder; gives its path there.
fn install(model: &Path, dir: &Path, name: &str) -> Result<String, ModelError> {
    if model.is_file() {
        let files = gguf_parts::files(model)?;
        let file = |i: usize| if files.len() == 1 { format!("{name}.gguf") } else { gguf_parts::part_name(name, i + 1, files.len()) };
        for (i, part) in files.iter().enumerate() {
            link_or_copy(part, &dir.join(file(i)))?;
        }
        return Ok(file(0));
    }
    let target = dir.join(name);
    std::fs::create_dir(&target).map_err(|source| ModelError::Read { path: target.clone(), source })?;
    for file in pair_files::of_folder(model)? {
        let Some(name) = file.file_name() else { continue };
        link_or_copy(&file, &target.join(name))?;
    }
    Ok(name.to_owned())
}

fn link_or_copy(from: &Path, to: &Path) -> Result<(), ModelError> {
    // A link of a link would point nowhere in a folder that is mounted elsewhere.
    let from = from.canonicalize().map_err(|source| ModelError::Read { path: from.to_owned(), source })?;
    if std::fs::hard_link(&from, to).is_ok() {
        return Ok(());
    }
    std::fs::copy(&from, to).map(drop).map_err(|source| ModelError::Read { path: from, source })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    std::fs::write(path, bytes).map_err(|source| ModelError::Read { path: path.to_owned(), source })
}
