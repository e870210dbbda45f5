//! Lessons kept on disk, so that the full model reads each example once in all runs.
//!
//! A file holds one lesson and is named by all that decides what is in it: the full model and the way of its keys and
//! values, the tokens, how many are kept. It is written beside its place and renamed, and ends in a checksum: what was cut
//! off or is damaged is read as not there.

use std::path::{Path, PathBuf};

use half::f16;
use half::slice::HalfFloatSliceExt;
use overfill_compress::Example;
use overfill_model::making;
use overfill_types::KvFormat;
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::TrainError;
use crate::lesson::{FullModel, Lesson, Question};
use crate::net::{Context, KvRows};

/// First bytes of a file; the last is the format's number.
const MAGIC: &[u8; 8] = b"lesson\0\x02";

/// Lessons in a folder.
pub struct LessonCache {
    folder: PathBuf,
    /// Hash of what decides what the full model says.
    source: String,
    /// Bytes that may be used.
    limit: u64,
    used: u64,
}

impl LessonCache {
    /// Opens or makes the folder. `source` says all of the full model and the way of its keys and values that decides
    /// what a lesson is; at most `limit` bytes are used.
    ///
    /// # Errors
    /// [`TrainError::File`] where the folder cannot be made or read.
    pub fn open(folder: &Path, source: &str, limit: u64) -> Result<Self, TrainError> {
        std::fs::create_dir_all(folder).map_err(TrainError::file(folder))?;
        let mut used = 0;
        for entry in std::fs::read_dir(folder).map_err(TrainError::file(folder))? {
            used += entry.and_then(|e| e.metadata()).map_err(TrainError::file(folder))?.len();
        }
        Ok(Self { folder: folder.to_owned(), source: source.to_owned(), limit, used })
    }

    /// The lesson on `example`: from its files, or read by the full model and then kept while there is room. What the full
    /// model would write and its keys and values are two files: a baseline wants only the first.
    ///
    /// # Errors
    /// As [`FullModel::read`]. A file that cannot be written ends the keeping, not the run.
    pub fn lesson(&mut self, full: &mut FullModel, example: &Example, question: Question) -> Result<Lesson, TrainError> {
        let Question { kept, top, states } = question;
        let with_states = if states { ", states" } else { "" };
        let names = [self.name(example, &format!("top {top}{with_states}")), self.name(example, &format!("kept {kept}"))];
        let found = |name: &String| std::fs::read(self.folder.join(name)).ok().and_then(|bytes| decode(&bytes));
        let said = if top > 0 { found(&names[0]) } else { Some(Lesson::default()) };
        let rows = if kept > 0 { found(&names[1]) } else { Some(Lesson::default()) };
        if let (Some(said), Some(rows)) = (&said, &rows) {
            return Ok(Lesson { context: rows.context.clone(), ..said.clone() });
        }
        let [top, kept] = [if said.is_some() { 0 } else { top }, if rows.is_some() { 0 } else { kept }];
        let read = full.read(example, Question { kept, top, states: states && top > 0 })?;
        let said = said.unwrap_or_else(|| {
            let said = Lesson { context: Context::default(), ..read.clone() };
            self.keep(&names[0], &said, full.formats.cache);
            said
        });
        let rows = rows.unwrap_or_else(|| {
            let rows = Lesson { context: read.context, ..Lesson::default() };
            self.keep(&names[1], &rows, full.formats.cache);
            rows
        });
        Ok(Lesson { context: rows.context, ..said })
    }

    fn keep(&mut self, name: &str, lesson: &Lesson, format: KvFormat) {
        let bytes = encode(lesson, format);
        if self.used + bytes.len() as u64 > self.limit {
            return;
        }
        let path = self.folder.join(name);
        match write(&self.folder, &path, &bytes) {
            Ok(()) => self.used += bytes.len() as u64,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the full model's reading is not kept from here on");
                self.limit = 0;
            }
        }
    }

    fn name(&self, example: &Example, what: &str) -> String {
        let mut hash = Sha256::new();
        hash.update(format!("{}\n{} {what}\n", self.source, example.prompt.len()));
        example.prompt.iter().chain(&example.response).for_each(|token| hash.update(token.to_le_bytes()));
        hex::encode(&hash.finalize()[..16])
    }
}

fn write(folder: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = making::file(folder, ".lesson-", "")?;
    std::io::Write::write_all(&mut file, bytes)?;
    file.persist(path).map(|_| ()).map_err(|e| e.error)
}

fn encode(lesson: &Lesson, format: KvFormat) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    let row = lesson.context.layers.first().map_or(0, |l| l.k.len());
    let half = u32::from(format == KvFormat::F16);
    for n in [
        lesson.context.tokens as u32,
        lesson.context.layers.len() as u32,
        row as u32,
        lesson.ids.len() as u32,
        lesson.states.len() as u32,
        half,
    ] {
        bytes.extend(n.to_le_bytes());
    }
    bytes.extend(lesson.ids.iter().flat_map(|id| id.to_le_bytes()));
    bytes.extend(lesson.log_probs.iter().chain(&lesson.states).flat_map(|p| p.to_le_bytes()));
    let mut halves = vec![f16::ZERO; row];
    for rows in lesson.context.layers.iter().flat_map(|l| [&l.k, &l.v]) {
        if half == 1 {
            // Rows come out of a cache of half precision: nothing is lost.
            halves.convert_from_f32_slice(rows);
            bytes.extend(halves.iter().flat_map(|x| x.to_le_bytes()));
        } else {
            bytes.extend(rows.iter().flat_map(|x| x.to_le_bytes()));
        }
    }
    let sum = xxh3_64(&bytes);
    bytes.extend(sum.to_le_bytes());
    bytes
}

/// `None` where the bytes are not a whole lesson.
fn decode(bytes: &[u8]) -> Option<Lesson> {
    let (bytes, sum) = bytes.split_last_chunk::<8>()?;
    let rest = bytes.strip_prefix(MAGIC)?;
    if xxh3_64(bytes) != u64::from_le_bytes(*sum) {
        return None;
    }
    let (header, mut rest) = rest.split_at_checked(24)?;
    let mut header = header.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
    let mut next = || header.next();
    let (tokens, layers, row, known, states, half) = (next()?, next()?, next()?, next()?, next()?, next()?);
    let mut take = |n: usize| {
        let (taken, left) = rest.split_at_checked(n)?;
        rest = left;
        Some(taken)
    };
    let words = |bytes: &[u8]| -> Vec<u32> { bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect() };
    let floats = |bytes: &[u8]| -> Vec<f32> { words(bytes).into_iter().map(f32::from_bits).collect() };
    let ids = words(take(known * 4)?);
    let log_probs = floats(take(known * 4)?);
    let states = floats(take(states * 4)?);
    let mut rows = || -> Option<Vec<f32>> {
        if half == 0 {
            return Some(floats(take(row * 4)?));
        }
        let halves: Vec<f16> = take(row * 2)?.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
        let mut rows = vec![0.0; row];
        halves.convert_to_f32_slice(&mut rows);
        Some(rows)
    };
    let layers = (0..layers).map(|_| Some(KvRows { k: rows()?, v: rows()? })).collect::<Option<Vec<_>>>()?;
    Some(Lesson { context: Context { tokens, layers }, ids, log_probs, states })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lesson_comes_back_and_a_damaged_one_does_not() {
        let rows = |from: f32| KvRows { k: (0..24).map(|i| from + i as f32 / 8.0).collect(), v: vec![from; 24] };
        let context = Context { tokens: 3, layers: vec![rows(1.0), rows(-2.0)] };
        let lesson = Lesson { context, ids: vec![7, 1, 9, 2], log_probs: vec![-0.1, -0.2, -0.3, -0.4], states: vec![0.5, -1.5] };
        for format in [KvFormat::F32, KvFormat::F16] {
            let bytes = encode(&lesson, format);
            assert_eq!(decode(&bytes), Some(lesson.clone()));
            for at in 0..bytes.len() {
                assert_eq!(decode(&bytes[..at]), None, "cut off at {at}");
                let mut damaged = bytes.clone();
                damaged[at] ^= 4;
                assert_eq!(decode(&damaged), None, "damaged at {at}");
            }
        }
    }
}
