//! The files of a pair's folder, as `pair.json` lists them: what each is for, how long it is, and its sha256.
//!
//! The list is what makes `pair.json` enough to check all else by: who knows its sha256 knows every byte of the pair. It is no part of
//! the fingerprint, which has the sha256 of all that decides which tokens are written; the two must agree, or the manifest is refused.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Code, ServiceError};
use crate::kv::KvTransform;
use crate::pair::{PAIR_FILE, PairManifest, TOKENIZER_FILE};

/// Files by their paths in the pair's folder, with `/` between folders.
pub type PairFiles = BTreeMap<String, PairFile>;

/// One file of a pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairFile {
    /// What it is a part of.
    pub part: Part,
    /// Its length.
    pub bytes: u64,
    /// Its digest, in lower-case hexadecimal digits.
    pub sha256: String,
}

/// What a file of a pair is a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Tokenizer and chat template. Nodes read the tokenizer too: for guides.
    Text,
    /// Weights and configuration of the full model.
    Full,
    /// Those of the decode model.
    Decode,
    /// The projection of keys and values, if the pair has one.
    Projection,
}

/// What of a pair a process opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// A router: no weights.
    Router,
    /// A prefill node: the full model, and the projection.
    Prefill,
    /// A decode node: the decode model.
    Decode,
    /// All of it.
    All,
}

impl Half {
    /// Whether files of this part belong to it.
    pub fn takes(self, part: Part) -> bool {
        match (self, part) {
            (Self::All, _) | (_, Part::Text) => true,
            (Self::Router, _) => false,
            (Self::Prefill, part) => part != Part::Decode,
            (Self::Decode, part) => part == Part::Decode,
        }
    }
}

impl std::str::FromStr for Half {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "router" => Ok(Self::Router),
            "prefill" => Ok(Self::Prefill),
            "decode" => Ok(Self::Decode),
            "all" => Ok(Self::All),
            other => Err(format!("'{other}' is no half of a pair: use router, prefill, decode or all")),
        }
    }
}

/// A model's digest, of those of its files of weights: of one file its own, of several that of the lines `<sha256>  <file name>` in
/// order of name. `files` may name others too: configurations and indices, which end in `.json`, as no weights do.
pub fn weights_sha256<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut weights: Vec<(&str, &str)> =
        files.into_iter().filter(|(path, _)| !path.ends_with(".json")).map(|(path, sha256)| (name(path), sha256)).collect();
    weights.sort_unstable();
    match weights.as_slice() {
        [(_, sha256)] => (*sha256).to_owned(),
        several => {
            let lines: String = several.iter().map(|(name, sha256)| format!("{sha256}  {name}\n")).collect();
            hex::encode(Sha256::digest(lines))
        }
    }
}

fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Checks a manifest's list of files against what it says of models, tokenizer and projection. An empty list is that of an older
/// version, and says nothing.
///
/// # Errors
/// [`Code::InvalidArgument`] where a path leads out of the folder or a digest is none, [`Code::Mismatch`] where the list is of other
/// weights than the manifest.
pub(crate) fn check(manifest: &PairManifest) -> Result<(), ServiceError> {
    let files = &manifest.files;
    if files.is_empty() {
        return Ok(());
    }
    for (path, file) in files {
        let invalid = |what: &str| ServiceError::new(Code::InvalidArgument, format!("{PAIR_FILE} lists the file {path:?}: {what}"));
        if !stays_inside(path) {
            return Err(invalid("the path of a pair's file names files and folders below the pair's own, none of them hidden"));
        }
        if file.sha256.len() != 64 || !file.sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(invalid("its sha256 is not 64 hexadecimal digits in lower case"));
        }
    }
    let digest =
        |part: Part| weights_sha256(files.iter().filter(|(_, f)| f.part == part).map(|(path, f)| (path.as_str(), f.sha256.as_str())));
    let one = |path: &str| files.get(path).map_or("none", |file| &file.sha256).to_owned();
    let mut pairs = vec![
        ("full model", digest(Part::Full), manifest.full.sha256.as_str()),
        ("decode model", digest(Part::Decode), manifest.decode.sha256.as_str()),
        ("tokenizer", one(TOKENIZER_FILE), manifest.tokenizer.sha256.as_str()),
    ];
    if let KvTransform::Projection { file, sha256, .. } = &manifest.kv {
        pairs.push(("projection", one(file), sha256));
    }
    match pairs.into_iter().find(|(_, listed, said)| listed != said) {
        None => Ok(()),
        Some((what, listed, said)) => Err(ServiceError::new(
            Code::Mismatch,
            format!("{PAIR_FILE} says sha256 {said} of the {what}, and lists files of {listed}: write its list anew with `overfill seal`"),
        )),
    }
}

/// Whether a path is relative and leads nowhere but down, past nothing hidden: those names are kept for what is under way.
fn stays_inside(path: &str) -> bool {
    let plain = |c: Component<'_>| matches!(c, Component::Normal(name) if !name.as_encoded_bytes().starts_with(b"."));
    // `components` passes over what says nothing, `a//b` and `a/./b`: two names of one file.
    let parts = Path::new(path).components();
    let same = parts.clone().filter_map(|c| c.as_os_str().to_str()).collect::<Vec<_>>().join("/") == path;
    !path.is_empty() && path.len() <= 1024 && path != PAIR_FILE && !path.contains(['\\', '\0']) && same && parts.clone().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(part: Part, digit: &str) -> PairFile {
        PairFile { part, bytes: 1, sha256: digit.repeat(64) }
    }

    fn sealed() -> PairManifest {
        let mut pair = crate::pair::tests::manifest();
        let files = [
            ("full/config.json", Part::Full, "0"),
            ("full/model-00001-of-00002.safetensors", Part::Full, "1"),
            ("full/model-00002-of-00002.safetensors", Part::Full, "2"),
            ("full/model.safetensors.index.json", Part::Full, "3"),
            ("decode.gguf", Part::Decode, "4"),
            ("tokenizer.json", Part::Text, "5"),
            ("tokenizer_config.json", Part::Text, "6"),
        ];
        pair.files = files.into_iter().map(|(path, part, digit)| (path.to_owned(), file(part, digit))).collect();
        let lines = format!("{}  model-00001-of-00002.safetensors\n{}  model-00002-of-00002.safetensors\n", "1".repeat(64), "2".repeat(64));
        pair.full.sha256 = hex::encode(Sha256::digest(lines));
        pair.decode.sha256 = "4".repeat(64);
        pair.tokenizer.sha256 = "5".repeat(64);
        pair.fingerprint = pair.compute_fingerprint();
        pair
    }

    #[test]
    fn a_list_agrees_with_the_models_or_is_refused() {
        check(&sealed()).unwrap();
        type Change = fn(&mut PairFiles);
        let changes: [(&str, Change); 5] = [
            ("full model", |files| files.get_mut("full/model-00002-of-00002.safetensors").unwrap().sha256 = "7".repeat(64)),
            ("full model", |files| drop(files.remove("full/model-00001-of-00002.safetensors"))),
            ("decode model", |files| files.get_mut("decode.gguf").unwrap().part = Part::Text),
            ("tokenizer", |files| drop(files.remove("tokenizer.json"))),
            ("64 hexadecimal", |files| files.get_mut("full/config.json").unwrap().sha256 = "A".repeat(64)),
        ];
        for (what, change) in changes {
            let mut pair = sealed();
            change(&mut pair.files);
            let error = check(&pair).unwrap_err();
            assert!(error.message.contains(what), "{error}");
        }
    }

    #[test]
    fn no_path_leads_out() {
        for path in ["a", "full/model.safetensors", "a/b/c.gguf"] {
            assert!(stays_inside(path), "{path}");
        }
        for path in ["", "/etc/passwd", "../a", "a/../b", "a/..", "./a", "a//b", "a/", ".pull/a", "a/.b", "a\\b", "a\0b", "pair.json"] {
            assert!(!stays_inside(path), "{path}");
            let mut pair = sealed();
            pair.files.insert(path.to_owned(), file(Part::Text, "8"));
            assert!(check(&pair).is_err(), "{path}");
        }
    }

    #[test]
    fn each_half_takes_its_own() {
        let of = |half: Half| [Part::Text, Part::Full, Part::Decode, Part::Projection].into_iter().filter(move |part| half.takes(*part));
        assert_eq!(of(Half::Router).collect::<Vec<_>>(), [Part::Text]);
        assert_eq!(of(Half::Prefill).collect::<Vec<_>>(), [Part::Text, Part::Full, Part::Projection]);
        assert_eq!(of(Half::Decode).collect::<Vec<_>>(), [Part::Text, Part::Decode]);
        assert_eq!(of(Half::All).count(), 4);
    }

    #[test]
    fn a_list_is_no_part_of_the_fingerprint() {
        let with = sealed();
        let without = PairManifest { files: PairFiles::new(), ..with.clone() };
        assert_eq!(with.compute_fingerprint(), without.compute_fingerprint());
        let text = serde_json::to_string(&without).unwrap();
        assert!(!text.contains("\"files\""), "an older version reads what it wrote");
        assert_eq!(PairManifest::from_json(&serde_json::to_string(&with).unwrap()).unwrap(), with);
        let other = serde_json::to_string(&with).unwrap().replace("\"decode.gguf\"", "\"../decode.gguf\"");
        assert!(PairManifest::from_json(&other).unwrap_err().message.contains("below the pair's own"));
    }
}
