//! A model's shape and constants, as its files tell them. A `config.json` is read in `config_json.rs`, what a GGUF file
//! says in `gguf_config.rs`.

use overfill_types::KvGeometry;

use crate::family::Family;

/// Most layers of a model.
pub(crate) const MOST_LAYERS: usize = 1 << 12;

/// Shape and constants of a Llama or one of its kin.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// What it computes otherwise than a Llama.
    pub family: Family,
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
    /// That of layers with a [`Rotation::Local`] one.
    pub local_rope: Option<Rope>,
    /// What each layer sees, and how it turns queries and keys.
    pub layers: Vec<LayerAttention>,
    /// Factors and caps.
    pub scalars: Scalars,
    /// Positions that the model was made for.
    pub max_context: usize,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// Token ids that end an answer.
    pub eos_token_ids: Vec<u32>,
}

/// What one layer's attention sees, and how it turns queries and keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerAttention {
    /// A token sees so many positions, itself the last of them; `None` where it sees all.
    pub window: Option<usize>,
    /// How queries and keys are turned.
    pub rotation: Rotation,
}

impl LayerAttention {
    /// Of a layer of `family`: whether it has the model's window, and whether it turns queries and keys.
    pub(crate) fn of(family: Family, (slides, turns): (bool, bool), window: Option<usize>, max_context: usize) -> Self {
        Self {
            // One that covers the context is none.
            window: window.filter(|window| slides && *window < max_context),
            rotation: match turns {
                false => Rotation::None,
                true if slides && family == Family::Gemma3 => Rotation::Local,
                true => Rotation::Global,
            },
        }
    }
}

/// Which rotary embedding a layer has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rotation {
    /// The model's.
    #[default]
    Global,
    /// That of the model's layers with windows.
    Local,
    /// None.
    None,
}

/// Factors and caps of what is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalars {
    /// Embeddings are multiplied by it.
    pub embedding: f64,
    /// What attention and MLP add to the residual stream is multiplied by it.
    pub residual: f64,
    /// Products of queries and keys are multiplied by it.
    pub attention: f64,
    /// Logits are multiplied by it.
    pub logits: f64,
    /// Scores become `cap * tanh(score / cap)`.
    pub attention_cap: Option<f64>,
    /// Logits likewise.
    pub logits_cap: Option<f64>,
}

impl Scalars {
    /// A Llama's.
    pub fn plain(head_dim: usize) -> Self {
        let attention = 1.0 / (head_dim as f64).sqrt();
        Self { embedding: 1.0, residual: 1.0, attention, logits: 1.0, attention_cap: None, logits_cap: None }
    }
}

/// The rotary embedding's constants.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Values of a head that turn: the first ones, an even number.
    pub turned: usize,
    /// How the frequencies are stretched for contexts longer than the pre-training's.
    pub scaling: RopeScaling,
    /// What cosines and sines are multiplied by.
    pub magnitude: f64,
}

impl Rope {
    /// With frequencies that nothing stretches; all of a head turns.
    pub fn plain(theta: f64, head_dim: usize) -> Self {
        Self { theta, turned: head_dim, scaling: RopeScaling::None, magnitude: 1.0 }
    }
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
    /// YaRN's: frequencies that turn less than `beta_slow` times within the original context divided by `factor`, those that turn
    /// more than `beta_fast` times kept, a ramp between.
    Yarn {
        /// The divisor.
        factor: f64,
        /// Turns above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is divided.
        beta_slow: f64,
        /// Context of the pre-training, in tokens.
        original_context: usize,
        /// Whether the ramp's ends are whole numbers of frequencies.
        truncate: bool,
    },
    /// Frequencies divided by given factors, one for each pair of values (LongRoPE's; `rope_freqs.weight` of a GGUF file).
    Factors {
        /// `turned / 2` divisors.
        factors: Vec<f64>,
    },
}

impl LlamaConfig {
    /// Weights that a decode step reads for one token: all matrices but the embedding, of which it reads a row.
    pub fn decode_weights(&self) -> usize {
        let (q, kv) = (self.heads * self.kv.head_dim, self.kv.row());
        self.kv.layers * self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size) + self.vocab_size * self.hidden_size
    }

    /// The rotary embedding of a layer, if it has one.
    pub(crate) fn rope_of(&self, layer: usize) -> Option<&Rope> {
        match self.layers.get(layer)?.rotation {
            Rotation::Global => Some(&self.rope),
            Rotation::Local => self.local_rope.as_ref(),
            Rotation::None => None,
        }
    }

    /// Refuses shapes that no model has.
    pub(crate) fn check(&self) -> Result<(), String> {
        // The names are those of config.json; what is larger than the last figure is no size of a model, but a file that is broken.
        let sizes = [
            ("hidden size (hidden_size)", self.hidden_size, 1 << 20),
            ("MLP width (intermediate_size)", self.intermediate_size, 1 << 22),
            ("vocabulary (vocab_size)", self.vocab_size, 1 << 24),
            ("number of heads (num_attention_heads)", self.heads, 1 << 12),
            ("number of layers (num_hidden_layers)", self.kv.layers, MOST_LAYERS),
            ("number of KV heads (num_key_value_heads)", self.kv.kv_heads, 1 << 12),
            ("head size (head_dim)", self.kv.head_dim, 1 << 12),
            ("context (max_position_embeddings)", self.max_context, usize::MAX),
            ("window (sliding_window)", self.layers.iter().filter_map(|layer| layer.window).min().unwrap_or(1), usize::MAX),
        ];
        if let Some((name, size, most)) = sizes.into_iter().find(|(_, size, most)| !(1..=*most).contains(size)) {
            return Err(format!("the {name} is {size}: it must be from 1 to {most}"));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(format!("rms_norm_eps is {}: it must be 0 or more", self.rms_norm_eps));
        }
        self.rope.check(self.kv.head_dim)?;
        self.local_rope.as_ref().map_or(Ok(()), |rope| rope.check(self.kv.head_dim))?;
        self.scalars.check()?;
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

impl Rope {
    fn check(&self, head_dim: usize) -> Result<(), String> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err(format!("rope_theta is {}: it must be above 0", self.theta));
        }
        if self.turned == 0 || self.turned > head_dim || !self.turned.is_multiple_of(2) && head_dim.is_multiple_of(2) {
            return Err(format!(
                "the rotary embedding turns {} values of a head of {head_dim}: an even number of them is wanted",
                self.turned
            ));
        }
        if !(self.magnitude.is_finite() && self.magnitude > 0.0) {
            return Err(format!("the rotary embedding's attention factor is {}: it must be above 0", self.magnitude));
        }
        let divisors = match &self.scaling {
            RopeScaling::None => &[][..],
            RopeScaling::Linear { factor } | RopeScaling::Llama3 { factor, .. } | RopeScaling::Yarn { factor, .. } => {
                std::slice::from_ref(factor)
            }
            RopeScaling::Factors { factors } => factors,
        };
        if let Some(factor) = divisors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
            return Err(format!("a factor of the rope scaling is {factor}: it must be above 0"));
        }
        match &self.scaling {
            RopeScaling::Factors { factors } if factors.len() != self.turned / 2 => {
                Err(format!("the rope scaling has {} factors, and {} pairs of values turn", factors.len(), self.turned / 2))
            }
            _ => Ok(()),
        }
    }
}

impl Scalars {
    fn check(&self) -> Result<(), String> {
        let all = [
            ("the factor of embeddings", Some(self.embedding)),
            ("the factor of what layers add", Some(self.residual)),
            ("the factor of scores", Some(self.attention)),
            ("the factor of logits", Some(self.logits)),
            ("the cap of scores (attn_logit_softcapping)", self.attention_cap),
            ("the cap of logits (final_logit_softcapping)", self.logits_cap),
        ];
        match all.into_iter().find(|(_, value)| value.is_some_and(|value| !(value.is_finite() && value > 0.0))) {
            Some((name, value)) => Err(format!("{name} is {}: it must be above 0", value.unwrap_or_default())),
            None => Ok(()),
        }
    }
}
