//! Checkpoints: read tensor by tensor, written as a folder that Hugging Face's transformers and every node can load.
//!
//! Nothing here holds more than a layer, an embedding, or one shard of what is written, so a model of 8 billion weights
//! passes through 24 GiB. What is written appears whole or not at all: it is made beside its place and renamed.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use half::{bf16, f16};
use overfill_model::names::{self, Place};
use overfill_model::{Family, LlamaConfig, TokenizerFiles, Weights, making};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use crate::error::CompressError;
use crate::matrix::Matrix;
use crate::shape_json;

/// Most bytes of one safetensors file: what a writer holds in memory.
const SHARD_BYTES: usize = 2 << 30;

/// A checkpoint that is read: a Hugging Face folder, sharded or not, or a GGUF file.
pub struct Checkpoint {
    path: PathBuf,
    weights: Weights,
}

/// One layer's weights, matrices `[out, in]`.
#[derive(Clone)]
pub struct LayerWeights {
    /// Norm of what attention reads, `[hidden]`; empty, as all that follow, where the family has none.
    pub input_norm: Vec<f32>,
    /// Queries, keys and values.
    pub qkv: [Matrix; 3],
    /// Their biases; empty where there are none.
    pub qkv_bias: [Vec<f32>; 3],
    /// Norms of queries and of keys, `[head_dim]` or as wide as all heads.
    pub query_key_norms: [Vec<f32>; 2],
    /// The attention's output.
    pub output: Matrix,
    /// Norm of what attention adds, `[hidden]`.
    pub attended_norm: Vec<f32>,
    /// Norm of what the MLP reads, `[hidden]`.
    pub mlp_norm: Vec<f32>,
    /// The MLP's gate.
    pub gate: Matrix,
    /// The MLP's input.
    pub up: Matrix,
    /// The MLP's output.
    pub down: Matrix,
    /// Norm of what the MLP adds, `[hidden]`.
    pub down_norm: Vec<f32>,
}

impl LayerWeights {
    /// The layer's norms that its family has, by their names.
    pub(crate) fn norms(&self, family: Family) -> Vec<(&'static str, &[f32])> {
        let norms = family.norms();
        let named = [
            (norms.before_attention, &self.input_norm),
            (norms.after_attention, &self.attended_norm),
            (norms.before_mlp, &self.mlp_norm),
            (norms.after_mlp, &self.down_norm),
        ];
        let mut all: Vec<(&str, &[f32])> = named.into_iter().filter_map(|(name, norm)| Some((name?, norm.as_slice()))).collect();
        if family.query_key_norm().is_some() {
            let [queries, keys] = &self.query_key_norms;
            all.extend([("self_attn.q_norm", queries.as_slice()), ("self_attn.k_norm", keys)]);
        }
        all
    }
}

const QKV: [&str; 3] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];

impl Checkpoint {
    /// Opens a Hugging Face folder or a `.gguf` file; tensors are read when they are asked for.
    ///
    /// # Errors
    /// [`CompressError::Model`] where it is not there, malformed, of another family, or a tensor is missing or of another shape.
    pub fn open(path: &Path) -> Result<Self, CompressError> {
        Ok(Self { path: path.to_owned(), weights: Weights::open(path)? })
    }

    /// Its shape.
    pub fn config(&self) -> &LlamaConfig {
        self.weights.config()
    }

    /// Whether the output head is the embedding.
    pub fn tied(&self) -> bool {
        self.config().tied_embeddings || !self.weights.has("lm_head.weight")
    }

    /// Token embeddings, `[vocab, hidden]`.
    ///
    /// # Errors
    /// [`CompressError::Model`] where the tensor cannot be read.
    pub fn embedding(&self) -> Result<Matrix, CompressError> {
        self.matrix("model.embed_tokens.weight")
    }

    /// The output head, `[vocab, hidden]`; the embedding where they are tied.
    ///
    /// # Errors
    /// As [`Checkpoint::embedding`].
    pub fn head(&self) -> Result<Matrix, CompressError> {
        if self.tied() { self.embedding() } else { self.matrix("lm_head.weight") }
    }

    /// The last norm, `[hidden]`.
    ///
    /// # Errors
    /// As [`Checkpoint::embedding`].
    pub fn norm(&self) -> Result<Vec<f32>, CompressError> {
        self.vector("model.norm.weight")
    }

    /// The weights of layer `i`.
    ///
    /// # Errors
    /// As [`Checkpoint::embedding`].
    pub fn layer(&self, i: usize) -> Result<LayerWeights, CompressError> {
        let name = |module: &str| format!("model.layers.{i}.{module}.weight");
        let bias = |module: &str| {
            let name = format!("model.layers.{i}.{module}.bias");
            if self.weights.has(&name) { self.vector(&name) } else { Ok(Vec::new()) }
        };
        for module in ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
            if !bias(module)?.is_empty() {
                return Err(CompressError::Refused(format!("{module} of layer {i} has a bias: only queries, keys and values may")));
            }
        }
        let family = self.config().family;
        let norms = family.norms();
        let norm = |which: Option<&str>| which.map_or(Ok(Vec::new()), |which| self.vector(&name(which)));
        let of_heads = |which: &'static str| norm(family.query_key_norm().map(|_| which));
        Ok(LayerWeights {
            input_norm: norm(norms.before_attention)?,
            query_key_norms: [of_heads("self_attn.q_norm")?, of_heads("self_attn.k_norm")?],
            attended_norm: norm(norms.after_attention)?,
            down_norm: norm(norms.after_mlp)?,
            qkv: [self.matrix(&name(QKV[0]))?, self.matrix(&name(QKV[1]))?, self.matrix(&name(QKV[2]))?],
            qkv_bias: [bias(QKV[0])?, bias(QKV[1])?, bias(QKV[2])?],
            output: self.matrix(&name("self_attn.o_proj"))?,
            mlp_norm: norm(norms.before_mlp)?,
            gate: self.matrix(&name("mlp.gate_proj"))?,
            up: self.matrix(&name("mlp.up_proj"))?,
            down: self.matrix(&name("mlp.down_proj"))?,
        })
    }

    /// Its tokenizer's files.
    ///
    /// # Errors
    /// [`CompressError::Model`] where they are not there or malformed.
    pub fn tokenizer(&self) -> Result<TokenizerFiles, CompressError> {
        Ok(TokenizerFiles::of(&self.path, &self.weights)?)
    }

    fn matrix(&self, name: &str) -> Result<Matrix, CompressError> {
        let (numbers, shape) = self.weights.numbers(name)?;
        Ok(Matrix::new(shape[0], shape[1], numbers))
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, CompressError> {
        Ok(self.weights.numbers(name)?.0)
    }

    /// `config.json` for a model of shape `config` made of this one: what the folder's own says besides the shape stays.
    fn config_json(&self, config: &LlamaConfig, format: Format) -> Result<Value, CompressError> {
        let mut json = match &self.weights {
            Weights::HuggingFace(_) => {
                let path = self.path.join("config.json");
                let text = std::fs::read_to_string(&path).map_err(|source| CompressError::File { path: path.clone(), source })?;
                serde_json::from_str(&text).map_err(|e| CompressError::Refused(format!("{} is no JSON: {e}", path.display())))?
            }
            Weights::Gguf(_) | Weights::Memory(..) => shape_json::whole(self.config())?,
        };
        json["hidden_size"] = config.hidden_size.into();
        json["intermediate_size"] = config.intermediate_size.into();
        json["num_attention_heads"] = config.heads.into();
        json["num_key_value_heads"] = config.kv.kv_heads.into();
        json["num_hidden_layers"] = config.kv.layers.into();
        json["head_dim"] = config.kv.head_dim.into();
        json["tie_word_embeddings"] = config.tied_embeddings.into();
        if let Some(object) = json.as_object_mut() {
            // One entry a layer, of another number of layers; what they are made of where they are not there; and scales, which are
            // applied to what is written.
            let of_layers = ["layer_types", "max_window_layers", "sliding_window_pattern", "no_rope_layer_interval"];
            for key in of_layers.into_iter().chain(["dtype", "quantization_config", "compression_config"]) {
                object.remove(key);
            }
        }
        shape_json::layers(config, &mut json);
        json["torch_dtype"] = format.name().into();
        Ok(json)
    }

    /// `generation_config.json`, if there is one or the end of an answer is known.
    fn generation_json(&self) -> Result<Option<Value>, CompressError> {
        let path = self.path.join("generation_config.json");
        if path.exists() {
            let text = std::fs::read_to_string(&path).map_err(|source| CompressError::File { path: path.clone(), source })?;
            return match serde_json::from_str(&text) {
                Ok(json) => Ok(Some(json)),
                Err(e) => Err(CompressError::Refused(format!("{} is no JSON: {e}", path.display()))),
            };
        }
        let ids = &self.config().eos_token_ids;
        Ok(if ids.is_empty() { None } else { Some(json!({ "eos_token_id": ids })) })
    }
}

/// What numbers of a written checkpoint are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit floats.
    F16,
}

impl Format {
    /// PyTorch's name.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    fn bytes(self, numbers: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::Bf16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            Self::F16 => numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            other => Err(format!("'{other}' is no number format: use f32, bf16 or f16")),
        }
    }
}

/// A Hugging Face folder that is being written. Dropped before it is closed, it leaves nothing behind.
pub struct Writer {
    out: PathBuf,
    /// The shape of what is written.
    config: LlamaConfig,
    /// Rows of a matrix that its family stores with those that follow.
    fused: Vec<f32>,
    making: tempfile::TempDir,
    format: Format,
    /// Bound of a file, in bytes.
    shard_bytes: usize,
    pending: Vec<(String, Vec<usize>, Vec<u8>)>,
    pending_bytes: usize,
    /// Names of the tensors in each finished file.
    shards: Vec<Vec<String>>,
    total_bytes: usize,
}

impl Writer {
    /// Begins a checkpoint of this shape that will be at `out`, which must not exist.
    ///
    /// # Errors
    /// [`CompressError::Refused`] where it exists, [`CompressError::File`].
    pub fn create(out: &Path, format: Format, config: &LlamaConfig) -> Result<Self, CompressError> {
        Self::with_shards(out, format, config, SHARD_BYTES)
    }

    fn with_shards(out: &Path, format: Format, config: &LlamaConfig, shard_bytes: usize) -> Result<Self, CompressError> {
        if out.exists() {
            return Err(CompressError::Refused(format!("{} exists already: name another folder, or remove it", out.display())));
        }
        // Beside the target, so that the last step is a rename within one file system.
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let failed = |source| CompressError::File { path: parent.to_owned(), source };
        std::fs::create_dir_all(parent).map_err(failed)?;
        let making = making::folder(parent, ".checkpoint-").map_err(failed)?;
        Ok(Self {
            out: out.to_owned(),
            config: config.clone(),
            fused: Vec::new(),
            making,
            format,
            shard_bytes,
            pending: Vec::new(),
            pending_bytes: 0,
            shards: Vec::new(),
            total_bytes: 0,
        })
    }

    /// Where it is being made: other files may be put there.
    pub fn folder(&self) -> &Path {
        self.making.path()
    }

    /// Token embeddings.
    ///
    /// # Errors
    /// [`CompressError::File`], as for all that writes.
    pub fn embedding(&mut self, matrix: &Matrix) -> Result<(), CompressError> {
        self.matrix("model.embed_tokens.weight".into(), matrix)
    }

    /// The weights of layer `i`.
    ///
    /// # Errors
    /// [`CompressError::File`].
    pub fn layer(&mut self, i: usize, layer: &LayerWeights) -> Result<(), CompressError> {
        let name = |module: &str| format!("model.layers.{i}.{module}.weight");
        for (norm, weights) in layer.norms(self.config.family) {
            self.vector(name(norm), weights)?;
        }
        for ((module, matrix), bias) in QKV.iter().zip(&layer.qkv).zip(&layer.qkv_bias) {
            self.matrix(name(module), matrix)?;
            if !bias.is_empty() {
                self.vector(format!("model.layers.{i}.{module}.bias"), bias)?;
            }
        }
        self.matrix(name("self_attn.o_proj"), &layer.output)?;
        self.matrix(name("mlp.gate_proj"), &layer.gate)?;
        self.matrix(name("mlp.up_proj"), &layer.up)?;
        self.matrix(name("mlp.down_proj"), &layer.down)
    }

    /// The last norm, and the output head unless it is the embedding.
    ///
    /// # Errors
    /// [`CompressError::File`].
    pub fn head(&mut self, norm: &[f32], head: Option<&Matrix>) -> Result<(), CompressError> {
        self.vector("model.norm.weight".into(), norm)?;
        head.map_or(Ok(()), |head| self.matrix("lm_head.weight".into(), head))
    }

    fn matrix(&mut self, name: String, matrix: &Matrix) -> Result<(), CompressError> {
        self.tensor(name, vec![matrix.rows(), matrix.columns()], matrix.numbers())
    }

    fn vector(&mut self, name: String, numbers: &[f32]) -> Result<(), CompressError> {
        self.tensor(name, vec![numbers.len()], numbers)
    }

    /// A tensor under its whole name. Matrices that the family stores as one come one after the other.
    ///
    /// # Errors
    /// [`CompressError::File`].
    pub fn tensor(&mut self, name: String, shape: Vec<usize>, numbers: &[f32]) -> Result<(), CompressError> {
        if self.config.family.is_gemma() && name.ends_with("norm.weight") {
            let less_one: Vec<f32> = numbers.iter().map(|w| w - 1.0).collect();
            return self.stored(name, shape, &less_one);
        }
        let Place { stored, rows } = names::place(&self.config, &name);
        let Some(rows) = rows else { return self.stored(stored, shape, numbers) };
        if rows.start == 0 {
            self.fused.clear();
        }
        self.fused.extend_from_slice(numbers);
        let whole = names::fused_shapes(&self.config).into_iter().find(|(module, _)| stored.contains(module));
        match whole {
            Some((_, [outputs, inputs])) if rows.end == outputs => {
                let numbers = std::mem::take(&mut self.fused);
                self.stored(stored, vec![outputs, inputs], &numbers)
            }
            _ => Ok(()),
        }
    }

    fn stored(&mut self, name: String, shape: Vec<usize>, numbers: &[f32]) -> Result<(), CompressError> {
        let bytes = self.format.bytes(numbers);
        if self.pending_bytes > 0 && self.pending_bytes + bytes.len() > self.shard_bytes {
            self.flush()?;
        }
        self.pending_bytes += bytes.len();
        self.total_bytes += bytes.len();
        self.pending.push((name, shape, bytes));
        Ok(())
    }

    /// Writes what is pending as one file.
    fn flush(&mut self) -> Result<(), CompressError> {
        let path = self.folder().join(format!("shard-{}", self.shards.len()));
        let dtype = match self.format {
            Format::F32 => Dtype::F32,
            Format::Bf16 => Dtype::BF16,
            Format::F16 => Dtype::F16,
        };
        let failed = |e: safetensors::SafeTensorError| CompressError::File { path: path.clone(), source: std::io::Error::other(e) };
        let views = self.pending.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(dtype, shape.clone(), bytes)?)));
        let views = views.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        // transformers refuses a file that does not say this.
        let said = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(views, Some(said), &path).map_err(failed)?;
        making::as_its_folder(&path).map_err(|source| CompressError::File { path: path.clone(), source })?;
        sync(&path)?;
        self.shards.push(self.pending.drain(..).map(|p| p.0).collect());
        self.pending_bytes = 0;
        Ok(())
    }

    /// Ends the weights of a checkpoint that was made of `full`; writes its configuration and tokenizer.
    ///
    /// # Errors
    /// [`CompressError::File`]; as [`Checkpoint::tokenizer`].
    pub fn close(mut self, full: &Checkpoint) -> Result<Closed, CompressError> {
        self.flush()?;
        self.name_shards()?;
        let folder = self.making.path();
        write(&folder.join("config.json"), &pretty(&full.config_json(&self.config, self.format)?))?;
        if let Some(generation) = full.generation_json()? {
            write(&folder.join("generation_config.json"), &pretty(&generation))?;
        }
        let tokenizer = full.tokenizer()?;
        write(&folder.join("tokenizer.json"), &tokenizer.tokenizer)?;
        write(&folder.join("tokenizer_config.json"), &pretty(&tokenizer.config))?;
        Ok(Closed { out: self.out, making: self.making })
    }

    /// Gives the files the names that transformers looks for, with an index where there are several.
    fn name_shards(&self) -> Result<(), CompressError> {
        let rename = |i: usize, name: &str| {
            let path = self.folder().join(format!("shard-{i}"));
            std::fs::rename(&path, self.folder().join(name)).map_err(|source| CompressError::File { path, source })
        };
        if self.shards.len() == 1 {
            return rename(0, "model.safetensors");
        }
        let mut map = BTreeMap::new();
        for (i, tensors) in self.shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, self.shards.len());
            rename(i, &name)?;
            map.extend(tensors.iter().map(|t| (t.clone(), name.clone())));
        }
        let index = json!({ "metadata": { "total_size": self.total_bytes }, "weight_map": map });
        write(&self.folder().join("model.safetensors.index.json"), &pretty(&index))
    }
}

/// A checkpoint that is whole but has not appeared yet: it can be opened and measured. Dropped, it leaves nothing behind.
pub struct Closed {
    out: PathBuf,
    making: tempfile::TempDir,
}

impl Closed {
    /// Where it lies for now.
    pub fn path(&self) -> &Path {
        self.making.path()
    }

    /// Adds `provenance.json` and puts it at its place.
    ///
    /// # Errors
    /// [`CompressError::File`].
    pub fn appear(self, provenance: &Map<String, Value>) -> Result<(), CompressError> {
        write(&self.path().join("provenance.json"), &pretty(provenance))?;
        let made = self.making.keep();
        if let Err(source) = std::fs::rename(&made, &self.out) {
            // Best effort: what is left over is hidden and harmless.
            let _ = std::fs::remove_dir_all(&made);
            return Err(CompressError::File { path: self.out, source });
        }
        Ok(())
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), CompressError> {
    std::fs::write(path, bytes).map_err(|source| CompressError::File { path: path.to_owned(), source })?;
    sync(path)
}

fn sync(path: &Path) -> Result<(), CompressError> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|source| CompressError::File { path: path.to_owned(), source })
}

fn pretty(value: &impl serde::Serialize) -> Vec<u8> {
    // JSON values have string keys only: nothing that could fail.
    serde_json::to_vec_pretty(value).unwrap_or_default()
}
