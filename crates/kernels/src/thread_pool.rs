//! The compute threads of one engine.
//!
//! A forward pass is some hundred short parallel runs, so a run must cost well under a microsecond: the workers persist,
//! a run allocates nothing, and between two runs a worker spins. It spins briefly, then sleeps, and so does the caller
//! that waits for the last part: a spinning thread whose peer was put aside by another process would only keep that peer
//! from its core.
//!
//! Each thread owns a contiguous share of the parts, so it streams a contiguous piece of a matrix. A thread that is
//! through takes parts from the ends of others' shares, so one that was put aside holds up at most the part in its hands.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Turns of a spinning thread before it sleeps: some 50 µs, a few times the longest gap between two runs of a step.
const SPINS: u32 = 1500;
/// Most parts in one run; more are grouped.
const MOST_PARTS: usize = 1 << 15;

/// Where an engine's threads run, and how readily they give way.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    /// Cores that they keep to: thread `i`, counted from the caller, to `cpus[i % cpus.len()]`; any core if empty.
    pub cpus: Vec<usize>,
    /// Their nice value. With one above 0 other threads of the machine (a network thread that has a frame to pass on)
    /// need not wait for the end of a compute thread's time slice.
    pub nice: u8,
}

impl Placement {
    /// Places the calling thread, as the first of an engine's.
    pub fn apply_to_caller(&self) {
        self.apply(0);
    }

    fn apply(&self, thread: usize) {
        if !self.cpus.is_empty() {
            // A core that this process may not use is the same as none: the thread stays free.
            core_affinity::set_for_current(core_affinity::CoreId { id: self.cpus[thread % self.cpus.len()] });
        }
        #[cfg(target_os = "linux")]
        if self.nice > 0 {
            // Of the calling thread alone, on Linux. Giving way more is always allowed where the call is.
            let _ = rustix::process::setpriority_process(None, self.nice.into());
        }
    }
}

/// A fixed set of threads that run the parts of one job at a time. The caller is one of them.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// The number of the current run; locked while it lasts.
    run: Mutex<u32>,
}

/// Parts that one thread has yet to run: number of the run, first, end, in 32, 16 and 16 bits.
#[repr(align(128))]
struct Share(AtomicU64);

struct Shared {
    shares: Box<[Share]>,
    /// Number of the run that was published last.
    published: AtomicU32,
    job: UnsafeCell<Job>,
    /// Parts that are not finished.
    pending: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Workers that sleep, or are about to.
    sleepers: AtomicUsize,
    /// The caller sleeps, or is about to.
    caller_sleeps: AtomicBool,
    lock: Mutex<()>,
    work: Condvar,
    done: Condvar,
}

/// The function of the current run.
type Job = Option<*const (dyn Fn(usize) + Sync)>;

// SAFETY: `job` is written by the caller alone, before it publishes the shares of a run (release) and while none of the
// last run's parts is pending; it is read by a thread only after that thread has claimed a part of the run (acquire), which
// the caller waits for. What it points to is `Sync` and outlives the run.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl ThreadPool {
    /// `threads` threads, the caller's included; at least one.
    ///
    /// With `cpus`, worker `i` keeps to core `cpus[i % cpus.len()]`, counted from the caller.
    ///
    /// # Errors
    /// Where the system gives no more threads.
    pub fn new(threads: usize, cpus: &[usize]) -> std::io::Result<Self> {
        Self::placed(threads, &Placement { cpus: cpus.to_vec(), nice: 0 })
    }

    /// `threads` threads, placed; the caller places itself ([`Placement::apply_to_caller`]).
    ///
    /// # Errors
    /// Where the system gives no more threads.
    pub fn placed(threads: usize, placement: &Placement) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            shares: (0..threads).map(|_| Share(AtomicU64::new(0))).collect(),
            published: AtomicU32::new(0),
            job: UnsafeCell::new(None),
            pending: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            caller_sleeps: AtomicBool::new(false),
            lock: Mutex::new(()),
            work: Condvar::new(),
            done: Condvar::new(),
        });
        let mut pool = Self { shared, workers: Vec::new(), run: Mutex::new(0) };
        for me in 1..threads {
            let shared = pool.shared.clone();
            let placement = placement.clone();
            let worker = std::thread::Builder::new().name(format!("compute-{me}")).spawn(move || {
                placement.apply(me);
                shared.serve(me);
            })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.shared.shares.len()
    }

    /// Calls `part` once with each number below `parts`, on all threads, and returns when all are through.
    ///
    /// `part` must not use this pool itself.
    ///
    /// # Panics
    /// Where a part panics; the other parts are run all the same, and the pool can be used again.
    pub fn run(&self, parts: usize, part: impl Fn(usize) + Sync) {
        if parts <= 1 || self.workers.is_empty() {
            (0..parts).for_each(part);
        } else if parts > MOST_PARTS {
            let each = parts.div_ceil(MOST_PARTS);
            self.run_parts(parts.div_ceil(each), &|i| (i * each..((i + 1) * each).min(parts)).for_each(&part));
        } else {
            self.run_parts(parts, &part);
        }
    }

    fn run_parts(&self, parts: usize, part: &(dyn Fn(usize) + Sync)) {
        let mut run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        *run = run.wrapping_add(1);
        self.shared.start(*run, parts, part);
        self.shared.claim_all(0, *run);
        self.shared.wait_for_the_last();
        drop(run);
        assert!(!self.shared.panicked.swap(false, Ordering::Relaxed), "a part of a parallel run panicked");
    }

    /// Calls `row` once with each number below `rows`, on all threads where `cost` (about the nanoseconds that a row
    /// takes) makes that worth while.
    pub(crate) fn rows(&self, rows: usize, cost: usize, row: impl Fn(usize) + Sync) {
        /// Nanoseconds below which a part is not worth handing to another thread.
        const LEAST: usize = 2000;
        let each = (LEAST / cost.max(1)).max(1);
        let parts = rows.div_ceil(each).min(self.threads() * 4);
        if parts <= 1 {
            return (0..rows).for_each(row);
        }
        let each = rows.div_ceil(parts);
        self.run(rows.div_ceil(each), |i| (i * each..((i + 1) * each).min(rows)).for_each(&row));
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.lock());
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches panics, so it ends well.
            let _ = worker.join();
        }
    }
}

fn pack(run: u32, first: usize, end: usize) -> u64 {
    u64::from(run) << 32 | (first as u64) << 16 | end as u64
}

impl Shared {
    fn start(&self, run: u32, parts: usize, part: &(dyn Fn(usize) + Sync)) {
        // SAFETY: the lifetime is cut off; the caller waits for all parts before `part` ends.
        let part: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &(dyn Fn(usize) + Sync)>(part) };
        // SAFETY: no part of the last run is pending, so no thread reads it.
        unsafe { *self.job.get() = Some(part) };
        self.pending.store(parts, Ordering::Relaxed);
        let threads = self.shares.len();
        for (i, share) in self.shares.iter().enumerate() {
            share.0.store(pack(run, i * parts / threads, (i + 1) * parts / threads), Ordering::Release);
        }
        self.published.store(run, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // A worker that counted itself holds the lock until it sleeps.
            drop(self.lock());
            self.work.notify_all();
        }
    }

    /// A worker's life.
    fn serve(&self, me: usize) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            while self.published.load(Ordering::Acquire) == seen {
                if self.stop.load(Ordering::Relaxed) {
                    return;
                }
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                    continue;
                }
                let mut lock = self.lock();
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                while self.published.load(Ordering::SeqCst) == seen && !self.stop.load(Ordering::SeqCst) {
                    lock = self.work.wait(lock).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
            seen = self.published.load(Ordering::Acquire);
            self.claim_all(me, seen);
        }
    }

    /// Runs parts until none is left: first one's own from the front, then others' from the end.
    fn claim_all(&self, me: usize, run: u32) {
        let threads = self.shares.len();
        let mut through = 0;
        for i in 0..threads {
            let share = &self.shares[(me + i) % threads].0;
            while let Some(part) = claim(share, run, i == 0) {
                // SAFETY: the part is claimed and pending, so the function that `start` published is alive.
                let job = unsafe { (*self.job.get()).map(|job| &*job) };
                if let Some(job) = job
                    && catch_unwind(AssertUnwindSafe(|| job(part))).is_err()
                {
                    self.panicked.store(true, Ordering::Relaxed);
                }
                through += 1;
            }
        }
        // Once for all of them: the counter's cache line goes from core to core.
        if through > 0 && self.pending.fetch_sub(through, Ordering::SeqCst) == through && self.caller_sleeps.load(Ordering::SeqCst) {
            drop(self.lock());
            self.done.notify_all();
        }
    }

    fn wait_for_the_last(&self) {
        for _ in 0..SPINS {
            if self.pending.load(Ordering::Acquire) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        let mut lock = self.lock();
        self.caller_sleeps.store(true, Ordering::SeqCst);
        while self.pending.load(Ordering::SeqCst) > 0 {
            lock = self.done.wait(lock).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(false, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a part of this run from one share, if one is left.
fn claim(share: &AtomicU64, run: u32, front: bool) -> Option<usize> {
    let mut now = share.load(Ordering::Acquire);
    loop {
        let (of, first, end) = ((now >> 32) as u32, (now >> 16 & 0xffff) as usize, (now & 0xffff) as usize);
        if of != run || first == end {
            return None;
        }
        let (part, next) = if front { (first, pack(run, first + 1, end)) } else { (end - 1, pack(run, first, end - 1)) };
        match share.compare_exchange_weak(now, next, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Some(part),
            Err(other) => now = other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_runs_once_in_run_after_run() {
        for threads in [1, 2, 3, 5] {
            let pool = ThreadPool::new(threads, &[]).unwrap();
            for round in 0..300 {
                let parts = [0, 1, 2, 7, 64, 1000][round % 6];
                let counts: Vec<AtomicU32> = (0..parts).map(|_| AtomicU32::new(0)).collect();
                pool.run(parts, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {parts} parts");
                if round % 50 == 0 {
                    // Long enough for the workers to fall asleep.
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
            }
        }
    }

    #[test]
    fn more_parts_than_fit_are_grouped() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        let sum = AtomicU64::new(0);
        pool.run(100_001, |i| {
            sum.fetch_add(i as u64, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 100_000 * 100_001 / 2);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(3, &[]).unwrap();
        let broken = catch_unwind(AssertUnwindSafe(|| pool.run(10, |i| assert!(i != 7, "seven"))));
        assert!(broken.is_err());
        let count = AtomicU32::new(0);
        pool.run(10, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 10);
    }

    #[test]
    fn callers_take_turns() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        let count = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, |_| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 3000);
    }
}
