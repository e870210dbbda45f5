//! What is read from files, and read again when they change: certificates, keys and tokens are renewed while servers run.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// How long what was read is used before it is looked at the files again.
pub const LOOKED_AT: Duration = Duration::from_secs(1);

/// What tells one state of a file from another; a link is followed, so one that is turned elsewhere counts too.
pub type Stamp = Option<(SystemTime, u64, u64)>;

/// A file's stamp; `None` where it is not there.
pub fn stamp(file: &Path) -> Stamp {
    fs::metadata(file).ok().and_then(|file| Some((file.modified().ok()?, file.len(), file.ino())))
}

/// Files that cannot be used; the sentence names the file.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub String);

type Read<T> = dyn Fn() -> Result<T, Unusable> + Send + Sync;

/// What `read` makes of `files`. While what they hold cannot be used, what was read last stays.
pub(crate) struct Watched<T> {
    files: Vec<PathBuf>,
    read: Box<Read<T>>,
    last: Mutex<Last<T>>,
}

struct Last<T> {
    value: T,
    stamps: Vec<Stamp>,
    looked: Instant,
}

impl<T: Clone> Watched<T> {
    /// Reads for the first time.
    ///
    /// # Errors
    /// Where the files cannot be used.
    pub(crate) fn new(files: Vec<PathBuf>, read: impl Fn() -> Result<T, Unusable> + Send + Sync + 'static) -> Result<Self, Unusable> {
        // Stamped before they are read: what changes between the two is read again.
        let (stamps, looked) = (files.iter().map(|file| stamp(file)).collect(), Instant::now());
        let last = Mutex::new(Last { value: read()?, stamps, looked });
        Ok(Self { files, read: Box::new(read), last })
    }

    /// What the files say, at most a second old.
    pub(crate) fn current(&self) -> T {
        // What was read is whole whatever panicked beside it.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.looked.elapsed() >= LOOKED_AT {
            last.looked = Instant::now();
            let stamps: Vec<Stamp> = self.files.iter().map(|file| stamp(file)).collect();
            if stamps != last.stamps {
                last.stamps = stamps;
                match (self.read)() {
                    Ok(value) => {
                        last.value = value;
                        tracing::info!(files = ?self.files, "changed, and taken as they are now");
                    }
                    Err(error) => tracing::error!(%error, "changed files cannot be used: what they said before stays"),
                }
            }
        }
        last.value.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_file_is_read_again_when_it_has_changed_and_can_be_used() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("number");
        let of = file.clone();
        let read = move || {
            let text = fs::read_to_string(&of).map_err(|error| Unusable(error.to_string()))?;
            text.parse::<u32>().map_err(|_| Unusable(format!("'{text}' is no number")))
        };
        assert!(Watched::new(vec![file.clone()], read.clone()).is_err());
        fs::write(&file, "1").unwrap();
        let number = Watched::new(vec![file.clone()], read).unwrap();
        for (written, read) in [("22", 22), ("no number", 22), ("333", 333)] {
            let before = number.current();
            fs::write(&file, written).unwrap();
            assert_eq!(number.current(), before, "it was looked at a moment ago");
            tokio::time::advance(LOOKED_AT).await;
            assert_eq!(number.current(), read);
        }
        fs::remove_file(&file).unwrap();
        tokio::time::advance(LOOKED_AT).await;
        assert_eq!(number.current(), 333);
    }
}
