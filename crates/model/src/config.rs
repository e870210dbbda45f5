//! A Llama-family model's shape, as its files tell it.

use overfill_types::KvGeometry;

/// Shape and constants of a Llama-family model.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// `llama` or `qwen2`.
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
