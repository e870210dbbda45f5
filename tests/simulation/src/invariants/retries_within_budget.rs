//! A request is tried no more often than the router allows itself: so many times with nothing to show for it, and so many in all.
//! Attempts that only want room are not bounded: they wait. Where nothing goes wrong there is one.

use std::collections::BTreeMap;

use overfill_proto::v1::Retry;

use crate::tap::NodeCall;
use crate::world::Outcome;

/// Attempts in a row of which no node tells a token.
const FRUITLESS: usize = 4;
/// Attempts of one request in all.
const IN_ALL: usize = 8;

pub(super) fn check(outcome: &Outcome) -> Result<(), String> {
    let mut of_request: BTreeMap<&[u32], Vec<&NodeCall>> = BTreeMap::new();
    for call in &outcome.calls {
        of_request.entry(&call.prompt).or_default().push(call);
    }
    for (prompt, calls) in of_request {
        let attempts: Vec<_> = attempts(&calls).into_iter().filter(|attempt| !attempt.iter().any(|call| wants_room(call))).collect();
        let longest = attempts.split(|attempt| attempt.iter().any(|call| call.tokens > 0)).map(<[_]>::len).max().unwrap_or(0);
        let most = if outcome.plan.faults.is_empty() { 1 } else { IN_ALL };
        if attempts.len() > most || longest > FRUITLESS {
            let request = outcome.plan.requests.iter().position(|request| request.prompt == prompt);
            return Err(format!(
                "{} attempts were made at request {request:?}, {longest} in a row without a token: {attempts:#?}",
                attempts.len()
            ));
        }
    }
    Ok(())
}

/// The calls of each attempt. One with two nodes asks the decode node first, and then the prefill node, if that has taken it on.
fn attempts<'a>(calls: &[&'a NodeCall]) -> Vec<Vec<&'a NodeCall>> {
    let mut attempts: Vec<Vec<&NodeCall>> = Vec::new();
    for call in calls {
        match attempts.last_mut() {
            Some(attempt) if call.epoch.is_none() && attempt.len() == 1 && attempt[0].epoch.is_some() => attempt.push(call),
            _ => attempts.push(vec![call]),
        }
    }
    attempts
}

fn wants_room(call: &NodeCall) -> bool {
    call.ended.as_ref().is_some_and(|ended| ended.retry() == Retry::Later && !ended.code.is_empty())
}
