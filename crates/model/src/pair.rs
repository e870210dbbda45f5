//! A pair on disk: opened, checked, loaded, made.

use std::path::{Path, PathBuf};

use candle_core::Device;
use overfill_types::PairManifest;

use crate::error::ModelError;
use crate::llama::Llama;
use crate::transform::Transform;

/// A pair's folder whose manifest was read and checked.
pub struct Pair {
    /// What `pair.json` says.
    pub manifest: PairManifest,
    /// Where it lies.
    pub dir: PathBuf,
}

#[allow(unused_variables)]
impl Pair {
    /// Reads and checks `pair.json` in `dir`, without loading weights.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        todo!()
    }

    /// Loads the full model; its weights' hash and geometry must be the manifest's.
    pub fn load_full(&self, device: &Device) -> Result<Llama, ModelError> {
        todo!()
    }

    /// Loads the decode model; its weights' hash and geometry must be the manifest's.
    pub fn load_decode(&self, device: &Device) -> Result<Llama, ModelError> {
        todo!()
    }

    /// Loads the KV transform.
    pub fn load_transform(&self) -> Result<Transform, ModelError> {
        todo!()
    }
}
