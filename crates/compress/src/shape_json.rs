//! A model's shape as transformers' `config.json` says it.

use overfill_model::Family;
use overfill_model::config::{LayerAttention, LlamaConfig, RopeScaling, Rotation};
use serde_json::{Value, json};

use crate::error::CompressError;

/// Says of each layer of `config` what it sees and how it turns, where the family has it said layer by layer.
pub(crate) fn layers(config: &LlamaConfig, json: &mut Value) {
    let slides = |layer: &LayerAttention| layer.window.is_some() || layer.rotation == Rotation::Local;
    let kinds = config.layers.iter().map(|layer| if slides(layer) { "sliding_attention" } else { "full_attention" });
    match config.family {
        Family::Qwen2 | Family::Qwen3 if config.layers.iter().any(slides) => json["layer_types"] = kinds.collect(),
        Family::Gemma2 | Family::Gemma3 => json["layer_types"] = kinds.collect(),
        Family::SmolLm3 => {
            json["layer_types"] = kinds.collect();
            json["no_rope_layers"] = config.layers.iter().map(|layer| u8::from(layer.rotation != Rotation::None)).collect();
        }
        _ => {}
    }
}

/// `config.json` of a model that has none: one that came in a GGUF file. Sizes and layers are left to whoever writes it.
pub(crate) fn whole(config: &LlamaConfig) -> Result<Value, CompressError> {
    let refused = |what: &str| {
        CompressError::Refused(format!("the GGUF file {what}, which config.json cannot say: start from the Hugging Face folder"))
    };
    let family = config.family;
    let rope = &config.rope;
    if rope.turned != config.kv.head_dim && family != Family::Phi3 {
        return Err(refused("turns a part of each head only"));
    }
    let scaling = match &rope.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor, "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_context,
        }),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, truncate } => json!({
            "rope_type": "yarn", "factor": factor, "beta_fast": beta_fast, "beta_slow": beta_slow, "truncate": truncate,
            "original_max_position_embeddings": original_context, "attention_factor": rope.magnitude,
        }),
        // Its longer contexts are not read here, so both lists are the same.
        RopeScaling::Factors { factors } if family == Family::Phi3 => json!({
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": rope.magnitude,
        }),
        RopeScaling::Factors { .. } => return Err(refused("stretches the rotary embedding by factors of its own")),
    };
    let window = config.layers.iter().find_map(|layer| layer.window);
    let (mut kind, mut class) = family.in_transformers();
    if family == Family::Llama && window.is_some() {
        (kind, class) = ("mistral", "MistralForCausalLM");
    }
    let mut json = json!({
        "architectures": [class],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "eos_token_id": config.eos_token_ids,
        "attention_bias": false,
        "mlp_bias": false,
        "sliding_window": window,
    });
    json[if family == Family::Gemma { "hidden_act" } else { "hidden_activation" }] = "gelu_pytorch_tanh".into();
    if !family.is_gemma() {
        json["hidden_act"] = "silu".into();
        json["hidden_activation"] = Value::Null;
    }
    let scalars = &config.scalars;
    let more = match family {
        Family::Granite => json!({
            "embedding_multiplier": scalars.embedding, "residual_multiplier": scalars.residual,
            "attention_multiplier": scalars.attention, "logits_scaling": 1.0 / scalars.logits,
        }),
        Family::Gemma2 | Family::Gemma3 => json!({
            "query_pre_attn_scalar": scalars.attention.powi(-2), "attn_logit_softcapping": scalars.attention_cap,
            "final_logit_softcapping": scalars.logits_cap, "sliding_window": window.unwrap_or(config.max_context),
            "rope_local_base_freq": config.local_rope.as_ref().map(|rope| rope.theta),
        }),
        Family::Phi3 => json!({
            "partial_rotary_factor": rope.turned as f64 / config.kv.head_dim as f64,
            "original_max_position_embeddings": config.max_context,
        }),
        _ => json!({}),
    };
    if let (Some(json), Value::Object(more)) = (json.as_object_mut(), more) {
        json.extend(more);
    }
    Ok(json)
}
