//! A pair on disk: opened, checked, loaded. [`crate::pair_make`] makes one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
#[cfg(unix)]
use memmap2::Advice;
use memmap2::Mmap;
use overfill_kernels::ThreadPool;
use overfill_types::pair::{ModelManifest, PAIR_FILE, WeightFormat};
use overfill_types::{KvTransform, PairManifest, pair_files};
use sha2::{Digest, Sha256};

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::llama::Llama;
use crate::stored::WeightFiles;
use crate::transform::Transform;
use crate::{gguf_parts, hugging_face};

/// A pair's folder whose manifest was read and checked.
pub struct Pair {
    /// What `pair.json` says.
    pub manifest: PairManifest,
    /// Where it lies.
    pub dir: PathBuf,
}

impl Pair {
    /// Reads and checks `pair.json` in `dir`, without loading weights.
    ///
    /// # Errors
    /// [`ModelError::Read`] where it is not there, [`ModelError::Mismatch`] where it is malformed or was changed by hand.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let text = hugging_face::read(&dir.join(PAIR_FILE))?;
        let manifest = PairManifest::from_json(&text).map_err(|e| ModelError::Mismatch(e.message))?;
        Ok(Self { manifest, dir: dir.to_owned() })
    }

    /// Loads the full model; its weights' hash and shape must be the manifest's.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] naming both sides where they are not; as [`Llama::load`].
    pub fn load_full(&self, device: &Device, pool: &ThreadPool) -> Result<Llama, ModelError> {
        self.load("full model", &self.manifest.full, |path, format| Llama::load(path, format, device, pool))
    }

    /// Loads the full model split over several GPUs, or on the one device that is named; `pool` packs its weights on the CPU.
    ///
    /// # Errors
    /// As [`Pair::load_full`] and [`Llama::split`].
    pub fn load_full_over(&self, devices: &[Device], pool: &ThreadPool) -> Result<Llama, ModelError> {
        match devices {
            [device] => self.load_full(device, pool),
            devices => self.load("full model", &self.manifest.full, |path, format| Llama::split(path, format, devices)),
        }
    }

    /// Loads the decode model; its weights' hash and shape must be the manifest's.
    ///
    /// # Errors
    /// As [`Pair::load_full`].
    pub fn load_decode(&self, device: &Device, pool: &ThreadPool) -> Result<Llama, ModelError> {
        self.load("decode model", &self.manifest.decode, |path, format| Llama::load(path, format, device, pool))
    }

    /// Loads the KV transform; the hash of a projection must be the manifest's.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where it is not; as [`Transform::load`].
    pub fn load_transform(&self, pool: &ThreadPool) -> Result<Transform, ModelError> {
        if let KvTransform::Projection { file, sha256: said, .. } = &self.manifest.kv {
            let sha256 = file_sha256(&self.dir.join(file))?;
            if sha256 != *said {
                return Err(ModelError::Mismatch(format!(
                    "the projection has sha256 {sha256}, {PAIR_FILE} says {said}: the file is not the one that the pair was made of; make it anew with `overfill pair`"
                )));
            }
        }
        Transform::load(&self.manifest.kv, &self.dir, self.manifest.full.kv, self.manifest.decode.kv, pool)
    }

    fn load(
        &self,
        which: &str,
        said: &ModelManifest,
        load: impl FnOnce(&Path, WeightFormat) -> Result<Llama, ModelError>,
    ) -> Result<Llama, ModelError> {
        let begun = Instant::now();
        let path = self.dir.join(&said.path);
        // One thread reads the bytes for their hash while the pool's read them for the model.
        let (hashed, model) = std::thread::scope(|scope| {
            let hash = scope.spawn(|| weights_sha256(&path).map(|sha256| (sha256, begun.elapsed())));
            let model = load(&path, said.weights);
            (hash.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), model)
        });
        let (sha256, hashed) = hashed?;
        if sha256 != said.sha256 {
            return Err(ModelError::Mismatch(format!(
                "the {which}'s weights have sha256 {sha256}, {PAIR_FILE} says {}: the files are not those that the pair was made of; make it anew with `overfill pair`",
                said.sha256
            )));
        }
        let model = model?;
        let found = describe(model.config(), said.path.clone(), sha256, said.weights);
        if found != *said {
            return Err(ModelError::Mismatch(format!(
                "the {which} is {} with {}, {PAIR_FILE} says {} with {}: make the pair anew with `overfill pair`",
                found.architecture, found.kv, said.architecture, said.kv
            )));
        }
        tracing::info!(model = which, hash_seconds = hashed.as_secs_f32(), seconds = begun.elapsed().as_secs_f32(), "model loaded");
        Ok(model)
    }
}

/// What a manifest says of a model of this shape.
pub(crate) fn describe(config: &LlamaConfig, path: String, sha256: String, weights: WeightFormat) -> ModelManifest {
    ModelManifest {
        path,
        sha256,
        weights,
        architecture: config.family.name().to_owned(),
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        heads: config.heads,
        vocab_size: config.vocab_size,
        max_context: config.max_context,
        kv: config.kv,
    }
}

/// sha256 of a model's weights, as `pair.json` has it: of the one file, or of the lines `<sha256>  <file name>` of several.
///
/// # Errors
/// [`ModelError::Read`].
pub fn weights_sha256(path: &Path) -> Result<String, ModelError> {
    let files = if path.is_file() { gguf_parts::files(path)? } else { WeightFiles::of(path)?.files };
    let digests: Vec<(String, String)> = files
        .iter()
        .map(|file| Ok((file.file_name().unwrap_or_default().to_string_lossy().into_owned(), file_sha256(file)?)))
        .collect::<Result<_, ModelError>>()?;
    Ok(pair_files::weights_sha256(digests.iter().map(|(name, sha256)| (name.as_str(), sha256.as_str()))))
}

/// sha256 of a file, which is mapped: nothing is copied.
///
/// # Errors
/// [`ModelError::Read`].
pub fn file_sha256(path: &Path) -> Result<String, ModelError> {
    let failed = |source| ModelError::Read { path: path.to_owned(), source };
    // SAFETY: the file is mapped for reading, and whatever bytes it has are hashed.
    let bytes = unsafe { Mmap::map(&File::open(path).map_err(failed)?) }.map_err(failed)?;
    #[cfg(unix)]
    // The system may refuse to read further ahead: it is as right without.
    let _ = bytes.advise(Advice::Sequential);
    Ok(hex::encode(Sha256::digest(&bytes)))
}
