//! What a run tells: a line of JSON for each step and each validation.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::rollout::Written;

/// File name of the log.
pub const LOG_FILE: &str = "log.jsonl";

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Record {
    /// A step was taken.
    Step(Step),
    /// The validation set was measured.
    Validation(Validation),
}

/// A step, counted from 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Its number.
    pub step: u64,
    /// Counted from 0.
    pub epoch: u64,
    /// What was minimised: mean over the step's tokens, in nats.
    pub loss: f64,
    /// Cross-entropy with the tokens that are there.
    pub ce: f64,
    /// Divergence from the full model, where it was asked.
    pub kl: f64,
    /// Mean square distance from the full model's hidden states, whose mean square is 1, where it was asked.
    #[serde(default)]
    pub states: f64,
    /// Learning rate.
    pub rate: f32,
    /// Length of the gradient before it was clipped.
    pub gradient: f64,
    /// Tokens that were learned from.
    pub tokens: usize,
    /// What the decode model wrote for it, where some of its batches are its own answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written: Option<Written>,
    /// Seconds that the step took.
    pub seconds: f64,
    /// Seconds of them in which the full model read, or its reading was fetched.
    pub reading: f64,
}

/// A validation: means over all tokens of the validation set's responses but their first ones, which the full model writes
/// when the pair is served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// After so many steps.
    pub step: u64,
    /// What is minimised.
    pub loss: f64,
    /// Cross-entropy with the tokens that are there.
    pub ce: f64,
    /// Divergence from the full model, where it was asked.
    pub kl: f64,
    /// Mean square distance from the full model's hidden states, where it was asked.
    #[serde(default)]
    pub states: f64,
    /// Share of tokens whose most likely one is the full model's, where it was asked.
    pub agreement: f64,
    /// Tokens that were measured.
    pub tokens: usize,
}

impl Record {
    fn step(&self) -> u64 {
        match self {
            Self::Step(step) => step.step,
            Self::Validation(validation) => validation.step,
        }
    }
}

/// The log of a run: its file, and its lines.
pub struct Log {
    file: File,
    path: std::path::PathBuf,
    /// All lines.
    pub records: Vec<Record>,
}

impl Log {
    /// Opens the log of a run that has come to `step`: what a stopped run told beyond its last state is taken away.
    ///
    /// # Errors
    /// [`TrainError::File`].
    pub fn open(folder: &Path, step: u64) -> Result<Self, TrainError> {
        let path = folder.join(LOG_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(TrainError::File { path, source }),
        };
        // A line that was cut off is no record.
        let records = text.lines().filter_map(|line| serde_json::from_str(line).ok());
        let records: Vec<Record> = records.filter(|r: &Record| r.step() <= step).collect();
        let mut making = tempfile::Builder::new().prefix(".log-").tempfile_in(folder).map_err(TrainError::file(folder))?;
        for record in &records {
            making.write_all(line(record).as_bytes()).map_err(TrainError::file(&path))?;
        }
        let file = making.persist(&path).map_err(|e| TrainError::File { path: path.clone(), source: e.error })?;
        Ok(Self { file, path, records })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// [`TrainError::File`].
    pub fn write(&mut self, record: Record) -> Result<(), TrainError> {
        self.file.write_all(line(&record).as_bytes()).map_err(TrainError::file(&self.path))?;
        self.records.push(record);
        Ok(())
    }
}

fn line(record: &Record) -> String {
    // Records have string keys, and numbers that are no numbers become null.
    let mut line = serde_json::to_string(record).unwrap_or_default();
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_goes_on_from_the_last_state() {
        let folder = tempfile::tempdir().unwrap();
        let step = |n| {
            Record::Step(Step {
                step: n,
                epoch: 0,
                loss: 0.1,
                ce: 0.2,
                kl: 1.0 / 3.0,
                states: 0.0,
                rate: 1e-4,
                gradient: 2.0,
                tokens: 9,
                written: Some(Written::default()),
                seconds: 0.3,
                reading: 0.1,
            })
        };
        let mut log = Log::open(folder.path(), 0).unwrap();
        (1..=5).for_each(|n| log.write(step(n)).unwrap());
        let path = folder.path().join(LOG_FILE);
        let cut = std::fs::read_to_string(&path).unwrap() + "{\"event\":\"st";
        std::fs::write(&path, cut).unwrap();
        let mut log = Log::open(folder.path(), 3).unwrap();
        log.write(step(4)).unwrap();
        assert_eq!(log.records, (1..=4).map(step).collect::<Vec<_>>());
        assert_eq!(Log::open(folder.path(), 9).unwrap().records, log.records);
    }
}
