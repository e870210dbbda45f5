//! Where a model's tensors come from: safetensors or GGUF, under Hugging Face's names.

use std::path::Path;

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};
use overfill_types::pair::WeightFormat;

use crate::config::LlamaConfig;
use crate::error::ModelError;

/// One weight as it will be held.
pub enum Weight {
    /// f32, bf16 or f16.
    Dense(Tensor),
    /// Blocks of quantised values, shape `[out, in]`.
    Quantised(QTensor),
}

/// An opened checkpoint. Names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`) whatever the file's are;
/// query and key rows come in Hugging Face's order (halves, not interleaved) also from a GGUF file.
pub struct Weights {}

#[allow(unused_variables)]
impl Weights {
    /// Opens a Hugging Face folder or a `.gguf` file.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        todo!()
    }

    /// Its shape.
    pub fn config(&self) -> &LlamaConfig {
        todo!()
    }

    /// Whether it has a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        todo!()
    }

    /// A matrix `[out, in]`, held as `format` says.
    pub fn matrix(&self, name: &str, format: WeightFormat, device: &Device) -> Result<Weight, ModelError> {
        todo!()
    }

    /// A vector (norm weight, bias) as f32 `[n]`.
    pub fn vector(&self, name: &str, device: &Device) -> Result<Tensor, ModelError> {
        todo!()
    }
}
