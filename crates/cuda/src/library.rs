//! The libraries themselves.

use std::sync::OnceLock;

/// One of CUDA's libraries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Library {
    Driver,
    Runtime,
    Blas,
    BlasLt,
    Random,
    Compiler,
}

/// cuBLAS needs its other half, which is found beside it or where it was loaded before.
pub(crate) const ALL: [Library; 6] =
    [Library::Driver, Library::Runtime, Library::BlasLt, Library::Blas, Library::Random, Library::Compiler];

/// A library of CUDA's cannot be loaded.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{file} cannot be loaded ({why}): {hint}")]
pub struct Missing {
    file: &'static str,
    why: String,
    hint: &'static str,
}

impl Library {
    /// Its file: of the version of CUDA that this was built with, where files have one.
    fn file(self) -> &'static str {
        match self {
            Library::Driver => "libcuda.so.1",
            Library::Runtime => concat!("libcudart.so.", env!("CUDA_MAJOR")),
            Library::Blas => concat!("libcublas.so.", env!("CUDA_MAJOR")),
            Library::BlasLt => concat!("libcublasLt.so.", env!("CUDA_MAJOR")),
            Library::Random => "libcurand.so.10",
            Library::Compiler => concat!("libnvrtc.so.", env!("CUDA_MAJOR")),
        }
    }

    fn hint(self) -> &'static str {
        match self {
            Library::Driver => {
                "it comes with NVIDIA's driver, which a machine with a GPU needs, and its container toolkit brings it into containers"
            }
            _ => concat!(
                "install CUDA's libraries of version ",
                env!("CUDA_MAJOR"),
                ", and name their folder in LD_LIBRARY_PATH where the system does not know it"
            ),
        }
    }

    /// Loaded once, for as long as the process lives.
    pub(crate) fn open(self) -> Result<&'static libloading::Library, Missing> {
        static OPENED: [OnceLock<Result<libloading::Library, Missing>>; ALL.len()] = [const { OnceLock::new() }; ALL.len()];
        let open = || {
            // SAFETY: loading them runs their initialisers, which do not depend on what runs here.
            let opened = unsafe { libloading::Library::new(self.file()) };
            opened.map_err(|error| Missing { file: self.file(), why: error.to_string(), hint: self.hint() })
        };
        OPENED[self as usize].get_or_init(open).as_ref().map_err(Clone::clone)
    }
}
