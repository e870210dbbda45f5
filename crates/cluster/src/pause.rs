//! Pauses between attempts at a source that has failed.

use std::time::Duration;

use rand::Rng;

/// A pause after a failure, which grows with their number up to `longest`. All of a cluster meet the same failure at the same moment: the
/// first pause is drawn from nothing upwards, so that they come back one after the other.
pub(crate) fn pause(failures: u32, longest: Duration) -> Duration {
    let longest = longest.min(Duration::from_millis(250) * 2u32.saturating_pow(failures.min(10)));
    longest.mul_f64(rand::rng().random_range(0.0..1.0))
}
