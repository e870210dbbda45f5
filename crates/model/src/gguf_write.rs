//! Writing a GGUF file as llama.cpp reads it: tensors under its names, rows of queries and keys in its order, each
//! quantised as asked for.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use overfill_text::gguf::GgufVocabulary;
use sha2::{Digest as _, Sha256};

use crate::config::{LayerAttention, LlamaConfig, RopeScaling, Rotation};
use crate::error::ModelError;
use crate::family::Family;
use crate::gguf::kind;
use crate::gguf_config::gemma_attention;
use crate::names;
use crate::rope::Frequencies;

/// Where a GGUF file says how it was made: a JSON object as text.
pub(crate) const PROVENANCE_KEY: &str = "overfill.provenance";

/// A GGUF file in the making. What is written is held in memory, quantised.
pub struct GgufWriter {
    config: LlamaConfig,
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, QTensor)>,
}

impl GgufWriter {
    /// Begins a file of a model of this shape, with its vocabulary.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where the vocabulary is larger than the embedding, or such a file cannot say what a layer sees.
    pub fn new(name: &str, config: &LlamaConfig, vocabulary: &GgufVocabulary) -> Result<Self, ModelError> {
        if vocabulary.tokens.len() > config.vocab_size {
            return Err(ModelError::Mismatch(format!(
                "the tokenizer has {} tokens, the embedding {} rows: they do not belong together",
                vocabulary.tokens.len(),
                config.vocab_size
            )));
        }
        let mut writer = Self { config: config.clone(), metadata: Vec::new(), tensors: Vec::new() };
        check_layers(config)?;
        writer.shape(name);
        writer.vocabulary(vocabulary);
        writer.factors()?;
        Ok(writer)
    }

    /// How the model was made, for people. Of long lists (the numbers of kept neurons) their length and hash go into the file.
    pub fn provenance(&mut self, provenance: &serde_json::Map<String, serde_json::Value>) {
        // Our own keys and values are text, which JSON can always hold.
        let text = serde_json::to_string(&summary(&serde_json::Value::Object(provenance.clone()))).unwrap_or_default();
        self.put(PROVENANCE_KEY, Value::String(text));
    }

    /// A tensor by Hugging Face's name, its shape, and what it is stored as. Vectors are stored as f32 whatever is asked for.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where the name is no tensor of such a file or a row is no whole number of the format's blocks.
    pub fn tensor(&mut self, name: &str, shape: &[usize], numbers: &[f32], format: GgmlDType) -> Result<(), ModelError> {
        let place = names::in_gguf(&self.config, name).filter(|place| place.rows.is_none());
        let stored =
            place.ok_or_else(|| ModelError::Mismatch(format!("{name} is no tensor of a {} model's file", self.config.family)))?.stored;
        let sorted = names::interleaved_heads(&self.config, name).map(|heads| interleaved(numbers, shape[0], heads));
        let tensor = Tensor::from_slice(sorted.as_deref().unwrap_or(numbers), shape, &Device::Cpu)?;
        let format = if shape.len() == 1 { GgmlDType::F32 } else { format };
        let row = shape.last().copied().unwrap_or_default();
        if !row.is_multiple_of(format.block_size()) {
            let blocks = format.block_size();
            return Err(ModelError::Mismatch(format!("rows of {name} have {row} numbers, no multiple of {format:?}'s {blocks}")));
        }
        self.tensors.push((stored, QTensor::quantize(&tensor, format)?));
        Ok(())
    }

    /// Writes the file. The same content gives the same bytes.
    ///
    /// # Errors
    /// [`ModelError::Read`] where it cannot be written.
    pub fn write(mut self, path: &Path) -> Result<(), ModelError> {
        self.tensors.sort_by(|a, b| a.0.cmp(&b.0));
        for (key, value) in kind(self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))) {
            self.put(key, value);
        }
        let failed = |source| ModelError::Read { path: path.to_owned(), source };
        let mut to = BufWriter::new(File::create(path).map_err(failed)?);
        let metadata: Vec<(&str, &Value)> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<(&str, &QTensor)> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut to, &metadata, &tensors)?;
        to.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)
    }

    fn put(&mut self, key: impl Into<String>, value: Value) {
        self.metadata.push((key.into(), value));
    }

    fn shape(&mut self, name: &str) {
        let config = self.config.clone();
        let family = config.family;
        let number = |n: usize| Value::U32(n as u32);
        self.put("general.architecture", Value::String(family.name().into()));
        self.put("general.name", Value::String(name.to_owned()));
        let mut put = |key: &str, value| self.put(format!("{family}.{key}"), value);
        put("block_count", number(config.kv.layers));
        put("context_length", number(config.max_context));
        put("embedding_length", number(config.hidden_size));
        put("feed_forward_length", number(config.intermediate_size));
        put("vocab_size", number(config.vocab_size));
        put("attention.head_count", number(config.heads));
        put("attention.head_count_kv", number(config.kv.kv_heads));
        put("attention.key_length", number(config.kv.head_dim));
        put("attention.value_length", number(config.kv.head_dim));
        put("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32));
        put("rope.dimension_count", number(config.rope.turned));
        put("rope.freq_base", Value::F32(config.rope.theta as f32));
        let float = |x: f64| Value::F32(x as f32);
        match config.rope.scaling {
            RopeScaling::Linear { factor } => {
                put("rope.scaling.type", Value::String("linear".into()));
                put("rope.scaling.factor", float(factor));
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, .. } => {
                put("rope.scaling.type", Value::String("yarn".into()));
                put("rope.scaling.factor", float(factor));
                put("rope.scaling.original_context_length", number(original_context));
                put("rope.scaling.yarn_beta_fast", float(beta_fast));
                put("rope.scaling.yarn_beta_slow", float(beta_slow));
                put("rope.scaling.yarn_attn_factor", float(config.rope.magnitude));
            }
            RopeScaling::Factors { .. } if family == Family::Phi3 => {
                put("rope.scaling.original_context_length", number(config.max_context));
                put("rope.scaling.attn_factor", float(config.rope.magnitude));
            }
            _ => {}
        }
        if let Some(rope) = &config.local_rope {
            put("rope.freq_base_swa", float(rope.theta));
        }
        let slides = |layer: &LayerAttention| layer.window.is_some() || layer.rotation == Rotation::Local;
        let window = config.layers.iter().find_map(|layer| layer.window);
        if family == Family::Gemma2 || config.layers.iter().any(slides) {
            // One that covers the context stands for none.
            put("attention.sliding_window", number(window.unwrap_or(config.max_context)));
            put("attention.sliding_window_pattern", Value::Array(config.layers.iter().map(|layer| Value::Bool(slides(layer))).collect()));
        }
        let scalars = &config.scalars;
        if family == Family::Granite {
            put("embedding_scale", float(scalars.embedding));
            put("residual_scale", float(scalars.residual));
            put("attention.scale", float(scalars.attention));
            put("logit_scale", float(1.0 / scalars.logits));
        }
        for (key, cap) in [("attn_logit_softcapping", scalars.attention_cap), ("final_logit_softcapping", scalars.logits_cap)] {
            if let Some(cap) = cap {
                put(key, float(cap));
            }
        }
    }

    fn vocabulary(&mut self, vocabulary: &GgufVocabulary) {
        let mut put = |key: &str, value| self.put(format!("tokenizer.{key}"), value);
        let texts = |all: &[String]| Value::Array(all.iter().cloned().map(Value::String).collect());
        put("ggml.model", Value::String(vocabulary.model.clone()));
        if let Some(pre) = &vocabulary.pre {
            put("ggml.pre", Value::String(pre.clone()));
        }
        let mut tokens = vocabulary.tokens.clone();
        let mut kinds = vocabulary.token_types.clone();
        kinds.resize(tokens.len(), NORMAL);
        // The embedding may have more rows than there are tokens: llama.cpp wants names for them.
        let known = tokens.len();
        put("ggml.merges", texts(&vocabulary.merges));
        for (key, id) in [("bos", vocabulary.bos), ("eos", vocabulary.eos), ("unknown", vocabulary.unknown)] {
            if let Some(id) = id {
                put(&format!("ggml.{key}_token_id"), Value::U32(id));
            }
        }
        put("ggml.add_bos_token", Value::Bool(vocabulary.add_bos));
        if let Some(template) = &vocabulary.chat_template {
            put("chat_template", Value::String(template.clone()));
        }
        let size = self.config.vocab_size;
        tokens.extend((known..size).map(|id| format!("[PAD{id}]")));
        kinds.resize(size, UNUSED);
        self.put("tokenizer.ggml.tokens", texts(&tokens));
        self.put("tokenizer.ggml.token_type", Value::Array(kinds.into_iter().map(|kind| Value::I32(kind as i32)).collect()));
    }

    /// Llama 3's stretching of the rotary embedding is a tensor of divisors there, and so is LongRoPE's.
    fn factors(&mut self) -> Result<(), ModelError> {
        if matches!(self.config.rope.scaling, RopeScaling::Yarn { .. }) {
            return Ok(());
        }
        let Some(factors) = Frequencies::divisors(&self.config.rope) else { return Ok(()) };
        let names: &[&str] = match self.config.family {
            // Both are wanted; what is read here is the first.
            Family::Phi3 => &["rope_factors_short.weight", "rope_factors_long.weight"],
            _ => &["rope_freqs.weight"],
        };
        for name in names {
            let tensor = Tensor::from_slice(&factors, factors.len(), &Device::Cpu)?;
            self.tensors.push(((*name).into(), QTensor::quantize(&tensor, GgmlDType::F32)?));
        }
        Ok(())
    }
}

/// Refuses models of which the keys of such a file cannot say what they compute.
fn check_layers(config: &LlamaConfig) -> Result<(), ModelError> {
    let family = config.family;
    let refused = |what: &str| Err(ModelError::Mismatch(format!("a GGUF file cannot say {what}: write a Hugging Face folder instead")));
    let every_fourth = |(i, layer): (usize, &LayerAttention)| (layer.rotation == Rotation::None) == (i + 1).is_multiple_of(4);
    if family == Family::SmolLm3 && !config.layers.iter().enumerate().all(every_fourth) {
        return refused("which layers of a smollm3 model have no rotary embedding, other than each fourth");
    }
    let windows = matches!(family, Family::Llama | Family::Phi3 | Family::Gemma2 | Family::Gemma3);
    if !windows && config.layers.iter().any(|layer| layer.window.is_some()) {
        return refused(&format!("which layers of a {family} model have windows"));
    }
    let read = gemma_attention(family, config.kv.layers, config.hidden_size / config.heads, config.kv.head_dim);
    if matches!(family, Family::Gemma2 | Family::Gemma3) && (config.scalars.attention - read).abs() > 1e-9 {
        return refused("by what scores are multiplied (query_pre_attn_scalar), other than the root of a head's size");
    }
    Ok(())
}

/// Longest list of a provenance that a file holds as it is.
const LONG_LIST: usize = 64;

/// The same with long lists told by their length and the hash of their JSON.
fn summary(value: &serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Array(list) if list.len() > LONG_LIST => {
            let hash = Sha256::digest(serde_json::to_string(list).unwrap_or_default());
            serde_json::json!({ "values": list.len(), "sha256": hex::encode(hash) })
        }
        Value::Array(list) => Value::Array(list.iter().map(summary).collect()),
        Value::Object(all) => Value::Object(all.iter().map(|(key, value)| (key.clone(), summary(value))).collect()),
        other => other.clone(),
    }
}

/// llama.cpp's kinds of tokens.
const NORMAL: u32 = 1;
const UNUSED: u32 = 5;

/// Rows of each head from halves to interleaved order (0, half, 1, half + 1, …).
fn interleaved(numbers: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (row, half) = (numbers.len() / rows, rows / heads / 2);
    let mut sorted = Vec::with_capacity(numbers.len());
    for head in 0..heads {
        for i in 0..half {
            for j in 0..2 {
                let from = (head * 2 * half + j * half + i) * row;
                sorted.extend_from_slice(&numbers[from..from + row]);
            }
        }
    }
    sorted
}
