//! A checkpoint in one GGUF file: shape, tensors under Hugging Face's names, and the vocabulary.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufReader, Seek};
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use overfill_types::KvGeometry;

use crate::config::{LlamaConfig, Rope, RopeScaling};
use crate::error::ModelError;
use crate::gguf_header;
use crate::weight::Weight;

/// An opened GGUF file.
pub struct GgufFile {
    pub(crate) path: PathBuf,
    pub(crate) config: LlamaConfig,
    content: Content,
    /// Query and key rows are stored interleaved, as llama.cpp's `llama` architecture wants them.
    interleaved: bool,
}

impl GgufFile {
    /// Reads the file's header; tensors are read when they are asked for.
    ///
    /// # Errors
    /// [`ModelError::Read`]; [`ModelError::Format`] where it is no GGUF file, or of another architecture.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let format = |what: String| ModelError::Format { path: path.to_owned(), what };
        let mut reader = BufReader::new(open(path)?);
        let read = |source| ModelError::Read { path: path.to_owned(), source };
        let length = reader.get_ref().metadata().map_err(read)?.len();
        gguf_header::check(&mut reader, length).map_err(|e| format(format!("no whole GGUF file: {e}")))?;
        reader.rewind().map_err(read)?;
        let content = Content::read(&mut reader).map_err(|e| format(format!("no whole GGUF file: {e}")))?;
        for (name, info) in &content.tensor_infos {
            let bytes = (info.shape.elem_count() / info.ggml_dtype.block_size()).saturating_mul(info.ggml_dtype.type_size());
            if content.tensor_data_offset.saturating_add(info.offset).saturating_add(bytes as u64) > length {
                return Err(format(format!("the file ends before tensor {name} does: it is not whole")));
            }
        }
        let mut config = config(&content).map_err(format)?;
        let interleaved = config.architecture == "llama";
        if content.tensor_infos.contains_key("rope_freqs.weight") {
            let factors = content.tensor(&mut reader, "rope_freqs.weight", &Device::Cpu)?.dequantize(&Device::Cpu)?.to_vec1::<f32>()?;
            if factors.len() != config.kv.head_dim / 2 {
                return Err(format(format!("rope_freqs.weight has {} factors, not {}", factors.len(), config.kv.head_dim / 2)));
            }
            config.rope.scaling = RopeScaling::Factors { factors: factors.into_iter().map(f64::from).collect() };
        }
        Ok(Self { path: path.to_owned(), config, content, interleaved })
    }

    /// A tensor's shape, if there is one of that name.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        file_name(name).and_then(|n| self.content.tensor_infos.get(&n)).map(|info| info.shape.dims().to_vec())
    }

    pub(crate) fn tensor(&self, name: &str, device: &Device) -> Result<Weight, ModelError> {
        let missing = || ModelError::Format { path: self.path.clone(), what: format!("tensor {name} is missing") };
        let stored = file_name(name).filter(|n| self.content.tensor_infos.contains_key(n)).ok_or_else(missing)?;
        let tensor = self
            .content
            .tensor(&mut open(&self.path)?, &stored, device)
            .map_err(|e| ModelError::Format { path: self.path.clone(), what: format!("tensor {stored} cannot be read: {e}") })?;
        let heads = match stored.rsplit('.').nth(1) {
            Some("attn_q") if self.interleaved => Some(self.config.heads),
            Some("attn_k") if self.interleaved => Some(self.config.kv.kv_heads),
            _ => None,
        };
        let tensor = match heads {
            Some(heads) => halves(&tensor, heads, device)?,
            None => tensor,
        };
        Ok(match tensor.dtype() {
            GgmlDType::F32 => Weight::Dense(tensor.dequantize(device)?),
            GgmlDType::F16 => Weight::Dense(tensor.dequantize_f16(device)?),
            GgmlDType::BF16 => Weight::Dense(tensor.dequantize(device)?.to_dtype(candle_core::DType::BF16)?),
            _ => Weight::Quantised(tensor),
        })
    }

    /// A value of the file's header, e.g. `tokenizer.ggml.tokens`.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// The file's header and tensors as they lie there, for a copy that is quantised anew.
    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    /// A stored tensor as it lies there.
    pub(crate) fn stored(&self, name: &str) -> Result<QTensor, ModelError> {
        Ok(self.content.tensor(&mut open(&self.path)?, name, &Device::Cpu)?)
    }
}

fn open(path: &Path) -> Result<File, ModelError> {
    File::open(path).map_err(|source| ModelError::Read { path: path.to_owned(), source })
}

/// The file's name of a tensor that Hugging Face names `name`.
pub(crate) fn file_name(name: &str) -> Option<String> {
    if let Some(rest) = name.strip_prefix("model.layers.") {
        let (layer, rest) = rest.split_once('.')?;
        let (module, kind) = rest.rsplit_once('.')?;
        let module = match module {
            "input_layernorm" => "attn_norm",
            "self_attn.q_proj" => "attn_q",
            "self_attn.k_proj" => "attn_k",
            "self_attn.v_proj" => "attn_v",
            "self_attn.o_proj" => "attn_output",
            "post_attention_layernorm" => "ffn_norm",
            "mlp.gate_proj" => "ffn_gate",
            "mlp.up_proj" => "ffn_up",
            "mlp.down_proj" => "ffn_down",
            _ => return None,
        };
        return Some(format!("blk.{layer}.{module}.{kind}"));
    }
    Some(
        match name {
            "model.embed_tokens.weight" => "token_embd.weight",
            "model.norm.weight" => "output_norm.weight",
            "lm_head.weight" => "output.weight",
            _ => return None,
        }
        .to_owned(),
    )
}

/// Rows of each head from interleaved order (0, half, 1, half + 1, …) to halves. Rows are whole runs of blocks, so it is exact.
fn halves(tensor: &QTensor, heads: usize, device: &Device) -> Result<QTensor, ModelError> {
    let dims = tensor.shape().dims().to_vec();
    let rows = dims[0];
    let data = tensor.data()?;
    let (row, half) = (data.len() / rows, rows / heads / 2);
    let mut sorted = Vec::with_capacity(data.len());
    for head in 0..heads {
        for j in 0..2 {
            for i in 0..half {
                let from = (head * 2 * half + i * 2 + j) * row;
                sorted.extend_from_slice(&data[from..from + row]);
            }
        }
    }
    Ok(QTensor::new(QStorage::from_data(Cow::Owned(sorted), device, tensor.dtype())?, dims)?)
}

fn config(content: &Content) -> Result<LlamaConfig, String> {
    let get = |key: &str| content.metadata.get(key);
    if let Some(parts) = get("split.count").and_then(whole).filter(|parts| *parts > 1) {
        return Err(format!("it is one of {parts} parts of a split file: join them first, with `llama-gguf-split --merge`"));
    }
    let architecture = match get("general.architecture").and_then(|v| v.to_string().ok()) {
        Some(name) if name == "llama" || name == "qwen2" => name.clone(),
        other => return Err(format!("the architecture is {}: llama and qwen2 are supported", other.map_or("missing", |s| s.as_str()))),
    };
    let optional = |key: &str| get(&format!("{architecture}.{key}")).and_then(whole);
    let number = |key: &str| optional(key).ok_or_else(|| format!("{architecture}.{key} is missing"));
    let float = |key: &str| get(&format!("{architecture}.{key}")).and_then(|v| v.to_f32().ok()).map(f64::from);
    let hidden_size = number("embedding_length")?;
    let heads = number("attention.head_count")?;
    let head_dim = optional("attention.key_length").unwrap_or(hidden_size / heads.max(1));
    if optional("rope.dimension_count").is_some_and(|d| d != head_dim) {
        return Err("the rotary embedding covers a part of a head only: not supported".into());
    }
    let scaling = match get(&format!("{architecture}.rope.scaling.type")).and_then(|v| v.to_string().ok()).map(String::as_str) {
        None | Some("none") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: float("rope.scaling.factor").ok_or("the rope scaling's factor is missing")? },
        Some(other) => return Err(format!("rope scaling {other} is not supported: none and linear are")),
    };
    let vocab_size = content
        .tensor_infos
        .get("token_embd.weight")
        .and_then(|t| t.shape.dims().first().copied())
        .ok_or("tensor token_embd.weight is missing")?;
    let eos = |key: &str| get(key).and_then(whole).and_then(|id| u32::try_from(id).ok());
    let mut eos_token_ids: Vec<u32> =
        ["eos_token_id", "eot_token_id", "eom_token_id"].iter().filter_map(|key| eos(&format!("tokenizer.ggml.{key}"))).collect();
    eos_token_ids.extend(ends_by_text(content));
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    let config = LlamaConfig {
        hidden_size,
        intermediate_size: number("feed_forward_length")?,
        vocab_size,
        heads,
        kv: KvGeometry { layers: number("block_count")?, kv_heads: optional("attention.head_count_kv").unwrap_or(heads), head_dim },
        rms_norm_eps: float("attention.layer_norm_rms_epsilon").unwrap_or(1e-6),
        rope: Rope { theta: float("rope.freq_base").unwrap_or(10_000.0), scaling },
        max_context: number("context_length")?,
        tied_embeddings: !content.tensor_infos.contains_key("output.weight"),
        eos_token_ids,
        architecture,
    };
    config.check()?;
    Ok(config)
}

/// Tokens that end an answer by their texts, as llama.cpp finds them: many files name the base model's end only.
const ENDS: [&str; 12] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|return|>",
    "<|call|>",
    "<EOT>",
    "_<EOT>",
];

fn ends_by_text(content: &Content) -> Vec<u32> {
    let list = |key: &str| content.metadata.get(key).and_then(|v| v.to_vec().ok()).map_or(&[][..], Vec::as_slice);
    let kinds = list("tokenizer.ggml.token_type");
    let ends = list("tokenizer.ggml.tokens").iter().zip(0_u32..).filter(|(token, id)| {
        // Control (3) or user-defined (4): elsewhere it is text that only looks so.
        let special = kinds.get(*id as usize).and_then(whole).is_some_and(|kind| matches!(kind, 3 | 4));
        special && token.to_string().is_ok_and(|text| ENDS.contains(&text.as_str()))
    });
    ends.map(|(_, id)| id).collect()
}

/// A whole number of whatever width.
pub(crate) fn whole(value: &Value) -> Option<usize> {
    match *value {
        Value::U8(n) => Some(n.into()),
        Value::U16(n) => Some(n.into()),
        Value::U32(n) => usize::try_from(n).ok(),
        Value::U64(n) => usize::try_from(n).ok(),
        Value::I8(n) => usize::try_from(n).ok(),
        Value::I16(n) => usize::try_from(n).ok(),
        Value::I32(n) => usize::try_from(n).ok(),
        Value::I64(n) => usize::try_from(n).ok(),
        _ => None,
    }
}

/// A copy of a GGUF file whose matrices are quantised to `dtype`; the embedding and the head to Q8_0, vectors stay f32.
///
/// The same input gives the same bytes. The vocabulary and all other metadata are carried over.
///
/// # Errors
/// Where `source` cannot be read, a width is no multiple of the format's block, or `target` cannot be written.
pub fn quantise(source: &Path, target: &Path, dtype: GgmlDType, mut progress: impl FnMut(usize, usize)) -> Result<(), ModelError> {
    let file = GgufFile::open(source)?;
    let mut names: Vec<&String> = file.content().tensor_infos.keys().collect();
    names.sort_unstable();
    let mut tensors = Vec::with_capacity(names.len());
    for (done, name) in names.iter().enumerate() {
        progress(done, names.len());
        let stored = file.stored(name)?;
        let wanted = match stored.rank() {
            1 => GgmlDType::F32,
            _ if matches!(name.as_str(), "token_embd.weight" | "output.weight") => GgmlDType::Q8_0,
            _ => dtype,
        };
        let tensor = if stored.dtype() == wanted { stored } else { QTensor::quantize(&stored.dequantize(&Device::Cpu)?, wanted)? };
        tensors.push((name.as_str(), tensor));
    }
    let kind = kind(tensors.iter().map(|(name, tensor)| (*name, tensor)));
    let mut metadata: Vec<(&str, &Value)> = file.content().metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    metadata.retain(|(key, _)| kind.iter().all(|(new, _)| new != key));
    metadata.extend(kind.iter().map(|(key, value)| (*key, value)));
    metadata.sort_unstable_by_key(|m| m.0);
    let failed = |source| ModelError::Read { path: target.to_owned(), source };
    let mut to = std::io::BufWriter::new(File::create(target).map_err(failed)?);
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
    candle_core::quantized::gguf_file::write(&mut to, &metadata, &tensors)?;
    to.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)
}

/// What loaders want to know of a file before they look at its tensors: `general.file_type`, llama.cpp's number for the format
/// that most weights of the layers have, and the version of the formats where any is quantised.
pub(crate) fn kind<'t>(tensors: impl Iterator<Item = (&'t str, &'t QTensor)>) -> Vec<(&'static str, Value)> {
    // As llama.cpp's `llama_ftype` numbers them.
    let numbered = [
        (GgmlDType::F32, 0),
        (GgmlDType::F16, 1),
        (GgmlDType::Q4_0, 2),
        (GgmlDType::Q4_1, 3),
        (GgmlDType::Q8_0, 7),
        (GgmlDType::Q5_0, 8),
        (GgmlDType::Q5_1, 9),
    ];
    let mut weights = [0; 7];
    let mut quantised = false;
    for (name, tensor) in tensors {
        let Some(at) = numbered.iter().position(|(dtype, _)| *dtype == tensor.dtype()) else { continue };
        quantised |= at > 1;
        if name.starts_with("blk.") && tensor.rank() > 1 {
            weights[at] += tensor.shape().elem_count();
        }
    }
    let most = (0..weights.len()).max_by_key(|&at| (weights[at], std::cmp::Reverse(at))).unwrap_or(0);
    let mut told = vec![("general.file_type", Value::U32(numbered[most].1))];
    if quantised {
        // GGML_QNT_VERSION.
        told.push(("general.quantization_version", Value::U32(2)));
    }
    told
}

/// A tensor's blocks, where our kernels multiply them as they are.
pub(crate) fn block_format(dtype: GgmlDType) -> Option<overfill_kernels::BlockFormat> {
    use overfill_kernels::BlockFormat;
    Some(match dtype {
        GgmlDType::Q4_0 => BlockFormat::Q4_0,
        GgmlDType::Q4_1 => BlockFormat::Q4_1,
        GgmlDType::Q5_0 => BlockFormat::Q5_0,
        GgmlDType::Q5_1 => BlockFormat::Q5_1,
        GgmlDType::Q8_0 => BlockFormat::Q8_0,
        GgmlDType::Q4K => BlockFormat::Q4K,
        GgmlDType::Q6K => BlockFormat::Q6K,
        _ => return None,
    })
}
