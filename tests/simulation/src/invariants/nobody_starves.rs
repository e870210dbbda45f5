//! A request that comes when all nodes are well and have room ends in tokens, whatever happened before: a cluster recovers, and
//! what waits is not overtaken for ever.

use crate::client::Ended;
use crate::world::Outcome;

pub(super) fn check(outcome: &Outcome) -> Result<(), String> {
    for answer in &outcome.answers {
        let request = &outcome.plan.requests[answer.number];
        if request.at >= outcome.plan.whole && !matches!(answer.ended, Ended::Finished(_)) {
            return Err(format!("request {} came when all was well again, and ended as {:?}", answer.number, answer.ended));
        }
    }
    Ok(())
}
