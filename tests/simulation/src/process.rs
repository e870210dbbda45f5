//! A process for each seed: forked from one that has opened what all seeds share.
//!
//! So a seed finds every counter of the process as any other finds it, whichever seeds ran before, and one that hangs or aborts
//! is one that fails.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::panic;
use std::sync::{Mutex, PoisonError};

use crate::entropy;

/// Seconds of real time that a seed may take; one takes some milliseconds.
const LIMIT: u32 = 60;
/// Bytes of what a seed says at most: they fit in a pipe that nobody reads yet.
const SAID: usize = 16 << 10;

/// Panics since the process began to simulate, wherever they were caught.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A seed that was run.
#[derive(Debug)]
pub struct Ran {
    /// Which.
    pub seed: u64,
    /// What `simulate` gave, or how it failed.
    pub result: Result<String, String>,
}

/// Runs `simulate` for each seed in a process of its own, `at_once` at a time. Gives all, in the order in which they ended.
///
/// Must be called where no other thread of this process holds a lock that `simulate` takes.
pub fn each(seeds: impl IntoIterator<Item = u64>, at_once: usize, simulate: impl Fn(u64) -> Result<String, String> + Sync) -> Vec<Ran> {
    let (mut running, mut ran): (HashMap<libc::pid_t, (u64, File)>, _) = (HashMap::new(), Vec::new());
    let mut seeds = seeds.into_iter();
    loop {
        while running.len() < at_once
            && let Some(seed) = seeds.next()
        {
            let (process, said) = begin(seed, &simulate);
            running.insert(process, (seed, said));
        }
        if running.is_empty() {
            return ran;
        }
        let mut status = 0;
        // SAFETY: `status` is a number of this function's.
        let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        let Some((seed, mut said)) = running.remove(&ended) else { continue };
        let mut told = Vec::new();
        said.read_to_end(&mut told).expect("a pipe can be read");
        let told = String::from_utf8_lossy(&told).into_owned();
        let result = match status {
            0 => Ok(told),
            _ if libc::WIFSIGNALED(status) => Err(format!("ended by signal {} {told}", libc::WTERMSIG(status))),
            _ => Err(told),
        };
        ran.push(Ran { seed, result });
    }
}

/// Begins a seed's process; gives it, and what it will say.
fn begin(seed: u64, simulate: &(impl Fn(u64) -> Result<String, String> + Sync)) -> (libc::pid_t, File) {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0, "the system gives a pipe");
    // SAFETY: both are descriptors that were just opened, and nobody else has them.
    let (said, mut says) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
    // SAFETY: the new process goes on with this thread alone, which is why callers see to it that no other holds a lock.
    match unsafe { libc::fork() } {
        -1 => panic!("the system gives no process: {}", std::io::Error::last_os_error()),
        0 => {
            let ended = inside(seed, simulate);
            let (Ok(told) | Err(told)) = &ended;
            let _ = says.write_all(&told.as_bytes()[..told.len().min(SAID)]);
            // SAFETY: ends the process at once: what its parent has registered for its own end is not for this one to do.
            unsafe { libc::_exit(i32::from(ended.is_err())) }
        }
        process => (process, said),
    }
}

fn inside(seed: u64, simulate: &(impl Fn(u64) -> Result<String, String> + Sync)) -> Result<String, String> {
    // SAFETY: no pointers; the signal ends this process.
    unsafe { libc::alarm(LIMIT) };
    entropy::follow(seed);
    panic::set_hook(Box::new(|told| {
        PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(told.to_string());
    }));
    // A new thread, whose generators and keys are seeded now.
    let ended = std::thread::scope(|scope| scope.spawn(|| simulate(seed)).join()).unwrap_or_else(|_| Err(String::new()));
    let panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner).join("\n");
    match ended {
        Ok(told) if panics.is_empty() => Ok(told),
        Ok(_) => Err(format!("something panicked:\n{panics}")),
        Err(why) if panics.is_empty() => Err(why),
        Err(why) => Err(format!("{why}\nsomething panicked:\n{panics}")),
    }
}
