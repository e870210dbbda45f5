//! The tensors of a model: their names in a Hugging Face folder, which are those used here, their shapes, and where files have them.

use std::ops::Range;

use crate::config::LlamaConfig;
use crate::family::QueryKeyNorm;

/// The matrices of a layer. Some families store some of them as one.
pub(crate) const MATRICES: [&str; 7] =
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];

/// Where a file has a tensor.
pub struct Place {
    /// Its name there.
    pub stored: String,
    /// Its rows of the stored matrix; `None` where it is all of it.
    pub rows: Option<Range<usize>>,
}

impl Place {
    /// The tensor's shape, given that of the stored one.
    pub(crate) fn shape(&self, mut stored: Vec<usize>) -> Vec<usize> {
        if let (Some(rows), Some(outputs)) = (&self.rows, stored.first_mut()) {
            *outputs = outputs.saturating_sub(rows.start).min(rows.len());
        }
        stored
    }
}

/// Shapes of a layer's matrices, `[outputs, inputs]`, in the order of [`MATRICES`].
pub(crate) fn matrix_shapes(config: &LlamaConfig) -> [[usize; 2]; 7] {
    let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.heads * config.kv.head_dim, config.kv.row());
    [[q, hidden], [kv, hidden], [kv, hidden], [hidden, q], [mlp, hidden], [mlp, hidden], [hidden, mlp]]
}

/// A layer's norms, with the lengths of their weights.
pub(crate) fn norms(config: &LlamaConfig) -> Vec<(&'static str, usize)> {
    let norms = config.family.norms();
    let of_stream = [norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp];
    let mut all: Vec<(&str, usize)> = of_stream.into_iter().flatten().map(|name| (name, config.hidden_size)).collect();
    let head_dim = config.kv.head_dim;
    match config.family.query_key_norm() {
        None => {}
        Some(QueryKeyNorm::Head) => all.extend([("self_attn.q_norm", head_dim), ("self_attn.k_norm", head_dim)]),
        Some(QueryKeyNorm::Row) => all.extend([("self_attn.q_norm", config.heads * head_dim), ("self_attn.k_norm", config.kv.row())]),
    }
    all
}

/// What a layer is made of in a Hugging Face folder.
pub(crate) fn in_folder(config: &LlamaConfig) -> Vec<&'static str> {
    let mut all: Vec<&str> = norms(config).into_iter().map(|(name, _)| name).collect();
    for module in MATRICES {
        let stored = fused(config, module).map_or(module, |(stored, _)| stored);
        if !all.contains(&stored) {
            all.push(stored);
        }
    }
    all
}

/// The matrix that a module is some rows of, where its family stores it so.
fn fused(config: &LlamaConfig, module: &str) -> Option<(&'static str, Range<usize>)> {
    if !config.family.is_fused() {
        return None;
    }
    let (q, kv, mlp) = (config.heads * config.kv.head_dim, config.kv.row(), config.intermediate_size);
    Some(match module {
        "self_attn.q_proj" => ("self_attn.qkv_proj", 0..q),
        "self_attn.k_proj" => ("self_attn.qkv_proj", q..q + kv),
        "self_attn.v_proj" => ("self_attn.qkv_proj", q + kv..q + 2 * kv),
        "mlp.gate_proj" => ("mlp.gate_up_proj", 0..mlp),
        "mlp.up_proj" => ("mlp.gate_up_proj", mlp..2 * mlp),
        _ => return None,
    })
}

/// The fused matrices of a layer with their shapes, `[outputs, inputs]`; none where the family has none.
pub fn fused_shapes(config: &LlamaConfig) -> Vec<(&'static str, [usize; 2])> {
    let q = config.heads * config.kv.head_dim + 2 * config.kv.row();
    let both = [("self_attn.qkv_proj", q), ("mlp.gate_up_proj", 2 * config.intermediate_size)];
    both.into_iter().filter(|_| config.family.is_fused()).map(|(name, outputs)| (name, [outputs, config.hidden_size])).collect()
}

/// A layer's name split up: `model.layers.3.mlp.up_proj.weight` is layer 3's `mlp.up_proj`, `weight`.
pub(crate) fn of_layer(name: &str) -> Option<(usize, &str, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    Some((layer.parse().ok()?, module, kind))
}

/// Where a Hugging Face folder has a tensor.
pub fn place(config: &LlamaConfig, name: &str) -> Place {
    let fused = of_layer(name).and_then(|(layer, module, kind)| {
        let (stored, rows) = fused(config, module)?;
        Some(Place { stored: format!("model.layers.{layer}.{stored}.{kind}"), rows: Some(rows) })
    });
    fused.unwrap_or_else(|| Place { stored: name.to_owned(), rows: None })
}

/// Where a GGUF file has a tensor; `None` for names that are none of a model.
pub(crate) fn in_gguf(config: &LlamaConfig, name: &str) -> Option<Place> {
    let stored = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        _ => {
            let (layer, module, kind) = of_layer(name)?;
            let (stored, rows) = match fused(config, module) {
                // Gate and up stand under the name of up.
                Some(("mlp.gate_up_proj", rows)) => ("ffn_up", Some(rows)),
                Some((_, rows)) => ("attn_qkv", Some(rows)),
                None => (module_in_gguf(config, module)?, None),
            };
            return Some(Place { stored: format!("blk.{layer}.{stored}.{kind}"), rows });
        }
    };
    Some(Place { stored: stored.to_owned(), rows: None })
}

fn module_in_gguf(config: &LlamaConfig, module: &str) -> Option<&'static str> {
    let norms = config.family.norms();
    let is = |norm: Option<&str>| norm == Some(module);
    Some(match module {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "self_attn.qkv_proj" if config.family.is_fused() => "attn_qkv",
        "mlp.gate_up_proj" if config.family.is_fused() => "ffn_up",
        _ if is(norms.before_attention) => "attn_norm",
        _ if is(norms.after_attention) => "post_attention_norm",
        _ if is(norms.before_mlp) => "ffn_norm",
        _ if is(norms.after_mlp) => "post_ffw_norm",
        _ => return None,
    })
}

/// Whether a GGUF file of this model may have a tensor of that name.
pub(crate) fn is_of_gguf(config: &LlamaConfig, stored: &str) -> bool {
    let known = |layer: &str, module: &str, kind: &str| {
        let of_model = layer.parse::<usize>().is_ok_and(|layer| layer < config.kv.layers);
        let matrix = in_folder(config).into_iter().filter(|name| kind == "weight" || kind == "bias" && name.ends_with("_proj"));
        of_model && matrix.into_iter().any(|name| module_in_gguf(config, name) == Some(module))
    };
    match stored.strip_prefix("blk.").map(|rest| rest.split('.').collect::<Vec<_>>()) {
        Some(parts) => match parts[..] {
            // Constants that old files carry along.
            [_, "attn_rot_embd", "weight"] => true,
            [layer, module, kind] => known(layer, module, kind),
            _ => false,
        },
        None => {
            let others = ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];
            matches!(stored, "token_embd.weight" | "output_norm.weight" | "output.weight") || others.contains(&stored)
        }
    }
}

/// The heads whose rows GGUF files have in llama.cpp's order, if those of this tensor are.
pub(crate) fn interleaved_heads(config: &LlamaConfig, name: &str) -> Option<usize> {
    match of_layer(name)? {
        (_, "self_attn.q_proj", _) if config.family.interleaved_in_gguf() => Some(config.heads),
        (_, "self_attn.k_proj", _) if config.family.interleaved_in_gguf() => Some(config.kv.kv_heads),
        _ => None,
    }
}
