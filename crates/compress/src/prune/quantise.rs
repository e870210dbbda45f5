//! `quantise`: a copy of the full model in fewer bits, which needs no training.

use std::path::Path;

use overfill_model::{GgmlDType, gguf, making};

use crate::calibrate::Calibration;
use crate::checkpoint::Checkpoint;
use crate::error::CompressError;
use crate::prune::loss::KvSource;
use crate::prune::{Losses, Progress, Report, everything, read};

/// Writes a copy of the GGUF file `full` to `out`, matrices in blocks of `format`, the embedding and the head in Q8_0.
///
/// With a calibration file the losses are measured on what it holds out, as for pruned models. Activations are not rounded
/// there as the engines round them.
///
/// # Errors
/// [`CompressError::Refused`] where `full` is a folder or `out` exists; where files cannot be read or written.
pub fn quantise(
    full: &Path,
    format: GgmlDType,
    calibration: Option<(&Path, &Calibration)>,
    out: &Path,
    progress: Progress<'_>,
) -> Result<Report, CompressError> {
    let checkpoint = Checkpoint::open(full)?;
    if !full.is_file() {
        return Err(CompressError::Refused(format!(
            "{} is a folder: quantise copies GGUF files, so export it as one first",
            full.display()
        )));
    }
    if out.exists() {
        return Err(CompressError::Refused(format!("{} exists already: name another file, or remove it", out.display())));
    }
    let samples = calibration.map(|(path, taken)| read(&checkpoint, taken, path)).transpose()?;
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |source| CompressError::File { path: parent.to_owned(), source };
    std::fs::create_dir_all(parent).map_err(failed)?;
    let making = making::file(parent, ".quantised-", ".gguf").map_err(failed)?;
    gguf::quantise(full, making.path(), format, |done, all| progress("quantising", done, all))?;
    let counts = samples.as_ref().map(|samples| (samples.fit.len(), samples.held_out.len()));
    let losses = match samples {
        Some(samples) if !samples.held_out.is_empty() => {
            let kept = everything(checkpoint.config(), (0..checkpoint.config().kv.layers).collect());
            let source = KvSource { layers: &kept.layers, kv_heads: &kept.kv_heads };
            Some(Losses::measure(&checkpoint, &Checkpoint::open(making.path())?, &source, &samples.held_out, progress)?)
        }
        _ => None,
    };
    making.persist_noclobber(out).map_err(|e| CompressError::File { path: out.to_owned(), source: e.error })?;
    let shape = checkpoint.config().clone();
    Ok(Report { full: shape.clone(), decode: shape, samples: counts, losses, kv: "identity".into() })
}
