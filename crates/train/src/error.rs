//! What can end a training run before its end.

use std::path::PathBuf;

use overfill_compress::CompressError;
use overfill_model::ModelError;

/// Why a run could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A file could not be written or read: no room, or no permission. What was there before is whole.
    #[error("{} cannot be written or read", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Options or files that do not fit together; the sentence says what to do.
    #[error("{0}")]
    Refused(String),
    /// The loss or a gradient is no number any more.
    #[error(
        "step {step}: the {what} is not finite; the last saved state is from before: lower the learning rate{}",
        conversation.map(|n| format!(", or look at conversation {n} of the data")).unwrap_or_default()
    )]
    NotFinite {
        /// Counted from 1.
        step: u64,
        /// `loss` or `gradient`.
        what: &'static str,
        /// The first conversation whose loss it is, counted from 1, where it is one's.
        conversation: Option<usize>,
    },
    /// Data or a checkpoint could not be read.
    #[error(transparent)]
    Compress(#[from] CompressError),
    /// The full model could not be loaded or run.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl TrainError {
    /// For `map_err` on what touches the file at `path`.
    pub(super) fn file(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Self::File { path: path.to_owned(), source }
    }
}
