//! Flags that say what guides may cost.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use overfill_types::flags::{parse_bytes, parse_seconds};

/// What compiling a guide may cost, and where it happens.
#[derive(Args, Clone, Debug)]
pub struct GuideArgs {
    /// Seconds of one core that compiling a guide (a JSON schema, an expression, a grammar) may take; one that takes more is refused
    #[arg(long, env = "OVERFILL_GUIDE_SECONDS", default_value_t = 1.0, value_parser = parse_seconds)]
    pub guide_seconds: f64,
    /// Memory that compiling a guide may take; K, M and G are understood
    #[arg(long, env = "OVERFILL_GUIDE_MEMORY", default_value = "256M", value_parser = parse_bytes)]
    pub guide_memory: u64,
    /// The program that compiles guides apart: it has to call `worker::run_if_asked` first [default: this one]
    #[arg(long, env = "OVERFILL_GUIDE_COMPILER", hide = true)]
    pub guide_compiler: Option<PathBuf>,
}

impl Default for GuideArgs {
    fn default() -> Self {
        Self { guide_seconds: 1.0, guide_memory: 256 << 20, guide_compiler: None }
    }
}

impl GuideArgs {
    pub(crate) fn time(&self) -> Duration {
        Duration::from_secs_f64(self.guide_seconds)
    }

    pub(crate) fn program(&self) -> PathBuf {
        // Linux's name for it: this very program, even where its file was replaced by a newer one.
        self.guide_compiler.clone().unwrap_or_else(|| "/proc/self/exe".into())
    }
}
