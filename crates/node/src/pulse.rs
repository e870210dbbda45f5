//! Whether an engine gets on: it says so after each turn, and a watchdog looks.
//!
//! A forward pass that never returns cannot be ended from outside. What can be done is to notice, to say so, and to end the
//! process, so that its work goes on elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use overfill_lifecycle::Drain;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often the watchdog looks.
const LOOK: Duration = Duration::from_millis(50);

/// An engine's sign of life. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Pulse {
    beats: Arc<AtomicU64>,
}

/// An engine that does not get on.
#[derive(Debug, thiserror::Error)]
#[error("no step was done for {0:?}: the engine hangs")]
pub struct Hangs(Duration);

impl Pulse {
    /// A step was done, or there was nothing to do.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits for the first sign.
    pub async fn begun(&self) {
        let mut looks = interval(Duration::from_millis(1));
        while self.beats.load(Ordering::Relaxed) == 0 {
            looks.tick().await;
        }
    }

    /// Looks until `end` is given. Time in which this process was stopped does not count.
    ///
    /// # Errors
    /// Where there was no sign for `limit`.
    pub async fn watch(self, limit: Duration, end: Drain) -> Result<(), Hangs> {
        let mut looks = interval(LOOK.min(limit / 4).max(Duration::from_millis(1)));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut seen, mut silent, mut looked) = (self.beats.load(Ordering::Relaxed), Duration::ZERO, Instant::now());
        loop {
            tokio::select! {
                _ = looks.tick() => {}
                () = end.signaled() => return Ok(()),
            }
            let now = Instant::now();
            let passed = (now - looked).min(LOOK * 2);
            looked = now;
            let beats = self.beats.load(Ordering::Relaxed);
            silent = if beats == seen { silent + passed } else { Duration::ZERO };
            seen = beats;
            if silent >= limit {
                return Err(Hangs(limit));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_is_noticed_and_steps_are_not_taken_for_it() {
        let pulse = Pulse::default();
        let begun = Instant::now();
        pulse.clone().watch(Duration::from_secs(2), Drain::new()).await.unwrap_err();
        assert!((2.0..2.2).contains(&begun.elapsed().as_secs_f64()), "{:?}", begun.elapsed());

        let (beating, begun) = (pulse.clone(), Instant::now());
        tokio::spawn(async move {
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_millis(1900)).await;
                beating.beat();
            }
        });
        pulse.watch(Duration::from_secs(2), Drain::new()).await.unwrap_err();
        assert!((21.0..21.2).contains(&begun.elapsed().as_secs_f64()), "{:?}", begun.elapsed());
    }
}
