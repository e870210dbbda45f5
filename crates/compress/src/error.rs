//! What can go wrong while a pair is made.

use std::path::PathBuf;

/// Why a decode model could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
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
}
