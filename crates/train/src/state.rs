//! A run's state on disk: all that it takes to go on as if it had never stopped.
//!
//! A state is written beside its place, forced to the disk and renamed, so there is always a whole one, the last or the one before.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use bytemuck::{cast_slice, cast_slice_mut};
use overfill_model::making;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use crate::adam::Adam;
use crate::error::TrainError;

/// File name of the state.
pub(super) const STATE_FILE: &str = "state.safetensors";
/// Key of [`Progress`] among the file's own words.
const PROGRESS: &str = "progress";

/// How far a run has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    /// Hash of all that decides the run: options, data, models.
    pub(super) run: String,
    /// Steps taken.
    pub(super) step: u64,
    /// Response tokens learned from.
    pub(super) tokens: u64,
    /// The step after which the validation loss was lowest, and that loss.
    pub(super) best: Option<(u64, f64)>,
    /// Validations in a row without a lower loss.
    pub(super) stale: u64,
    /// Seconds of computing so far.
    pub(super) seconds: f64,
}

/// Writes parameters, the optimiser's memory and progress to `folder`.
///
/// # Errors
/// [`TrainError::File`]: the state that was there is still whole.
pub(super) fn save(folder: &Path, parameters: &[f32], adam: &Adam, progress: &Progress) -> Result<(), TrainError> {
    let path = folder.join(STATE_FILE);
    let failed = |e: safetensors::SafeTensorError| match e {
        safetensors::SafeTensorError::IoError(source) => TrainError::File { path: path.clone(), source },
        other => TrainError::File { path: path.clone(), source: std::io::Error::other(other) },
    };
    let named = [("parameters", parameters), ("m", &adam.m), ("v", &adam.v)];
    let views = named.iter().map(|(name, numbers)| Ok((*name, TensorView::new(Dtype::F32, vec![numbers.len()], cast_slice(numbers))?)));
    let views = views.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    // A progress has no map and no number that JSON cannot say.
    let said = HashMap::from([(PROGRESS.to_owned(), serde_json::to_string(progress).unwrap_or_default())]);
    let made = making::file(folder, ".state-", "").map_err(TrainError::file(folder))?.into_temp_path();
    safetensors::serialize_to_file(views, Some(said), &made).map_err(failed)?;
    making::as_its_folder(&made).map_err(TrainError::file(&path))?;
    File::open(&made).and_then(|f| f.sync_all()).map_err(TrainError::file(&path))?;
    made.persist(&path).map_err(|e| TrainError::File { path: path.clone(), source: e.error })?;
    // The name is as lasting as the content only once the folder is on the disk.
    File::open(folder).and_then(|f| f.sync_all()).map_err(TrainError::file(folder))
}

/// Reads what [`save`] wrote, if there is something.
///
/// # Errors
/// [`TrainError::Refused`] where it is another run's, or no whole state; [`TrainError::File`].
pub(super) fn load(folder: &Path, run: &str, parameters: &mut [f32], adam: &mut Adam) -> Result<Option<Progress>, TrainError> {
    let path = folder.join(STATE_FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TrainError::File { path, source }),
    };
    let broken = |what: String| TrainError::Refused(format!("{} is no whole state of a run: {what}", path.display()));
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| broken(e.to_string()))?;
    let said = header.metadata().as_ref().and_then(|m| m.get(PROGRESS)).ok_or_else(|| broken("it does not say how far it is".into()))?;
    let progress: Progress = serde_json::from_str(said).map_err(|e| broken(e.to_string()))?;
    if progress.run != run {
        return Err(TrainError::Refused(format!(
            "{} is of a run with other options, data or models: give those that it was begun with, or name another folder",
            path.display()
        )));
    }
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| broken(e.to_string()))?;
    for (name, to) in [("parameters", parameters), ("m", adam.m.as_mut_slice()), ("v", adam.v.as_mut_slice())] {
        let tensor = tensors.tensor(name).map_err(|e| broken(e.to_string()))?;
        if tensor.dtype() != Dtype::F32 || tensor.data().len() != to.len() * 4 {
            return Err(broken(format!("{name} has another size")));
        }
        cast_slice_mut::<f32, u8>(to).copy_from_slice(tensor.data());
    }
    adam.steps = progress.step;
    Ok(Some(progress))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adam::AdamOptions;

    #[test]
    fn a_state_comes_back_and_another_runs_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let parameters: Vec<f32> = (0..100).map(|i| i as f32 / 3.0).collect();
        let mut adam = Adam::new(AdamOptions::default(), 100);
        adam.v[7] = 3.0;
        adam.m[99] = -1e-30;
        adam.steps = 5;
        let progress = Progress { run: "a".into(), step: 5, tokens: 1234, best: Some((4, 1.0 / 3.0)), stale: 1, seconds: 0.5 };
        save(folder.path(), &parameters, &adam, &progress).unwrap();
        let mut read = vec![0.0; 100];
        let mut other = Adam::new(AdamOptions::default(), 100);
        assert_eq!(load(folder.path(), "a", &mut read, &mut other).unwrap(), Some(progress));
        assert_eq!((read, other), (parameters.clone(), adam));
        let mut other = Adam::new(AdamOptions::default(), 100);
        let error = load(folder.path(), "b", &mut [0.0; 100], &mut other).unwrap_err().to_string();
        assert!(error.contains("other options"), "{error}");
    }

    #[test]
    fn a_state_that_cannot_be_written_leaves_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let mut adam = Adam::new(AdamOptions::default(), 3);
        let progress = Progress { run: "a".into(), step: 1, ..Progress::default() };
        save(folder.path(), &[1.0, 2.0, 3.0], &adam, &progress).unwrap();
        // What a kill in the middle of writing leaves: a file beside it.
        std::fs::write(folder.path().join(".state-cut"), b"half").unwrap();
        let mut read = vec![0.0; 3];
        assert_eq!(load(folder.path(), "a", &mut read, &mut adam).unwrap().unwrap().step, 1);
        assert_eq!(read, [1.0, 2.0, 3.0]);
        let gone = folder.path().join("gone");
        assert!(matches!(save(&gone, &[1.0], &adam, &progress), Err(TrainError::File { .. })));
    }
}
