//! Carries out a plan: starts a router and nodes, lets clients ask, lets things go wrong, and notes what came of it.

use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use overfill_cluster::Discovery;
use overfill_guide::Guides;
use overfill_lifecycle::Drain;
use overfill_router::{Models, Router, RouterConfig};
use overfill_tests::tiny::{self, TinyPair};
use overfill_types::PairManifest;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;
use tokio::runtime::{Builder, Handle};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::client::{self, Answer};
use crate::hosts::{HostSlot, ROUTER, address};
use crate::invariants;
use crate::mangle::Mangling;
use crate::network::{Hosts, Network};
use crate::node::Pair;
use crate::plan::{Fault, Plan};
use crate::tap::Asked;

/// How often it is looked whether a node has ended, and whether all is over.
const LOOK: Duration = Duration::from_millis(100);
/// How long after the last answer something may still be held: nodes notice that a reader has gone when its connection tells
/// them, or their reservation runs out.
const SETTLES: Duration = Duration::from_secs(30);

/// What all seeds share, opened once: that takes longer than a seed.
pub struct Shared {
    pair: Pair,
    models: Models,
    keys: PathBuf,
    _tiny: TinyPair,
    _folder: TempDir,
}

impl Shared {
    /// Opens it.
    pub fn open() -> Self {
        let tiny = tiny::pair(tiny::Kind::Identity, 1);
        let opened = tiny.open();
        let models = Models::open(std::slice::from_ref(&tiny.dir)).expect("the tiny pair can be opened");
        let folder = tempfile::tempdir().expect("there is a folder for the clients' keys");
        let keys = folder.path().join("keys.json");
        std::fs::write(&keys, client::keys()).expect("they can be written");
        let pair = Pair { guides: Arc::new(Guides::open(&opened.dir, &opened.manifest)), manifest: opened.manifest };
        Self { pair, models, keys, _tiny: tiny, _folder: folder }
    }
}

/// What came of a plan.
pub struct Outcome {
    /// The plan.
    pub plan: Plan,
    /// What was served.
    pub manifest: PairManifest,
    /// What came of each request.
    pub answers: Vec<Answer>,
    /// What routers asked nodes.
    pub asked: Vec<Asked>,
    /// What was still held when all was over.
    pub held: Vec<String>,
}

/// Runs a seed, and checks what has to hold.
///
/// # Errors
/// What does not hold, with the plan.
pub fn simulate(shared: &Shared, seed: u64) -> Result<(), String> {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().map_err(|e| e.to_string())?;
    let plan = Plan::of(seed);
    let outcome = runtime.block_on(carry_out(shared, plan));
    invariants::check(&outcome).map_err(|broken| {
        let mut told = broken;
        let Plan { nodes, faults, .. } = &outcome.plan;
        for (number, node) in nodes.iter().enumerate() {
            let _ = write!(told, "\n  node {number}: {node:?}");
        }
        for fault in faults {
            let _ = write!(told, "\n  {:?} for {:?}: {:?}", fault.at, fault.lasts, fault.what);
        }
        told
    })
}

async fn carry_out(shared: &Shared, plan: Plan) -> Outcome {
    let (network, discovery) = (Network::new(plan.seed), Discovery::memory());
    let router = router(shared, &plan, &network, &discovery);
    let following = AbortOnDropHandle::new(tokio::spawn(router.clone().follow()));
    let mut random = StdRng::seed_from_u64(plan.seed ^ 1);
    let mut hosts: Vec<HostSlot> = Vec::new();
    for (number, node) in plan.nodes.iter().enumerate() {
        let mut slot = HostSlot::new(number, node.clone(), network.clone(), discovery.clone(), random.random());
        slot.start(&shared.pair).await;
        hosts.push(slot);
    }
    let listed = discovery.watch().wait_for(|view| view.nodes.len() == plan.nodes.len()).await.is_ok();
    assert!(listed, "all nodes are listed");
    let (begun, mut asking) = (Instant::now(), JoinSet::new());
    for (number, request) in plan.requests.iter().enumerate() {
        let (door, request) = (router.grpc(), request.clone());
        asking.spawn(async move { client::ask(door, number, &request, begun).await });
    }
    let mut answers = Vec::new();
    let mut faults = timeline(&plan);
    while !asking.is_empty() || !faults.is_empty() {
        while let Some((_, fault, begins)) = faults.pop_if(|(at, ..)| begun + *at <= Instant::now()) {
            happen(&plan.faults[fault].what, begins, plan.faults[fault].lasts, &network, &mut hosts);
        }
        for slot in &mut hosts {
            slot.keep_up(&shared.pair).await;
        }
        let next = faults.last().map_or(LOOK, |(at, ..)| (begun + *at).saturating_duration_since(Instant::now()).min(LOOK));
        tokio::select! {
            Some(answer) = asking.join_next() => answers.push(answer.expect("clients do not panic")),
            () = sleep(next) => {}
        }
    }
    let settled = Instant::now();
    let mut held = held(&router, &hosts);
    while !held.is_empty() && settled.elapsed() < SETTLES {
        sleep(LOOK).await;
        for slot in &mut hosts {
            slot.keep_up(&shared.pair).await;
        }
        held = self::held(&router, &hosts);
    }
    let asked = network.tap.asked();
    drop((following, hosts, router));
    sleep(SETTLES).await;
    let tasks = Handle::current().metrics().num_alive_tasks();
    if tasks > 0 {
        held.push(format!("{tasks} tasks run when everything has ended"));
    }
    Outcome { manifest: shared.pair.manifest.clone(), plan, answers, asked, held }
}

fn router(shared: &Shared, plan: &Plan, network: &Network, discovery: &Discovery) -> Arc<Router> {
    let cli = overfill_router::config::Cli::parse_from(["router", "--pair", "opened"]);
    let config =
        RouterConfig { queue_timeout: plan.queue_timeout, keys: Some(shared.keys.clone()), ..RouterConfig::new(cli.pair, cli.bounds) };
    Router::new(config, shared.models.clone(), discovery, network.connector(ROUTER), Drain::new()).expect("a router can be made")
}

/// When each fault begins and ends, the next one last.
fn timeline(plan: &Plan) -> Vec<(Duration, usize, bool)> {
    let mut events: Vec<(Duration, usize, bool)> = Vec::new();
    for (number, fault) in plan.faults.iter().enumerate() {
        events.extend([(fault.at, number, true), (fault.at + fault.lasts, number, false)]);
    }
    events.sort_by(|a, b| b.cmp(a));
    events
}

/// A fault begins, or is over.
fn happen(fault: &Fault, begins: bool, lasts: Duration, network: &Network, nodes: &mut [HostSlot]) {
    let host = |number: usize| if number == nodes.len() { ROUTER.to_owned() } else { address(number) };
    match *fault {
        Fault::Dies(node) if begins => nodes[node].die(lasts),
        Fault::Hangs(node) if begins => nodes[node].hang(),
        Fault::Drains(node) if begins => nodes[node].drain(),
        Fault::Dies(_) | Fault::Hangs(_) | Fault::Drains(_) => {}
        Fault::Cut(a, b) if begins => network.cut(&Hosts::new(&host(a), &host(b))),
        Fault::Cut(a, b) => network.heal(&Hosts::new(&host(a), &host(b))),
        Fault::Slow(a, b, by) => network.slow(&Hosts::new(&host(a), &host(b)), if begins { by } else { Duration::ZERO }),
        Fault::Mangles(mangling) => network.mangle(if begins { mangling } else { Mangling::default() }),
        Fault::Forgets(node) => nodes[node].forgotten(begins),
    }
}

/// What is held, a phrase each.
fn held(router: &Router, hosts: &[HostSlot]) -> Vec<String> {
    let requests = Some(router.under_way()).filter(|n| *n > 0).map(|n| format!("the router has {n} requests under way"));
    requests.into_iter().chain(hosts.iter().filter_map(HostSlot::held)).collect()
}
