//! What a GGUF file's header says of a model, by the keys that llama.cpp's converter writes.

use candle_core::quantized::gguf_file::{Content, Value};
use overfill_types::KvGeometry;

use crate::config::{LayerAttention, LlamaConfig, MOST_LAYERS, Rope, RopeScaling, Scalars};
use crate::family::Family;
use crate::rope::yarn_magnitude;

/// Reads the header of a file whose tensors include `factors` of the rotary embedding, if they do.
///
/// # Errors
/// A sentence that names the key that is missing, not supported, or would change what is computed.
pub(crate) fn read(content: &Content, factors: Option<Vec<f64>>) -> Result<LlamaConfig, String> {
    let family = Family::of_gguf(content.metadata.get("general.architecture").and_then(|v| v.to_string().ok()).map(String::as_str))?;
    let keys = Keys { content, family };
    keys.check()?;
    let hidden_size = keys.number("embedding_length")?;
    let heads = keys.number("attention.head_count")?;
    let layers = keys.number("block_count")?;
    let head_dim = keys.whole("attention.key_length").unwrap_or(hidden_size / heads.max(1));
    if keys.whole("attention.value_length").is_some_and(|length| length != head_dim) {
        return Err(format!(
            "{family}.attention.value_length is not {head_dim}, the size of a key: models whose values have another size are not supported"
        ));
    }
    let vocab_size = content
        .tensor_infos
        .get("token_embd.weight")
        .and_then(|t| t.shape.dims().first().copied())
        .ok_or("tensor token_embd.weight is missing")?;
    let (rope, local_rope) = keys.ropes(head_dim, factors)?;
    let positions = keys.number("context_length")?;
    let original = keys.whole("rope.scaling.original_context_length");
    let max_context = match (&rope.scaling, original) {
        // Beyond its original context LongRoPE has other divisors: those of a cache cannot be exchanged when an answer gets there.
        (RopeScaling::Factors { .. }, Some(original)) if family == Family::Phi3 => original.min(positions),
        (RopeScaling::Yarn { factor, .. }, Some(original)) => positions.max((original as f64 * factor) as usize),
        _ => positions,
    };
    let config = LlamaConfig {
        family,
        hidden_size,
        intermediate_size: keys.number("feed_forward_length")?,
        vocab_size,
        heads,
        kv: KvGeometry { layers, kv_heads: keys.whole("attention.head_count_kv").unwrap_or(heads), head_dim },
        rms_norm_eps: keys.real("attention.layer_norm_rms_epsilon").unwrap_or(1e-6),
        rope,
        local_rope,
        layers: keys.layers(layers, max_context)?,
        scalars: keys.scalars(hidden_size, heads, layers, head_dim)?,
        max_context,
        tied_embeddings: !content.tensor_infos.contains_key("output.weight"),
        eos_token_ids: ends(content),
    };
    config.check()?;
    Ok(config)
}

/// Keys that change what is computed, each with the numbers at which it changes nothing (a truth counts as 0 or 1).
const NEUTRAL: [(&str, &[f64]); 17] = [
    ("expert_count", &[0.0]),
    ("attention.causal", &[1.0]),
    ("attention.clamp_kqv", &[0.0]),
    ("attention.max_alibi_bias", &[0.0]),
    ("attention.output_scale", &[1.0]),
    ("attention.value_scale", &[1.0]),
    ("attention.temperature_scale", &[0.0]),
    ("attention.shared_kv_layers", &[0.0]),
    ("attention.scale", &[0.0]),
    ("attn_logit_softcapping", &[0.0]),
    ("final_logit_softcapping", &[0.0]),
    ("embedding_scale", &[0.0, 1.0]),
    ("residual_scale", &[0.0, 1.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("use_parallel_residual", &[0.0]),
    ("rope.scaling.yarn_log_multiplier", &[0.0]),
    ("rope.scaling.yarn_ext_factor", &[1.0]),
];

/// The header of a file of one family.
struct Keys<'c> {
    content: &'c Content,
    family: Family,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(&format!("{}.{key}", self.family))
    }

    fn whole(&self, key: &str) -> Option<usize> {
        self.get(key).and_then(whole)
    }

    fn number(&self, key: &str) -> Result<usize, String> {
        self.whole(key).ok_or_else(|| format!("{}.{key} is missing", self.family))
    }

    fn real(&self, key: &str) -> Option<f64> {
        let value = self.get(key)?;
        value.to_f32().map(f64::from).or(value.to_f64()).ok().or(whole(value).map(|n| n as f64))
    }

    /// Refuses what the header says that is not computed here.
    fn check(&self) -> Result<(), String> {
        let family = self.family;
        let computed: &[&str] = match family {
            Family::Granite => &["attention.scale", "embedding_scale", "residual_scale", "logit_scale"],
            Family::Gemma2 | Family::Gemma3 => &["attn_logit_softcapping", "final_logit_softcapping"],
            _ => &[],
        };
        for (key, neutral) in NEUTRAL.iter().filter(|(key, _)| !computed.contains(key)) {
            let Some(value) = self.get(key) else { continue };
            let number = self.real(key).or(value.to_bool().ok().map(|truth| f64::from(u8::from(truth))));
            if !number.is_some_and(|number| neutral.contains(&number)) {
                return Err(format!("{family}.{key} is {}: models that have it are not supported", told(value)));
            }
        }
        for key in ["rope.dimension_sections", "attention.rope_pattern", "deepstack_mapping"] {
            if let Some(value) = self.get(key) {
                return Err(format!("{family}.{key} is {}: models that have it are not supported", told(value)));
            }
        }
        if family == Family::Granite && self.get("rope.scaling.finetuned").is_some_and(|v| v.to_bool().is_ok_and(|finetuned| !finetuned)) {
            return Err("granite.rope.scaling.finetuned is false: a model without a rotary embedding is not supported".into());
        }
        Ok(())
    }

    /// The rotary embedding, and that of layers with windows where they have another.
    fn ropes(&self, head_dim: usize, factors: Option<Vec<f64>>) -> Result<(Rope, Option<Rope>), String> {
        let turned = self.whole("rope.dimension_count").unwrap_or(head_dim);
        let theta = self.real("rope.freq_base").unwrap_or(10_000.0);
        let plain = Rope { turned, ..Rope::plain(theta, head_dim) };
        let factor = || self.real("rope.scaling.factor").ok_or("the rope scaling's factor is missing");
        let kind = self.get("rope.scaling.type").and_then(|v| v.to_string().ok()).map_or("none", String::as_str);
        let rope = match (kind, factors) {
            ("none" | "longrope", Some(factors)) => {
                let magnitude = self.real("rope.scaling.attn_factor").unwrap_or(1.0);
                Rope { scaling: RopeScaling::Factors { factors }, magnitude, ..plain }
            }
            (kind, Some(_)) => return Err(format!("the file has factors of the rotary embedding and rope scaling {kind}: not supported")),
            ("none", None) => plain,
            ("linear", None) => Rope { scaling: RopeScaling::Linear { factor: factor()? }, ..plain },
            ("yarn", None) => {
                let factor = factor()?;
                let scaling = RopeScaling::Yarn {
                    factor,
                    beta_fast: self.real("rope.scaling.yarn_beta_fast").unwrap_or(32.0),
                    beta_slow: self.real("rope.scaling.yarn_beta_slow").unwrap_or(1.0),
                    original_context: self.number("rope.scaling.original_context_length")?,
                    truncate: true,
                };
                let usual = yarn_magnitude(factor, 1.0);
                let magnitude =
                    self.real("rope.scaling.yarn_attn_factor").unwrap_or(usual) * self.real("rope.scaling.attn_factor").unwrap_or(1.0);
                Rope { scaling, magnitude, ..plain }
            }
            (kind, None) => {
                return Err(format!("rope scaling {kind} is not supported: none, linear, yarn and longrope with its factors are"));
            }
        };
        let local = self.real("rope.freq_base_swa").unwrap_or(10_000.0);
        let local = (self.family == Family::Gemma3).then(|| Rope { turned, ..Rope::plain(local, head_dim) });
        Ok((rope, local))
    }

    /// What each layer sees, and how it turns queries and keys.
    fn layers(&self, count: usize, max_context: usize) -> Result<Vec<LayerAttention>, String> {
        // More are refused by the check of sizes.
        let count = count.min(MOST_LAYERS);
        let family = self.family;
        let window = self.whole("attention.sliding_window").filter(|window| *window > 0);
        let window = match family {
            Family::Gemma2 => window.or(Some(4096)),
            Family::Llama | Family::Phi3 | Family::Gemma3 => window,
            _ if window.is_some() => {
                return Err(format!("{family}.attention.sliding_window: models of {family} that have it are not supported"));
            }
            _ => None,
        };
        let pattern = self.get("attention.sliding_window_pattern");
        let every = |n: usize| (1..=count).map(|layer| !layer.is_multiple_of(n.max(1))).collect::<Vec<bool>>();
        let slides = match (family, pattern.map(|p| (p.to_vec(), whole(p)))) {
            (_, Some((Ok(all), _))) if all.len() >= count => all[..count]
                .iter()
                .map(|slides| slides.to_bool().map_err(|_| format!("{family}.attention.sliding_window_pattern is no list of truths")))
                .collect::<Result<_, _>>()?,
            (_, Some((_, Some(n)))) => every(n),
            (_, Some(_)) => return Err(format!("{family}.attention.sliding_window_pattern has not a truth for each of {count} layers")),
            (Family::Gemma2, None) => every(2),
            (Family::Gemma3, None) if window.is_some() => every(6),
            (Family::Gemma3, None) => vec![false; count],
            (_, None) => vec![true; count],
        };
        // As llama.cpp has it: the header does not say it.
        let turns = |layer: usize| family != Family::SmolLm3 || !(layer + 1).is_multiple_of(4);
        let layers = slides.into_iter().enumerate().map(|(layer, slides)| (slides, turns(layer)));
        Ok(layers.map(|layer| LayerAttention::of(family, layer, window, max_context)).collect())
    }

    fn scalars(&self, hidden_size: usize, heads: usize, layers: usize, head_dim: usize) -> Result<Scalars, String> {
        let plain = Scalars::plain(head_dim);
        let given = |key: &str| self.real(key).filter(|value| *value != 0.0);
        let gemma = || {
            let attention = gemma_attention(self.family, layers, hidden_size / heads.max(1), head_dim);
            Scalars { embedding: (hidden_size as f64).sqrt(), attention, ..plain }
        };
        Ok(match self.family {
            Family::Granite => Scalars {
                embedding: given("embedding_scale").unwrap_or(1.0),
                residual: given("residual_scale").unwrap_or(1.0),
                attention: given("attention.scale").unwrap_or(plain.attention),
                logits: 1.0 / self.real("logit_scale").ok_or("granite.logit_scale is missing")?,
                ..plain
            },
            Family::Gemma2 => Scalars {
                attention_cap: given("attn_logit_softcapping").or(Some(50.0)),
                logits_cap: given("final_logit_softcapping").or(Some(30.0)),
                ..gemma()
            },
            Family::Gemma3 => {
                Scalars { attention_cap: given("attn_logit_softcapping"), logits_cap: given("final_logit_softcapping"), ..gemma() }
            }
            Family::Gemma => gemma(),
            _ => plain,
        })
    }
}

/// What Gemma 2 and 3 multiply scores by, which no header says: the largest of both are the exception, which llama.cpp knows by their
/// number of layers.
pub(crate) fn gemma_attention(family: Family, layers: usize, hidden_by_heads: usize, head_dim: usize) -> f64 {
    let exception = matches!((family, layers), (Family::Gemma2, 46) | (Family::Gemma3, 62));
    (if exception { hidden_by_heads } else { head_dim } as f64).powf(-0.5)
}

/// A value for a sentence.
fn told(value: &Value) -> String {
    match value.to_vec() {
        Ok(all) => format!("a list of {}", all.len()),
        Err(_) => format!("{value:?}"),
    }
}

/// Token ids that end an answer.
fn ends(content: &Content) -> Vec<u32> {
    let id = |key: &str| content.metadata.get(&format!("tokenizer.ggml.{key}")).and_then(whole).and_then(|id| u32::try_from(id).ok());
    let mut ids: Vec<u32> = ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().filter_map(id).collect();
    ids.extend(ends_by_text(content));
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Tokens that end an answer by their texts, as llama.cpp finds them: many files name the base model's end only.
const ENDS: [&str; 12] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|return|>",
    "<|call|>",
    "<EOT>",
    "_<EOT>",
];

fn ends_by_text(content: &Content) -> Vec<u32> {
    let list = |key: &str| content.metadata.get(key).and_then(|v| v.to_vec().ok()).map_or(&[][..], Vec::as_slice);
    let kinds = list("tokenizer.ggml.token_type");
    let ends = list("tokenizer.ggml.tokens").iter().zip(0_u32..).filter(|(token, id)| {
        // Control (3) or user-defined (4): elsewhere it is text that only looks so.
        let special = kinds.get(*id as usize).and_then(whole).is_some_and(|kind| matches!(kind, 3 | 4));
        special && token.to_string().is_ok_and(|text| ENDS.contains(&text.as_str()))
    });
    ends.map(|(_, id)| id).collect()
}

/// A whole number of whatever width.
pub(crate) fn whole(value: &Value) -> Option<usize> {
    match *value {
        Value::U8(n) => Some(n.into()),
        Value::U16(n) => Some(n.into()),
        Value::U32(n) => usize::try_from(n).ok(),
        Value::U64(n) => usize::try_from(n).ok(),
        Value::I8(n) => usize::try_from(n).ok(),
        Value::I16(n) => usize::try_from(n).ok(),
        Value::I32(n) => usize::try_from(n).ok(),
        Value::I64(n) => usize::try_from(n).ok(),
        _ => None,
    }
}
