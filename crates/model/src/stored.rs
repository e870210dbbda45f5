//! Where the tensors of a Hugging Face folder lie: in safetensors, or in files that PyTorch wrote. Nothing else of the program
//! knows the difference.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use safetensors::Dtype;

use crate::error::ModelError;
use crate::hugging_face::read;
use crate::torch::TorchFile;

/// The files of a folder that hold its weights.
pub(crate) struct WeightFiles {
    /// In order of name.
    pub(crate) files: Vec<PathBuf>,
    /// What says which tensor is in which of them, where there are several.
    pub(crate) index: Option<PathBuf>,
    torch: bool,
}

impl WeightFiles {
    /// The files of a folder: safetensors where there are both forms.
    ///
    /// # Errors
    /// [`ModelError::Read`] where a file that an index names is missing; [`ModelError::Format`] where there are none, or the index
    /// is broken.
    pub(crate) fn of(folder: &Path) -> Result<Self, ModelError> {
        for (name, torch) in [("model.safetensors", false), ("pytorch_model.bin", true)] {
            let (whole, index) = (folder.join(name), folder.join(format!("{name}.index.json")));
            if index.exists() {
                return Ok(Self { files: shards(folder, &index)?, index: Some(index), torch });
            }
            if whole.exists() {
                return Ok(Self { files: vec![whole], index: None, torch });
            }
        }
        let what = "it has no weights: model.safetensors or pytorch_model.bin is wanted, or one of them in parts with its index".into();
        Err(ModelError::Format { path: folder.to_owned(), what })
    }
}

fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let broken = |what: String| ModelError::Format { path: index.to_owned(), what };
    let json: serde_json::Value = serde_json::from_str(&read(index)?).map_err(|e| broken(format!("no JSON: {e}")))?;
    let map = json["weight_map"].as_object().ok_or_else(|| broken("weight_map is missing".into()))?;
    let names: BTreeSet<&str> = map.values().filter_map(|v| v.as_str()).collect();
    if let Some(name) = names.iter().find(|n| n.contains(['/', '\\'])) {
        return Err(broken(format!("shard {name} is not in the folder itself")));
    }
    let files: Vec<PathBuf> = names.into_iter().map(|name| folder.join(name)).collect();
    for file in &files {
        std::fs::metadata(file).map_err(|source| ModelError::Read { path: file.clone(), source })?;
    }
    Ok(files)
}

/// The tensors of opened files.
pub(crate) enum Stored {
    /// In safetensors.
    Safetensors(MmapedSafetensors),
    /// In files that PyTorch wrote, with the one that has each tensor.
    Torch(Vec<TorchFile>, HashMap<String, usize>),
}

impl Stored {
    /// Opens the files of a folder; tensors are read when they are asked for.
    ///
    /// # Errors
    /// [`ModelError::Read`] and [`ModelError::Format`], naming the file.
    pub(crate) fn open(folder: &Path, WeightFiles { files, torch, .. }: &WeightFiles) -> Result<Self, ModelError> {
        if !torch {
            // SAFETY: the files are mapped for reading. Whoever changes a checkpoint while a node loads it gets wrong weights,
            // which the check of the weights' hash finds when a pair is loaded; no memory of ours is at stake.
            let tensors = unsafe { MmapedSafetensors::multi(files) };
            let no = |e| ModelError::Format { path: folder.to_owned(), what: format!("no whole safetensors: {e}") };
            return Ok(Self::Safetensors(tensors.map_err(no)?));
        }
        let (mut opened, mut places) = (Vec::new(), HashMap::new());
        for (i, path) in files.iter().enumerate() {
            let file = TorchFile::open(path)?;
            for name in file.tensors().keys() {
                if places.insert(name.clone(), i).is_some() {
                    return Err(ModelError::Format { path: path.clone(), what: format!("tensor {name} is in another shard too") });
                }
            }
            opened.push(file);
        }
        Ok(Self::Torch(opened, places))
    }

    /// What a tensor is made of, and its shape.
    pub(crate) fn get(&self, name: &str) -> Option<(Dtype, Vec<usize>)> {
        match self {
            Self::Safetensors(tensors) => {
                let view = tensors.get(name).ok()?;
                Some((view.dtype(), view.shape().to_vec()))
            }
            Self::Torch(files, places) => {
                let tensor = &files[*places.get(name)?].tensors()[name];
                Some((tensor.number.stored(), tensor.shape.clone()))
            }
        }
    }

    /// A tensor's numbers in row-major order, as bytes.
    pub(crate) fn bytes(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        match self {
            Self::Safetensors(tensors) => Some(Cow::Borrowed(tensors.get(name).ok()?.data())),
            Self::Torch(files, places) => {
                let file = &files[*places.get(name)?];
                Some(file.bytes(&file.tensors()[name]))
            }
        }
    }

    /// The names of all, in no order.
    pub(crate) fn names(&self) -> Vec<String> {
        match self {
            Self::Safetensors(tensors) => tensors.tensors().into_iter().map(|(name, _)| name).collect(),
            Self::Torch(_, places) => places.keys().cloned().collect(),
        }
    }
}
