//! The next token, chosen where the logits lie: only its id leaves a GPU.
//!
//! That is for samplers whose choice depends on logits, temperature and filters alone ([`Plain`]); of the others the logits are read.
//! The token is the one that [`Sampler`](crate::Sampler) would choose, but for the last bits of a GPU's exponentials: a draw that falls
//! between two tokens may fall to the other one.

use candle_core::Tensor;

use crate::error::ModelError;
use crate::sample::Plain;

/// Threads of a block: the kernel's `CHOOSERS`.
#[cfg(any(feature = "cuda", test))]
pub(crate) const THREADS: usize = 512;
/// Bytes of shared memory that a block needs.
#[cfg(any(feature = "cuda", test))]
pub(crate) const SHARED: usize = 12 * THREADS + 8 * (256 + 2);

/// How the token of a row of logits is chosen: `draw` in `kernels/choose.cu`.
#[cfg(any(feature = "cuda", test))]
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Draw {
    row: i32,
    temperature: f32,
    top_p: f32,
    min_p: f32,
    top_k: i32,
    unused: i32,
    drawn: f64,
}

#[cfg(any(feature = "cuda", test))]
impl Draw {
    pub(crate) fn of(row: usize, plain: Plain) -> Self {
        let Plain { temperature, top_p, min_p, top_k, drawn } = plain;
        Self { row: row as i32, temperature, top_p, min_p, top_k: i32::try_from(top_k).unwrap_or(i32::MAX), unused: 0, drawn }
    }
}

/// The tokens of these rows of `logits`, `[rows, vocab]`; `None` where they lie on no GPU.
///
/// # Errors
/// Where the GPU fails.
pub(crate) fn choose(logits: &Tensor, plain: &[(usize, Plain)]) -> Result<Option<Vec<u32>>, ModelError> {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = logits.device() {
        let draws: Vec<Draw> = plain.iter().map(|&(row, plain)| Draw::of(row, plain)).collect();
        return Ok(Some(on_gpu::choose(logits, &draws, device)?));
    }
    let _ = (logits, plain);
    Ok(None)
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
    use candle_core::{CudaDevice, Result, Storage, Tensor, bail};

    use crate::gpu::choice::{Draw, SHARED, THREADS};
    use crate::gpu::compiled::Program;

    static PROGRAM: Program = Program::new("choose", include_str!("kernels/choose.cu"), &[]);

    // SAFETY: plain numbers, laid out as C does.
    unsafe impl DeviceRepr for Draw {}

    pub(super) fn choose(logits: &Tensor, draws: &[Draw], device: &CudaDevice) -> Result<Vec<u32>> {
        let (rows, vocabulary) = logits.dims2()?;
        if draws.iter().any(|draw| draw.row as usize >= rows) {
            bail!("a token is to be chosen of a row that is not there");
        }
        let (storage, layout) = logits.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("logits lie elsewhere than they say") };
        let logits = storage.as_cuda_slice::<f32>()?.slice(layout.start_offset()..);
        let (told, mut chosen) = (device.clone_htod(draws)?, device.alloc_zeros::<i32>(draws.len())?);
        let kernel = PROGRAM.kernel(device, "choose")?;
        let (stream, vocabulary) = (device.cuda_stream(), vocabulary as i32);
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&logits).arg(&vocabulary).arg(&told).arg(&mut chosen);
        let blocks =
            LaunchConfig { grid_dim: (draws.len() as u32, 1, 1), block_dim: (THREADS as u32, 1, 1), shared_mem_bytes: SHARED as u32 };
        // SAFETY: each block reads one row, whose number was checked, and writes one number of as many as there are blocks.
        unsafe { launch.launch(blocks) }.w()?;
        Ok(device.clone_dtoh(&chosen)?.into_iter().map(|token| token as u32).collect())
    }
}
