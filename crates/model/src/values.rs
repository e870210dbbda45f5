//! The numbers of a tensor that lies in main memory, without a copy.

use candle_core::{Storage, Tensor, WithDType};

use crate::error::ModelError;

/// Calls `f` with the values of a contiguous CPU tensor.
pub(crate) fn read<T: WithDType, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R, ModelError> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(values), Some((start, end))) => Ok(f(&values.as_slice::<T>()?[start..end])),
        (Storage::Cpu(_), None) => Err(ModelError::Tensor(candle_core::Error::RequiresContiguous { op: "host read" })),
        _ => Err(ModelError::Device("a tensor of another device was read as main memory".into())),
    }
}
