//! Memory that engines which share cores have in common: whose turn it is, who waits, and what each has used.
//!
//! It is this process's, or a file that processes of one machine map. Each word is an atomic of its own, and whatever stands in
//! them, no engine waits for ever: a process that dies with the turn in its hand holds up the others for a moment.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use memmap2::MmapMut;

/// Bytes of a board: a page, which nothing else is in.
const BYTES: usize = 4096;

/// The memory. Clones share it.
#[derive(Clone)]
pub struct Board(Arc<MmapMut>);

#[repr(C)]
pub(super) struct Words {
    /// Whose turn it is; 0 where nobody computes.
    pub(super) turn: AtomicU32,
    pub(super) kinds: [KindWords; 2],
}

/// What is known of the engines of one kind. Times are nanoseconds of the machine's clock, 0 where there was none.
#[repr(C)]
pub(super) struct KindWords {
    /// When one last said that it waits for its turn.
    pub(super) waits: AtomicU64,
    /// Nanoseconds of computing, over the kind's weight.
    pub(super) used: AtomicU64,
    /// Mean nanoseconds of a slice: of a decode step, or of a chunk's pass through a layer.
    pub(super) slice: AtomicU64,
    /// The same for each token.
    pub(super) token: AtomicU64,
    /// When one last gave its turn back.
    pub(super) ended: AtomicU64,
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Board")
    }
}

impl Board {
    /// For engines of this process.
    ///
    /// # Errors
    /// Where the system gives no page.
    pub fn of_this_process() -> io::Result<Self> {
        Ok(Self(Arc::new(MmapMut::map_anon(BYTES)?)))
    }

    /// The file at `path`, which all processes that share cores name; it is made where there is none.
    ///
    /// # Errors
    /// Where it cannot be had, or is another kind of file.
    pub fn at(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.metadata()?.len() {
            0 => file.set_len(BYTES as u64)?,
            length if length == BYTES as u64 => {}
            length => {
                let message = format!("it has {length} bytes, not {BYTES}: name a file that only nodes that share cores use");
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
        }
        // SAFETY: what others write to the file is read as atomic words alone, of which any bits are valid.
        Ok(Self(Arc::new(unsafe { MmapMut::map_mut(&file)? })))
    }

    pub(super) fn words(&self) -> &Words {
        const { assert!(size_of::<Words>() <= BYTES) };
        // SAFETY: the page is mapped as long as `self` is, begins where a page does, and consists of atomics.
        unsafe { &*self.0.as_ptr().cast::<Words>() }
    }

    /// Waits until the turn is not `turn`'s any more, `limit` at most; it may return before.
    pub(super) fn wait(&self, turn: u32, limit: Duration) {
        #[cfg(target_os = "linux")]
        {
            use rustix::thread::futex;
            let limit = futex::Timespec { tv_sec: limit.as_secs() as _, tv_nsec: limit.subsec_nanos().into() };
            // Whatever ended it, the caller looks again.
            let _ = futex::wait(&self.words().turn, futex::Flags::empty(), turn, Some(&limit));
        }
        #[cfg(not(target_os = "linux"))]
        if self.words().turn.load(Ordering::Acquire) == turn {
            std::thread::sleep(limit.min(Duration::from_micros(100)));
        }
    }

    /// The turn is nobody's, if it is still `turn`'s.
    pub(super) fn free(&self, turn: u32) {
        let word = &self.words().turn;
        if word.compare_exchange(turn, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            #[cfg(target_os = "linux")]
            let _ = rustix::thread::futex::wake(word, rustix::thread::futex::Flags::empty(), u32::MAX >> 1);
        }
    }
}
