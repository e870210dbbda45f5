//! Tokenizers of the kinds that models have make of ten thousand odd texts what the reference library makes of them, read from a
//! folder and from a GGUF file; and the text comes back, whole and token by token. `tests/reference` made what is expected.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::path::{Path, PathBuf};

use overfill_model::{TokenizerFiles, Weights};
use overfill_text::ModelText;
use overfill_text::probe::first_difference;
use sha2::{Digest, Sha256};

const TEXTS: u64 = 10_000;
/// Bytes of the digest of one text.
const DIGEST: usize = 2;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizers")
}

/// The same numbers as `tokenizer_kinds.py` draws (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((z ^ (z >> 31)) % bound).unwrap()
    }
}

/// The first texts are the pieces, the others of one to eight of them.
fn texts() -> Vec<String> {
    let pieces: Vec<String> = serde_json::from_slice(&std::fs::read(fixtures().join("pieces.json")).unwrap()).unwrap();
    let drawn = (pieces.len() as u64..TEXTS).map(|index| {
        let mut numbers = Numbers(index);
        let parts = 1 + numbers.below(8);
        (0..parts).map(|_| pieces[numbers.below(pieces.len() as u64)].as_str()).collect()
    });
    pieces.iter().cloned().chain(drawn).collect()
}

/// As a pair's maker and then a router read it.
fn from_folder(kind: &str) -> ModelText {
    let file = |name: &str| std::fs::read(fixtures().join(kind).join(name)).unwrap();
    ModelText::from_files(kind, &file("tokenizer.json"), &file("tokenizer_config.json")).unwrap()
}

fn from_gguf(kind: &str) -> ModelText {
    let path = fixtures().join(kind).join("vocabulary.gguf");
    let files = TokenizerFiles::of(&path, &Weights::open(&path).unwrap()).unwrap();
    ModelText::from_files(kind, &files.tokenizer, files.config.to_string().as_bytes()).unwrap()
}

fn check(kind: &str) {
    let expected = std::fs::read(fixtures().join(kind).join("expected.bin")).unwrap();
    let texts = texts();
    assert_eq!(expected.len(), texts.len() * DIGEST);
    let (folder, file) = (from_folder(kind), from_gguf(kind));
    // A pair may be made of both.
    assert_eq!(first_difference(&folder, &file), None);
    let names = |model: &ModelText| (0..).map_while(|id| model.token_name(id)).collect::<Vec<_>>();
    assert_eq!(names(&folder), names(&file));
    for (source, model) in [("folder", folder), ("GGUF file", file)] {
        let mut wrong = Vec::new();
        for (index, (text, expected)) in texts.iter().zip(expected.chunks(DIGEST)).enumerate() {
            let ids = model.encode(text).unwrap();
            let decoded = model.decode(&ids, false);
            let mut digest = Sha256::new();
            ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
            digest.update(&decoded);
            if digest.finalize()[..DIGEST] != *expected {
                wrong.push(format!("text {index} {text:?} as {ids:?} and back as {decoded:?}"));
            }
            let mut detokenizer = model.detokenizer(&[]);
            let mut pieces: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
            pieces += &detokenizer.finish();
            if pieces != decoded {
                wrong.push(format!("text {index} {text:?} comes token by token as {pieces:?}, and whole as {decoded:?}"));
            }
        }
        assert!(
            wrong.is_empty(),
            "the {source} of {kind} reads {} texts otherwise than the reference (`tokenizer_kinds.py --show {kind} INDEX` tells):\n{}",
            wrong.len(),
            wrong[..wrong.len().min(10)].join("\n")
        );
    }
}

#[test]
fn llama_2() {
    check("llama-2");
}

#[test]
fn mistral() {
    check("mistral");
}

#[test]
fn gemma() {
    check("gemma");
}

#[test]
fn llama_3() {
    check("llama-3");
}

#[test]
fn qwen_2_5() {
    check("qwen2.5");
}

#[test]
fn smollm_2() {
    check("smollm2");
}

#[test]
fn mistral_since_nemo() {
    check("mistral-tekken");
}
