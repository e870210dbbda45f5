//! Weight matrices on a device, multiplied by candle.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use overfill_types::pair::WeightFormat;

use crate::error::ModelError;
use crate::gpu::split::{Along, Part};
use crate::weight::Weight;
use crate::weights::Weights;

/// A weight matrix `[out, in]`.
#[derive(Clone)]
pub(crate) enum Matrix {
    /// f32, bf16 or f16, `[out, in]`.
    Dense(Tensor),
    /// Blocks of small integers.
    Quantised(Arc<QTensor>),
}

impl Matrix {
    pub(crate) fn load(weights: &Weights, name: &str, format: WeightFormat, device: &Device) -> Result<Self, ModelError> {
        Self::held(weights.matrix(name, format, device)?, format)
    }

    /// A part of it.
    fn load_part(weights: &Weights, name: &str, format: WeightFormat, place: Place<'_>) -> Result<Self, ModelError> {
        let Place { device, part, along } = place;
        if part.of == 1 {
            return Self::load(weights, name, format, device);
        }
        // In main memory: no device has to hold the whole.
        Ok(match Self::held(part.matrix(&weights.matrix(name, format, &Device::Cpu)?, along)?, format)? {
            Self::Dense(part) => Self::Dense(part.to_device(device)?),
            Self::Quantised(part) => {
                let storage = QStorage::from_data(part.data()?, device, part.dtype())?;
                Self::Quantised(Arc::new(QTensor::new(storage, part.shape().clone())?))
            }
        })
    }

    fn held(weight: Weight, format: WeightFormat) -> Result<Self, ModelError> {
        Ok(match weight {
            Weight::Quantised(q) => Matrix::Quantised(q),
            Weight::Dense(t) if format == WeightFormat::Q8_0 && t.dim(1)?.is_multiple_of(GgmlDType::Q8_0.block_size()) => {
                Matrix::Quantised(Arc::new(QTensor::quantize(&t, GgmlDType::Q8_0)?))
            }
            Weight::Dense(t) => Matrix::Dense(t),
        })
    }

    /// `x W^T`: `[n, in]` to `[n, out]`.
    pub(crate) fn multiply(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(match self {
            Matrix::Dense(w) => x.to_dtype(w.dtype())?.matmul(&w.t()?)?.to_dtype(DType::F32)?,
            Matrix::Quantised(w) => QMatMul::from_arc(w.clone())?.forward(x)?,
        })
    }

    /// Rows `ids` as `[n, in]`.
    pub(crate) fn rows(&self, ids: &[u32], device: &Device) -> Result<Tensor, ModelError> {
        let index = Tensor::from_slice(ids, ids.len(), device)?;
        Ok(match self {
            Matrix::Dense(w) => w.index_select(&index, 0)?.to_dtype(DType::F32)?,
            Matrix::Quantised(w) => w.embedding(&index)?.to_dtype(DType::F32)?,
        })
    }
}

/// A linear map with an optional bias.
pub(crate) struct Linear {
    weight: Matrix,
    bias: Option<Tensor>,
}

/// Which part of a matrix is held where.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) device: &'a Device,
    pub(crate) part: Part,
    pub(crate) along: Along,
}

impl Linear {
    /// Loads a part of `{name}.weight`, and of `{name}.bias` where the file has one.
    pub(crate) fn load(weights: &Weights, name: &str, format: WeightFormat, place: Place<'_>) -> Result<Self, ModelError> {
        let weight = Matrix::load_part(weights, &format!("{name}.weight"), format, place)?;
        let Place { device, part, along } = place;
        let bias = format!("{name}.bias");
        let bias = match along {
            _ if !weights.has(&bias) => None,
            Along::Outputs => Some(part.vector(&weights.vector(&bias, device)?)?),
            // What the parts make is summed: one of them adds it.
            Along::Inputs if part.number == 0 => Some(weights.vector(&bias, device)?),
            Along::Inputs => None,
        };
        Ok(Self { weight, bias })
    }

    /// `[n, in]` to `[n, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let y = self.weight.multiply(x)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}
