//! Trying again: after pauses that grow, a number of times without anything having come between.

use std::time::Duration;

use super::error::PullError;

/// The first pause; each is twice the one before.
const FIRST: Duration = Duration::from_millis(500);
/// No pause is longer, whatever a server asks for.
const LONGEST: Duration = Duration::from_secs(30);

/// Failures in a row.
pub(crate) struct Retries {
    most: u32,
    failed: u32,
}

impl Retries {
    /// Up to `most` attempts in a row.
    pub(crate) fn new(most: u32) -> Self {
        Self { most, failed: 0 }
    }

    /// Something came: what failed before counts no more.
    pub(crate) fn progressed(&mut self) {
        self.failed = 0;
    }

    /// Waits before another attempt.
    ///
    /// # Errors
    /// `error`, where it will not pass by itself, or was the last that is taken.
    pub(crate) async fn pause(&mut self, error: PullError) -> Result<(), PullError> {
        self.failed += 1;
        if !error.passes() || self.failed >= self.most {
            return Err(error);
        }
        let pause = error.after().unwrap_or(FIRST * 2u32.saturating_pow(self.failed - 1)).min(LONGEST);
        // Nodes of a cluster that start together do not come again together.
        let pause = pause.mul_f64(rand::random_range(0.75..1.25));
        eprintln!("{error}; again in {:.1} s ({} of {})", pause.as_secs_f64(), self.failed, self.most);
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broke() -> PullError {
        PullError::Connection { url: "http://here/".into(), what: "it broke".into() }
    }

    #[tokio::test(start_paused = true)]
    async fn only_failures_in_a_row_count() {
        let mut retries = Retries::new(3);
        for _ in 0..5 {
            retries.pause(broke()).await.unwrap();
            retries.pause(broke()).await.unwrap();
            retries.progressed();
        }
        retries.pause(broke()).await.unwrap();
        retries.pause(broke()).await.unwrap();
        assert!(retries.pause(broke()).await.is_err());
        assert!(Retries::new(3).pause(PullError::Refused("no".into())).await.is_err(), "what will not pass is not tried again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_may_say_when_but_not_never() {
        let begun = tokio::time::Instant::now();
        let after = |seconds| PullError::Status {
            url: "http://here/".into(),
            status: reqwest::StatusCode::SERVICE_UNAVAILABLE,
            advice: "",
            after: Some(Duration::from_secs(seconds)),
        };
        Retries::new(2).pause(after(8)).await.unwrap();
        let waited = begun.elapsed().as_secs_f64();
        assert!((6.0..=10.0).contains(&waited), "{waited}");
        Retries::new(2).pause(after(86_400)).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
}
