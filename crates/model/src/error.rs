//! What can go wrong with a model: its files, or a forward pass.

use std::path::PathBuf;

/// A model that cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what it should be; the sentence says in what.
    #[error("{path}: {what}")]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Two things that belong together do not fit: the sentence names both sides.
    #[error("{0}")]
    Mismatch(String),
    /// A device that was asked for is not there.
    #[error("{0}")]
    Device(String),
    /// A GPU does not give or take rows.
    #[error(transparent)]
    Nccl(#[from] overfill_nccl::NcclError),
    /// Choosing a token panicked.
    #[error("choosing a token panicked")]
    Sampling,
    /// A tensor operation failed.
    #[error("tensor operation failed")]
    Tensor(#[from] candle_core::Error),
}
