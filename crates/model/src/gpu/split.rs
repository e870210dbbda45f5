//! One model over several devices: each has a part of every layer's heads and of its MLP's channels, and what the parts make of
//! a layer's input is summed (Megatron-LM, arXiv 1909.08053). Two sums a layer; all else is done by each for itself.
//!
//! Queries, keys, values, gate and up are split by their outputs, the two matrices that follow them by their inputs, so nothing has
//! to be brought together between the two. The embedding and the head are the first device's.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{QStorage, QTensor};
use candle_core::{Device, Tensor};

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::family::QueryKeyNorm;
use crate::gpu::reduce::Reduce;
use crate::weight::Weight;

/// One of several parts of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) number: usize,
    pub(crate) of: usize,
}

/// By what a matrix `[out, in]` is split.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Along {
    Outputs,
    Inputs,
}

impl Part {
    /// The part of `length` that is its own.
    fn range(self, length: usize) -> (usize, usize) {
        let each = length / self.of;
        (self.number * each, each)
    }

    /// What the part of a model has of its heads and channels.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where they do not come out even, or all heads have to be seen at once.
    pub(crate) fn config(self, config: &LlamaConfig) -> Result<LlamaConfig, ModelError> {
        let LlamaConfig { heads, kv, intermediate_size: mlp, .. } = *config;
        let of = self.of;
        if ![heads, kv.kv_heads, mlp].iter().all(|length| length.is_multiple_of(of)) {
            return Err(ModelError::Mismatch(format!(
                "a model with {heads} heads, {} KV heads and an MLP of {mlp} cannot be split over {of} devices: each has to get as many",
                kv.kv_heads
            )));
        }
        if of > 1 && config.family.query_key_norm() == Some(QueryKeyNorm::Row) {
            let message = format!("{}'s queries and keys are normalised over all heads: it cannot be split over devices", config.family);
            return Err(ModelError::Mismatch(message));
        }
        let mut part = config.clone();
        (part.heads, part.kv.kv_heads, part.intermediate_size) = (heads / of, kv.kv_heads / of, mlp / of);
        Ok(part)
    }

    /// Its part of a matrix in main memory, there.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where a block of quantised numbers would be cut.
    pub(crate) fn matrix(self, whole: &Weight, along: Along) -> Result<Weight, ModelError> {
        match whole {
            Weight::Dense(whole) => {
                let dim = match along {
                    Along::Outputs => 0,
                    Along::Inputs => 1,
                };
                let (first, length) = self.range(whole.dim(dim)?);
                Ok(Weight::Dense(whole.narrow(dim, first, length)?.contiguous()?))
            }
            Weight::Quantised(whole) => self.blocks(whole, along).map(|part| Weight::Quantised(Arc::new(part))),
        }
    }

    fn blocks(self, whole: &QTensor, along: Along) -> Result<QTensor, ModelError> {
        let (outputs, inputs) = whole.shape().dims2()?;
        let (block, bytes) = (whole.dtype().block_size(), whole.dtype().type_size());
        let data = whole.data()?;
        let row = inputs / block * bytes;
        let (part, shape) = match along {
            Along::Outputs => {
                let (first, length) = self.range(outputs);
                (data[first * row..(first + length) * row].to_vec(), (length, inputs))
            }
            Along::Inputs => {
                let (first, length) = self.range(inputs);
                if !length.is_multiple_of(block) {
                    return Err(ModelError::Mismatch(format!(
                        "rows of {inputs} numbers in blocks of {block} cannot be split over {} devices: hold the model in bf16 or f16 \
                         (`overfill pair --full-weights`)",
                        self.of
                    )));
                }
                let (first, part) = (first / block * bytes, length / block * bytes);
                let rows = data.chunks_exact(row).flat_map(|row| &row[first..first + part]);
                (rows.copied().collect(), (outputs, length))
            }
        };
        let storage = QStorage::from_data(Cow::Owned(part), &Device::Cpu, whole.dtype())?;
        Ok(QTensor::new(storage, shape)?)
    }

    /// Its part of a vector of one number for each output.
    pub(crate) fn vector(self, whole: &Tensor) -> Result<Tensor, ModelError> {
        let (first, length) = self.range(whole.dim(0)?);
        Ok(whole.narrow(0, first, length)?.contiguous()?)
    }
}

/// The devices of one model, the first of which has what is not split.
pub(crate) struct Devices {
    pub(crate) all: Vec<Device>,
    reduce: Reduce,
}

impl Devices {
    /// At least one.
    ///
    /// # Errors
    /// Where several GPUs have no NCCL between them.
    pub(crate) fn of(all: &[Device]) -> Result<Self, ModelError> {
        Ok(Self { all: all.to_vec(), reduce: Reduce::over(all)? })
    }

    pub(crate) fn first(&self) -> &Device {
        &self.all[0]
    }

    /// The same numbers on each.
    pub(crate) fn copies(&self, of: Tensor) -> Result<Vec<Tensor>, ModelError> {
        let rest = self.all[1..].iter().map(|device| Ok(of.to_device(device)?)).collect::<Result<Vec<_>, ModelError>>()?;
        Ok(std::iter::once(of).chain(rest).collect())
    }

    /// The sum of what each has, on each.
    pub(crate) fn sums(&self, parts: Vec<Tensor>) -> Result<Vec<Tensor>, ModelError> {
        if parts.len() == 1 { Ok(parts) } else { self.reduce.sums(parts) }
    }
}
