//! Runs scenarios: a load, what is done meanwhile, and what came of it.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;

use crate::cluster::Cluster;
use crate::fault::Fault;
use crate::load::{Ended, Load};
use crate::report::Row;

/// How long the last answers may take.
const LAST: Duration = Duration::from_secs(180);

/// How long each part of a scenario takes.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// The load alone.
    pub before: Duration,
    /// What is done lasts.
    pub lasting: Duration,
    /// The load after it is undone.
    pub after: Duration,
}

/// Does `faults`, one after the other, under a load whose undisturbed answers are given.
pub async fn scenario(
    cluster: &mut Cluster,
    faults: &[Fault],
    (undisturbed, tokens): (&[Ended], usize),
    times: Times,
    draws: &mut StdRng,
) -> Row {
    let load = Load::begin(&cluster.doors(), undisturbed, tokens);
    tokio::time::sleep(times.before).await;
    let begun = Instant::now();
    let mut done = Vec::new();
    for fault in faults {
        done.push((*fault, fault.begin(cluster, draws).await));
    }
    tokio::time::sleep(times.lasting).await;
    for (fault, done_to) in done {
        fault.end(cluster, done_to).await;
    }
    tokio::time::sleep(times.after).await;
    let outcome = load.end(LAST).await;
    cluster.whole().await;
    let last = outcome.heard_again.iter().filter(|heard| **heard > begun).max();
    let recovery = last.map_or(Duration::ZERO, |last| *last - begun);
    Row {
        scenario: faults.iter().map(|fault| fault.name()).collect::<Vec<_>>().join(" + "),
        outcome,
        recovery,
        held: cluster.nothing_is_held(Duration::from_secs(30)).await,
        promised: faults.len() < 2 && !Fault::too_much().contains(&faults[0]),
        breaks_connections: faults.iter().any(|fault| fault.breaks_connections_of_clients()),
    }
}
