//! Whether a body comes fast enough to be waited for: a byte now and then is as good as silence.

use std::time::Duration;

use reqwest::{Response, Url};
use tokio::time::{Instant, timeout_at};

use super::error::{PullError, shown};

/// Bytes that have to come each time that a connection may be silent.
const LEAST: u64 = 16 << 10;

/// A body that is being read.
pub(crate) struct Pace {
    silence: Duration,
    until: Instant,
    came: u64,
}

impl Pace {
    /// From now on.
    pub(crate) fn new(silence: Duration) -> Self {
        Self { silence, until: Instant::now() + silence, came: 0 }
    }

    /// What comes next of a body; `None` at its end.
    ///
    /// # Errors
    /// [`PullError::Connection`] where it breaks, [`PullError::Silent`] where too little came.
    pub(crate) async fn next(&mut self, url: &Url, response: &mut Response) -> Result<Option<bytes::Bytes>, PullError> {
        loop {
            if Instant::now() >= self.until {
                if self.came < LEAST {
                    return Err(PullError::Silent { url: shown(url), least: LEAST >> 10, seconds: self.silence.as_secs() });
                }
                *self = Self::new(self.silence);
            }
            if let Ok(came) = timeout_at(self.until, response.chunk()).await {
                let bytes = came.map_err(|e| PullError::request(url, &e))?;
                self.came += bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
                return Ok(bytes);
            }
        }
    }
}
