//! How a model's tokens are chosen where a request does not say it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Code, ServiceError};
use crate::sampling::SamplingParams;

/// What is said of how tokens are chosen, by a request or for a model; what is absent is open. The names are those of Hugging
/// Face's `generation_config.json`, of which vLLM takes the same fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerationConfig {
    /// 0 is greedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Keep the most likely tokens that add up to this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Keep this many of the most likely tokens; 0 keeps all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Keep tokens at least this times as likely as the most likely one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Above 1, tokens that were seen become less likely.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Of the text of a `generation_config.json`, whose other fields are passed over. As in vLLM its `do_sample` says nothing: a
    /// temperature is a temperature.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where it is no JSON object, or a value is out of range.
    pub fn from_hugging_face(text: &str) -> Result<Self, ServiceError> {
        #[derive(Deserialize)]
        struct File {
            temperature: Option<f32>,
            top_p: Option<f32>,
            top_k: Option<u32>,
            min_p: Option<f32>,
            repetition_penalty: Option<f32>,
        }
        let File { temperature, top_p, top_k, min_p, repetition_penalty } = serde_json::from_str(text)
            .map_err(|e| ServiceError::new(Code::InvalidArgument, format!("generation_config.json cannot be read: {e}")))?;
        let config = Self { temperature, top_p, top_k, min_p, repetition_penalty };
        config.fill(SamplingParams::greedy()).validate()?;
        Ok(config)
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What is open here is as `other` says.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            temperature: self.temperature.or(other.temperature),
            top_p: self.top_p.or(other.top_p),
            top_k: self.top_k.or(other.top_k),
            min_p: self.min_p.or(other.min_p),
            repetition_penalty: self.repetition_penalty.or(other.repetition_penalty),
        }
    }

    /// `params` with what is said here; the rest stays.
    #[must_use]
    pub fn fill(self, params: SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(params.temperature),
            top_p: self.top_p.unwrap_or(params.top_p),
            top_k: self.top_k.unwrap_or(params.top_k),
            min_p: self.min_p.unwrap_or(params.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(params.repetition_penalty),
            ..params
        }
    }
}

/// Where a server or a pair has it from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GenerationSource {
    /// As the pair, or the full model, has it.
    #[default]
    Auto,
    /// Nothing is said: the servers' own defaults.
    None,
    /// This `generation_config.json`.
    File(PathBuf),
}

impl GenerationSource {
    /// Of a file.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] naming the file.
    pub fn read(file: &Path) -> Result<GenerationConfig, ServiceError> {
        let named = |what: &dyn std::fmt::Display| ServiceError::new(Code::InvalidArgument, format!("{}: {what}", file.display()));
        let text = std::fs::read_to_string(file).map_err(|e| named(&e))?;
        GenerationConfig::from_hugging_face(&text).map_err(|e| named(&e.message))
    }
}

impl std::str::FromStr for GenerationSource {
    type Err = std::convert::Infallible;

    /// `auto`, `none` (`vllm`, as vLLM spells it), or a file.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Self::Auto,
            "none" | "vllm" => Self::None,
            file => Self::File(file.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_speaks_first_is_heard() {
        let request = GenerationConfig { temperature: Some(0.0), ..GenerationConfig::default() };
        let model = GenerationConfig { temperature: Some(0.6), top_p: Some(0.9), ..GenerationConfig::default() };
        let params = request.or(model).fill(SamplingParams { temperature: 1.0, top_k: 3, ..SamplingParams::greedy() });
        assert_eq!((params.temperature, params.top_p, params.top_k), (0.0, 0.9, 3));
        assert!(GenerationConfig::default().is_empty() && !model.is_empty());
    }

    #[test]
    fn a_file_is_read_as_vllm_reads_it() {
        let text =
            r#"{"bos_token_id": 1, "do_sample": false, "temperature": 0.6, "top_p": 0.9, "top_k": null, "transformers_version": "4.42.3"}"#;
        let config = GenerationConfig::from_hugging_face(text).unwrap();
        assert_eq!(config, GenerationConfig { temperature: Some(0.6), top_p: Some(0.9), ..GenerationConfig::default() });
        for wrong in ["", "[]", r#"{"temperature": "hot"}"#, r#"{"temperature": -1}"#, r#"{"top_p": 2}"#, r#"{"top_k": 0.5}"#] {
            assert!(GenerationConfig::from_hugging_face(wrong).is_err(), "{wrong}");
        }
    }
}
