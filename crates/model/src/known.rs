//! What a checkpoint says that would change its answers and that is not computed here: it is refused by name, never passed over.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::config::LlamaConfig;
use crate::family::Family;
use crate::{fp8, names};

/// Keys of `config.json` that change what is computed, each with the value at which it changes nothing, and the families that compute
/// it.
const NEUTRAL: [(&str, Neutral, &[Family]); 23] = [
    ("alibi", Neutral::Off, &[]),
    ("attention_chunk_size", Neutral::Absent, &[]),
    ("attention_multiplier", Neutral::One, &[Family::Granite]),
    ("attn_logit_softcapping", Neutral::Absent, &[Family::Gemma2, Family::Gemma3]),
    ("clip_qkv", Neutral::Absent, &[]),
    ("embedding_multiplier", Neutral::One, &[Family::Granite]),
    ("final_logit_softcapping", Neutral::Absent, &[Family::Gemma2, Family::Gemma3]),
    ("logit_scale", Neutral::One, &[]),
    ("logits_scaling", Neutral::One, &[Family::Granite]),
    ("n_routed_experts", Neutral::Absent, &[]),
    ("no_rope_layers", Neutral::Absent, &[Family::SmolLm3]),
    ("num_experts", Neutral::Absent, &[]),
    ("num_local_experts", Neutral::Absent, &[]),
    ("parallel_attn", Neutral::Off, &[]),
    ("partial_rotary_factor", Neutral::One, &[Family::Phi3]),
    ("qk_layernorm", Neutral::Off, &[]),
    ("query_pre_attn_scalar", Neutral::Absent, &[Family::Gemma2, Family::Gemma3]),
    ("residual_multiplier", Neutral::One, &[Family::Granite]),
    ("rope_local_base_freq", Neutral::Absent, &[Family::Gemma3]),
    ("use_bidirectional_attention", Neutral::Off, &[]),
    ("use_parallel_residual", Neutral::Off, &[]),
    ("use_qk_norm", Neutral::Off, &[]),
    ("use_sliding_window", Neutral::Off, &[Family::Qwen2, Family::Qwen3, Family::SmolLm3]),
];

/// When a key changes nothing.
#[derive(Clone, Copy)]
enum Neutral {
    Absent,
    Off,
    One,
}

/// Refuses what `config.json` says that is not computed here.
///
/// # Errors
/// A sentence that names the key.
pub(crate) fn check_keys(json: &Value, family: Family) -> Result<(), String> {
    fp8::Scheme::of(json)?;
    for (key, neutral, computed) in NEUTRAL {
        let value = &json[key];
        let changes_nothing = value.is_null()
            || computed.contains(&family)
            || match neutral {
                Neutral::Absent => false,
                Neutral::Off => *value == json!(false),
                Neutral::One => value.as_f64() == Some(1.0),
            };
        if !changes_nothing {
            return Err(format!("{key} is {value}: models that have it are not supported"));
        }
    }
    Ok(())
}

/// Refuses tensors that the model of `json` and `config` does not have, or that hold other numbers than f32, bf16 and f16; and
/// biases that it has and that are missing.
///
/// # Errors
/// A sentence that names the tensor.
pub(crate) fn check_tensors(json: &Value, config: &LlamaConfig, tensors: &BTreeMap<String, Dtype>) -> Result<(), String> {
    let attention = json["attention_bias"].as_bool().unwrap_or(false);
    let mlp = json["mlp_bias"].as_bool().unwrap_or(false);
    let family = config.family;
    let biased = |module: &str| match module {
        "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" if family == Family::Qwen2 => true,
        "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" | "self_attn.o_proj" => {
            attention && !matches!(family, Family::Qwen2 | Family::Phi3)
        }
        "mlp.gate_proj" | "mlp.up_proj" | "mlp.down_proj" => mlp && matches!(family, Family::Llama | Family::SmolLm3 | Family::Granite),
        _ => false,
    };
    let modules = names::in_folder(config);
    for (name, dtype) in tensors {
        // Constants that old files carry along.
        if name.ends_with("rotary_emb.inv_freq") {
            continue;
        }
        let known = match name.strip_prefix("model.layers.") {
            None => matches!(name.as_str(), "model.embed_tokens.weight" | "model.norm.weight" | "lm_head.weight"),
            Some(_) => names::of_layer(name).is_some_and(|(layer, module, kind)| {
                let named = match kind {
                    "weight" => modules.contains(&module),
                    "bias" => biased(module),
                    _ => false,
                };
                layer < config.kv.layers && named
            }),
        };
        if !known {
            return Err(format!("tensor {name} is none of this model by its config.json: without it the answers would be others"));
        }
        if !matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return Err(format!("tensor {name} holds {dtype:?}: f32, bf16 and f16 are read"));
        }
    }
    for layer in 0..config.kv.layers {
        let missing = modules.iter().filter(|module| biased(module)).map(|module| format!("model.layers.{layer}.{module}.bias"));
        if let Some(name) = missing.into_iter().find(|name| !tensors.contains_key(name)) {
            return Err(format!("tensor {name} is missing"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_change_the_answers_is_named() {
        for (config, word) in [
            (json!({ "quantization_config": { "quant_method": "awq" } }), "awq"),
            (json!({ "quantization_config": { "quant_method": "gptq", "bits": 4 } }), "gptq"),
            (json!({ "attn_logit_softcapping": 50.0 }), "attn_logit_softcapping"),
            (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
            (json!({ "num_local_experts": 8 }), "num_local_experts"),
            (json!({ "logits_scaling": 8.0 }), "logits_scaling"),
            (json!({ "use_sliding_window": true }), "use_sliding_window"),
        ] {
            assert!(check_keys(&config, Family::Llama).unwrap_err().contains(word), "{config}");
        }
        let nothing = json!({
            "quantization_config": null, "attn_logit_softcapping": null, "partial_rotary_factor": 1.0, "layer_types": ["full_attention"],
            "use_sliding_window": false, "logits_scaling": 1, "pretraining_tp": 2, "use_cache": true,
        });
        assert_eq!(check_keys(&nothing, Family::Llama), Ok(()));
        let granite = json!({ "logits_scaling": 8.0, "residual_multiplier": 0.2 });
        assert_eq!(check_keys(&granite, Family::Granite), Ok(()));
        assert!(check_keys(&granite, Family::Qwen3).is_err());
    }
}
