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

/// While two clients of a class wait, neither gets more for its weight than the other but for a request of each: the bound of
/// start-time fair queueing (Goyal, Vin, Cheng 1997).
///
/// A turn is heard up to [`SLACK`] after it was decided. So one client got at least what was heard of it, and the other at most
/// what was heard, or given up, until so much later.
fn by_weight(waited: &[Waited<'_>]) -> Result<(), String> {
    let classes = CLIENTS.map(|(_, class)| class);
    for (one, other) in (0..CLIENTS.len()).flat_map(|one| (0..CLIENTS.len()).map(move |other| (one, other))) {
        if one == other || classes[one] != classes[other] {
            continue;
        }
        let of = |client| waited.iter().filter(move |w| w.plan.client == client);
        let largest = |client| of(client).map(Waited::share).fold(0.0, f64::max);
        let bound = largest(one) + largest(other);
        let turns: Vec<(Duration, f64)> = of(one).filter_map(|w| Some((w.turn?, w.share()))).collect();
        for first in 0..turns.len() {
            let from = turns[first].0.saturating_sub(SLACK);
            let mut got = 0.0;
            for &(to, share) in &turns[first..] {
                if ![one, other].iter().all(|client| waits_throughout(of(*client), from, to)) {
                    break;
                }
                got += share;
                let most: f64 = of(other).filter(|w| (from..=to + SLACK).contains(&w.until)).map(Waited::share).sum();
                if got - most > bound {
                    return Err(format!(
                        "clients {one} and {other} waited from {from:?} to {to:?}, and one got {got:.0} tokens over weight, the other \
                         {most:.0}; {bound:.0} more are allowed"
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Whether one of these surely waits at each moment of a time.
fn waits_throughout<'a>(waited: impl Iterator<Item = &'a Waited<'a>> + Clone, from: Duration, to: Duration) -> bool {
    let mut at = from;
    while at <= to {
        let until = waited.clone().filter(|w| w.waits(at)).map(|w| w.until.saturating_sub(SLACK)).max();
        match until {
            Some(until) => at = until,
            None => return false,
        }
    }
    true
}
