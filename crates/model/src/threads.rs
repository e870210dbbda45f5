//! The threads that one engine computes on.

/// A pool of compute threads. An engine runs its forward passes inside it, so that two engines in one process
/// do not share threads, and `--threads` means what it says.
pub struct Threads {
    pool: rayon::ThreadPool,
}

impl Threads {
    /// `count` threads, at least one.
    ///
    /// # Errors
    /// Where the system gives no more threads.
    pub fn new(count: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(count.max(1)).thread_name(|i| format!("compute-{i}")).build()?;
        Ok(Self { pool })
    }

    /// Runs `work` inside the pool; what it runs in parallel runs on the pool's threads.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }
}
