//! When all requests have ended, nothing is held for them: no place in the router, no sequence or block at a node, and no task.

use crate::world::Outcome;

pub(super) fn check(outcome: &Outcome) -> Result<(), String> {
    if outcome.held.is_empty() { Ok(()) } else { Err(outcome.held.join(", ")) }
}
