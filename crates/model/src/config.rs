//! A Llama-family model's shape, as its files tell it.
//!
//! A Hugging Face `config.json` is read in both spellings: `rope_theta` with `rope_scaling`, and the `rope_parameters` of
//! transformers 5. What a GGUF file says is read in [`crate::gguf`].

use overfill_types::KvGeometry;
use serde_json::Value;

use crate::known;

/// Shape and constants of a Llama-family model.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// `llama` (Mistral is one) or `qwen2`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Layers, KV heads and head size.
    pub kv: KvGeometry,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// The rotary embedding.
    pub rope: Rope,
    /// Positions that the model was made for.
    pub max_context: usize,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// Token ids that end an answer.
    pub eos_token_ids: Vec<u32>,
}

/// The rotary embedding's constants.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched for contexts longer than the pre-training's.
    pub scaling: RopeScaling,
}

/// Rope scaling.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3's: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of the pre-training, in tokens.
        original_context: usize,
    },
    /// Frequencies divided by given factors, one for each pair of values (`rope_freqs.weight` of a GGUF file).
    Factors {
        /// `head_dim / 2` divisors.
        factors: Vec<f64>,
    },
}

impl LlamaConfig {
    /// Reads `config.json`, and `generation_config.json` if there is one (it may name more end-of-sequence tokens).
    ///
    /// # Errors
    /// A sentence that names the key that is missing or not supported.
    pub fn from_hugging_face(config: &str, generation: Option<&str>) -> Result<Self, String> {
        let parse = |text: &str, file: &str| serde_json::from_str::<Value>(text).map_err(|e| format!("{file} is no JSON: {e}"));
        let json = parse(config, "config.json")?;
        let architecture = match json["model_type"].as_str() {
            Some(name @ ("llama" | "qwen2")) => name.to_owned(),
            // A Llama, but for a window that attention may have.
            Some("mistral") => "llama".to_owned(),
            other => return Err(format!("model_type is {}: llama, mistral and qwen2 are supported", other.unwrap_or("missing"))),
        };
        known::check_keys(&json)?;
        match json["hidden_act"].as_str() {
            None | Some("silu" | "swish") => {}
            Some(other) => return Err(format!("hidden_act is {other}: only silu is supported")),
        }
        let hidden_size = number(&json, "hidden_size")?;
        let heads = number(&json, "num_attention_heads")?;
        let kv = KvGeometry {
            layers: number(&json, "num_hidden_layers")?,
            kv_heads: optional(&json, "num_key_value_heads")?.unwrap_or(heads),
            head_dim: optional(&json, "head_dim")?.unwrap_or(hidden_size / heads.max(1)),
        };
        let mut eos_token_ids = token_ids(&json["eos_token_id"])?;
        if let Some(generation) = generation {
            eos_token_ids.extend(token_ids(&parse(generation, "generation_config.json")?["eos_token_id"])?);
        }
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        let config = Self {
            architecture,
            hidden_size,
            intermediate_size: number(&json, "intermediate_size")?,
            vocab_size: number(&json, "vocab_size")?,
            heads,
            kv,
            rms_norm_eps: real(&json["rms_norm_eps"], "rms_norm_eps")?.unwrap_or(1e-6),
            rope: rope(&json)?,
            max_context: max_context(&json)?,
            tied_embeddings: truth(&json, "tie_word_embeddings")?.unwrap_or(false),
            eos_token_ids,
        };
        config.check()?;
        Ok(config)
    }

    /// Weights that a decode step reads for one token: all matrices but the embedding, of which it reads a row.
    pub fn decode_weights(&self) -> usize {
        let (q, kv) = (self.heads * self.kv.head_dim, self.kv.row());
        self.kv.layers * self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size) + self.vocab_size * self.hidden_size
    }

    /// Refuses shapes that no Llama has.
    pub(crate) fn check(&self) -> Result<(), String> {
        // The names are those of config.json; what is larger than the last figure is no size of a model, but a file that is broken.
        let sizes = [
            ("hidden size (hidden_size)", self.hidden_size, 1 << 20),
            ("MLP width (intermediate_size)", self.intermediate_size, 1 << 22),
            ("vocabulary (vocab_size)", self.vocab_size, 1 << 24),
            ("number of heads (num_attention_heads)", self.heads, 1 << 12),
            ("number of layers (num_hidden_layers)", self.kv.layers, 1 << 12),
            ("number of KV heads (num_key_value_heads)", self.kv.kv_heads, 1 << 12),
            ("head size (head_dim)", self.kv.head_dim, 1 << 12),
            ("context (max_position_embeddings)", self.max_context, usize::MAX),
        ];
        if let Some((name, size, most)) = sizes.into_iter().find(|(_, size, most)| !(1..=*most).contains(size)) {
            return Err(format!("the {name} is {size}: it must be from 1 to {most}"));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(format!("rms_norm_eps is {}: it must be 0 or more", self.rms_norm_eps));
        }
        if !(self.rope.theta.is_finite() && self.rope.theta > 0.0) {
            return Err(format!("rope_theta is {}: it must be above 0", self.rope.theta));
        }
        let divisors = match &self.rope.scaling {
            RopeScaling::None => &[][..],
            RopeScaling::Linear { factor } | RopeScaling::Llama3 { factor, .. } => std::slice::from_ref(factor),
            RopeScaling::Factors { factors } => factors,
        };
        if let Some(factor) = divisors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
            return Err(format!("a factor of the rope scaling is {factor}: it must be above 0"));
        }
        if let Some(id) = self.eos_token_ids.iter().find(|id| **id as usize >= self.vocab_size) {
            return Err(format!("eos_token_id is {id}, and the vocabulary has {} tokens", self.vocab_size));
        }
        if !self.heads.is_multiple_of(self.kv.kv_heads) {
            return Err(format!("{} heads cannot share {} KV heads", self.heads, self.kv.kv_heads));
        }
        if !self.kv.head_dim.is_multiple_of(2) {
            return Err(format!("the head size {} is odd: the rotary embedding needs pairs", self.kv.head_dim));
        }
        Ok(())
    }
}

/// Positions that the model was made for. Where attention has a window, as many as it covers: so far it sees everything.
fn max_context(json: &Value) -> Result<usize, String> {
    let positions = optional(json, "max_position_embeddings")?.unwrap_or(2048);
    let window = if json["model_type"] == "mistral" { optional(json, "sliding_window")? } else { None };
    Ok(window.map_or(positions, |window| window.min(positions)))
}

fn number(json: &Value, key: &str) -> Result<usize, String> {
    optional(json, key)?.ok_or_else(|| format!("{key} is missing"))
}

fn optional(json: &Value, key: &str) -> Result<Option<usize>, String> {
    match &json[key] {
        Value::Null => Ok(None),
        value => match value.as_u64() {
            Some(n) => Ok(Some(n as usize)),
            None => Err(format!("{key} is {value}, not a whole number")),
        },
    }
}

/// A number, if there is one.
fn real(value: &Value, key: &str) -> Result<Option<f64>, String> {
    match value {
        Value::Null => Ok(None),
        value => value.as_f64().map(Some).ok_or_else(|| format!("{key} is {value}, not a number")),
    }
}

fn truth(json: &Value, key: &str) -> Result<Option<bool>, String> {
    match &json[key] {
        Value::Null => Ok(None),
        value => value.as_bool().map(Some).ok_or_else(|| format!("{key} is {value}, neither true nor false")),
    }
}

/// One id or a list of them.
fn token_ids(value: &Value) -> Result<Vec<u32>, String> {
    let id = |v: &Value| {
        let id = v.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| format!("eos_token_id is {value}: a token id or a list of them is wanted"))
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        other => Ok(vec![id(other)?]),
    }
}

fn rope(json: &Value) -> Result<Rope, String> {
    let (parameters, theta) = match &json["rope_parameters"] {
        Value::Null => (&json["rope_scaling"], &json["rope_theta"]),
        parameters => (parameters, &parameters["rope_theta"]),
    };
    if !(parameters.is_null() || parameters.is_object()) {
        return Err(format!("rope_scaling is {parameters}, not an object"));
    }
    let theta = if theta.is_null() { &json["rope_theta"] } else { theta };
    let theta = real(theta, "rope_theta")?.unwrap_or(10_000.0);
    let field = |key: &str| parameters[key].as_f64().ok_or_else(|| format!("{key} of the rope scaling is missing"));
    let kind = parameters["rope_type"].as_str().or_else(|| parameters["type"].as_str()).unwrap_or("default");
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: field("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: field("factor")?,
            low_freq_factor: field("low_freq_factor")?,
            high_freq_factor: field("high_freq_factor")?,
            original_context: field("original_max_position_embeddings")? as usize,
        },
        other => return Err(format!("rope scaling {other} is not supported: default, linear and llama3 are")),
    };
    Ok(Rope { theta, scaling })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#""model_type":"llama","hidden_size":64,"num_attention_heads":4,"num_key_value_heads":2,"num_hidden_layers":3,
        "intermediate_size":128,"vocab_size":256,"max_position_embeddings":512,"rms_norm_eps":1e-5,"eos_token_id":2"#;

    fn read(rest: &str) -> Result<LlamaConfig, String> {
        LlamaConfig::from_hugging_face(&format!("{{{BASE}{rest}}}"), None)
    }

    #[test]
    fn both_spellings_of_rope_say_the_same() {
        let scaling =
            r#""rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":128"#;
        let old = read(&format!(r#","rope_theta":500000.0,"rope_scaling":{{{scaling}}}"#)).unwrap();
        let new = read(&format!(r#","rope_parameters":{{"rope_theta":500000.0,{scaling}}}"#)).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.rope.theta, 500_000.0);
        assert_eq!(old.kv, KvGeometry { layers: 3, kv_heads: 2, head_dim: 16 });
        assert_eq!(read(r#","rope_scaling":null"#).unwrap().rope, Rope { theta: 10_000.0, scaling: RopeScaling::None });
        let linear = read(r#","rope_scaling":{"type":"linear","factor":2.0}"#).unwrap();
        assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn a_window_bounds_the_context() {
        let mistral =
            |rest: &str| LlamaConfig::from_hugging_face(&format!("{{{}{rest}}}", BASE.replace("llama", "mistral")), None).unwrap();
        let windowed = mistral(r#","sliding_window":128"#);
        assert_eq!((windowed.architecture.as_str(), windowed.max_context), ("llama", 128));
        assert_eq!(mistral(r#","sliding_window":4096"#).max_context, 512);
        assert_eq!(mistral(r#","sliding_window":null"#), read("").unwrap());
    }

    #[test]
    fn end_of_sequence_tokens_come_from_both_files() {
        let config = LlamaConfig::from_hugging_face(&format!("{{{BASE}}}"), Some(r#"{"eos_token_id":[7,2]}"#)).unwrap();
        assert_eq!(config.eos_token_ids, [2, 7]);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (rest, word) in [
            (r#","hidden_act":"gelu""#, "gelu"),
            (r#","use_sliding_window":true"#, "sliding"),
            (r#","rope_scaling":{"rope_type":"yarn","factor":2.0}"#, "yarn"),
            (r#","rope_scaling":{"rope_type":"llama3","factor":2.0}"#, "low_freq_factor"),
            (r#","head_dim":15"#, "odd"),
            (r#","head_dim":"x""#, "head_dim"),
        ] {
            assert!(read(rest).unwrap_err().contains(word), "{rest}");
        }
        assert!(LlamaConfig::from_hugging_face(r#"{"model_type":"gpt2"}"#, None).unwrap_err().contains("gpt2"));
        assert!(LlamaConfig::from_hugging_face("{", None).is_err());
        let zero = BASE.replace("\"num_key_value_heads\":2", "\"num_key_value_heads\":0");
        assert!(LlamaConfig::from_hugging_face(&format!("{{{zero}}}"), None).unwrap_err().contains("KV heads"));
    }
}
