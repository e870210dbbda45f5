//! Bytes in a GPU's memory.
//!
//! **Order.** Whatever works on bytes does so on a stream, after all that worked on them before on others: each piece of memory has
//! one event, which is recorded after each use and waited for before the next, also before it is given back.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, PinnedHostSlice, result};

use crate::error::NcclError;

const DRIVER: &str = "libcuda.so.1";
/// Bytes of a piece of the host's memory at least: those of a frame, so that each serves any.
const LEAST_PINNED: usize = 1 << 20;
/// Pieces of it that are kept: as many as are copied at a time, and little of what the system can pin.
const MOST_PINNED: usize = 16;

/// One GPU. Clones share it.
#[derive(Clone)]
pub struct Gpu {
    context: Arc<CudaContext>,
    /// For memory and for copies to and from the host, beside what computes.
    copies: Arc<CudaStream>,
    /// Memory of the host that the GPU reads and writes by itself, kept from copy to copy.
    pinned: Arc<Mutex<Vec<PinnedHostSlice<u8>>>>,
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
        Ok(Self { context, copies, pinned: Arc::default() })
    }

    /// Room for so many bytes, which nobody has written.
    ///
    /// # Errors
    /// [`NcclError::Driver`] where the GPU has no memory left.
    pub fn room(&self, bytes: usize) -> Result<GpuBytes, NcclError> {
        // SAFETY: who reads them before they are written reads whatever lay there, which are bytes.
        let memory = unsafe { self.copies.alloc::<u8>(bytes) }.map_err(NcclError::driver("taking memory"))?;
        let used = self.copies.record_event(Some(CUevent_flags::CU_EVENT_DISABLE_TIMING)).map_err(NcclError::driver("taking memory"))?;
        Ok(GpuBytes { gpu: self.clone(), memory: Some(memory), used })
    }

    /// Bytes of the host, copied there.
    ///
    /// # Errors
    /// [`NcclError::Driver`] where the GPU has no memory left, or fails.
    pub fn copy_of(&self, parts: &[&[u8]]) -> Result<GpuBytes, NcclError> {
        let bytes = parts.iter().map(|part| part.len()).sum();
        let (mut room, mut host) = (self.room(bytes)?, self.host(bytes)?);
        let there = host.as_mut_slice().map_err(NcclError::driver("copying to a GPU"))?;
        let mut at = 0;
        for part in parts {
            there[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        room.on(&self.copies, |at| {
            // SAFETY: the room is as long, and the host's memory is neither written nor given back before the stream is through.
            unsafe { result::memcpy_htod_async(at, &there[..bytes], self.copies.cu_stream()) }
                .map_err(NcclError::driver("copying to a GPU"))?;
            self.copies.synchronize().map_err(NcclError::driver("copying to a GPU"))
        })?;
        self.keep(host);
        Ok(room)
    }

    /// Memory of the host for a copy of so many bytes at least.
    fn host(&self, bytes: usize) -> Result<PinnedHostSlice<u8>, NcclError> {
        let kept = {
            let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
            pinned.iter().position(|host| host.len() >= bytes).map(|i| pinned.swap_remove(i))
        };
        match kept {
            Some(host) => Ok(host),
            // SAFETY: only what a copy has written is read.
            None => unsafe { self.context.alloc_pinned_with_flags(bytes.max(LEAST_PINNED), 0) }
                .map_err(NcclError::driver("taking memory of the host")),
        }
    }

    fn keep(&self, host: PinnedHostSlice<u8>) {
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        if pinned.len() < MOST_PINNED {
            pinned.push(host);
        }
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
    gpu: Gpu,
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
        let (gpu, bytes) = (self.gpu.clone(), self.len());
        let mut host = gpu.host(bytes)?;
        let there = host.as_mut_slice().map_err(NcclError::driver("copying from a GPU"))?;
        self.on(&gpu.copies, |at| {
            // SAFETY: the host's memory is as long at least, and is neither read nor given back before the stream is through.
            unsafe { result::memcpy_dtoh_async(&mut there[..bytes], at, gpu.copies.cu_stream()) }
                .map_err(NcclError::driver("copying from a GPU"))?;
            gpu.copies.synchronize().map_err(NcclError::driver("copying from a GPU"))
        })?;
        let read = there[..bytes].to_vec();
        gpu.keep(host);
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
