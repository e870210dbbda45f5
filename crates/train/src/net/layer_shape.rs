//! How large a layer is, and which parameters it has.

use std::ops::Range;

use overfill_model::config::{LayerAttention, Scalars};
use overfill_model::family::QueryKeyNorm;
use overfill_model::{Family, LlamaConfig};

/// Sizes of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub mlp: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Values of a head; `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Whether queries, keys and values have biases (Qwen2).
    pub biases: bool,
    /// Epsilon of the norms.
    pub eps: f32,
    /// What is computed otherwise than in a Llama.
    pub family: Family,
    /// Factors and caps.
    pub scalars: Scalars,
    /// What this layer sees, and how it turns queries and keys.
    pub sees: LayerAttention,
}

impl LayerShape {
    /// Of a model's layers, that see everything.
    pub fn of(config: &LlamaConfig, biases: bool) -> Self {
        Self {
            hidden: config.hidden_size,
            mlp: config.intermediate_size,
            heads: config.heads,
            kv_heads: config.kv.kv_heads,
            head_dim: config.kv.head_dim,
            biases,
            eps: config.rms_norm_eps as f32,
            family: config.family,
            scalars: config.scalars,
            sees: LayerAttention::default(),
        }
    }

    /// Width of all query heads.
    pub fn q(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads, and of all value heads.
    pub fn kv_row(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of queries, keys and values.
    pub fn qkv(&self) -> usize {
        self.q() + 2 * self.kv_row()
    }

    /// Where a row's queries lie, and its keys.
    pub(super) fn head_parts(&self) -> [Range<usize>; 2] {
        [0..self.q(), self.q()..self.q() + self.kv_row()]
    }

    /// Query heads that share a KV head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// What scores are multiplied by.
    pub(super) fn scale(&self) -> f32 {
        self.scalars.attention as f32
    }

    /// Which of the first `visible` positions the last of them sees.
    pub(super) fn seen(&self, visible: usize) -> Range<usize> {
        self.sees.window.map_or(0, |window| visible.saturating_sub(window))..visible
    }

    /// Lengths of the weights of queries' and of keys' norms; 0 where there are none.
    pub(super) fn query_key_norms(&self) -> [usize; 2] {
        match self.family.query_key_norm() {
            None => [0, 0],
            Some(QueryKeyNorm::Head) => [self.head_dim; 2],
            Some(QueryKeyNorm::Row) => [self.q(), self.kv_row()],
        }
    }

    /// `hidden` where the family has the norm of that name.
    pub(super) fn norm(&self, name: Option<&str>) -> usize {
        if name.is_some() { self.hidden } else { 0 }
    }

    /// Parameters by their names within the layer, with their shapes, in their order in memory.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let Self { hidden, mlp, .. } = *self;
        let (q, kv) = (self.q(), self.kv_row());
        let norms = self.family.norms();
        let norm = |all: &mut Vec<(String, Vec<usize>)>, name: Option<&str>| {
            all.extend(name.map(|name| (format!("{name}.weight"), vec![hidden])));
        };
        let named =
            |parts: &[(&str, Vec<usize>)]| parts.iter().map(|(name, shape)| ((*name).to_owned(), shape.clone())).collect::<Vec<_>>();
        let mut all = Vec::new();
        norm(&mut all, norms.before_attention);
        all.extend(named(&[
            ("self_attn.q_proj.weight", vec![q, hidden]),
            ("self_attn.k_proj.weight", vec![kv, hidden]),
            ("self_attn.v_proj.weight", vec![kv, hidden]),
        ]));
        if self.biases {
            all.extend(named(&[
                ("self_attn.q_proj.bias", vec![q]),
                ("self_attn.k_proj.bias", vec![kv]),
                ("self_attn.v_proj.bias", vec![kv]),
            ]));
        }
        let [queries, keys] = self.query_key_norms();
        if queries > 0 {
            all.extend(named(&[("self_attn.q_norm.weight", vec![queries]), ("self_attn.k_norm.weight", vec![keys])]));
        }
        all.extend(named(&[("self_attn.o_proj.weight", vec![hidden, q])]));
        norm(&mut all, norms.after_attention);
        norm(&mut all, norms.before_mlp);
        all.extend(named(&[
            ("mlp.gate_proj.weight", vec![mlp, hidden]),
            ("mlp.up_proj.weight", vec![mlp, hidden]),
            ("mlp.down_proj.weight", vec![hidden, mlp]),
        ]));
        norm(&mut all, norms.after_mlp);
        all
    }

    /// Parameters of a layer, in numbers.
    pub fn len(&self) -> usize {
        self.parameters().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// Never: a layer has parameters.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
