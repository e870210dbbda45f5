//! The sum over devices of what each has computed.

use candle_core::{Device, Tensor};
#[cfg(feature = "cuda")]
use overfill_nccl::AllReduce;

use crate::error::ModelError;

/// Who adds.
pub(crate) enum Reduce {
    /// The first device; that of tests, where all are the CPU.
    First,
    /// NCCL, each GPU at the same time.
    #[cfg(feature = "cuda")]
    Nccl(AllReduce),
}

impl Reduce {
    pub(crate) fn over(devices: &[Device]) -> Result<Self, ModelError> {
        #[cfg(feature = "cuda")]
        if devices.len() > 1 {
            let numbers: Option<Vec<usize>> = devices
                .iter()
                .map(|device| match device {
                    Device::Cuda(gpu) => Some(gpu.cuda_stream().context().ordinal()),
                    _ => None,
                })
                .collect();
            if let Some(numbers) = numbers {
                return Ok(Self::Nccl(AllReduce::over(&numbers)?));
            }
        }
        let _ = devices;
        Ok(Self::First)
    }

    /// On each device the sum of all, which lie there one each.
    pub(crate) fn sums(&self, parts: Vec<Tensor>) -> Result<Vec<Tensor>, ModelError> {
        match self {
            Self::First => {
                let device = parts[0].device().clone();
                let mut sum = parts[0].clone();
                for part in &parts[1..] {
                    sum = (sum + part.to_device(&device)?)?;
                }
                parts.iter().map(|part| Ok(sum.to_device(part.device())?)).collect()
            }
            #[cfg(feature = "cuda")]
            Self::Nccl(all) => {
                on_gpus::sum(all, &parts)?;
                Ok(parts)
            }
        }
    }
}

#[cfg(feature = "cuda")]
mod on_gpus {
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    use candle_core::{Device, Storage, Tensor};
    use overfill_nccl::{AllReduce, Numbers};

    use crate::error::ModelError;

    /// Sums f32 numbers in place, which nobody else has: they are what a product has just made.
    pub(super) fn sum(all: &AllReduce, parts: &[Tensor]) -> Result<(), ModelError> {
        let numbers = parts.iter().map(|part| {
            let (storage, layout) = part.storage_and_layout();
            let (Storage::Cuda(storage), Device::Cuda(device)) = (&*storage, part.device()) else {
                return Err(ModelError::Mismatch("a part of a model on GPUs is on none".into()));
            };
            let stream = device.cuda_stream();
            let slice = storage.as_cuda_slice::<f32>()?.slice(layout.start_offset()..);
            let at = slice.device_ptr(&stream).0;
            Ok(Numbers { at, count: part.elem_count(), stream })
        });
        let numbers = numbers.collect::<Result<Vec<_>, ModelError>>()?;
        // SAFETY: each tensor is contiguous, has as many numbers as it says, and lives until the streams are through: memory of
        // candle's is given back in their order.
        Ok(unsafe { all.sum(&numbers) }?)
    }
}
