//! What can go wrong while a pair is made.

use std::path::PathBuf;

use overfill_model::ModelError;
use overfill_types::ServiceError;

/// Why a decode model could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// A file could not be read or written.
    #[error("{} cannot be read or written", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line of a data set is not what it should be.
    #[error("{}, line {line}: {what}", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// A checkpoint could not be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A text could not be turned into tokens.
    #[error(transparent)]
    Text(#[from] ServiceError),
    /// What was asked for cannot be made; the sentence says why, and what can.
    #[error("{0}")]
    Refused(String),
    /// Numbers that are not finite, or that cannot be computed with.
    #[error("{0} cannot be computed: the checkpoint has weights that are not finite, or gives numbers that are not")]
    Numbers(String),
}
