//! Where a model's tensors come from: a Hugging Face folder, GGUF or memory, under Hugging Face's names.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use overfill_types::pair::WeightFormat;

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gguf::GgufFile;
use crate::hugging_face::HuggingFaceFolder;
use crate::names;
use crate::values;
use crate::weight::Weight;

/// An opened checkpoint. Names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`) whatever the file's are;
/// query and key rows come in Hugging Face's order (halves, not interleaved) also from a GGUF file. Matrices that a family stores as
/// one come apart, and weights of norms are what is multiplied, also where a family stores them less one.
pub enum Weights {
    /// A folder with `config.json` and safetensors, or files that PyTorch wrote.
    HuggingFace(HuggingFaceFolder),
    /// One `.gguf` file.
    Gguf(GgufFile),
    /// No file: numbers in memory, as those of a model that is being trained.
    Memory(LlamaConfig, HashMap<String, Tensor>),
}

/// A matrix whose numbers are in a file as they are wanted.
pub(crate) struct InPlace<'w> {
    /// In row-major order; borrowed from the file where they lie there in one run.
    pub(crate) bytes: Cow<'w, [u8]>,
    /// `[out, in]`
    pub(crate) shape: [usize; 2],
    pub(crate) stored: StoredAs,
}

/// What a matrix's bytes are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoredAs {
    Dense(DType),
    Blocks(GgmlDType),
}

impl Weights {
    /// Opens a Hugging Face folder or a `.gguf` file. Every tensor is there and as large as the configuration says; their
    /// numbers are read when they are asked for.
    ///
    /// # Errors
    /// [`ModelError::Read`] and [`ModelError::Format`], naming the tensor that is missing or of another shape.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = std::fs::metadata(path).map_err(|source| ModelError::Read { path: path.to_owned(), source })?.is_file();
        let weights = if file { Self::Gguf(GgufFile::open(path)?) } else { Self::HuggingFace(HuggingFaceFolder::open(path)?) };
        weights.check()?;
        Ok(weights)
    }

    /// Of numbers in memory, which are copied: each tensor's name, shape and numbers in row-major order.
    ///
    /// # Errors
    /// [`ModelError::Format`], naming the tensor that is missing or of another shape than the configuration says.
    pub fn of_numbers<'n>(
        config: LlamaConfig,
        tensors: impl IntoIterator<Item = (String, Vec<usize>, &'n [f32])>,
    ) -> Result<Self, ModelError> {
        let tensor = |(name, shape, numbers): (String, Vec<usize>, &[f32])| Ok((name, Tensor::from_slice(numbers, shape, &Device::Cpu)?));
        let tensors = tensors.into_iter().map(tensor).collect::<Result<_, ModelError>>()?;
        let weights = Self::Memory(config, tensors);
        weights.check()?;
        Ok(weights)
    }

    /// Its shape.
    pub fn config(&self) -> &LlamaConfig {
        match self {
            Self::HuggingFace(folder) => &folder.config,
            Self::Gguf(file) => &file.config,
            Self::Memory(config, _) => config,
        }
    }

    /// Whether it has a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self {
            Self::HuggingFace(folder) => folder.shape(name),
            Self::Gguf(file) => file.shape(name),
            Self::Memory(_, tensors) => tensors.get(name).map(|tensor| tensor.dims().to_vec()),
        }
    }

    /// Kernels trust the configuration: what does not go with it would end a node at its first request.
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        let config = self.config();
        let LlamaConfig { hidden_size: hidden, intermediate_size: mlp, vocab_size: vocab, heads, kv, .. } = *config;
        let wants = |name: &str, wanted: &[usize]| match self.shape(name) {
            Some(found) if found == wanted => Ok(()),
            Some(found) => Err(self.format_error(format!(
                "tensor {name} has shape {found:?}, which must be {wanted:?} by the configuration (hidden size {hidden}, MLP {mlp}, \
                 {heads} heads, {kv}, vocabulary {vocab})"
            ))),
            None => Err(self.format_error(format!("tensor {name} is missing"))),
        };
        let may = |name: &str, wanted: &[usize]| if self.has(name) { wants(name, wanted) } else { Ok(()) };
        wants("model.embed_tokens.weight", &[vocab, hidden])?;
        for layer in 0..kv.layers {
            for (norm, length) in names::norms(config) {
                wants(&format!("model.layers.{layer}.{norm}.weight"), &[length])?;
            }
            if !matches!(self, Self::Memory(..)) {
                for (module, shape) in names::fused_shapes(config) {
                    wants(&format!("model.layers.{layer}.{module}.weight"), &shape)?;
                }
            }
            for (module, shape) in names::MATRICES.into_iter().zip(names::matrix_shapes(config)) {
                wants(&format!("model.layers.{layer}.{module}.weight"), &shape)?;
                may(&format!("model.layers.{layer}.{module}.bias"), &shape[..1])?;
            }
        }
        wants("model.norm.weight", &[hidden])?;
        may("lm_head.weight", &[vocab, hidden])
    }

    /// A matrix in the file itself, where it need not be changed for `format`: nobody has to copy what is read once. Whatever is
    /// missing or wrong is told by [`Weights::matrix`].
    pub(crate) fn in_place(&self, name: &str, format: WeightFormat) -> Option<InPlace<'_>> {
        let there = match self {
            Self::HuggingFace(folder) => folder.in_place(name)?,
            Self::Gguf(file) => file.in_place(name)?,
            Self::Memory(..) => return None,
        };
        let wanted = match format {
            WeightFormat::F32 => StoredAs::Dense(DType::F32),
            WeightFormat::Bf16 => StoredAs::Dense(DType::BF16),
            WeightFormat::F16 => StoredAs::Dense(DType::F16),
            WeightFormat::Q8_0 => match there.stored {
                // They are rounded while they are packed.
                StoredAs::Dense(dtype) => StoredAs::Dense(dtype),
                StoredAs::Blocks(_) => StoredAs::Blocks(GgmlDType::Q8_0),
            },
            WeightFormat::Native => there.stored,
        };
        (there.stored == wanted).then_some(there)
    }

    /// A matrix `[out, in]`, held as `format` says; but where that is Q8_0 and the file has other numbers, they come as f32, and who
    /// multiplies them rounds them.
    ///
    /// # Errors
    /// [`ModelError::Format`] where it is missing, is no matrix, or cannot be read.
    pub fn matrix(&self, name: &str, format: WeightFormat, device: &Device) -> Result<Weight, ModelError> {
        let tensor = match self {
            Self::HuggingFace(folder) => folder.tensor(name, device)?,
            Self::Memory(_, tensors) => self.held(tensors, name, device)?,
            Self::Gguf(file) => match (file.tensor(name, device)?, format) {
                (Weight::Quantised(q), WeightFormat::Native) => return Ok(Weight::Quantised(q)),
                (Weight::Quantised(q), WeightFormat::Q8_0) if q.dtype() == GgmlDType::Q8_0 => return Ok(Weight::Quantised(q)),
                (Weight::Quantised(q), _) => q.dequantize(device)?,
                (Weight::Dense(t), _) => t,
            },
        };
        if tensor.rank() != 2 {
            return Err(self.format_error(format!("tensor {name} has shape {:?}, not that of a matrix", tensor.dims())));
        }
        let dtype = match format {
            WeightFormat::F32 | WeightFormat::Q8_0 => DType::F32,
            WeightFormat::Bf16 => DType::BF16,
            WeightFormat::F16 => DType::F16,
            WeightFormat::Native => match self {
                Self::HuggingFace(folder) => folder.native(&tensor, name),
                _ => tensor.dtype(),
            },
        };
        Ok(Weight::Dense(tensor.to_dtype(dtype)?))
    }

    /// A vector (norm weight, bias) as f32 `[n]`.
    ///
    /// # Errors
    /// [`ModelError::Format`] where it is missing, is no vector, or cannot be read.
    pub fn vector(&self, name: &str, device: &Device) -> Result<Tensor, ModelError> {
        let tensor = match self {
            Self::HuggingFace(folder) => folder.tensor(name, device)?,
            Self::Memory(_, tensors) => self.held(tensors, name, device)?,
            Self::Gguf(file) => match file.tensor(name, device)? {
                Weight::Dense(t) => t,
                Weight::Quantised(q) => q.dequantize(device)?,
            },
        };
        if tensor.rank() != 1 {
            return Err(self.format_error(format!("tensor {name} has shape {:?}, not that of a vector", tensor.dims())));
        }
        Ok(tensor.to_dtype(DType::F32)?)
    }

    /// A tensor's numbers as f32, in row-major order, with its shape: for those who compute without tensors.
    ///
    /// # Errors
    /// [`ModelError::Format`] where it is missing or cannot be read.
    pub fn numbers(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>), ModelError> {
        let tensor = match self {
            Self::HuggingFace(folder) => folder.tensor(name, &Device::Cpu)?,
            Self::Memory(_, tensors) => self.held(tensors, name, &Device::Cpu)?,
            Self::Gguf(file) => match file.tensor(name, &Device::Cpu)? {
                Weight::Dense(t) => t,
                Weight::Quantised(q) => q.dequantize(&Device::Cpu)?,
            },
        };
        let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
        Ok((values::read(&tensor, <[f32]>::to_vec)?, tensor.dims().to_vec()))
    }

    fn held(&self, tensors: &HashMap<String, Tensor>, name: &str, device: &Device) -> Result<Tensor, ModelError> {
        let tensor = tensors.get(name).ok_or_else(|| self.format_error(format!("tensor {name} is missing")))?;
        Ok(tensor.to_device(device)?)
    }

    fn format_error(&self, what: String) -> ModelError {
        let path = match self {
            Self::HuggingFace(folder) => folder.path.clone(),
            Self::Gguf(file) => file.path.clone(),
            Self::Memory(..) => PathBuf::from("a model in memory"),
        };
        ModelError::Format { path, what }
    }
}
