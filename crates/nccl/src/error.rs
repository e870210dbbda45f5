//! What may go wrong between two GPUs.

use std::time::Duration;

use cudarc::driver::DriverError;

/// Why bytes do not get from GPU to GPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// A library that is loaded at run time is not there, or is too old.
    #[error("{library} cannot be used: {why}; {hint}")]
    Missing {
        /// The library's file.
        library: &'static str,
        /// What the loader says.
        why: String,
        /// What to do.
        hint: &'static str,
    },
    /// The driver refused something.
    #[error("the GPU's driver failed at {what}: {why}")]
    Driver {
        /// What was asked of it.
        what: &'static str,
        /// Its word for it.
        why: String,
    },
    /// NCCL failed, here or at the other end.
    #[error("NCCL failed at {what}: {why}")]
    Failed {
        /// What was asked of it.
        what: &'static str,
        /// Its word for it.
        why: String,
    },
    /// The other end does not do its part.
    #[error("NCCL was not through with {what} after {} s: the other node hangs or is gone", waited.as_secs_f32())]
    Late {
        /// What was asked of it.
        what: &'static str,
        /// How long it was waited for.
        waited: Duration,
    },
    /// It was given up, or failed before.
    #[error("the communicator has ended")]
    Ended,
}

impl NcclError {
    /// Names what the driver was asked.
    pub(crate) fn driver(what: &'static str) -> impl FnOnce(DriverError) -> Self {
        move |error| Self::Driver { what, why: format!("{error:?}") }
    }
}
