//! `--threads` of the commands that compute by themselves.

use clap::Args;

#[derive(Clone, Copy, Args)]
pub(crate) struct ThreadArgs {
    /// Compute threads [default: all cores]
    #[arg(long, env = "OVERFILL_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl ThreadArgs {
    /// How many, at least 1.
    pub(crate) fn count(self) -> usize {
        self.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from)
    }
}
