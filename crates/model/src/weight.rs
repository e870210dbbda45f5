//! A weight as a file gives it: what readers of files and those who load models from them have in common.

use std::sync::Arc;

use candle_core::Tensor;
use candle_core::quantized::QTensor;

/// One weight as it will be held.
pub enum Weight {
    /// f32, bf16 or f16.
    Dense(Tensor),
    /// Blocks of quantised values, shape `[out, in]`.
    Quantised(Arc<QTensor>),
}
