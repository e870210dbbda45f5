//! The sum of what the GPUs of one machine have, on each of them.

use std::ffi::c_int;
use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::error::NcclError;
use crate::library::{Comm, Library};

/// A communicator over the GPUs of this process. Dropping it ends it.
pub struct AllReduce {
    library: Library,
    comms: Vec<Comm>,
}

// SAFETY: any thread may use NCCL's communicators, one at a time: whoever computes owns this.
unsafe impl Send for AllReduce {}

/// Numbers in f32 in one GPU's memory.
pub struct Numbers {
    /// Their address.
    pub at: u64,
    /// How many there are.
    pub count: usize,
    /// What has computed them, and what reads the sum.
    pub stream: Arc<CudaStream>,
}

impl AllReduce {
    /// Over the GPUs of these numbers.
    ///
    /// # Errors
    /// [`NcclError::Missing`] where NCCL is not there, [`NcclError::Failed`] where it does not connect them.
    pub fn over(gpus: &[usize]) -> Result<Self, NcclError> {
        let library = Library::load()?;
        let gpus: Vec<c_int> = gpus.iter().map(|gpu| *gpu as c_int).collect();
        let comms = library.all(&gpus)?;
        Ok(Self { library, comms })
    }

    /// Puts their sum in the place of each; `parts` are one of each GPU, in the order in which these were named. It is there for what
    /// is put on their streams after.
    ///
    /// # Errors
    /// [`NcclError::Failed`], also where they are not as many as the GPUs, or not equally long.
    ///
    /// # Safety
    /// The numbers are there, and nobody else uses them, until the streams are through.
    pub unsafe fn sum(&self, parts: &[Numbers]) -> Result<(), NcclError> {
        let count = parts.first().map_or(0, |part| part.count);
        if parts.len() != self.comms.len() || parts.iter().any(|part| part.count != count) {
            return Err(NcclError::Failed { what: "adding", why: "parts of other lengths, or too few".into() });
        }
        let parts = parts.iter().map(|part| (part.at, part.stream.cu_stream().cast()));
        // SAFETY: as the caller promises.
        unsafe { self.library.sum(parts.zip(self.comms.iter().copied()), count) }
    }
}

impl Drop for AllReduce {
    fn drop(&mut self) {
        self.comms.iter().for_each(|comm| self.library.abort(*comm));
    }
}
