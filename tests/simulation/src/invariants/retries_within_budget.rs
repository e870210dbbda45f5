//! A request is tried no more often than the router allows itself: so many times without a token, and so many in all. Attempts
//! that only want room are not bounded: they wait.

use std::collections::BTreeMap;

use overfill_proto::v1::Retry;

use crate::tap::NodeCall;
use crate::world::Outcome;

/// Attempts in a row of which the decode node tells no token: two that bring nothing, one that brings the full model's, and
/// three that bring nothing.
const FRUITLESS: usize = 6;
/// Attempts of one request in all.
const IN_ALL: usize = 8;

pub(super) fn check(outcome: &Outcome) -> Result<(), String> {
    let mut of_request: BTreeMap<&[u32], Vec<&NodeCall>> = BTreeMap::new();
    for call in outcome.calls.iter().filter(|call| !wants_room(call)) {
        of_request.entry(&call.prompt).or_default().push(call);
    }
    for (prompt, calls) in of_request {
        // An attempt with two nodes asks the decode node first, and then the prefill node, if that has taken it on.
        let decode: Vec<&&NodeCall> = calls.iter().filter(|call| call.epoch.is_some()).collect();
        let attempts = if decode.is_empty() { calls.iter().collect() } else { decode };
        let longest = attempts.split(|call| call.tokens > 0).map(<[_]>::len).max().unwrap_or(0);
        if attempts.len() > IN_ALL || longest > FRUITLESS {
            let request = outcome.plan.requests.iter().position(|request| request.prompt == prompt);
            return Err(format!(
                "{} attempts were made at request {request:?}, {longest} in a row without a token: {attempts:#?}",
                attempts.len()
            ));
        }
    }
    Ok(())
}

fn wants_room(call: &NodeCall) -> bool {
    call.ended.as_ref().is_some_and(|ended| ended.retry() == Retry::Later && !ended.code.is_empty())
}
