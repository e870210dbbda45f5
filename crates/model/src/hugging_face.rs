//! A checkpoint as Hugging Face has it: a folder with `config.json` and weights, in one file or several shards.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::fp8::{self, Scheme};
use crate::stored::{Stored, WeightFiles};
use crate::weights::{InPlace, StoredAs};
use crate::{known, names};

/// An opened folder.
pub struct HuggingFaceFolder {
    pub(crate) path: PathBuf,
    pub(crate) config: LlamaConfig,
    tensors: Arc<Stored>,
    /// What the names of its tensors begin with in the files, which may hold others.
    prefix: &'static str,
    /// How matrices of eight-bit floats are scaled.
    scaled: Option<Scheme>,
}

impl HuggingFaceFolder {
    /// Opens `path`; tensors are read when they are asked for.
    ///
    /// # Errors
    /// [`ModelError::Read`] and [`ModelError::Format`], naming the file.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let tensors = Stored::open(path, &WeightFiles::of(path)?)?;
        Self::part(path, Arc::new(tensors), "")
    }

    /// The model that `config.json` in `path` tells of, whose tensors are those of `tensors` under `prefix`.
    ///
    /// # Errors
    /// As [`HuggingFaceFolder::open`].
    pub(crate) fn part(path: &Path, tensors: Arc<Stored>, prefix: &'static str) -> Result<Self, ModelError> {
        let config_path = path.join("config.json");
        let text = read(&config_path)?;
        let generation = path.join("generation_config.json");
        let generation = if generation.exists() { Some(read(&generation)?) } else { None };
        let config =
            LlamaConfig::from_hugging_face(&text, generation.as_deref()).map_err(|what| ModelError::Format { path: config_path, what })?;
        let broken = |what| ModelError::Format { path: path.to_owned(), what };
        let json: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let scaled = Scheme::of(&json).map_err(broken)?;
        known::check_tensors(&json, &config, &unscaled(&tensors, prefix, scaled).map_err(broken)?).map_err(broken)?;
        Ok(Self { path: path.to_owned(), config, tensors, prefix, scaled })
    }

    /// A tensor's shape, if there is one of that name.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let (_, shape) = self.tensors.get(&self.stored(name))?;
        Some(names::place(&self.config, name).shape(shape))
    }

    /// What a tensor's numbers are held as where the file's own format is asked for.
    pub(crate) fn native(&self, tensor: &Tensor, name: &str) -> DType {
        let scaled = self.tensors.get(&self.stored(name)).is_some_and(|(dtype, _)| dtype == Dtype::F8_E4M3);
        if scaled { fp8::HELD } else { tensor.dtype() }
    }

    /// A matrix in its file, unless scales are to be applied to it.
    pub(crate) fn in_place(&self, name: &str) -> Option<InPlace<'_>> {
        let names::Place { stored, rows } = names::place(&self.config, name);
        let stored = format!("{}{stored}", self.prefix);
        let (dtype, shape) = self.tensors.get(&stored).filter(|(dtype, _)| *dtype != Dtype::F8_E4M3)?;
        let [all, inputs] = shape[..] else { return None };
        let (bytes, rows) = (self.tensors.bytes(&stored)?, rows.unwrap_or(0..all));
        let row = bytes.len().checked_div(all)?;
        let (first, end) = (rows.start * row, rows.end * row);
        let bytes = match bytes {
            Cow::Borrowed(bytes) => Cow::Borrowed(bytes.get(first..end)?),
            Cow::Owned(bytes) => Cow::Owned(bytes.get(first..end)?.to_vec()),
        };
        Some(InPlace { bytes, shape: [rows.len(), inputs], stored: StoredAs::Dense(DType::try_from(dtype).ok()?) })
    }

    pub(crate) fn tensor(&self, name: &str, device: &Device) -> Result<Tensor, ModelError> {
        let format = |what| ModelError::Format { path: self.path.clone(), what };
        let missing = || format(format!("tensor {name} is missing"));
        let stored = self.stored(name);
        let (dtype, shape) = self.tensors.get(&stored).ok_or_else(missing)?;
        let mut tensor = match (dtype, self.scaled) {
            (Dtype::F8_E4M3, Some(scheme)) => Tensor::from_vec(scheme.numbers(&self.tensors, &stored).map_err(format)?, shape, device)?,
            _ => {
                let bytes = self.tensors.bytes(&stored).ok_or_else(missing)?;
                Tensor::from_raw_buffer(&bytes, DType::try_from(dtype)?, &shape, device)?
            }
        };
        if let Some(rows) = names::place(&self.config, name).rows {
            tensor = tensor.narrow(0, rows.start, rows.len())?.contiguous()?;
        }
        if self.config.family.is_gemma() && name.ends_with("norm.weight") {
            tensor = (tensor.to_dtype(DType::F32)? + 1.0)?;
        }
        Ok(tensor)
    }

    /// The name of a tensor in the files.
    fn stored(&self, name: &str) -> String {
        format!("{}{}", self.prefix, names::place(&self.config, name).stored)
    }
}

/// What each tensor of a model is made of once the scales have been applied, which are no tensors of the model.
fn unscaled(tensors: &Stored, prefix: &str, scaled: Option<Scheme>) -> Result<BTreeMap<String, Dtype>, String> {
    let mut all = BTreeMap::new();
    for name in tensors.names() {
        let (Some(own), Some((dtype, _))) = (name.strip_prefix(prefix), tensors.get(&name)) else { continue };
        let dtype = match scaled {
            Some(_) if Scheme::is_scale(tensors, &name) => continue,
            Some(scheme) if dtype == Dtype::F8_E4M3 => {
                scheme.check(tensors, &name)?;
                Dtype::BF16
            }
            _ => dtype,
        };
        all.insert(own.to_owned(), dtype);
    }
    Ok(all)
}

pub(crate) fn read(path: &Path) -> Result<String, ModelError> {
    std::fs::read_to_string(path).map_err(|source| ModelError::Read { path: path.to_owned(), source })
}
