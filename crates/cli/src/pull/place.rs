//! The folder that a pair is pulled into, by any number of processes at once.
//!
//! A file appears under its name only when all of it is there and its sha256 is right: until then it lies in the hidden folder `.pull`,
//! under its digest. Who fetches it holds a lock there, which ends with the process; others wait, and then find it. Beside it, a stamp
//! says what the file looked like when it was checked last (length, times, inode), so that it need not be read again until it changes.

use std::fs::{self, File, Permissions, TryLockError};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use overfill_types::PairManifest;
use overfill_types::pair::PAIR_FILE;
use overfill_types::pair_files::PairFile;
use sha2::{Digest, Sha256};

use super::error::PullError;
use super::partial::{Partial, Wanted};
use super::progress::Progress;

/// Where all lies that is under way.
const WORK: &str = ".pull";
/// What names of stamps end in.
const STAMP: &str = "checked";
/// Who holds a lock, and whose file has not grown for so long, is given up: it may be unpacking tens of GB.
const STUCK: Duration = Duration::from_secs(30 * 60);
/// Between two looks at a lock that another process holds.
const LOOK: Duration = Duration::from_millis(200);

/// A pair's folder that is being filled.
pub(crate) struct Place {
    dir: PathBuf,
    work: PathBuf,
}

/// The right to fetch what has one digest; it ends when it is dropped.
pub(crate) struct Lock {
    /// None where the file system knows no locks, or may not be written to.
    held: Option<File>,
}

impl Place {
    /// Makes the folder, if it is not there. `reread`: what was found out about files before is forgotten.
    ///
    /// # Errors
    /// [`PullError::File`] where it cannot be made, or not be forgotten.
    pub(crate) fn open(dir: &Path, reread: bool) -> Result<Self, PullError> {
        let work = dir.join(WORK);
        for folder in [dir, &work] {
            let fresh = !folder.exists();
            match fs::create_dir_all(folder) {
                // All may be there already, in a folder that is only to be read.
                Err(error) if folder == work && matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {}
                made => made.map_err(|e| PullError::file(folder, 0, e))?,
            }
            if fresh {
                share(folder, 0o775);
            }
        }
        for entry in work.read_dir().into_iter().flatten().flatten().filter(|_| reread) {
            if entry.path().extension().is_some_and(|e| e == STAMP) {
                fs::remove_file(entry.path()).map_err(|e| PullError::file(&entry.path(), 0, e))?;
            }
        }
        Ok(Self { dir: dir.to_owned(), work })
    }

    /// The content of `pair.json`, if there is one.
    ///
    /// # Errors
    /// [`PullError::File`] where it cannot be read.
    pub(crate) fn pair_json(&self) -> Result<Option<Vec<u8>>, PullError> {
        let path = self.dir.join(PAIR_FILE);
        match fs::read(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(PullError::file(&path, 0, error)),
        }
    }

    /// Gives the folder to one pair, for good: `text` is its `pair.json`. What another pair, or anything else, has there stays.
    ///
    /// # Errors
    /// [`PullError::Refused`] where it belongs to another pair, or has files of a pair's names that no `pair.json` speaks for.
    pub(crate) async fn settle(&self, text: &[u8], manifest: &PairManifest, progress: &mut Progress) -> Result<(), PullError> {
        let _lock = self.lock(PAIR_FILE).await?;
        match self.pair_json()? {
            Some(there) if there == text => return Ok(()),
            Some(_) => {
                return Err(PullError::Refused(format!(
                    "{} holds another pair, or another version of this one: nodes may be using it, so name another folder, or remove it",
                    self.dir.display()
                )));
            }
            None => {}
        }
        for (name, file) in &manifest.files {
            if self.dir.join(name).exists() && !self.has(name, file, progress)? {
                return Err(PullError::Refused(format!(
                    "{} has a file {name} that is not this pair's, and no {PAIR_FILE}: name another folder",
                    self.dir.display()
                )));
            }
        }
        // Of its own name: where there are no locks, others write theirs at the same moment.
        let path = self.work.join(format!("{PAIR_FILE}-{:08x}", rand::random::<u32>()));
        let missing = text.len() as u64;
        fs::write(&path, text).map_err(|e| PullError::file(&path, missing, e))?;
        self.install(&path, PAIR_FILE)
    }

    /// Whether a file is there, and is the one that is meant.
    ///
    /// # Errors
    /// [`PullError::File`] where it cannot be read.
    pub(crate) fn has(&self, name: &str, file: &PairFile, progress: &mut Progress) -> Result<bool, PullError> {
        let path = self.dir.join(name);
        let failed = |e| PullError::file(&path, 0, e);
        let mut opened = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            opened => opened.map_err(failed)?,
        };
        let looks = opened.metadata().map_err(failed)?;
        if !looks.is_file() || looks.len() != file.bytes {
            return Ok(false);
        }
        let stamp = stamp(&looks, &file.sha256);
        if fs::read_to_string(self.stamp_of(name)).is_ok_and(|said| said == stamp) {
            return Ok(true);
        }
        progress.begin(format!("checking {name}"), file.bytes, 0);
        let (mut hash, mut buffer, mut done) = (Sha256::new(), vec![0; 1 << 20], 0);
        loop {
            match opened.read(&mut buffer).map_err(failed)? {
                0 => break,
                n => {
                    hash.update(&buffer[..n]);
                    done += n as u64;
                    progress.at(done);
                }
            }
        }
        let right = hex::encode(hash.finalize()) == file.sha256;
        if right {
            self.write_stamp(name, &stamp);
        }
        Ok(right)
    }

    /// Puts a checked file under its name, in the place of what may be there.
    ///
    /// # Errors
    /// [`PullError::File`].
    pub(crate) fn install(&self, from: &Path, name: &str) -> Result<(), PullError> {
        let path = self.dir.join(name);
        if let Some(folder) = path.parent().filter(|folder| !folder.exists()) {
            fs::create_dir_all(folder).map_err(|e| PullError::file(folder, 0, e))?;
            share(folder, 0o775);
        }
        share(from, 0o664);
        fs::rename(from, &path).map_err(|e| PullError::file(&path, 0, e))
    }

    /// Remembers what a file that was just checked looks like.
    pub(crate) fn remember(&self, name: &str, sha256: &str) {
        if let Ok(looks) = self.dir.join(name).metadata() {
            self.write_stamp(name, &stamp(&looks, sha256));
        }
    }

    /// Which `pair.json`, by its sha256, the image of this digest turned out to have.
    pub(crate) fn of_image(&self, digest: &str) -> Option<String> {
        fs::read_to_string(self.work.join(format!("image-{digest}"))).ok()
    }

    /// Remembers that.
    pub(crate) fn remember_image(&self, digest: &str, pair_json: &str) {
        // Another pull asks the registry again, if this cannot be written.
        let _ = fs::write(self.work.join(format!("image-{digest}")), pair_json);
    }

    /// Waits until nobody else fetches what has this digest.
    ///
    /// # Errors
    /// [`PullError::Refused`] where who fetches it does not get on.
    pub(crate) async fn lock(&self, digest: &str) -> Result<Lock, PullError> {
        let path = self.work.join(format!("{digest}.lock"));
        let file = match File::options().create(true).read(true).append(true).open(&path) {
            Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
                return Ok(Lock { held: None });
            }
            opened => opened.map_err(|e| PullError::file(&path, 0, e))?,
        };
        share(&path, 0o664);
        let partial = self.work.join(format!("{digest}.partial"));
        let (mut grown, mut length, mut told) = (Instant::now(), 0, false);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock { held: Some(file) }),
                Err(TryLockError::WouldBlock) => {}
                // A file system without locks: each fetches for itself, and the last to rename wins, with the same bytes.
                Err(TryLockError::Error(_)) => return Ok(Lock { held: None }),
            }
            let now = fs::metadata(&partial).map_or(0, |m| m.len());
            if now != length {
                (grown, length) = (Instant::now(), now);
            }
            if grown.elapsed() > STUCK {
                return Err(PullError::Refused(format!(
                    "another process holds {} and has written nothing for {} minutes: end it",
                    path.display(),
                    STUCK.as_secs() / 60
                )));
            }
            if !told {
                eprintln!("another process fetches the same into {}: waiting for it", self.dir.display());
                told = true;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What is there of a file, or of a layer, that is being fetched; it is fetched by whoever holds its lock.
    ///
    /// # Errors
    /// [`PullError::File`].
    pub(crate) fn partial(&self, wanted: Wanted<'_>, lock: &Lock, progress: &mut Progress) -> Result<Partial, PullError> {
        let name = match lock.held {
            Some(_) => format!("{}.partial", wanted.sha256),
            None => format!("{}.partial-{:08x}", wanted.sha256, rand::random::<u32>()),
        };
        let path = self.work.join(name);
        let partial = Partial::open(&path, wanted, lock.held.is_some(), progress)?;
        share(&path, 0o664);
        Ok(partial)
    }

    fn stamp_of(&self, name: &str) -> PathBuf {
        self.work.join(format!("{}.{STAMP}", name.replace('/', "+")))
    }

    fn write_stamp(&self, name: &str, stamp: &str) {
        // Without it the file is read again the next time, as it is where two write at once and one reads half of it.
        let _ = fs::write(self.stamp_of(name), stamp);
    }
}

/// What a file looks like. Whatever writes to it, or puts another in its place, changes the time of its inode, which nobody can set.
fn stamp(looks: &fs::Metadata, sha256: &str) -> String {
    let time = |seconds: i64, nanoseconds: i64| format!("{seconds}.{nanoseconds:09}");
    let (modified, changed) = (time(looks.mtime(), looks.mtime_nsec()), time(looks.ctime(), looks.ctime_nsec()));
    format!("{sha256} {} {modified} {changed} {}", looks.len(), looks.ino())
}

/// Lets the group do what the owner may: a cluster that gives each pod a user of its own gives all of them one group.
fn share(path: &Path, mode: u32) {
    // Only who made it may, and need.
    let _ = fs::set_permissions(path, Permissions::from_mode(mode));
}

#[cfg(test)]
mod tests {
    use overfill_types::pair_files::Part;

    use super::*;

    fn file(content: &[u8]) -> PairFile {
        PairFile { part: Part::Text, bytes: content.len() as u64, sha256: hex::encode(Sha256::digest(content)) }
    }

    #[test]
    fn a_file_is_read_again_when_it_changed() {
        let folder = tempfile::tempdir().unwrap();
        let (place, path) = (Place::open(folder.path(), false).unwrap(), folder.path().join("a"));
        let wanted = file(b"right");
        let has = || place.has("a", &wanted, &mut Progress::new()).unwrap();
        assert!(!has());
        fs::write(&path, "right").unwrap();
        assert!(has() && has());
        // The same length, and the time set back: the inode's own time tells, which ticks a few hundred times a second.
        std::thread::sleep(Duration::from_millis(50));
        let modified = path.metadata().unwrap().modified().unwrap();
        fs::write(&path, "wrong").unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        assert!(!has());
    }

    #[test]
    fn a_stamp_spares_the_reading_and_can_be_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "wrong").unwrap();
        let wanted = file(b"right");
        let place = Place::open(folder.path(), false).unwrap();
        // A stamp that lies: only who reads finds out.
        place.remember("a", &wanted.sha256);
        assert!(place.has("a", &wanted, &mut Progress::new()).unwrap());
        assert!(!Place::open(folder.path(), true).unwrap().has("a", &wanted, &mut Progress::new()).unwrap());
    }

    #[tokio::test]
    async fn one_fetches_and_the_other_waits() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (Place::open(folder.path(), false).unwrap(), Place::open(folder.path(), false).unwrap());
        let held = one.lock("aa").await.unwrap();
        let soon = Duration::from_millis(500);
        assert!(tokio::time::timeout(soon, other.lock("aa")).await.is_err());
        assert!(tokio::time::timeout(soon, other.lock("bb")).await.is_ok());
        drop(held);
        assert!(tokio::time::timeout(soon * 4, other.lock("aa")).await.is_ok());
    }
}
