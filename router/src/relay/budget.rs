//! How many further attempts a router makes in all: where many nodes fail, retries are not to be the load that the rest fails under.
//!
//! A request may be tried again at once as long as retries are at most a tenth of the requests, beyond a floor that lets the
//! sequences of a few nodes go on together. Beyond that a further attempt waits for its turn: no answer is lost for it, unless
//! its deadline comes first.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use overfill_schedule::Bucket;
use tokio::time::{Instant, sleep};

/// Retries that each request adds to the budget.
const PER_REQUEST: f64 = 0.1;
/// Retries a second that there are without any requests.
const FLOOR: f64 = 20.0;
/// How much of the floor may be saved up: 200 retries, three full decode nodes.
const SAVED: Duration = Duration::from_secs(10);
/// Rounding may leave less to wait for than a clock can tell.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

/// The retries of one router.
pub(crate) struct RetryBudget {
    left: Mutex<Bucket>,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { left: Mutex::new(Bucket::new(FLOOR, SAVED, Instant::now().into_std())) }
    }
}

impl RetryBudget {
    /// A request begins.
    pub(super) fn request(&self) {
        self.with(|left| left.give_back(PER_REQUEST));
    }

    /// Waits until there may be one more retry. True if it had to.
    pub(super) async fn retry(&self) -> bool {
        let mut waited = false;
        while let Err(wait) = self.with(|left| left.take(1.0, Instant::now().into_std())) {
            waited = true;
            // Longer by a part that differs, so that those who wait do not come together.
            sleep(wait.max(SHORTEST_WAIT).mul_f64(rand::random_range(1.0..2.0))).await;
        }
        waited
    }

    fn with<T>(&self, act: impl FnOnce(&mut Bucket) -> T) -> T {
        // A few numbers are whole whatever panicked beside them.
        act(&mut self.left.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn retries_beyond_the_floor_are_a_tenth_of_the_requests() {
        let budget = RetryBudget::default();
        let saved = (FLOOR * SAVED.as_secs_f64()) as usize;
        for _ in 0..saved {
            assert!(!budget.retry().await);
        }
        let begun = Instant::now();
        (0..30).for_each(|_| budget.request());
        let mut at_once = 0;
        while !budget.retry().await {
            at_once += 1;
        }
        // Three for thirty requests, and what the floor has brought meanwhile.
        let floor = (begun.elapsed().as_secs_f64() * FLOOR).ceil() as i32;
        assert!((3..=3 + floor).contains(&at_once), "{at_once} at once, {floor} of the floor");
    }
}
