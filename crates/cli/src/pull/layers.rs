//! What lies in a layer of an image: a tar file, packed or not, of which the files under `/pair` are ours.
//!
//! Only those of a pair's list are taken out, each of the length that the list says, and each is hashed as it is written: what else a
//! layer holds, links and devices among it, is passed over.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path};

use flate2::read::MultiGzDecoder;
use overfill_types::pair_files::PairFile;
use tar::{Archive, EntryType};

use super::error::PullError;
use super::partial::{Partial, Wanted};
use super::place::{Lock, Place};
use super::progress::Progress;

/// Where the pair lies in an image.
const FOLDER: &str = "pair";

/// The content of one file of a layer, if it has it; at most `limit` bytes.
///
/// # Errors
/// [`PullError::File`] where the layer is no tar file, [`PullError::Refused`] where the file is longer.
pub(crate) fn find(layer: &Path, name: &str, limit: u64) -> Result<Option<Vec<u8>>, PullError> {
    let failed = |e| PullError::file(layer, 0, e);
    let mut archive = open(layer)?;
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        if entry.header().entry_type() != EntryType::Regular || of_pair(&entry.path().map_err(failed)?).as_deref() != Some(name) {
            continue;
        }
        if entry.size() > limit {
            return Err(PullError::Refused(format!("the image's {name} has {} bytes: more than {limit} are not read", entry.size())));
        }
        let mut text = Vec::new();
        entry.read_to_end(&mut text).map_err(failed)?;
        return Ok(Some(text));
    }
    Ok(None)
}

/// Takes those files out of a layer that are `missing`, and puts them in their place; they are missing no more.
///
/// # Errors
/// [`PullError::File`] where the layer is no tar file; what the disk says.
pub(crate) fn unpack(
    layer: &Path,
    missing: &mut BTreeMap<&str, &PairFile>,
    place: &Place,
    lock: &Lock,
    progress: &mut Progress,
) -> Result<(), PullError> {
    let failed = |e| PullError::file(layer, 0, e);
    let mut archive = open(layer)?;
    let mut buffer = vec![0; 1 << 20];
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let Some(name) = of_pair(&entry.path().map_err(failed)?) else { continue };
        let Some((name, file)) = missing.get_key_value(name.as_str()).map(|(name, file)| (*name, *file)) else { continue };
        if entry.header().entry_type() != EntryType::Regular || entry.size() != file.bytes {
            continue;
        }
        let wanted = Wanted { what: name, sha256: &file.sha256, bytes: file.bytes };
        let mut partial: Partial = place.partial(wanted, lock, progress)?;
        partial.restart()?;
        progress.begin(format!("unpacking {name}"), file.bytes, 0);
        loop {
            match entry.read(&mut buffer).map_err(failed)? {
                0 => break,
                n => partial.write(&buffer[..n])?,
            }
            progress.at(partial.at());
        }
        // Another layer may have the right one.
        if partial.digest() == file.sha256 {
            partial.sync()?;
            place.install(partial.path(), name)?;
            place.remember(name, &file.sha256);
            missing.remove(name);
        } else {
            partial.restart()?;
        }
    }
    Ok(())
}

/// The tar file of a layer. How it is packed is seen from its first bytes.
fn open(layer: &Path) -> Result<Archive<Box<dyn Read>>, PullError> {
    let failed = |e| PullError::file(layer, 0, e);
    let mut file = File::open(layer).map_err(failed)?;
    let mut begins = Vec::new();
    (&mut file).take(4).read_to_end(&mut begins).map_err(failed)?;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let file = BufReader::with_capacity(1 << 20, file);
    let unpacked: Box<dyn Read> = match begins.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::with_buffer(file).map_err(failed)?),
        _ => Box::new(file),
    };
    Ok(Archive::new(unpacked))
}

/// `full.gguf` of `pair/full.gguf`; nothing of a path that leads elsewhere.
fn of_pair(path: &Path) -> Option<String> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::CurDir | Component::RootDir => {}
            Component::Normal(name) => parts.push(name.to_str()?),
            _ => return None,
        }
    }
    match parts.as_slice() {
        [FOLDER, rest @ ..] if !rest.is_empty() => Some(rest.join("/")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use overfill_types::pair_files::Part;
    use sha2::{Digest, Sha256};

    use super::*;

    /// A layer with files and a link.
    fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(EntryType::Symlink);
        link.set_size(0);
        tar.append_link(&mut link, "pair/full.gguf", "/etc/passwd").unwrap();
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_entry_type(EntryType::Regular);
            tar.append_data(&mut header, path, *content).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn file(content: &[u8]) -> PairFile {
        PairFile { part: Part::Full, bytes: content.len() as u64, sha256: hex::encode(Sha256::digest(content)) }
    }

    #[tokio::test]
    async fn only_what_is_wanted_and_right_comes_out_however_it_is_packed() {
        let tar = layer(&[
            ("etc/passwd", b"root"),
            ("pair/full.gguf", b"wrong"),
            ("pair/decode.gguf", b"other"),
            ("pair/sub/full.gguf", b"right"),
            ("pair/full.gguf", b"right"),
        ]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).unwrap();
        for packed in [tar.clone(), gzip.finish().unwrap(), zstd::encode_all(tar.as_slice(), 1).unwrap()] {
            let folder = tempfile::tempdir().unwrap();
            let (from, to) = (folder.path().join("layer"), folder.path().join("to"));
            std::fs::write(&from, packed).unwrap();
            let (place, right, absent) = (Place::open(&to, false).unwrap(), file(b"right"), file(b"none"));
            let mut missing = BTreeMap::from([("full.gguf", &right), ("config.json", &absent)]);
            let lock = place.lock("aa").await.unwrap();
            unpack(&from, &mut missing, &place, &lock, &mut Progress::new()).unwrap();
            assert_eq!(missing.into_keys().collect::<Vec<_>>(), ["config.json"]);
            assert_eq!(std::fs::read(to.join("full.gguf")).unwrap(), b"right");
            let names = std::fs::read_dir(&to).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            assert_eq!(names.filter(|name| !name.starts_with('.')).collect::<Vec<_>>(), ["full.gguf"]);
            assert_eq!(find(&from, "decode.gguf", 5).unwrap().unwrap(), b"other");
            assert!(find(&from, "decode.gguf", 4).is_err());
            assert!(find(&from, "passwd", 9).unwrap().is_none());
        }
    }

    #[test]
    fn no_path_leads_elsewhere() {
        for (path, name) in [
            ("pair/a", Some("a")),
            ("./pair/full/b", Some("full/b")),
            ("/pair/a", Some("a")),
            ("pair", None),
            ("pair/../a", None),
            ("../pair/a", None),
            ("a/pair/b", None),
        ] {
            assert_eq!(of_pair(Path::new(path)).as_deref(), name, "{path}");
        }
    }

    #[test]
    fn what_is_no_tar_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("layer");
        for content in [&b"\x1f\x8bno gzip"[..], b"\x28\xb5\x2f\xfdno zstd", &[7; 2000]] {
            std::fs::write(&from, content).unwrap();
            assert!(find(&from, "a", 1).is_err());
        }
    }
}
