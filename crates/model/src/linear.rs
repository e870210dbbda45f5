//! Weight matrices as the forward pass uses them: products and look-ups.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use half::{bf16, f16};
use overfill_kernels::{PackedMatrix, QuantisedMatrix};
use overfill_types::pair::WeightFormat;

use crate::error::ModelError;
use crate::gguf::block_format;
use crate::host;
use crate::weights::{Weight, Weights};

/// A weight matrix `[out, in]` on its device.
///
/// On the CPU it is packed for our kernels, whose results do not depend on the batch; elsewhere candle multiplies.
#[derive(Clone)]
pub(crate) enum Matrix {
    /// Dense, on the CPU.
    Packed(Arc<PackedMatrix>),
    /// Dense, on another device, `[out, in]`.
    Dense(Tensor),
    /// Quantised, on the CPU.
    Blocks(Arc<QuantisedMatrix>),
    /// Quantised, on another device.
    Quantised(Arc<QTensor>),
}

impl Matrix {
    pub(crate) fn load(weights: &Weights, name: &str, format: WeightFormat, device: &Device) -> Result<Self, ModelError> {
        Ok(match weights.matrix(name, format, device)? {
            Weight::Quantised(q) if device.is_cpu() => {
                let (outputs, inputs) = q.shape().dims2()?;
                let blocks = match block_format(q.dtype()) {
                    Some(format) => QuantisedMatrix::from_blocks(format, &q.data()?, outputs, inputs),
                    None => None,
                };
                match blocks {
                    Some(blocks) => Matrix::Blocks(Arc::new(blocks)),
                    None => {
                        return Err(ModelError::Device(format!(
                            "tensor {name} is {:?}, which is not multiplied on a CPU: load the model as f32, bf16 or f16",
                            q.dtype()
                        )));
                    }
                }
            }
            Weight::Quantised(q) => Matrix::Quantised(Arc::new(q)),
            Weight::Dense(t) if device.is_cpu() => {
                let (outputs, inputs) = t.dims2()?;
                Matrix::Packed(Arc::new(match t.dtype() {
                    DType::BF16 => host::read(&t, |w: &[bf16]| PackedMatrix::from_bf16(w, outputs, inputs))?,
                    DType::F16 => host::read(&t, |w: &[f16]| PackedMatrix::from_f16(w, outputs, inputs))?,
                    _ => host::read(&t.to_dtype(DType::F32)?, |w: &[f32]| PackedMatrix::from_f32(w, outputs, inputs))?,
                }))
            }
            Weight::Dense(t) => Matrix::Dense(t),
        })
    }

    /// `x W^T`: `[n, in]` to `[n, out]`.
    pub(crate) fn multiply(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(match self {
            Matrix::Packed(w) => {
                let (rows, _) = x.dims2()?;
                let mut y = vec![0.0; rows * w.outputs()];
                host::read(x, |x: &[f32]| w.multiply(x, rows, &mut y))?;
                Tensor::from_vec(y, (rows, w.outputs()), x.device())?
            }
            Matrix::Blocks(w) => {
                let (rows, _) = x.dims2()?;
                let mut y = vec![0.0; rows * w.outputs()];
                host::read(x, |x: &[f32]| w.multiply(x, rows, &mut y))?;
                Tensor::from_vec(y, (rows, w.outputs()), x.device())?
            }
            Matrix::Dense(w) => x.to_dtype(w.dtype())?.matmul(&w.t()?)?.to_dtype(DType::F32)?,
            Matrix::Quantised(w) => QMatMul::from_arc(w.clone())?.forward(x)?,
        })
    }

    /// Rows `ids` as `[n, in]`.
    pub(crate) fn rows(&self, ids: &[u32], device: &Device) -> Result<Tensor, ModelError> {
        let index = || Tensor::from_slice(ids, ids.len(), device);
        Ok(match self {
            Matrix::Packed(w) => look_up(ids, w.inputs(), |id, row| w.row(id, row))?,
            Matrix::Blocks(w) => look_up(ids, w.inputs(), |id, row| w.row(id, row))?,
            Matrix::Dense(w) => w.index_select(&index()?, 0)?.to_dtype(DType::F32)?,
            Matrix::Quantised(w) => w.embedding(&index()?)?.to_dtype(DType::F32)?,
        })
    }
}

fn look_up(ids: &[u32], width: usize, read: impl Fn(usize, &mut [f32])) -> Result<Tensor, ModelError> {
    let mut rows = vec![0.0; ids.len() * width];
    for (row, &id) in rows.chunks_exact_mut(width).zip(ids) {
        read(id as usize, row);
    }
    Ok(Tensor::from_vec(rows, (ids.len(), width), &Device::Cpu)?)
}

/// A linear map with an optional bias.
pub(crate) struct Linear {
    weight: Matrix,
    bias: Option<Tensor>,
}

impl Linear {
    /// Loads `{name}.weight`, and `{name}.bias` where the file has one.
    pub(crate) fn load(weights: &Weights, name: &str, format: WeightFormat, device: &Device) -> Result<Self, ModelError> {
        let weight = Matrix::load(weights, &format!("{name}.weight"), format, device)?;
        let bias = format!("{name}.bias");
        let bias = if weights.has(&bias) { Some(weights.vector(&bias, device)?) } else { None };
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

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use candle_core::quantized::{GgmlDType, QStorage};

    use super::*;

    #[test]
    fn our_reading_of_every_block_format_is_candles() {
        let (rows, columns) = (3, 512);
        for dtype in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q5_0, GgmlDType::Q5_1, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K] {
            let format = block_format(dtype).unwrap();
            let mut bytes: Vec<u8> = (0..rows * columns / format.block() * format.bytes()).map(|i| ((i * 7919) >> 3) as u8).collect();
            // The scales: half-precision numbers that are not odd.
            let halves: &[usize] = match dtype {
                GgmlDType::Q6K => &[208],
                GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K => &[0, 2],
                _ => &[0],
            };
            for (b, block) in bytes.chunks_exact_mut(format.bytes()).enumerate() {
                for &at in halves {
                    block[at..at + 2].copy_from_slice(&f16::from_f32((b % 17 + at) as f32 * 0.01 - 0.05).to_le_bytes());
                }
            }
            let storage = QStorage::from_data(Cow::Borrowed(&bytes), &Device::Cpu, dtype).unwrap();
            let expected = QTensor::new(storage, (rows, columns)).unwrap().dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
            let ours = QuantisedMatrix::from_blocks(format, &bytes, rows, columns).unwrap();
            let mut row = vec![0.0; columns];
            for (r, expected) in expected.iter().enumerate() {
                ours.row(r, &mut row);
                for (i, (got, want)) in row.iter().zip(expected).enumerate() {
                    assert!((got - want).abs() <= 1e-6 * want.abs().max(1.0), "{dtype:?} [{r}, {i}]: {got}, not {want}");
                }
            }
        }
    }
}
