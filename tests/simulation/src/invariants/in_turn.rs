//! Who waits for the same nodes gets them by class, then by weight; a client's own requests by age.
//!
//! Whose turn it is shows in the first call that a router makes for a request. Only calm plans are looked at: where a way is cut,
//! a call is made long before it is heard.

use std::collections::BTreeMap;
use std::time::Duration;

use overfill_types::Quality;

use crate::plan::{CLIENTS, Plan, RequestPlan};
use crate::world::Outcome;

/// What a connection that begins, and the order of two messages to two nodes, take from a call until it is heard.
const SLACK: Duration = Duration::from_millis(50);

/// A request and its wait.
struct Waited<'a> {
    number: usize,
    plan: &'a RequestPlan,
    /// When it came, since the simulation began.
    came: Duration,
    /// When it had its turn.
    turn: Option<Duration>,
    /// When it had its turn, or gave up.
    until: Duration,
}

impl Waited<'_> {
    /// Whether it surely waits at that moment.
    fn waits(&self, at: Duration) -> bool {
        self.came + SLACK < at && at + SLACK < self.until
    }

    /// What its client pays for it.
    fn share(&self) -> f64 {
        (self.plan.prompt.len() + self.plan.max_tokens) as f64 / f64::from(CLIENTS[self.plan.client].0)
    }
}

pub(super) fn check(outcome: &Outcome) -> Result<(), String> {
    if !outcome.plan.faults.is_empty() {
        return Ok(());
    }
    let mut alike: BTreeMap<_, Vec<Waited<'_>>> = BTreeMap::new();
    for waited in waits(outcome).into_iter().filter(|waited| waited.plan.max_tokens > 1) {
        let RequestPlan { router, pair, quality, .. } = *waited.plan;
        alike.entry((router, pair, quality as u8)).or_default().push(waited);
    }
    for waited in alike.values_mut() {
        waited.sort_by_key(|waited| waited.turn.unwrap_or(Duration::MAX));
        by_class_and_age(waited)?;
        if all_want_the_same(&outcome.plan) {
            by_weight(waited)?;
        }
    }
    Ok(())
}

fn waits(outcome: &Outcome) -> Vec<Waited<'_>> {
    let mut turns: BTreeMap<&[u32], Duration> = BTreeMap::new();
    for call in &outcome.calls {
        turns.entry(&call.prompt).or_insert(call.at);
    }
    let waited = |answer: &crate::client::Answer| {
        let plan = &outcome.plan.requests[answer.number];
        let (came, turn) = (outcome.begun + plan.at, turns.get(&plan.prompt[..]).copied());
        Waited { number: answer.number, plan, came, turn, until: turn.unwrap_or(came + answer.took) }
    };
    outcome.answers.iter().map(waited).collect()
}

/// Nobody gets his turn while one of a higher class, or an older one of the same client, waits for the same nodes.
fn by_class_and_age(waited: &[Waited<'_>]) -> Result<(), String> {
    for served in waited {
        let Some(turn) = served.turn else { continue };
        for other in waited.iter().filter(|other| other.waits(turn)) {
            let above = CLIENTS[other.plan.client].1 > CLIENTS[served.plan.client].1;
            let older = other.plan.client == served.plan.client && other.came + SLACK < served.came;
            if above || older {
                return Err(format!(
                    "request {} had its turn after {turn:?} while request {} waited, of a higher class or older, until {:?}",
                    served.number, other.number, other.until
                ));
            }
        }
    }
    Ok(())
}

fn all_want_the_same(plan: &Plan) -> bool {
    let wanted = |request: &RequestPlan| -> (usize, Quality, bool) { (request.pair, request.quality, request.max_tokens > 1) };
    plan.requests.iter().all(|request| wanted(request) == wanted(&plan.requests[0]))
}

/// While two clients of a class wait, neither gets more for its weight than the other but for a request or two.
///
/// For start-time fair queueing the difference is at most the largest request of each (Goyal, Vin, Cheng 1997); as much again
/// may stand in another order than it was decided.
fn by_weight(waited: &[Waited<'_>]) -> Result<(), String> {
    for (one, (_, class)) in CLIENTS.iter().enumerate() {
        for other in (0..one).filter(|other| CLIENTS[*other].1 == *class) {
            let largest = |client| waited.iter().filter(|w| w.plan.client == client).map(Waited::share).fold(0.0, f64::max);
            let bound = 2.0 * (largest(one) + largest(other));
            let mut ahead = 0.0;
            let (mut most, mut least) = (0.0_f64, 0.0_f64);
            for served in waited {
                let Some(turn) = served.turn else { continue };
                if ![one, other].iter().all(|client| waited.iter().any(|w| w.plan.client == *client && w.waits(turn))) {
                    (ahead, most, least) = (0.0, 0.0, 0.0);
                    continue;
                }
                ahead += served.share() * f64::from(i8::from(served.plan.client == one) - i8::from(served.plan.client == other));
                (most, least) = (most.max(ahead), least.min(ahead));
                if most - least > bound {
                    return Err(format!(
                        "clients {one} and {other} waited, and one got {:.0} tokens over weight more than the other",
                        most - least
                    ));
                }
            }
        }
    }
    Ok(())
}
