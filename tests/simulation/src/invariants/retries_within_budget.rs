//! A request is tried no more often than the router allows itself: so many times with nothing to show for it, and so many in all.
//! Attempts that only want room are not bounded: they wait. One that a router learnt to have failed while it heard no node tells
//! nothing of the nodes: it counts in all only. Where nothing goes wrong there is one.

use std::collections::BTreeMap;

use overfill_proto::v1::Retry;

use crate::hosts;
use crate::tap::{NodeCall, Silence};
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
        let request = outcome.plan.requests.iter().position(|request| request.prompt == prompt).ok_or("nobody asked this")?;
        let router = hosts::router(outcome.plan.requests[request].router);
        let attempts = attempts(&calls);
        let (mut in_all, mut in_a_row, mut longest) = (0, 0, 0);
        for (number, attempt) in attempts.iter().enumerate() {
            if attempt.iter().any(|call| wants_room(call)) {
                continue;
            }
            in_all += 1;
            if attempt.iter().any(|call| call.tokens > 0) {
                in_a_row = 0;
                continue;
            }
            let next = attempts.get(number + 1).map(|next| next[0].at);
            let waited_out = |silence: &Silence| silence.host == router && attempt[0].at < silence.until && Some(silence.until) <= next;
            if !outcome.silences.iter().any(waited_out) {
                in_a_row += 1;
                longest = longest.max(in_a_row);
            }
        }
        let most = if outcome.plan.faults.is_empty() { 1 } else { IN_ALL };
        if in_all > most || longest > FRUITLESS {
            return Err(format!(
                "{in_all} attempts were made at request {request}, {longest} in a row without a token, and {router} was cut off \
                 {:?}: {attempts:#?}",
                outcome.silences
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
