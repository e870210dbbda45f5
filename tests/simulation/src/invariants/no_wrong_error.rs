//! A request fails only for a reason that there was: its time ran out, its cluster was full, or something went wrong with a node
//! or on the way to one, not so long ago. No client is told of a fault of its own that it has not, or of one in our processes.

use overfill_types::Code;

use crate::client::Ended;
use crate::plan::Fault;
use crate::world::Outcome;

pub(super) fn check(outcome: &Outcome) -> Result<(), String> {
    let plan = &outcome.plan;
    let deadly =
        plan.faults.iter().any(|fault| matches!(fault.what, Fault::Dies(_) | Fault::Vanishes(_) | Fault::Hangs(_) | Fault::Cut(..)));
    for answer in &outcome.answers {
        let Ended::Failed(error) = &answer.ended else { continue };
        let request = &plan.requests[answer.number];
        let disturbed = plan.disturbed(request.at, request.at + answer.took);
        let reason = match error.code {
            Code::DeadlineExceeded => answer.took >= request.timeout,
            Code::Unavailable => disturbed || error.message.contains("the cluster is full"),
            Code::Quarantined => deadly,
            _ => false,
        };
        if !reason {
            return Err(format!(
                "request {} of {:?} failed after {:?} with {}: {error}",
                answer.number, request.at, answer.took, error.code
            ));
        }
    }
    Ok(())
}
