//! What one client may take in a time: a bucket that fills at its rate.

use std::time::{Duration, Instant};

/// A bucket. What is taken may go below nothing once, so that one large request is served and paid for after.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    per_second: f64,
    most: f64,
    left: f64,
    at: Instant,
}

impl Bucket {
    /// A full one that fills at `per_second` (above 0) and holds at most what comes in `burst`, at least 1.
    pub fn new(per_second: f64, burst: Duration, now: Instant) -> Self {
        let most = (per_second * burst.as_secs_f64()).max(1.0);
        Self { per_second, most, left: most, at: now }
    }

    /// Takes `amount` if anything is there.
    ///
    /// # Errors
    /// How long it takes until something is.
    pub fn take(&mut self, amount: f64, now: Instant) -> Result<(), Duration> {
        let filled = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.left = (self.left + filled).min(self.most);
        self.at = self.at.max(now);
        // A whole unit, or all that fits: what is asked for is at least that.
        let wanted = amount.min(1.0);
        if self.left < wanted {
            return Err(Duration::from_secs_f64(((wanted - self.left) / self.per_second).min(86_400.0)));
        }
        self.left -= amount;
        Ok(())
    }

    /// Gives back what was taken and not used.
    pub fn give_back(&mut self, amount: f64) {
        self.left = (self.left + amount).min(self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time() {
        let begun = Instant::now();
        let mut bucket = Bucket::new(5.0, Duration::from_secs(2), begun);
        let mut taken = 0;
        for ms in (0..10_000).step_by(10) {
            taken += i32::from(bucket.take(1.0, begun + Duration::from_millis(ms)).is_ok());
        }
        assert!((58..=60).contains(&taken), "{taken}: 10 at once and 50 in ten seconds");
    }

    #[test]
    fn how_long_to_wait_is_true() {
        let begun = Instant::now();
        let mut bucket = Bucket::new(100.0, Duration::from_secs(1), begun);
        bucket.take(350.0, begun).unwrap();
        let wait = bucket.take(10.0, begun).unwrap_err();
        assert!((wait.as_secs_f64() - 2.51).abs() < 1e-6, "{wait:?}");
        assert!(bucket.take(10.0, begun + wait - Duration::from_millis(5)).is_err());
        bucket.take(10.0, begun + wait + Duration::from_millis(1)).unwrap();
        bucket.give_back(1e9);
        assert!(bucket.take(1.0, begun + wait).is_ok() && bucket.left <= 100.0);
    }
}
