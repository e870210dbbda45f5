//! The list of a pair's files in `pair.json`, made of the files themselves.

use std::path::{Path, PathBuf};

use overfill_text::tokenizer::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};
use overfill_types::KvTransform;
use overfill_types::pair::PAIR_FILE;
use overfill_types::pair_files::{self, PairFile, PairFiles, Part};

use crate::error::ModelError;
use crate::gguf_parts;
use crate::making;
use crate::pair::{Pair, file_sha256};
use crate::stored::WeightFiles;

/// Lists the files in the folder `dir` of a pair whose models lie at these paths in it; reads all of them.
///
/// # Errors
/// [`ModelError::Read`] where one is missing, [`ModelError::Format`] where a model is not whole.
pub(crate) fn list(dir: &Path, full: &str, decode: &str, kv: &KvTransform) -> Result<PairFiles, ModelError> {
    let mut paths = vec![(Part::Text, dir.join(TOKENIZER_FILE)), (Part::Text, dir.join(TOKENIZER_CONFIG_FILE))];
    for (part, model) in [(Part::Full, dir.join(full)), (Part::Decode, dir.join(decode))] {
        let files = if model.is_file() { gguf_parts::files(&model)? } else { of_folder(&model)? };
        paths.extend(files.into_iter().map(|file| (part, file)));
    }
    if let KvTransform::Projection { file, .. } = kv {
        paths.push((Part::Projection, dir.join(file)));
    }
    let mut files = PairFiles::new();
    for (part, path) in paths {
        let name = path.strip_prefix(dir).ok().and_then(Path::to_str).ok_or_else(|| ModelError::Format {
            path: path.clone(),
            what: "it does not lie in the pair's folder under a name in UTF-8".into(),
        })?;
        let bytes = path.metadata().map_err(|source| ModelError::Read { path: path.clone(), source })?.len();
        files.insert(name.to_owned(), PairFile { part, bytes, sha256: file_sha256(&path)? });
    }
    Ok(files)
}

/// The files of a Hugging Face folder that a pair has.
///
/// # Errors
/// As [`WeightFiles::of`].
pub(crate) fn of_folder(model: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let WeightFiles { mut files, index, .. } = WeightFiles::of(model)?;
    files.extend(index);
    files.extend(["config.json", "generation_config.json"].map(|f| model.join(f)).into_iter().filter(|f| f.exists()));
    Ok(files)
}

/// The digest of a model of a list.
pub(crate) fn weights_sha256(files: &PairFiles, part: Part) -> String {
    let of_part = files.iter().filter(|(_, file)| file.part == part);
    pair_files::weights_sha256(of_part.map(|(path, file)| (path.as_str(), file.sha256.as_str())))
}

/// Writes the list into the `pair.json` of a pair that an older version made, or renews it after the chat template was changed.
/// Its models, its projection and its tokenizer have to be those that it was made of. The fingerprint stays.
///
/// # Errors
/// As [`Pair::open`]; [`ModelError::Mismatch`] where a file is another than the manifest says, [`ModelError::Read`] where the file
/// cannot be written.
pub fn seal(dir: &Path) -> Result<Pair, ModelError> {
    let mut manifest = Pair::open(dir)?.manifest;
    manifest.files = list(dir, &manifest.full.path, &manifest.decode.path, &manifest.kv)?;
    let text = text(&manifest);
    // Reads it as everyone will: this is what compares the digests.
    overfill_types::PairManifest::from_json(&String::from_utf8_lossy(&text)).map_err(|e| ModelError::Mismatch(e.message))?;
    let path = dir.join(PAIR_FILE);
    let failed = |source| ModelError::Read { path: path.clone(), source };
    let file = making::file(dir, ".pair-", ".json").map_err(failed)?;
    std::fs::write(file.path(), &text).map_err(failed)?;
    file.persist(&path).map_err(|e| failed(e.error))?;
    Pair::open(dir)
}

/// A value as the pair's folder has it.
pub(crate) fn text(value: &impl serde::Serialize) -> Vec<u8> {
    // Our own types and JSON values have string keys only: nothing that could fail.
    serde_json::to_vec_pretty(value).unwrap_or_default()
}
