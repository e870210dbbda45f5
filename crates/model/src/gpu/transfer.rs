//! Rows of a KV cache on their way from one GPU to another: gathered out of their blocks, and put into others.

use candle_core::Device;
use overfill_kv::BlockId;
use overfill_nccl::{Gpu, GpuBytes};

use crate::cache::KvCache;
use crate::error::ModelError;

/// A GPU, for copies to and from what lies there; `None` of the CPU.
///
/// # Errors
/// Where its driver fails.
pub(crate) fn gpu(device: &Device) -> Result<Option<Gpu>, ModelError> {
    Ok(match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Some(Gpu::open(device.cuda_stream().context().ordinal())?),
        _ => None,
    })
}

impl KvCache {
    /// Copies keys, then values, of positions `start..start + count` of a sequence in one layer, `[count, kv_heads, head_dim]` each, to
    /// memory of their own on `gpu`, which is the cache's. It is copied when what was computed before is.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where the layer or a position is not there, or the cache is on no GPU.
    pub fn gather(&self, gpu: &Gpu, layer: usize, blocks: &[BlockId], start: usize, count: usize) -> Result<GpuBytes, ModelError> {
        on_gpu::gather(self, gpu, layer, &self.runs(layer, blocks, start, count)?)
    }

    /// Sets keys and values of positions from `start` on of a sequence in one layer to rows that came to the cache's GPU. What is
    /// computed after sees them.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where they are no whole rows, the layer or a position is not there, or the cache is on no GPU.
    pub fn put(&mut self, layer: usize, blocks: &[BlockId], start: usize, rows: &mut GpuBytes) -> Result<(), ModelError> {
        let both = 2 * self.bytes_per_row();
        if !rows.len().is_multiple_of(both) {
            return Err(ModelError::Mismatch(format!("{} bytes of keys and values are no rows of {both}", rows.len())));
        }
        let runs = self.runs(layer, blocks, start, rows.len() / both)?;
        on_gpu::put(self, layer, &runs, rows)
    }
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use std::sync::Arc;

    use candle_core::backend::BackendStorage;
    use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, result};
    use candle_core::{DType, Device, Storage, Tensor};
    use half::f16;
    use overfill_nccl::{Gpu, GpuBytes};

    use crate::cache::KvCache;
    use crate::error::ModelError;

    pub(super) fn gather(cache: &KvCache, gpu: &Gpu, layer: usize, runs: &[(usize, usize)]) -> Result<GpuBytes, ModelError> {
        let tokens: usize = runs.iter().map(|(_, count)| count).sum();
        let mut made = gpu.room(2 * tokens * cache.bytes_per_row())?;
        copy(cache, layer, runs, &mut made, |room, rows, bytes, stream| {
            // SAFETY: the runs were checked against the cache, and the room is as long as all of them.
            unsafe { result::memcpy_dtod_async(room, rows, bytes, stream.cu_stream()) }
        })?;
        Ok(made)
    }

    pub(super) fn put(cache: &mut KvCache, layer: usize, runs: &[(usize, usize)], rows: &mut GpuBytes) -> Result<(), ModelError> {
        copy(cache, layer, runs, rows, |room, rows, bytes, stream| {
            // SAFETY: as above; nobody else has the cache while this has it.
            unsafe { result::memcpy_dtod_async(rows, room, bytes, stream.cu_stream()) }
        })
    }

    type Failed = candle_core::cuda_backend::cudarc::driver::DriverError;

    /// Calls `each` with where each run lies in `bytes`, where it lies in the cache, and how long it is, on the cache's stream.
    fn copy(
        cache: &KvCache,
        layer: usize,
        runs: &[(usize, usize)],
        bytes: &mut GpuBytes,
        each: impl Fn(u64, u64, usize, &CudaStream) -> Result<(), Failed>,
    ) -> Result<(), ModelError> {
        let (row, rows) = (cache.bytes_per_row(), cache.tensors(layer, 0)?);
        let Device::Cuda(device) = rows.k.device() else { return Err(elsewhere()) };
        let stream = device.cuda_stream();
        bytes.on(&stream, |at| {
            let mut at = at;
            for tensor in [&rows.k, &rows.v] {
                let first = address(tensor, &stream)?;
                for &(slot, count) in runs {
                    let copied = each(at, first + (slot * row) as u64, count * row, &stream);
                    copied.map_err(|error| ModelError::Device(format!("a GPU does not copy rows: {error:?}")))?;
                    at += (count * row) as u64;
                }
            }
            Ok(())
        })
    }

    /// Where the rows of a whole tensor lie.
    fn address(rows: &Tensor, stream: &Arc<CudaStream>) -> Result<u64, ModelError> {
        let (storage, _) = rows.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { return Err(elsewhere()) };
        Ok(match storage.dtype() {
            DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(stream).0,
            _ => storage.as_cuda_slice::<f32>()?.device_ptr(stream).0,
        })
    }

    fn elsewhere() -> ModelError {
        ModelError::Mismatch("rows are to go from GPU to GPU, the KV cache is on none".into())
    }
}

#[cfg(not(feature = "cuda"))]
mod on_gpu {
    use overfill_nccl::{Gpu, GpuBytes};

    use crate::cache::KvCache;
    use crate::error::ModelError;

    const NO_CUDA: &str = "this build has no models on GPUs: build it with `--features cuda`";

    pub(super) fn gather(_: &KvCache, _: &Gpu, _: usize, _: &[(usize, usize)]) -> Result<GpuBytes, ModelError> {
        Err(ModelError::Device(NO_CUDA.into()))
    }

    pub(super) fn put(_: &mut KvCache, _: usize, _: &[(usize, usize)], _: &mut GpuBytes) -> Result<(), ModelError> {
        Err(ModelError::Device(NO_CUDA.into()))
    }
}
