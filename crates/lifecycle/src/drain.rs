//! One signal for "finish what runs and take nothing new".

use tokio_util::sync::CancellationToken;

/// Tells every part of a process that it is to drain. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    token: CancellationToken,
}

impl Drain {
    /// One that was not given yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that SIGTERM or Ctrl-C gives; a second of them ends the process at once. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Where the signal handlers cannot be installed.
    pub fn on_signal() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let drain = Self::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let given = drain.clone();
        // Ends with the process: it owns nothing.
        tokio::spawn(async move {
            let mut next = async || {
                tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                }
            };
            let first = next().await;
            tracing::info!(signal = first, "draining");
            given.start();
            let second = next().await;
            tracing::warn!(signal = second, "told twice to end: what still runs is broken off");
            std::process::exit(1);
        });
        Ok(drain)
    }

    /// Gives the signal.
    pub fn start(&self) {
        self.token.cancel();
    }

    /// Whether it was given.
    pub fn draining(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until it is given.
    pub async fn signaled(&self) {
        self.token.cancelled().await;
    }
}
