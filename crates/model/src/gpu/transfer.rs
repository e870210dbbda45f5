//! Rows of a KV cache on their way out of a GPU and into one: gathered out of their blocks, and put into others. Where the wire has
//! them in int8, a kernel makes them so, and rows of them again (`kernels/wire.cu`).

use candle_core::Device;
use overfill_kv::{BlockId, wire};
use overfill_nccl::{Gpu, GpuBytes};
use overfill_types::WireFormat;

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
    /// Copies keys, then values, of positions `start..start + count` of a sequence in one layer, as [`wire::encode`] would give them in
    /// `format`, to memory of their own on `gpu`, which is the cache's ([`KvCache::gpu`]). It is copied when what was computed before is.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where the layer or a position is not there, or the cache is on no GPU.
    pub fn gather(
        &self,
        gpu: &Gpu,
        format: WireFormat,
        layer: usize,
        blocks: &[BlockId],
        start: usize,
        count: usize,
    ) -> Result<GpuBytes, ModelError> {
        let runs = self.runs(layer, blocks, start, count)?;
        let mut made = gpu.room(2 * count * wire::row_bytes(format, &self.geometry()))?;
        on_gpu::gather(self, format, layer, &runs, &mut made)?;
        Ok(made)
    }

    /// Sets keys and values of positions from `start` on of a sequence in one layer to rows that came to the cache's GPU in `format`.
    /// What is computed after sees them.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where they are no whole rows, the layer or a position is not there, or the cache is on no GPU.
    pub fn put(
        &mut self,
        format: WireFormat,
        layer: usize,
        blocks: &[BlockId],
        start: usize,
        rows: &mut GpuBytes,
    ) -> Result<(), ModelError> {
        let both = 2 * wire::row_bytes(format, &self.geometry());
        if !rows.len().is_multiple_of(both) {
            return Err(ModelError::Mismatch(format!("{} bytes of keys and values are no rows of {both}", rows.len())));
        }
        let runs = self.runs(layer, blocks, start, rows.len() / both)?;
        on_gpu::put(self, format, layer, &runs, rows)
    }
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use std::sync::Arc;

    use candle_core::backend::BackendStorage;
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, LaunchConfig, PushKernelArg, result};
    use candle_core::{CudaDevice, DType, Device, Storage, Tensor};
    use half::f16;
    use overfill_kv::wire;
    use overfill_nccl::GpuBytes;
    use overfill_types::{KvGeometry, WireFormat};

    use crate::cache::{KvCache, KvTensors};
    use crate::error::ModelError;
    use crate::gpu::compiled::OverCache;

    /// Threads of a block: the kernels' `PACKERS`.
    const PACKERS: usize = 128;

    static KERNELS: OverCache =
        OverCache::new(["wire_f16", "wire_f32"], concat!(include_str!("kernels/stored.cu"), include_str!("kernels/wire.cu")));

    pub(super) fn gather(
        cache: &KvCache,
        format: WireFormat,
        layer: usize,
        runs: &[(usize, usize)],
        made: &mut GpuBytes,
    ) -> Result<(), ModelError> {
        if format == WireFormat::Int8 {
            return convert("pack", cache, layer, runs, made);
        }
        copy(cache, format, layer, runs, made, |room, rows, bytes, stream| {
            // SAFETY: the runs were checked against the cache, and the room is as long as all of them.
            unsafe { result::memcpy_dtod_async(room, rows, bytes, stream.cu_stream()) }
        })
    }

    pub(super) fn put(
        cache: &mut KvCache,
        format: WireFormat,
        layer: usize,
        runs: &[(usize, usize)],
        rows: &mut GpuBytes,
    ) -> Result<(), ModelError> {
        if format == WireFormat::Int8 {
            return convert("unpack", cache, layer, runs, rows);
        }
        copy(cache, format, layer, runs, rows, |room, rows, bytes, stream| {
            // SAFETY: as above; nobody else has the cache while this has it.
            unsafe { result::memcpy_dtod_async(rows, room, bytes, stream.cu_stream()) }
        })
    }

    /// Has one of the kernels go from the cache's rows to int8 in `bytes`, or back, on the cache's stream.
    fn convert(kernel: &str, cache: &KvCache, layer: usize, runs: &[(usize, usize)], bytes: &mut GpuBytes) -> Result<(), ModelError> {
        let KvGeometry { kv_heads, head_dim, .. } = cache.geometry();
        let (rows, device) = on_device(cache, layer)?;
        let slots: Vec<i32> = runs.iter().flat_map(|&(slot, count)| slot as i32..(slot + count) as i32).collect();
        let stream = device.cuda_stream();
        let kernel = KERNELS.kernel(device, kernel, rows.k.dtype())?;
        let (keys, values, told) = (address(&rows.k, &stream)?, address(&rows.v, &stream)?, device.clone_htod(&slots)?);
        let blocks = LaunchConfig {
            grid_dim: (slots.len() as u32, kv_heads as u32, 2),
            block_dim: (PACKERS as u32, 1, 1),
            shared_mem_bytes: (PACKERS * size_of::<f32>()) as u32,
        };
        let [tokens, kv_heads, head_dim] = [slots.len(), kv_heads, head_dim].map(|n| n as i32);
        bytes.on(&stream, |at| {
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(&at).arg(&keys).arg(&values).arg(&told).arg(&tokens).arg(&kv_heads).arg(&head_dim);
            // SAFETY: the slots were checked against the cache, and the bytes are those of so many rows. Who packs writes to the bytes
            // alone; who unpacks has the cache to itself.
            unsafe { launch.launch(blocks) }.w()?;
            Ok(())
        })
    }

    type Failed = candle_core::cuda_backend::cudarc::driver::DriverError;

    /// Calls `each` with where each run lies in `bytes`, where it lies in the cache, and how long it is, on the cache's stream.
    fn copy(
        cache: &KvCache,
        format: WireFormat,
        layer: usize,
        runs: &[(usize, usize)],
        bytes: &mut GpuBytes,
        each: impl Fn(u64, u64, usize, &CudaStream) -> Result<(), Failed>,
    ) -> Result<(), ModelError> {
        let (row, (rows, device)) = (wire::row_bytes(format, &cache.geometry()), on_device(cache, layer)?);
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

    /// One layer, and the GPU that it lies on.
    fn on_device(cache: &KvCache, layer: usize) -> Result<(&KvTensors, &CudaDevice), ModelError> {
        let rows = cache.tensors(layer, 0)?;
        match rows.k.device() {
            Device::Cuda(device) => Ok((rows, device)),
            _ => Err(ModelError::Mismatch("rows are to leave a GPU or to come to one, the KV cache is on none".into())),
        }
    }

    /// Where the rows of a whole tensor lie.
    fn address(rows: &Tensor, stream: &Arc<CudaStream>) -> Result<u64, ModelError> {
        let (storage, _) = rows.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { return Err(ModelError::Mismatch("a tensor lies elsewhere than it says".into())) };
        Ok(match storage.dtype() {
            DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(stream).0,
            _ => storage.as_cuda_slice::<f32>()?.device_ptr(stream).0,
        })
    }
}

#[cfg(not(feature = "cuda"))]
mod on_gpu {
    use overfill_nccl::GpuBytes;
    use overfill_types::WireFormat;

    use crate::cache::KvCache;
    use crate::error::ModelError;

    const NO_CUDA: &str = "this build has no models on GPUs: build it with `--features cuda`";

    pub(super) fn gather(_: &KvCache, _: WireFormat, _: usize, _: &[(usize, usize)], _: &mut GpuBytes) -> Result<(), ModelError> {
        Err(ModelError::Device(NO_CUDA.into()))
    }

    pub(super) fn put(_: &mut KvCache, _: WireFormat, _: usize, _: &[(usize, usize)], _: &mut GpuBytes) -> Result<(), ModelError> {
        Err(ModelError::Device(NO_CUDA.into()))
    }
}
