//! A checkpoint as Hugging Face has it: a folder with `config.json` and safetensors, one file or several shards.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::{known, names};

/// An opened folder.
pub struct HuggingFaceFolder {
    pub(crate) path: PathBuf,
    pub(crate) config: LlamaConfig,
    tensors: MmapedSafetensors,
}

impl HuggingFaceFolder {
    /// Opens `path`; tensors are read when they are asked for.
    ///
    /// # Errors
    /// [`ModelError::Read`] and [`ModelError::Format`], naming the file.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let config_path = path.join("config.json");
        let text = read(&config_path)?;
        let generation = path.join("generation_config.json");
        let generation = if generation.exists() { Some(read(&generation)?) } else { None };
        let config =
            LlamaConfig::from_hugging_face(&text, generation.as_deref()).map_err(|what| ModelError::Format { path: config_path, what })?;
        let files = weight_files(path)?;
        // SAFETY: the files are mapped for reading. Whoever changes a checkpoint while a node loads it gets wrong weights,
        // which the check of the weights' hash finds when a pair is loaded; no memory of ours is at stake.
        let tensors = unsafe { MmapedSafetensors::multi(&files) }
            .map_err(|e| ModelError::Format { path: path.to_owned(), what: format!("no whole safetensors: {e}") })?;
        let json: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        known::check_tensors(&json, &config, &tensors).map_err(|what| ModelError::Format { path: path.to_owned(), what })?;
        Ok(Self { path: path.to_owned(), config, tensors })
    }

    /// A tensor's shape, if there is one of that name.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let place = names::place(&self.config, name);
        let shape = self.tensors.get(&place.stored).ok()?.shape().to_vec();
        Some(place.shape(shape))
    }

    pub(crate) fn tensor(&self, name: &str, device: &Device) -> Result<Tensor, ModelError> {
        if self.shape(name).is_none() {
            return Err(ModelError::Format { path: self.path.clone(), what: format!("tensor {name} is missing") });
        }
        let names::Place { stored, rows } = names::place(&self.config, name);
        let mut tensor = self.tensors.load(&stored, device)?;
        if let Some(rows) = rows {
            tensor = tensor.narrow(0, rows.start, rows.len())?.contiguous()?;
        }
        if self.config.family.is_gemma() && name.ends_with("norm.weight") {
            tensor = (tensor.to_dtype(DType::F32)? + 1.0)?;
        }
        Ok(tensor)
    }
}

/// The safetensors files of a folder, in order of name.
///
/// # Errors
/// [`ModelError::Read`] where there are none or a shard that the index names is missing; [`ModelError::Format`] where the index is broken.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index_path = folder.join("model.safetensors.index.json");
    let files: Vec<PathBuf> = if index_path.exists() {
        let broken = |what: String| ModelError::Format { path: index_path.clone(), what };
        let index: serde_json::Value = serde_json::from_str(&read(&index_path)?).map_err(|e| broken(format!("no JSON: {e}")))?;
        let map = index["weight_map"].as_object().ok_or_else(|| broken("weight_map is missing".into()))?;
        let names: BTreeSet<&str> = map.values().filter_map(|v| v.as_str()).collect();
        if let Some(name) = names.iter().find(|n| n.contains(['/', '\\'])) {
            return Err(broken(format!("shard {name} is not in the folder itself")));
        }
        names.into_iter().map(|name| folder.join(name)).collect()
    } else {
        vec![folder.join("model.safetensors")]
    };
    for file in &files {
        std::fs::metadata(file).map_err(|source| ModelError::Read { path: file.clone(), source })?;
    }
    Ok(files)
}

pub(crate) fn read(path: &Path) -> Result<String, ModelError> {
    std::fs::read_to_string(path).map_err(|source| ModelError::Read { path: path.to_owned(), source })
}
