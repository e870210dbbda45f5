//! `pair.json`: what a pair is made of, and the fingerprint that names it.
//!
//! Parsing is here; files are read, and weights checked against it, by `overfill-model::pair`.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Code, ServiceError};
use crate::generation::GenerationConfig;
use crate::id::Fingerprint;
use crate::kv::{KvFormats, KvGeometry, KvTransform};
use crate::pair_files::{self, PairFiles};
use crate::sampling::SamplingParams;

/// File name of the manifest in a pair's folder.
pub const PAIR_FILE: &str = "pair.json";

/// File name of the tokenizer beside it.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Format number that this version writes and reads.
pub const PAIR_FORMAT: u32 = 1;

/// A pair: full model, decode model, and how the one's KV cache becomes the other's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairManifest {
    /// Format of this file: [`PAIR_FORMAT`].
    pub format: u32,
    /// Name that clients ask for.
    pub name: String,
    /// [`PairManifest::compute_fingerprint`] of the rest, checked when the file is read.
    pub fingerprint: Fingerprint,
    /// Reads the prompt.
    pub full: ModelManifest,
    /// Writes the answer.
    pub decode: ModelManifest,
    /// From the full model's KV cache to the decode model's.
    pub kv: KvTransform,
    /// What the KV cache's numbers are stored and sent as; 32-bit floats where the file says nothing.
    #[serde(default)]
    pub kv_formats: KvFormats,
    /// The tokenizer that both share.
    pub tokenizer: TokenizerManifest,
    /// How tokens are chosen where a request does not say it; not part of the fingerprint, since the request may say it.
    #[serde(default, skip_serializing_if = "GenerationConfig::is_empty")]
    pub generation: GenerationConfig,
    /// How the decode model was made, for people; not part of the fingerprint.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub provenance: serde_json::Map<String, serde_json::Value>,
    /// Every other file of the folder, with its sha256; not part of the fingerprint. Empty where an older version wrote this file.
    #[serde(default, skip_serializing_if = "PairFiles::is_empty")]
    pub files: PairFiles,
}

/// One of the two models of a pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelManifest {
    /// Where it lies, relative to the pair's folder: a folder as Hugging Face has it, or a `.gguf` file.
    pub path: String,
    /// sha256 of the weights file; for several shards that of the lines `<sha256>  <file name>` in order of name.
    pub sha256: String,
    /// How the weights are held in memory.
    pub weights: WeightFormat,
    /// `llama` or `qwen2`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Positions that the model was made for.
    pub max_context: usize,
    /// Shape of its KV cache.
    pub kv: KvGeometry,
}

/// How a model's weights are held in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// As the file has them: quantised stays quantised.
    Native,
    /// Dequantised or converted to 32-bit floats.
    F32,
    /// Converted to bfloat16.
    Bf16,
    /// Converted to 16-bit floats.
    F16,
    /// Rounded to ggml's Q8_0: 8-bit integers, 32 to a scale. A matrix whose rows are not whole groups is held as f32.
    Q8_0,
}

impl std::str::FromStr for WeightFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "native" => Ok(Self::Native),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            "q8_0" => Ok(Self::Q8_0),
            other => Err(format!("'{other}' is no weight format: use native, q8_0, bf16, f16 or f32")),
        }
    }
}

/// The tokenizer: `tokenizer.json` and `tokenizer_config.json` (chat template, special tokens) in the pair's folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerManifest {
    /// sha256 of `tokenizer.json`.
    pub sha256: String,
    /// Token ids that end an answer.
    pub eos_token_ids: Vec<u32>,
}

impl PairManifest {
    /// Parses `pair.json` and checks its format and fingerprint.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where it is no manifest of this format, [`Code::Mismatch`] where the fingerprint is
    /// not that of the rest (the file was edited by hand: make it anew with `overfill pair`), or the list of files is of other weights.
    pub fn from_json(text: &str) -> Result<Self, ServiceError> {
        let manifest: PairManifest =
            serde_json::from_str(text).map_err(|e| ServiceError::new(Code::InvalidArgument, format!("{PAIR_FILE} cannot be read: {e}")))?;
        if manifest.format != PAIR_FORMAT {
            return Err(ServiceError::new(
                Code::InvalidArgument,
                format!(
                    "{PAIR_FILE} has format {}, this version reads format {PAIR_FORMAT}: make the pair anew with `overfill pair`",
                    manifest.format
                ),
            ));
        }
        manifest.generation.fill(SamplingParams::greedy()).validate()?;
        let computed = manifest.compute_fingerprint();
        if computed != manifest.fingerprint {
            return Err(ServiceError::new(
                Code::Mismatch,
                format!(
                    "{PAIR_FILE} says fingerprint {}, its content has {}: it was changed by hand; make the pair anew with `overfill pair`",
                    manifest.fingerprint.short(),
                    computed.short()
                ),
            ));
        }
        pair_files::check(&manifest)?;
        Ok(manifest)
    }

    /// Longest sequence that both models take, in tokens.
    pub fn max_context(&self) -> usize {
        self.full.max_context.min(self.decode.max_context)
    }

    /// Token ids below it are known to both models.
    pub fn vocab_size(&self) -> usize {
        self.full.vocab_size.min(self.decode.vocab_size)
    }

    /// Hash of all that decides which tokens the pair writes: weights and how they are held, KV geometry of both,
    /// transform and number formats, tokenizer, end-of-sequence ids. The name, the paths, the generation defaults, the provenance
    /// and the list of files are left out.
    pub fn compute_fingerprint(&self) -> Fingerprint {
        let model = |m: &ModelManifest| {
            format!(
                "{} {:?} {} hidden {} mlp {} heads {} vocab {} kv {}/{}/{}",
                m.sha256,
                m.weights,
                m.architecture,
                m.hidden_size,
                m.intermediate_size,
                m.heads,
                m.vocab_size,
                m.kv.layers,
                m.kv.kv_heads,
                m.kv.head_dim
            )
        };
        let transform = match &self.kv {
            KvTransform::Identity => "identity".to_owned(),
            KvTransform::Prune { layers, .. } => format!("prune {layers:?}"),
            KvTransform::Projection { sha256, layers, .. } => format!("projection {sha256} {layers:?}"),
        };
        // 32-bit floats are not named: they were all there was once.
        let formats = match self.kv_formats {
            formats if formats == KvFormats::default() => String::new(),
            KvFormats { cache, wire } => format!(" cache {cache} wire {wire}"),
        };
        let text = format!(
            "overfill pair 1\nfull {}\ndecode {}\nkv {transform}{formats}\ntokenizer {} eos {:?}\n",
            model(&self.full),
            model(&self.decode),
            self.tokenizer.sha256,
            self.tokenizer.eos_token_ids
        );
        Fingerprint::new(hex::encode(Sha256::digest(text)))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn manifest() -> PairManifest {
        let model = |sha: &str| ModelManifest {
            path: "full".into(),
            sha256: sha.into(),
            weights: WeightFormat::F32,
            architecture: "llama".into(),
            hidden_size: 64,
            intermediate_size: 128,
            heads: 4,
            vocab_size: 256,
            max_context: 512,
            kv: KvGeometry { layers: 4, kv_heads: 2, head_dim: 16 },
        };
        let mut pair = PairManifest {
            format: PAIR_FORMAT,
            name: "tiny".into(),
            fingerprint: Fingerprint::new(""),
            full: model("aa"),
            decode: model("bb"),
            kv: KvTransform::Identity,
            kv_formats: KvFormats::default(),
            tokenizer: TokenizerManifest { sha256: "cc".into(), eos_token_ids: vec![2] },
            generation: GenerationConfig { temperature: Some(0.2), ..GenerationConfig::default() },
            provenance: serde_json::Map::new(),
            files: PairFiles::new(),
        };
        pair.fingerprint = pair.compute_fingerprint();
        pair
    }

    #[test]
    fn a_manifest_survives_json() {
        let pair = manifest();
        let text = serde_json::to_string_pretty(&pair).unwrap();
        assert_eq!(PairManifest::from_json(&text).unwrap(), pair);
    }

    #[test]
    fn an_edited_manifest_is_refused() {
        let text = serde_json::to_string(&manifest()).unwrap();
        let error = PairManifest::from_json(&text.replace("\"bb\"", "\"dd\"")).unwrap_err();
        assert_eq!(error.code, Code::Mismatch);
        let error = PairManifest::from_json(&text.replace("\"format\":1", "\"format\":9")).unwrap_err();
        assert!(error.message.contains("format 9"), "{error}");
        assert!(PairManifest::from_json("{").is_err());
        let error = PairManifest::from_json(&text.replace("\"temperature\":0.2", "\"temperature\":-1")).unwrap_err();
        assert!(error.message.contains("temperature"), "{error}");
    }

    #[test]
    fn what_decides_the_tokens_decides_the_fingerprint() {
        let base = manifest().fingerprint;
        let changes: [fn(&mut PairManifest); 8] = [
            |p| p.full.sha256 = "x".into(),
            |p| p.decode.weights = WeightFormat::Native,
            |p| p.kv = KvTransform::Prune { strategy: crate::PruneStrategy::First, layers: vec![0] },
            |p| p.tokenizer.sha256 = "x".into(),
            |p| p.tokenizer.eos_token_ids.push(3),
            |p| p.decode.kv.layers = 3,
            |p| p.kv_formats.cache = crate::KvFormat::F16,
            |p| p.kv_formats.wire = crate::WireFormat::Int8,
        ];
        for change in changes {
            let mut pair = manifest();
            change(&mut pair);
            assert_ne!(pair.compute_fingerprint(), base);
        }
        let mut renamed = manifest();
        renamed.name = "other".into();
        renamed.full.path = "elsewhere".into();
        assert_eq!(renamed.compute_fingerprint(), base);
    }
}
