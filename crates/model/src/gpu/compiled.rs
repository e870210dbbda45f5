//! Kernels of ours (`kernels/`), compiled by NVRTC when a GPU first needs them.

use std::sync::OnceLock;

use candle_core::cuda_backend::cudarc::driver::CudaFunction;
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::{CudaDevice, DType, Result, bail};

/// What their words mean on a GPU.
const DIALECT: &str = include_str!("kernels/dialect.cu");
/// The oldest GPUs that the compiled kernels run on; newer ones compile them on.
const ARCHITECTURE: &str = "compute_80";

/// Kernels that are compiled together.
pub(crate) struct Program {
    name: &'static str,
    source: &'static str,
    defines: &'static [&'static str],
    compiled: OnceLock<std::result::Result<String, String>>,
}

impl Program {
    /// `name` is another one for each program.
    pub(crate) const fn new(name: &'static str, source: &'static str, defines: &'static [&'static str]) -> Self {
        Self { name, source, defines, compiled: OnceLock::new() }
    }

    /// One of its kernels.
    ///
    /// # Errors
    /// Where it does not compile, or the device does not take it.
    pub(crate) fn kernel(&self, device: &CudaDevice, name: &str) -> Result<CudaFunction> {
        let compile = || {
            let options = self.defines.iter().map(|define| format!("-D{define}")).collect();
            let options = CompileOptions { options, arch: Some(ARCHITECTURE), ..CompileOptions::default() };
            let compiled = compile_ptx_with_opts(format!("{DIALECT}{}", self.source), options);
            compiled.map(|ptx| ptx.to_src()).map_err(|error| format!("the kernels of {} cannot be compiled: {error:?}", self.name))
        };
        match self.compiled.get_or_init(compile) {
            Ok(ptx) => Ok(device.get_or_load_custom_func(name, self.name, ptx)?.into_cuda_function()),
            Err(why) => bail!("{why}"),
        }
    }
}

/// Kernels over the KV cache, for each format that it may have.
pub(crate) struct OverCache {
    f16: Program,
    f32: Program,
}

impl OverCache {
    /// `source` comes after `kernels/stored.cu`. The names are those of no other program.
    pub(crate) const fn new([f16, f32]: [&'static str; 2], source: &'static str) -> Self {
        Self { f16: Program::new(f16, source, &["CACHE_F16"]), f32: Program::new(f32, source, &["CACHE_F32"]) }
    }

    /// One of them, for a cache of this format.
    ///
    /// # Errors
    /// As [`Program::kernel`], and where it is no format of a cache.
    pub(crate) fn kernel(&self, device: &CudaDevice, name: &str, cache: DType) -> Result<CudaFunction> {
        match cache {
            DType::F16 => self.f16.kernel(device, name),
            DType::F32 => self.f32.kernel(device, name),
            other => bail!("a KV cache of {other:?} is not known to our kernels"),
        }
    }
}
