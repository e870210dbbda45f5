//! Every request ends before its deadline, in tokens or with an error.

use std::time::Duration;

use crate::client::Ended;
use crate::world::Outcome;

/// What timers and the router's own door take beyond the deadline.
const SLACK: Duration = Duration::from_millis(50);

pub(super) fn check(outcome: &Outcome) -> Result<(), String> {
    for answer in &outcome.answers {
        let timeout = outcome.plan.requests[answer.number].timeout;
        if matches!(answer.ended, Ended::Never) || answer.took > timeout + SLACK {
            return Err(format!("request {} had {timeout:?}, and after {:?} it was {:?}", answer.number, answer.took, answer.ended));
        }
    }
    Ok(())
}
