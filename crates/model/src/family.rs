//! Families of models: where each computes otherwise than a Llama, as its code in transformers 5 does.

use std::fmt;

pub use overfill_kernels::Gate;

/// A family whose models are computed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2, TinyLlama; Mistral, which is one but for a window that attention may have.
    Llama,
    /// With biases of queries, keys and values.
    Qwen2,
    /// Queries and keys are normalised, head by head.
    Qwen3,
    /// Every fourth layer is without a rotary embedding.
    SmolLm3,
    /// With factors of embeddings, of what layers add, of scores and of logits.
    Granite,
    /// Norms whose weights are stored less one, scaled embeddings, GELU.
    Gemma,
    /// As Gemma, with norms after attention and MLP too, caps of scores and logits, and windows in every second layer.
    Gemma2,
    /// As Gemma 2, without caps; queries and keys are normalised; five of six layers have windows and a rotary embedding of their own.
    Gemma3,
    /// Queries, keys and values are one matrix, gate and up another; part of a head may turn only.
    Phi3,
    /// Norms after attention and MLP instead of before; queries and keys are normalised over all heads.
    Olmo2,
}

/// The norms of a layer, by the names that they have in its family (`input_layernorm`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Norms {
    /// Of what attention reads.
    pub before_attention: Option<&'static str>,
    /// Of what attention adds.
    pub after_attention: Option<&'static str>,
    /// Of what the MLP reads.
    pub before_mlp: Option<&'static str>,
    /// Of what the MLP adds.
    pub after_mlp: Option<&'static str>,
}

/// Over how much of a token's queries, or keys, a norm of them goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// Each head by itself; the weights, `[head_dim]`, are all heads'.
    Head,
    /// All heads together; the weights are `[heads * head_dim]`.
    Row,
}

impl Family {
    /// All of them.
    const ALL: [Self; 10] = [
        Self::Llama,
        Self::Qwen2,
        Self::Qwen3,
        Self::SmolLm3,
        Self::Granite,
        Self::Gemma,
        Self::Gemma2,
        Self::Gemma3,
        Self::Phi3,
        Self::Olmo2,
    ];

    /// Its name in GGUF files (`general.architecture`) and in `pair.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::SmolLm3 => "smollm3",
            Self::Granite => "granite",
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
            Self::Olmo2 => "olmo2",
        }
    }

    /// Its name in a `config.json`, and that of its class in transformers.
    pub fn in_transformers(self) -> (&'static str, &'static str) {
        match self {
            Self::Gemma3 => ("gemma3_text", "Gemma3ForCausalLM"),
            Self::Llama => ("llama", "LlamaForCausalLM"),
            Self::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Self::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
            Self::SmolLm3 => ("smollm3", "SmolLM3ForCausalLM"),
            Self::Granite => ("granite", "GraniteForCausalLM"),
            Self::Gemma => ("gemma", "GemmaForCausalLM"),
            Self::Gemma2 => ("gemma2", "Gemma2ForCausalLM"),
            Self::Phi3 => ("phi3", "Phi3ForCausalLM"),
            Self::Olmo2 => ("olmo2", "Olmo2ForCausalLM"),
        }
    }

    /// The family of a `config.json`'s `model_type`.
    ///
    /// # Errors
    /// A sentence that names what is supported.
    pub(crate) fn of_model_type(name: Option<&str>) -> Result<Self, String> {
        let name = name.unwrap_or("missing");
        let family = Self::ALL.into_iter().find(|family| family.in_transformers().0 == name);
        let told = match name {
            "mistral" => return Ok(Self::Llama),
            "gemma3" => "model_type is gemma3, a model of texts and images: take its GGUF file, which has the text model alone".to_owned(),
            _ => format!("model_type is {name}: llama, mistral, {} are supported", supported(|family| family.in_transformers().0)),
        };
        family.ok_or(told)
    }

    /// The family of a GGUF file's `general.architecture`.
    ///
    /// # Errors
    /// A sentence that names what is supported.
    pub(crate) fn of_gguf(name: Option<&str>) -> Result<Self, String> {
        let name = name.unwrap_or("missing");
        let told = || format!("the architecture is {name}: llama, {} are supported", supported(Self::name));
        Self::ALL.into_iter().find(|family| family.name() == name).ok_or_else(told)
    }

    /// The norms of its layers.
    pub fn norms(self) -> Norms {
        let before_and_after = Norms {
            before_attention: Some("input_layernorm"),
            after_attention: Some("post_attention_layernorm"),
            before_mlp: Some("pre_feedforward_layernorm"),
            after_mlp: Some("post_feedforward_layernorm"),
        };
        match self {
            Self::Gemma2 | Self::Gemma3 => before_and_after,
            Self::Olmo2 => Norms { before_attention: None, before_mlp: None, ..before_and_after },
            _ => Norms { after_attention: None, before_mlp: Some("post_attention_layernorm"), after_mlp: None, ..before_and_after },
        }
    }

    /// How queries and keys are normalised, where they are.
    pub fn query_key_norm(self) -> Option<QueryKeyNorm> {
        match self {
            Self::Qwen3 | Self::Gemma3 => Some(QueryKeyNorm::Head),
            Self::Olmo2 => Some(QueryKeyNorm::Row),
            _ => None,
        }
    }

    /// What an MLP's gate goes through.
    pub fn gate(self) -> Gate {
        if self.is_gemma() { Gate::Gelu } else { Gate::Silu }
    }

    /// Whether it is one of Gemma's: a folder has the weights of norms less one, and embeddings are multiplied by the root of their width.
    pub fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma | Self::Gemma2 | Self::Gemma3)
    }

    /// Whether queries, keys and values are one matrix in files, and gate and up another.
    pub fn is_fused(self) -> bool {
        self == Self::Phi3
    }

    /// Whether rows of queries and keys lie in GGUF files as llama.cpp turns them: 0, half, 1, half + 1, …
    pub(crate) fn interleaved_in_gguf(self) -> bool {
        matches!(self, Self::Llama | Self::SmolLm3 | Self::Granite)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn supported(name: impl Fn(Family) -> &'static str) -> String {
    let names: Vec<&str> = Family::ALL[1..].iter().map(|family| name(*family)).collect();
    let (last, others) = names.split_last().unwrap_or((&"", &[]));
    format!("{} and {last}", others.join(", "))
}
