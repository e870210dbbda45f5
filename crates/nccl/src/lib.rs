//! From GPU to GPU: bytes in a GPU's memory, communicators of NCCL that carry them to another node's, and sums over the GPUs of one
//! machine.
//!
//! Nothing is linked: the driver (`libcuda.so.1`) and NCCL (`libnccl.so.2`) are loaded when a node is told to use them, and what
//! is missing is said then. So one executable runs with and without them, and tests run all of this over stand-ins of both.

mod all_reduce;
mod communicator;
mod error;
mod gpu;
mod library;

pub use all_reduce::{AllReduce, Numbers};
pub use communicator::{Communicator, Rank};
pub use error::NcclError;
pub use gpu::{Gpu, GpuBytes};
pub use library::{Library, UniqueId};

/// What a node needs to hand over from GPU to GPU. Clones share it.
#[derive(Clone)]
pub struct Nccl {
    library: Library,
    gpu: Gpu,
}

impl Nccl {
    /// With the GPU of this number.
    ///
    /// # Errors
    /// [`NcclError::Missing`] where a library is not there, [`NcclError::Driver`] where there is no such GPU.
    pub fn open(gpu: usize) -> Result<Self, NcclError> {
        Ok(Self { library: Library::load()?, gpu: Gpu::open(gpu)? })
    }

    /// The GPU whose memory is sent and written.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// NCCL itself.
    pub fn library(&self) -> &Library {
        &self.library
    }
}
