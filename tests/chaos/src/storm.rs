//! Requests that are aborted at random moments, in every state that they may be in; and what is left of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;

use crate::cluster::{Cluster, Kind};
use crate::load;

/// Requests at a time.
const AT_A_TIME: usize = 64;
/// The latest moment of an abort: past the first tokens.
const LATEST: Duration = Duration::from_millis(400);

/// What a process has at one moment.
#[derive(Clone, Debug)]
pub struct Has {
    /// Which process.
    pub process: String,
    /// Resident memory in bytes.
    pub memory: u64,
    /// Tasks of its runtime.
    pub tasks: f64,
    /// Open descriptors.
    pub descriptors: usize,
}

/// How requests of a storm ended.
#[derive(Debug, Default)]
pub struct Ends {
    /// Aborted.
    pub aborted: usize,
    /// Whole before they were.
    pub whole: usize,
    /// With an error, or a connection that broke.
    pub failed: Vec<String>,
}

/// Has `requests` requests begun and aborted.
pub async fn storm(cluster: &Cluster, requests: usize, tokens: usize, seed: u64) -> Ends {
    let (doors, next) = (Arc::new(cluster.doors()), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    for number in 0..AT_A_TIME {
        let (doors, next) = (doors.clone(), next.clone());
        let mut draws = StdRng::seed_from_u64(seed + number as u64);
        clients.spawn(async move {
            let (client, mut ends) = (load::client(), Ends::default());
            loop {
                let request = next.fetch_add(1, Ordering::Relaxed);
                if request >= requests {
                    return ends;
                }
                let door = &doors[request % doors.len()];
                let abort = LATEST.mul_f64(draws.random::<f64>().powi(2));
                let asked = load::request(request, tokens);
                match tokio::time::timeout(abort, load::ask(&client, door, &asked, || {})).await {
                    Err(_) => ends.aborted += 1,
                    Ok(load::Ended::Whole(_)) => ends.whole += 1,
                    Ok(load::Ended::Failed(why) | load::Ended::BrokenOff(why)) => ends.failed.push(why),
                }
            }
        });
    }
    let mut all = Ends::default();
    while let Some(ends) = clients.join_next().await {
        let ends = ends.expect("a client asks");
        (all.aborted, all.whole) = (all.aborted + ends.aborted, all.whole + ends.whole);
        all.failed.extend(ends.failed);
    }
    all
}

/// What each process of ours has now.
///
/// # Panics
/// Where one does not tell.
pub async fn has(cluster: &Cluster) -> Vec<Has> {
    let mut all = Vec::new();
    for kind in [Kind::Router, Kind::Prefill, Kind::Decode] {
        for (number, member) in cluster.of(kind).into_iter().enumerate() {
            let process = cluster.process(member);
            let tasks = cluster.metric(member, "overfill_tasks").await.filter(|tasks| *tasks > 0.0).expect("a process tells its tasks");
            let (memory, descriptors) = (process.resident_bytes(), process.descriptors());
            all.push(Has { process: format!("{} {number}", kind.name()), memory, tasks, descriptors });
        }
    }
    all
}
