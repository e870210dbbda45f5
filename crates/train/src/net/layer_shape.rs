//! How large a layer is, and which parameters it has.

use overfill_model::LlamaConfig;

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
}

impl LayerShape {
    /// Of a model's layers.
    pub fn of(config: &LlamaConfig, biases: bool) -> Self {
        Self {
            hidden: config.hidden_size,
            mlp: config.intermediate_size,
            heads: config.heads,
            kv_heads: config.kv.kv_heads,
            head_dim: config.kv.head_dim,
            biases,
            eps: config.rms_norm_eps as f32,
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

    /// Query heads that share a KV head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// What scores are multiplied by.
    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Parameters by their names within the layer, with their shapes, in their order in memory.
    pub fn parameters(&self) -> Vec<(&'static str, Vec<usize>)> {
        let Self { hidden, mlp, .. } = *self;
        let (q, kv) = (self.q(), self.kv_row());
        let mut all = vec![
            ("input_layernorm.weight", vec![hidden]),
            ("self_attn.q_proj.weight", vec![q, hidden]),
            ("self_attn.k_proj.weight", vec![kv, hidden]),
            ("self_attn.v_proj.weight", vec![kv, hidden]),
        ];
        if self.biases {
            all.extend([("self_attn.q_proj.bias", vec![q]), ("self_attn.k_proj.bias", vec![kv]), ("self_attn.v_proj.bias", vec![kv])]);
        }
        all.extend([
            ("self_attn.o_proj.weight", vec![hidden, q]),
            ("post_attention_layernorm.weight", vec![hidden]),
            ("mlp.gate_proj.weight", vec![mlp, hidden]),
            ("mlp.up_proj.weight", vec![mlp, hidden]),
            ("mlp.down_proj.weight", vec![hidden, mlp]),
        ]);
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
