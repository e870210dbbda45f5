//! Calibration: samples of text that a full model is looked at while it reads them.
//!
//! A file is plain text or JSON lines (`.jsonl`, conversations). Which samples are taken depends on the file, the options
//! and the seed alone.

use std::path::Path;

use overfill_text::ModelText;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::data;
use crate::error::CompressError;

/// Shortest answer that is used, in tokens: the decode model reads all but its last one.
const SHORTEST_RESPONSE: usize = 2;
/// Shortest piece of plain text that is used, in tokens.
const SHORTEST_TEXT: usize = 8;

/// A run of tokens that a model reads from position 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// All of them.
    pub tokens: Vec<u32>,
    /// How many of them the full model reads in an OverFill pair; the others are the answer. At least 1.
    pub prompt: usize,
}

/// How samples are taken of a file.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// Most samples that a model is fitted to.
    pub samples: usize,
    /// Most samples kept apart to measure losses with: a quarter of all at most, so that enough is left to fit to.
    pub held_out: usize,
    /// Most tokens of a sample; conversations are cut there.
    pub length: usize,
    /// Which samples are taken of a file that has more.
    pub seed: u64,
}

/// Samples of one file.
pub struct Samples {
    /// What a model is fitted to.
    pub fit: Vec<Sample>,
    /// What losses are measured on; none of it is in `fit`.
    pub held_out: Vec<Sample>,
    /// What they are, for a checkpoint's provenance.
    pub provenance: Value,
}

impl Calibration {
    /// Reads `path`: JSON lines where its name ends in `.jsonl`, else plain text, which is cut into runs of `length` tokens
    /// whose first half is taken for the prompt.
    ///
    /// # Errors
    /// [`CompressError::File`], [`CompressError::Line`], [`CompressError::Text`]; [`CompressError::Refused`] where the file
    /// has too few samples.
    pub fn read(&self, path: &Path, text: &ModelText, end: Option<u32>) -> Result<Samples, CompressError> {
        let bytes = std::fs::read(path).map_err(|source| CompressError::File { path: path.to_owned(), source })?;
        let conversations = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl"));
        let mut all = if conversations { self.conversations(path, text, end)? } else { self.plain(path, &bytes, text)? };
        all.shuffle(&mut ChaCha8Rng::seed_from_u64(self.seed));
        let found = all.len();
        let held_out = all.split_off(found - self.held_out.min(found / 4));
        all.truncate(self.samples);
        if all.is_empty() || held_out.is_empty() && self.held_out > 0 {
            return Err(CompressError::Refused(format!(
                "{} has {found} usable samples: that is too short for calibration, which holds up to {} out and needs at least three times as \
                 many to fit to; give more text, or hold none out",
                path.display(),
                self.held_out
            )));
        }
        let tokens = |samples: &[Sample]| samples.iter().map(|s| s.tokens.len()).sum::<usize>();
        let answers = |samples: &[Sample]| samples.iter().map(|s| s.tokens.len() - s.prompt).sum::<usize>();
        let provenance = json!({
            "sha256": hex::encode(Sha256::digest(&bytes)),
            "seed": self.seed,
            "length": self.length,
            "samples": all.len(),
            "tokens": tokens(&all),
            "response_tokens": answers(&all),
            "held_out_samples": held_out.len(),
            "held_out_response_tokens": answers(&held_out),
        });
        Ok(Samples { fit: all, held_out, provenance })
    }

    fn conversations(&self, path: &Path, text: &ModelText, end: Option<u32>) -> Result<Vec<Sample>, CompressError> {
        let end = end.ok_or_else(|| {
            CompressError::Refused("the checkpoint names no token that ends an answer: calibrate with plain text instead".into())
        })?;
        let mut all = Vec::new();
        for conversation in data::read(path)? {
            let example = conversation.tokenise(text, end)?;
            let prompt = example.prompt.len();
            let mut tokens = example.prompt;
            tokens.extend(example.response);
            tokens.truncate(self.length);
            if prompt > 0 && tokens.len() >= prompt + SHORTEST_RESPONSE {
                all.push(Sample { tokens, prompt });
            }
        }
        Ok(all)
    }

    fn plain(&self, path: &Path, bytes: &[u8], text: &ModelText) -> Result<Vec<Sample>, CompressError> {
        let content = std::str::from_utf8(bytes).map_err(|_| {
            CompressError::Refused(format!("{} is neither UTF-8 text nor JSON lines (whose name ends in .jsonl)", path.display()))
        })?;
        let tokens = text.encode(content)?;
        let runs = tokens.chunks(self.length.max(SHORTEST_TEXT)).filter(|run| run.len() >= SHORTEST_TEXT);
        Ok(runs.map(|run| Sample { tokens: run.to_vec(), prompt: run.len() / 2 }).collect())
    }
}
