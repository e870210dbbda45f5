//! A file that is on its way: what came of it is kept and hashed as it comes.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::error::PullError;
use super::progress::Progress;

/// What is to be fetched.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// How it is called in messages.
    pub(crate) what: &'a str,
    /// Its digest, in hexadecimal digits.
    pub(crate) sha256: &'a str,
    /// Its length.
    pub(crate) bytes: u64,
}

/// What has come of it.
pub(crate) struct Partial {
    path: PathBuf,
    file: File,
    hash: Sha256,
    at: u64,
    /// What it must become.
    bytes: u64,
    /// Whether another try finds it.
    kept: bool,
}

impl Partial {
    /// Opens what an earlier try left at `path`, if there is something that is not too long. `kept`: this one leaves something too.
    ///
    /// # Errors
    /// [`PullError::File`].
    pub(crate) fn open(path: &Path, wanted: Wanted<'_>, kept: bool, progress: &mut Progress) -> Result<Self, PullError> {
        let failed = |e| PullError::file(path, wanted.bytes, e);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut partial = Self { path: path.to_owned(), file, hash: Sha256::new(), at: 0, bytes: wanted.bytes, kept };
        if length > wanted.bytes {
            partial.restart()?;
        }
        if length > 0 {
            progress.begin(format!("reading what is there of {}", wanted.what), length, 0);
        }
        let mut buffer = vec![0; 1 << 20];
        loop {
            match partial.file.read(&mut buffer).map_err(failed)? {
                0 => break,
                n => {
                    partial.hash.update(&buffer[..n]);
                    partial.at += n as u64;
                    progress.at(partial.at);
                }
            }
        }
        Ok(partial)
    }

    /// Bytes that have come.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Where they lie.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes what comes next.
    ///
    /// # Errors
    /// [`PullError::Full`], [`PullError::File`].
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), PullError> {
        let missing = self.bytes - self.at;
        if let Err(error) = self.file.write_all(bytes) {
            // Some of it may have been written: the hash is of what was there before.
            self.cut(self.at)?;
            return Err(PullError::file(&self.path, missing, error));
        }
        self.hash.update(bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Throws away what came.
    ///
    /// # Errors
    /// [`PullError::File`].
    pub(crate) fn restart(&mut self) -> Result<(), PullError> {
        self.cut(0)?;
        (self.hash, self.at) = (Sha256::new(), 0);
        Ok(())
    }

    /// It is needed no more.
    ///
    /// # Errors
    /// [`PullError::File`].
    pub(crate) fn remove(self) -> Result<(), PullError> {
        fs::remove_file(&self.path).map_err(|e| PullError::file(&self.path, 0, e))
    }

    fn cut(&mut self, length: u64) -> Result<(), PullError> {
        self.file
            .set_len(length)
            .and_then(|()| self.file.seek(std::io::SeekFrom::Start(length)))
            .map(drop)
            .map_err(|e| PullError::file(&self.path, 0, e))
    }

    /// The sha256 of what came.
    pub(crate) fn digest(&self) -> String {
        hex::encode(self.hash.clone().finalize())
    }

    /// Has it on the disk, and not only in memory: it gets its name next, by which others take it for whole.
    ///
    /// # Errors
    /// [`PullError::File`].
    pub(crate) fn sync(&self) -> Result<(), PullError> {
        self.file.sync_all().map_err(|e| PullError::file(&self.path, 0, e))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.kept {
            // It may have been renamed.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path, bytes: u64) -> Partial {
        Partial::open(path, Wanted { what: "it", sha256: "", bytes }, true, &mut Progress::new()).unwrap()
    }

    #[test]
    fn what_came_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        open(&path, 10).write(b"0123").unwrap();
        let mut again = open(&path, 10);
        assert_eq!(again.at(), 4);
        again.write(b"456789").unwrap();
        assert_eq!(again.digest(), hex::encode(Sha256::digest(b"0123456789")));
        again.restart().unwrap();
        again.write(b"x").unwrap();
        assert_eq!((fs::read(&path).unwrap(), again.digest()), (b"x".to_vec(), hex::encode(Sha256::digest(b"x"))));
    }

    #[test]
    fn what_is_too_long_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "0123456789").unwrap();
        assert_eq!(open(&path, 9).at(), 0);
    }
}
