//! What a Hugging Face `config.json` says of a model.
//!
//! It is read in both spellings: `rope_theta` with `rope_scaling`, and the `rope_parameters` of transformers 5. What is not said is
//! what the family's configuration in transformers 5 takes for it.

use overfill_types::KvGeometry;
use serde_json::Value;

use crate::config::{LayerAttention, LlamaConfig, MOST_LAYERS, Rope, RopeScaling, Scalars};
use crate::family::Family;
use crate::known;
use crate::rope::yarn_magnitude;

impl LlamaConfig {
    /// Reads `config.json`, and `generation_config.json` if there is one (it may name more end-of-sequence tokens).
    ///
    /// # Errors
    /// A sentence that names the key that is missing or not supported.
    pub fn from_hugging_face(config: &str, generation: Option<&str>) -> Result<Self, String> {
        let parse = |text: &str, file: &str| serde_json::from_str::<Value>(text).map_err(|e| format!("{file} is no JSON: {e}"));
        let json = parse(config, "config.json")?;
        let family = Family::of_model_type(json["model_type"].as_str())?;
        known::check_keys(&json, family)?;
        check_activation(&json, family)?;
        let hidden_size = number(&json, "hidden_size")?;
        let heads = number(&json, "num_attention_heads")?;
        let head_dim = match family {
            Family::Qwen3 => 128,
            _ if family.is_gemma() => 256,
            _ => hidden_size / heads.max(1),
        };
        let kv = KvGeometry {
            layers: number(&json, "num_hidden_layers")?,
            kv_heads: optional(&json, "num_key_value_heads")?.unwrap_or(heads),
            head_dim: optional(&json, "head_dim")?.unwrap_or(head_dim),
        };
        let mut eos_token_ids = token_ids(&json["eos_token_id"])?;
        if let Some(generation) = generation {
            eos_token_ids.extend(token_ids(&parse(generation, "generation_config.json")?["eos_token_id"])?);
        }
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        let (rope, local_rope) = ropes(&json, family, kv.head_dim)?;
        let max_context = max_context(&json, family, &rope)?;
        let config = Self {
            family,
            hidden_size,
            intermediate_size: number(&json, "intermediate_size")?,
            vocab_size: number(&json, "vocab_size")?,
            heads,
            kv,
            rms_norm_eps: real(&json, "rms_norm_eps")?.unwrap_or(if matches!(family, Family::Phi3 | Family::Olmo2) { 1e-5 } else { 1e-6 }),
            rope,
            local_rope,
            layers: layers(&json, family, kv.layers, max_context)?,
            scalars: scalars(&json, family, hidden_size, kv.head_dim)?,
            max_context,
            tied_embeddings: truth(&json, "tie_word_embeddings")?.unwrap_or(family.is_gemma() || family == Family::SmolLm3),
            eos_token_ids,
        };
        config.check()?;
        Ok(config)
    }
}

fn check_activation(json: &Value, family: Family) -> Result<(), String> {
    // Gemma's first files say "gelu" and mean the approximation, with which all of them were trained.
    let known: &[&str] = if family.is_gemma() { &["gelu_pytorch_tanh", "gelu"] } else { &["silu", "swish"] };
    for key in ["hidden_act", "hidden_activation"] {
        match &json[key] {
            Value::Null => {}
            Value::String(name) if known.contains(&name.as_str()) => {}
            other => return Err(format!("{key} is {other}: only {} is supported", known[0])),
        }
    }
    Ok(())
}

/// Positions that the model was made for.
fn max_context(json: &Value, family: Family, rope: &Rope) -> Result<usize, String> {
    let positions = positions(json)?;
    Ok(match rope.scaling {
        // Some files name what they were trained for, and say by the factor what they reach.
        RopeScaling::Yarn { factor, original_context, .. } => positions.max((original_context as f64 * factor) as usize),
        // LongRoPE has other divisors beyond its original context; those of a cache cannot be exchanged when an answer gets there.
        RopeScaling::Factors { .. } => original_context(json, family)?.unwrap_or(positions).min(positions),
        _ => positions,
    })
}

/// What each layer sees, and how it turns queries and keys.
fn layers(json: &Value, family: Family, count: usize, max_context: usize) -> Result<Vec<LayerAttention>, String> {
    // More are refused by the check of sizes.
    let count = count.min(MOST_LAYERS);
    let told = list(json, "layer_types", count, |kind| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(format!("layer_types has {kind}: full_attention and sliding_attention are supported")),
    })?;
    let turned = list(json, "no_rope_layers", count, |turns| match turns.as_u64() {
        Some(turns @ (0 | 1)) => Ok(turns == 1),
        _ => Err(format!("no_rope_layers has {turns}: 0 and 1 are meant")),
    })?;
    let turns = match (family, turned) {
        (Family::SmolLm3, None) => {
            let interval = optional(json, "no_rope_layer_interval")?.unwrap_or(4).max(1);
            (1..=count).map(|layer| !layer.is_multiple_of(interval)).collect()
        }
        (_, turned) => turned.unwrap_or(vec![true; count]),
    };
    let uses = truth(json, "use_sliding_window")?.unwrap_or(false);
    let slides: Vec<bool> = match (family, told) {
        (Family::Gemma2 | Family::Gemma3 | Family::Qwen2 | Family::Qwen3 | Family::SmolLm3, Some(told)) => told,
        (_, Some(told)) if told.contains(&true) && json["model_type"] != "mistral" => {
            return Err(format!("layer_types has sliding_attention, which models of {family} do not have"));
        }
        (Family::Gemma2, None) => (1..=count).map(|layer| !layer.is_multiple_of(2)).collect(),
        (Family::Gemma3, None) => {
            let pattern = optional(json, "sliding_window_pattern")?.unwrap_or(6).max(1);
            (1..=count).map(|layer| !layer.is_multiple_of(pattern)).collect()
        }
        (Family::Qwen2 | Family::Qwen3, None) => {
            let full = optional(json, "max_window_layers")?.unwrap_or(28);
            (0..count).map(|layer| uses && layer >= full).collect()
        }
        (Family::SmolLm3, None) => turns.iter().map(|turns| uses && !turns).collect(),
        (Family::Phi3, _) => vec![true; count],
        (_, Some(told)) => told,
        (_, None) => vec![json["model_type"] == "mistral"; count],
    };
    let window = match (&json["sliding_window"], family) {
        (Value::Null, Family::Gemma2 | Family::Gemma3) => Some(4096),
        (Value::Null, _) if json.get("sliding_window").is_none() && json["model_type"] == "mistral" => Some(4096),
        _ => optional(json, "sliding_window")?,
    };
    Ok(slides.into_iter().zip(turns).map(|layer| LayerAttention::of(family, layer, window, max_context)).collect())
}

/// A list with an entry for each layer, if there is one.
fn list<T>(json: &Value, key: &str, count: usize, read: impl Fn(&Value) -> Result<T, String>) -> Result<Option<Vec<T>>, String> {
    match &json[key] {
        Value::Null => Ok(None),
        Value::Array(all) if all.len() >= count => all[..count].iter().map(read).collect::<Result<_, _>>().map(Some),
        Value::Array(all) => Err(format!("{key} has {} entries, and the model {count} layers", all.len())),
        other => Err(format!("{key} is {other}, not a list")),
    }
}

fn scalars(json: &Value, family: Family, hidden_size: usize, head_dim: usize) -> Result<Scalars, String> {
    let plain = Scalars::plain(head_dim);
    let real = |key: &str| real(json, key);
    Ok(match family {
        Family::Granite => Scalars {
            embedding: real("embedding_multiplier")?.unwrap_or(1.0),
            residual: real("residual_multiplier")?.unwrap_or(1.0),
            attention: real("attention_multiplier")?.unwrap_or(1.0),
            logits: 1.0 / real("logits_scaling")?.unwrap_or(1.0),
            ..plain
        },
        Family::Gemma => Scalars { embedding: (hidden_size as f64).sqrt(), ..plain },
        Family::Gemma2 | Family::Gemma3 => {
            let cap = |key: &str, value: f64| match json.get(key) {
                // What the configuration of Gemma 2 takes where its file says nothing.
                None if family == Family::Gemma2 => Ok(Some(value)),
                _ => real(key),
            };
            Scalars {
                embedding: (hidden_size as f64).sqrt(),
                attention: real("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5),
                attention_cap: cap("attn_logit_softcapping", 50.0)?,
                logits_cap: cap("final_logit_softcapping", 30.0)?,
                ..plain
            }
        }
        _ => plain,
    })
}

/// The rotary embedding, and that of layers with windows where they have another.
fn ropes(json: &Value, family: Family, head_dim: usize) -> Result<(Rope, Option<Rope>), String> {
    let theta = match family {
        Family::SmolLm3 => 2_000_000.0,
        Family::Gemma3 => 1_000_000.0,
        _ => 10_000.0,
    };
    let parameters = match &json["rope_parameters"] {
        Value::Null => &json["rope_scaling"],
        parameters => parameters,
    };
    if !(parameters.is_null() || parameters.is_object()) {
        return Err(format!("rope_scaling is {parameters}, not an object"));
    }
    if family != Family::Gemma3 {
        return Ok((rope(json, parameters, "rope_theta", theta, family, head_dim)?, None));
    }
    let nested = parameters.get("full_attention").is_some() || parameters.get("sliding_attention").is_some();
    let global = if nested { &parameters["full_attention"] } else { parameters };
    let local = if nested { &parameters["sliding_attention"] } else { &Value::Null };
    let local = rope(json, local, "rope_local_base_freq", 10_000.0, family, head_dim)?;
    Ok((rope(json, global, "rope_theta", theta, family, head_dim)?, Some(local)))
}

/// One rotary embedding, whose base stands among its `parameters` or as `key` beside them.
fn rope(json: &Value, parameters: &Value, key: &str, theta: f64, family: Family, head_dim: usize) -> Result<Rope, String> {
    let among = |key: &str| real(parameters, key);
    let theta = among("rope_theta")?.or(real(json, key)?).unwrap_or(theta);
    let share = among("partial_rotary_factor")?.or(real(json, "partial_rotary_factor")?).unwrap_or(1.0);
    if share != 1.0 && family != Family::Phi3 {
        return Err(format!("partial_rotary_factor is {share}: models of {family} that turn a part of a head are not supported"));
    }
    let plain = Rope { turned: (head_dim as f64 * share) as usize, ..Rope::plain(theta, head_dim) };
    let field = |key: &str| among(key)?.ok_or_else(|| format!("{key} of the rope scaling is missing"));
    let positions = positions(json)?;
    let original_context = original_context(json, family)?.unwrap_or(positions);
    // By how much the context was stretched, where no factor says it.
    let stretched = positions as f64 / original_context.max(1) as f64;
    let kind = ["rope_type", "type"].into_iter().find_map(|key| parameters[key].as_str()).unwrap_or("default");
    // Phi-3's first files have other names for it.
    let kind = if family == Family::Phi3 && matches!(kind, "su" | "yarn") { "longrope" } else { kind };
    Ok(match kind {
        // Dynamic scaling begins beyond the positions that the model was made for, and none are given beyond them.
        "default" | "dynamic" => plain,
        "linear" => Rope { scaling: RopeScaling::Linear { factor: field("factor")? }, ..plain },
        "llama3" => Rope {
            scaling: RopeScaling::Llama3 {
                factor: field("factor")?,
                low_freq_factor: field("low_freq_factor")?,
                high_freq_factor: field("high_freq_factor")?,
                original_context,
            },
            ..plain
        },
        "yarn" => {
            let factor = among("factor")?.unwrap_or(stretched);
            let magnitude = |scale: f64| yarn_magnitude(factor, scale);
            let magnitude = match (among("attention_factor")?, among("mscale")?, among("mscale_all_dim")?) {
                (Some(magnitude), ..) => magnitude,
                (None, Some(scale), Some(all)) if scale != 0.0 && all != 0.0 => magnitude(scale) / magnitude(all),
                _ => magnitude(1.0),
            };
            let scaling = RopeScaling::Yarn {
                factor,
                beta_fast: among("beta_fast")?.filter(|beta| *beta != 0.0).unwrap_or(32.0),
                beta_slow: among("beta_slow")?.filter(|beta| *beta != 0.0).unwrap_or(1.0),
                original_context,
                truncate: truth(parameters, "truncate")?.unwrap_or(true),
            };
            Rope { scaling, magnitude, ..plain }
        }
        "longrope" => {
            let factor = among("factor")?.unwrap_or(stretched);
            let magnitude = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original_context as f64).ln()).sqrt() };
            let factors = parameters["short_factor"].as_array().ok_or("short_factor of the rope scaling is missing")?;
            let factors = factors.iter().map(|factor| factor.as_f64().ok_or(format!("short_factor has {factor}, which is no number")));
            let scaling = RopeScaling::Factors { factors: factors.collect::<Result<_, _>>()? };
            Rope { scaling, magnitude: among("attention_factor")?.unwrap_or(magnitude), ..plain }
        }
        other => return Err(format!("rope scaling {other} is not supported: default, linear, dynamic, yarn, longrope and llama3 are")),
    })
}

fn positions(json: &Value) -> Result<usize, String> {
    Ok(optional(json, "max_position_embeddings")?.unwrap_or(2048))
}

/// The context of the pre-training, in tokens, if it is said: beside the rope scaling before within it.
fn original_context(json: &Value, family: Family) -> Result<Option<usize>, String> {
    let key = "original_max_position_embeddings";
    let beside = optional(json, key)?.or((family == Family::Phi3).then_some(4096));
    Ok(beside.or(optional(&json["rope_parameters"], key)?).or(optional(&json["rope_scaling"], key)?))
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
fn real(json: &Value, key: &str) -> Result<Option<f64>, String> {
    match &json[key] {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Rotation;

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
        assert_eq!(read(r#","rope_scaling":null"#).unwrap().rope, Rope::plain(10_000.0, 16));
        let linear = read(r#","rope_scaling":{"type":"linear","factor":2.0}"#).unwrap();
        assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    }

    fn family(name: &str, rest: &str) -> Result<LlamaConfig, String> {
        LlamaConfig::from_hugging_face(&format!("{{{}{rest}}}", BASE.replace("llama", name)), None)
    }

    fn windows(config: &LlamaConfig) -> Vec<Option<usize>> {
        config.layers.iter().map(|layer| layer.window).collect()
    }

    #[test]
    fn windows_are_those_of_the_family() {
        for (name, rest, expected) in [
            ("mistral", r#","sliding_window":128"#, [Some(128); 3]),
            // One that covers the context is none, and so is what the configuration takes where nothing is said.
            ("mistral", r#","sliding_window":4096"#, [None; 3]),
            ("mistral", "", [None; 3]),
            ("mistral", r#","sliding_window":null"#, [None; 3]),
            ("llama", r#","sliding_window":128"#, [None; 3]),
            ("qwen2", r#","sliding_window":128,"max_window_layers":1"#, [None; 3]),
            ("qwen2", r#","sliding_window":128,"use_sliding_window":true,"max_window_layers":1"#, [None, Some(128), Some(128)]),
            (
                "qwen3",
                r#","sliding_window":128,"layer_types":["full_attention","sliding_attention","full_attention"]"#,
                [None, Some(128), None],
            ),
            ("gemma2", r#","sliding_window":64"#, [Some(64), None, Some(64)]),
            ("gemma3_text", r#","sliding_window":64,"sliding_window_pattern":3"#, [Some(64), Some(64), None]),
            ("phi3", r#","sliding_window":64"#, [Some(64); 3]),
        ] {
            assert_eq!(windows(&family(name, rest).unwrap()), expected, "{name}{rest}");
        }
        let mistral = family("mistral", r#","sliding_window":128"#).unwrap();
        assert_eq!((mistral.family, mistral.max_context), (Family::Llama, 512), "a window does not bound the context");
        assert!(family("mistral", r#","sliding_window":0"#).unwrap_err().contains("sliding_window"));
        assert!(
            family("granite", r#","layer_types":["full_attention","sliding_attention","full_attention"]"#).unwrap_err().contains("granite")
        );
        assert!(family("qwen3", r#","layer_types":["full_attention"]"#).unwrap_err().contains("1 entries"));
    }

    #[test]
    fn rotations_are_those_of_the_layer() {
        let rotations = |config: LlamaConfig| config.layers.iter().map(|layer| layer.rotation).collect::<Vec<_>>();
        let smol = |rest: &str| rotations(family("smollm3", rest).unwrap());
        assert_eq!(smol(""), [Rotation::Global; 3]);
        assert_eq!(smol(r#","no_rope_layer_interval":2"#), [Rotation::Global, Rotation::None, Rotation::Global]);
        assert_eq!(smol(r#","no_rope_layers":[0,1,0]"#), [Rotation::None, Rotation::Global, Rotation::None]);
        let gemma = family("gemma3_text", r#","sliding_window":64,"sliding_window_pattern":3,"rope_theta":5.0,"rope_local_base_freq":7.0,"rope_scaling":{"rope_type":"linear","factor":8.0}"#).unwrap();
        let scaled = Rope { scaling: RopeScaling::Linear { factor: 8.0 }, ..Rope::plain(5.0, 256) };
        assert_eq!((&gemma.rope, &gemma.local_rope), (&scaled, &Some(Rope::plain(7.0, 256))));
        let new = family("gemma3_text", r#","sliding_window":64,"sliding_window_pattern":3,"rope_parameters":{"full_attention":{"rope_type":"linear","factor":8.0,"rope_theta":5.0},"sliding_attention":{"rope_type":"default","rope_theta":7.0}}"#).unwrap();
        assert_eq!(new, gemma);
        assert_eq!(rotations(gemma), [Rotation::Local, Rotation::Local, Rotation::Global]);
        let part = family("phi3", r#","partial_rotary_factor":0.75"#).unwrap();
        assert_eq!((part.rope.turned, part.kv.head_dim), (12, 16));
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
            (r#","partial_rotary_factor":0.5"#, "partial_rotary_factor"),
            (r#","use_sliding_window":true"#, "sliding"),
            (r#","rope_scaling":{"rope_type":"proportional"}"#, "proportional"),
            (r#","rope_scaling":{"rope_type":"longrope","original_max_position_embeddings":8}"#, "short_factor"),
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
