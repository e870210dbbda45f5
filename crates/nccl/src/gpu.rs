//! Bytes in a GPU's memory.
//!
//! **Order.** Whatever works on bytes does so on a stream, after all that worked on them before on others: each piece of memory has
//! one event, which is recorded after each use and waited for before the next, also before it is given back.

use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, result};

use crate::error::NcclError;

const DRIVER: &str = "libcuda.so.1";

/// One GPU. Clones share it.
#[derive(Clone)]
pub struct Gpu {
    context: Arc<CudaContext>,
    /// For memory and for copies to and from the host.
    copies: Arc<CudaStream>,
}

impl Gpu {
    /// The GPU of this number.
    ///
    /// # Errors
    /// [`NcclError::Missing`] where this machine has no driver, [`NcclError::Driver`] where it has no such GPU.
    pub fn open(number: usize) -> Result<Self, NcclError> {
        // SAFETY: loading the driver runs its initialisers, which do not depend on what runs here. It stays loaded: the bindings,
        // which would end the process where it is missing, load it again.
        let driver = unsafe { libloading::Library::new(DRIVER) }.map_err(|error| NcclError::Missing {
            library: DRIVER,
            why: error.to_string(),
            hint: "install the GPU's driver, or leave out --nccl",
        })?;
        std::mem::forget(driver);
        let context = CudaContext::new(number).map_err(NcclError::driver("opening a GPU"))?;
        // SAFETY: each piece of memory has an event of its own here.
        unsafe { context.disable_event_tracking() };
        let copies = context.new_stream().map_err(NcclError::driver("making a stream"))?;
        Ok(Self { context, copies })
    }

    /// Room for so many bytes, which nobody has written.
    ///
    /// # Errors
    /// [`NcclError::Driver`] where the GPU has no memory left.
    pub fn room(&self, bytes: usize) -> Result<GpuBytes, NcclError> {
        // SAFETY: who reads them before they are written reads whatever lay there, which are bytes.
        let memory = unsafe { self.copies.alloc::<u8>(bytes) }.map_err(NcclError::driver("taking memory"))?;
        let used = self.copies.record_event(Some(CUevent_flags::CU_EVENT_DISABLE_TIMING)).map_err(NcclError::driver("taking memory"))?;
        Ok(GpuBytes { memory: Some(memory), used })
    }

    /// Bytes of the host, copied there.
    ///
    /// # Errors
    /// [`NcclError::Driver`] where the GPU has no memory left, or fails.
    pub fn copy_of(&self, parts: &[&[u8]]) -> Result<GpuBytes, NcclError> {
        let mut room = self.room(parts.iter().map(|part| part.len()).sum())?;
        room.on(&self.copies, |at| {
            let mut to = at;
            for part in parts {
                // SAFETY: the room is as long as all parts, and they are read before this returns.
                unsafe { result::memcpy_htod_async(to, part, self.copies.cu_stream()) }.map_err(NcclError::driver("copying to a GPU"))?;
                to += part.len() as u64;
            }
            self.copies.synchronize().map_err(NcclError::driver("copying to a GPU"))
        })?;
        Ok(room)
    }

    /// A stream of its own.
    pub(crate) fn stream(&self) -> Result<Arc<CudaStream>, NcclError> {
        self.context.new_stream().map_err(NcclError::driver("making a stream"))
    }

    /// Makes the calling thread one that may use it.
    pub(crate) fn bind(&self) -> Result<(), NcclError> {
        self.context.bind_to_thread().map_err(NcclError::driver("binding a thread"))
    }
}

/// Bytes in a GPU's memory, which they leave when this is dropped.
pub struct GpuBytes {
    /// `None` once it is given back.
    memory: Option<CudaSlice<u8>>,
    /// Recorded after what was last asked of them.
    used: CudaEvent,
}

impl GpuBytes {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.memory.as_ref().map_or(0, CudaSlice::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Has `work`, which is told their address, put on `stream` something that reads or writes them.
    ///
    /// # Errors
    /// Those of `work`, and [`NcclError::Driver`].
    pub fn on<T, E: From<NcclError>>(&mut self, stream: &CudaStream, work: impl FnOnce(u64) -> Result<T, E>) -> Result<T, E> {
        let Some(memory) = &self.memory else { return Err(NcclError::Ended.into()) };
        stream.wait(&self.used).map_err(NcclError::driver("waiting for a stream"))?;
        let done = {
            let (at, _) = address(memory, stream);
            work(at)
        };
        // Also where it failed: a part of it may be under way.
        self.used.record(stream).map_err(NcclError::driver("marking a stream"))?;
        done
    }

    /// The bytes as they are once all that was asked of them is done.
    ///
    /// # Errors
    /// [`NcclError::Driver`] where the GPU fails.
    pub fn read(&mut self) -> Result<Vec<u8>, NcclError> {
        let Some(stream) = self.memory.as_ref().map(|memory| memory.stream().clone()) else { return Err(NcclError::Ended) };
        let mut read = vec![0; self.len()];
        self.on(&stream, |at| {
            // SAFETY: both are as long, and alive until the stream is through.
            unsafe { result::memcpy_dtoh_async(&mut read, at, stream.cu_stream()) }.map_err(NcclError::driver("copying from a GPU"))?;
            stream.synchronize().map_err(NcclError::driver("copying from a GPU"))
        })?;
        Ok(read)
    }

    /// Whether all that was asked of them is done.
    pub(crate) fn idle(&self) -> Result<bool, NcclError> {
        self.used.try_is_complete().map_err(NcclError::driver("asking for an event"))
    }
}

/// Where memory lies.
fn address(memory: &CudaSlice<u8>, stream: &CudaStream) -> (u64, ()) {
    use cudarc::driver::DevicePtr;
    let (at, _nothing_is_tracked) = memory.device_ptr(stream);
    (at, ())
}

impl Drop for GpuBytes {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        // It is given back in the order of the stream that it was taken on.
        if let Err(error) = memory.stream().wait(&self.used) {
            tracing::warn!(?error, "memory of a GPU is given back while it may be in use");
        }
        drop(memory);
    }
}
