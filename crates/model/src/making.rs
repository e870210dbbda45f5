//! Folders and files that appear whole or not at all: made beside their place, under a hidden name, and renamed. Who may read
//! them is the umask's affair, as with everything that a process writes.

use std::fs::Permissions;
use std::io::Result;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::{Builder, NamedTempFile, TempDir};

/// A folder in `parent`.
///
/// # Errors
/// Those of the file system.
pub fn folder(parent: &Path, prefix: &str) -> Result<TempDir> {
    Builder::new().prefix(prefix).permissions(Permissions::from_mode(0o777)).tempdir_in(parent)
}

/// A file in `parent`.
///
/// # Errors
/// Those of the file system.
pub fn file(parent: &Path, prefix: &str, suffix: &str) -> Result<NamedTempFile> {
    Builder::new().prefix(prefix).suffix(suffix).permissions(Permissions::from_mode(0o666)).tempfile_in(parent)
}

/// Gives a file in a folder of [`folder`] the rights that a file has here: some libraries write theirs for their owner alone.
///
/// # Errors
/// Those of the file system.
pub fn as_its_folder(file: &Path) -> Result<()> {
    let of_folder = file.parent().unwrap_or(Path::new(".")).metadata()?.permissions().mode();
    std::fs::set_permissions(file, Permissions::from_mode(of_folder & 0o666))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn rights_are_those_that_everything_has() {
        let place = tempfile::tempdir().unwrap();
        let usual = place.path().join("usual");
        std::fs::write(&usual, "").unwrap();
        let folder = folder(place.path(), ".folder-").unwrap();
        assert_eq!(mode(folder.path()) & 0o666, mode(&usual));
        assert_eq!(mode(file(place.path(), ".file-", ".x").unwrap().path()), mode(&usual));
        let narrow = folder.path().join("narrow");
        std::fs::write(&narrow, "").unwrap();
        std::fs::set_permissions(&narrow, Permissions::from_mode(0o600)).unwrap();
        as_its_folder(&narrow).unwrap();
        assert_eq!(mode(&narrow), mode(&usual));
    }
}
