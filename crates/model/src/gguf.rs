//! A checkpoint in GGUF, one file or its parts: shape, tensors under Hugging Face's names, and the vocabulary.

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device};

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gguf_parts::Parts;
use crate::weight::Weight;
use crate::weights::{InPlace, StoredAs};
use crate::{gguf_config, names};

/// An opened GGUF file.
pub struct GgufFile {
    pub(crate) path: PathBuf,
    pub(crate) config: LlamaConfig,
    parts: Parts,
}

impl GgufFile {
    /// Reads the file's header, and those of its other parts where it is the first of several; tensors are read when they are asked for.
    ///
    /// # Errors
    /// [`ModelError::Read`]; [`ModelError::Format`] where it is no GGUF file, or of another architecture.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let format = |what: String| ModelError::Format { path: path.to_owned(), what };
        let parts = Parts::open(path)?;
        let content = parts.content();
        let mut factors = None;
        for name in ["rope_freqs.weight", "rope_factors_short.weight"] {
            if content.tensor_infos.contains_key(name) {
                let numbers = parts.tensor(name, &Device::Cpu)?.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
                factors = Some(numbers.into_iter().map(f64::from).collect());
            }
        }
        let config = gguf_config::read(content, factors).map_err(format)?;
        if let Some(name) = content.tensor_infos.keys().find(|name| !names::is_of_gguf(&config, name)) {
            return Err(format(format!(
                "tensor {name} is none of a {} model by its header: without it the answers would be others",
                config.family
            )));
        }
        Ok(Self { path: path.to_owned(), config, parts })
    }

    /// A tensor's shape, if there is one of that name.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let place = names::in_gguf(&self.config, name)?;
        let shape = self.parts.content().tensor_infos.get(&place.stored)?.shape.dims().to_vec();
        Some(place.shape(shape))
    }

    /// A matrix in its file, where its rows stand in their order.
    pub(crate) fn in_place(&self, name: &str) -> Option<InPlace<'_>> {
        let names::Place { stored, rows } = names::in_gguf(&self.config, name)?;
        if names::interleaved_heads(&self.config, name).is_some() {
            return None;
        }
        let (info, bytes) = self.parts.bytes(&stored)?;
        let (all, inputs) = info.shape.dims2().ok()?;
        let (row, rows) = (bytes.len().checked_div(all)?, rows.unwrap_or(0..all));
        let stored = match info.ggml_dtype {
            GgmlDType::F32 => StoredAs::Dense(DType::F32),
            GgmlDType::F16 => StoredAs::Dense(DType::F16),
            GgmlDType::BF16 => StoredAs::Dense(DType::BF16),
            dtype => StoredAs::Blocks(dtype),
        };
        let bytes = bytes.get(rows.start * row..rows.end * row)?;
        Some(InPlace { bytes: Cow::Borrowed(bytes), shape: [rows.len(), inputs], stored })
    }

    pub(crate) fn tensor(&self, name: &str, device: &Device) -> Result<Weight, ModelError> {
        let missing = || ModelError::Format { path: self.path.clone(), what: format!("tensor {name} is missing") };
        let names::Place { stored, rows } = names::in_gguf(&self.config, name)
            .filter(|place| self.parts.content().tensor_infos.contains_key(&place.stored))
            .ok_or_else(missing)?;
        let mut tensor = self.parts.tensor(&stored, device)?;
        if let Some(rows) = rows {
            tensor = self::rows(&tensor, rows, device)?;
        }
        if let Some(heads) = names::interleaved_heads(&self.config, name) {
            tensor = halves(&tensor, heads, device)?;
        }
        Ok(match tensor.dtype() {
            GgmlDType::F32 => Weight::Dense(tensor.dequantize(device)?),
            GgmlDType::F16 => Weight::Dense(tensor.dequantize_f16(device)?),
            GgmlDType::BF16 => Weight::Dense(tensor.dequantize(device)?.to_dtype(DType::BF16)?),
            _ => Weight::Quantised(Arc::new(tensor)),
        })
    }

    /// A value of the file's header, e.g. `tokenizer.ggml.tokens`.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.parts.metadata(key)
    }

    /// The file's header and tensors as they lie there, for a copy that is quantised anew.
    pub(crate) fn content(&self) -> &Content {
        self.parts.content()
    }

    /// A stored tensor as it lies there.
    pub(crate) fn stored(&self, name: &str) -> Result<QTensor, ModelError> {
        self.parts.tensor(name, &Device::Cpu)
    }
}

/// Some rows of a matrix. They are whole runs of blocks, so it is exact.
fn rows(tensor: &QTensor, rows: Range<usize>, device: &Device) -> Result<QTensor, ModelError> {
    let (all, columns) = tensor.shape().dims2()?;
    let data = tensor.data()?;
    let row = data.len() / all;
    let some = data[rows.start * row..rows.end * row].to_vec();
    Ok(QTensor::new(QStorage::from_data(Cow::Owned(some), device, tensor.dtype())?, (rows.len(), columns))?)
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
    // The copy is one file, whatever it was made of.
    metadata.retain(|(key, _)| kind.iter().all(|(new, _)| new != key) && !key.starts_with("split."));
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
