//! NCCL, loaded when it is asked for.
//!
//! The declarations are those of `nccl.h`, of 2.17 and later: a later library takes the configuration of an earlier one, whose size
//! and version it is told. cudarc has bindings too, but of one version, and ends the process where the library is missing.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use crate::error::NcclError;

const NAME: &str = "libnccl.so.2";
/// From 2.17 on communicators are configured as below, and may be made without blocking.
const OLDEST: c_int = 21_700;
/// `NCCL_CONFIG_UNDEF_INT`: the library chooses.
const LIBRARY_CHOOSES: c_int = c_int::MIN;
/// `ncclUint8`
const BYTES: c_int = 1;
/// `ncclFloat32`
const FLOATS: c_int = 7;
/// `ncclSum`
const SUM: c_int = 0;

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

/// What both ends of a communicator have to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId([u8; 128]);

impl UniqueId {
    /// Its bytes, to be told to the other end.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As it was told; `None` where that is none.
    pub fn told(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// `ncclConfig_t` of 2.17.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

pub(crate) type Comm = *mut c_void;
/// `CUstream`
pub(crate) type Stream = *mut c_void;

struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank_config: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    comm_init_all: unsafe extern "C" fn(*mut Comm, c_int, *const c_int) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    version: c_int,
    /// The functions are its.
    _library: libloading::Library,
}

/// NCCL. Clones share it.
#[derive(Clone)]
pub struct Library(Arc<Functions>);

/// What a call has come to.
pub(crate) enum Progress {
    Done,
    UnderWay,
}

impl Library {
    /// Loads it.
    ///
    /// # Errors
    /// [`NcclError::Missing`] where it is not there, or older than 2.17.
    pub fn load() -> Result<Self, NcclError> {
        let missing =
            |why: String| NcclError::Missing { library: NAME, why, hint: "install NCCL 2.17 or later (`libnccl2`), or leave out --nccl" };
        // SAFETY: loading NCCL runs its initialisers, which do not depend on what runs here.
        let library = unsafe { libloading::Library::new(NAME) }.map_err(|error| missing(error.to_string()))?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field that this is for has the type that `nccl.h` declares.
                *unsafe { library.get($name) }.map_err(|error| missing(error.to_string()))?
            };
        }
        let get_version: unsafe extern "C" fn(*mut c_int) -> c_int = function!(b"ncclGetVersion");
        let mut version = 0;
        // SAFETY: it writes one number.
        unsafe { get_version(&mut version) };
        if version < OLDEST {
            return Err(missing(format!("it is of version {version}")));
        }
        let functions = Functions {
            get_unique_id: function!(b"ncclGetUniqueId"),
            comm_init_rank_config: function!(b"ncclCommInitRankConfig"),
            comm_get_async_error: function!(b"ncclCommGetAsyncError"),
            comm_abort: function!(b"ncclCommAbort"),
            send: function!(b"ncclSend"),
            recv: function!(b"ncclRecv"),
            comm_init_all: function!(b"ncclCommInitAll"),
            group_start: function!(b"ncclGroupStart"),
            group_end: function!(b"ncclGroupEnd"),
            all_reduce: function!(b"ncclAllReduce"),
            get_error_string: function!(b"ncclGetErrorString"),
            version,
            _library: library,
        };
        Ok(Self(Arc::new(functions)))
    }

    /// Its version, as `ncclGetVersion` tells it: 22809 is 2.28.9.
    pub fn version(&self) -> i32 {
        self.0.version
    }

    /// Of a communicator that is to be made.
    ///
    /// # Errors
    /// [`NcclError::Failed`] where this machine has no network for it.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: it writes 128 bytes.
        let result = unsafe { (self.0.get_unique_id)(&mut id) };
        self.progress("making an identifier", result).map(|_| id)
    }

    /// Begins to make one of two ends; whether it is made tells [`Self::state`].
    pub(crate) fn begin(&self, id: UniqueId, rank: c_int) -> Result<Comm, NcclError> {
        let mut config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: OLDEST as c_uint,
            blocking: 0,
            cga_cluster_size: LIBRARY_CHOOSES,
            min_ctas: LIBRARY_CHOOSES,
            max_ctas: LIBRARY_CHOOSES,
            net_name: std::ptr::null(),
            split_share: LIBRARY_CHOOSES,
        };
        let mut comm = std::ptr::null_mut();
        // SAFETY: both are alive for the call, and the configuration is of the version that it says.
        let result = unsafe { (self.0.comm_init_rank_config)(&mut comm, 2, id, rank, &mut config) };
        self.progress("making a communicator", result).map(|_| comm)
    }

    /// Whether all that was asked of a communicator has been begun.
    pub(crate) fn state(&self, comm: Comm, what: &'static str) -> Result<Progress, NcclError> {
        let mut state = SUCCESS;
        // SAFETY: the communicator was made by `begin` and not ended.
        let result = unsafe { (self.0.comm_get_async_error)(comm, &mut state) };
        self.progress(what, result).and_then(|_| self.progress(what, state))
    }

    /// Sends bytes of a GPU's memory to the other end, on a stream.
    ///
    /// # Safety
    /// They stay where they are until the stream is through with it, or the communicator ends.
    pub(crate) unsafe fn send(&self, from: u64, bytes: usize, peer: c_int, comm: Comm, stream: Stream) -> Result<Progress, NcclError> {
        // SAFETY: as the caller promises.
        let result = unsafe { (self.0.send)(from as *const c_void, bytes, BYTES, peer, comm, stream) };
        self.progress("sending", result)
    }

    /// Receives what the other end sends.
    ///
    /// # Safety
    /// As [`Self::send`].
    pub(crate) unsafe fn receive(&self, to: u64, bytes: usize, peer: c_int, comm: Comm, stream: Stream) -> Result<Progress, NcclError> {
        // SAFETY: as the caller promises.
        let result = unsafe { (self.0.recv)(to as *mut c_void, bytes, BYTES, peer, comm, stream) };
        self.progress("receiving", result)
    }

    /// One communicator of each of these GPUs, all in this process.
    pub(crate) fn all(&self, gpus: &[c_int]) -> Result<Vec<Comm>, NcclError> {
        let mut comms = vec![std::ptr::null_mut(); gpus.len()];
        // SAFETY: both are as long as it is told.
        let result = unsafe { (self.0.comm_init_all)(comms.as_mut_ptr(), gpus.len() as c_int, gpus.as_ptr()) };
        self.progress("connecting the GPUs of this machine", result).map(|_| comms)
    }

    /// Puts the sum of f32 numbers, which lie at an address on each GPU, in their place, on a stream of each.
    ///
    /// # Safety
    /// As [`Self::send`], of each.
    pub(crate) unsafe fn sum(&self, parts: impl Iterator<Item = ((u64, Stream), Comm)>, count: usize) -> Result<(), NcclError> {
        // SAFETY: a group has no arguments; the rest is as the caller promises.
        unsafe {
            self.progress("adding", (self.0.group_start)())?;
            let mut asked = parts.map(|((at, stream), comm)| {
                let result = (self.0.all_reduce)(at as *const c_void, at as *mut c_void, count, FLOATS, SUM, comm, stream);
                self.progress("adding", result).map(|_| ())
            });
            let asked = asked.try_for_each(|asked| asked);
            // A group that was begun has to be ended.
            self.progress("adding", (self.0.group_end)()).map(|_| ()).and(asked)
        }
    }

    /// Ends a communicator, and what is under way on it.
    pub(crate) fn abort(&self, comm: Comm) {
        // SAFETY: it was made by `begin`, and its owner forgets it now.
        let result = unsafe { (self.0.comm_abort)(comm) };
        if let Err(error) = self.progress("ending a communicator", result) {
            tracing::warn!(%error, "a communicator may have left something behind");
        }
    }

    fn progress(&self, what: &'static str, result: c_int) -> Result<Progress, NcclError> {
        match result {
            SUCCESS => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::UnderWay),
            _ => {
                // SAFETY: it gives a text that is always there.
                let why = unsafe { CStr::from_ptr((self.0.get_error_string)(result)) };
                Err(NcclError::Failed { what, why: why.to_string_lossy().into_owned() })
            }
        }
    }
}
