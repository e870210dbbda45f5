//! Carries out a plan: starts routers and nodes, lets clients ask, lets things go wrong, and notes what came of it.

use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
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
use crate::hosts::{self, HostSlot, address};
use crate::invariants;
use crate::mangle::Mangling;
use crate::network::{Hosts, Network};
use crate::node::Pair;
use crate::plan::{Fault, Plan};
use crate::tap::{NodeCall, Silence};

/// How often it is looked whether a node has ended, and whether all is over.
const LOOK: Duration = Duration::from_millis(100);
/// How long after the last answer something may still be held: nodes notice that a reader has gone when its connection tells
/// them, or their reservation runs out.
const SETTLES: Duration = Duration::from_secs(30);

/// What all seeds share, opened once: that takes longer than a seed.
pub struct Shared {
    pairs: Vec<Pair>,
    models: Models,
    keys: PathBuf,
    _tiny: Vec<TinyPair>,
    _folder: TempDir,
}

impl Shared {
    /// Opens it.
    pub fn open() -> Self {
        // Another seed makes another pair; that their full models differ is nowhere looked at.
        let tiny: Vec<TinyPair> =
            (0..2).map(|number| tiny::pair_named(&client::pair(number), tiny::Kind::Identity, number as u64)).collect();
        let folders: Vec<PathBuf> = tiny.iter().map(|pair| pair.dir.clone()).collect();
        let cli = overfill_router::config::Cli::parse_from(["router", "--pair", "opened"]);
        let config = RouterConfig::new(folders, cli.bounds);
        let models = Models::open(&config).expect("tiny pairs can be opened");
        let pair = |(number, tiny): (usize, &TinyPair)| {
            let opened = tiny.open();
            Pair { number, guides: Guides::open(&opened.dir, &opened.manifest, &config.guides), manifest: opened.manifest }
        };
        let pairs = tiny.iter().enumerate().map(pair).collect();
        let folder = tempfile::tempdir().expect("there is a folder for the clients' keys");
        let keys = folder.path().join("keys.json");
        std::fs::write(&keys, client::keys()).expect("they can be written");
        Self { pairs, models, keys, _tiny: tiny, _folder: folder }
    }
}

/// What came of a plan.
pub struct Outcome {
    /// The plan.
    pub plan: Plan,
    /// The pairs that were served.
    pub manifests: Vec<PairManifest>,
    /// When the times of the plan began, since the simulation did.
    pub begun: Duration,
    /// What came of each request.
    pub answers: Vec<Answer>,
    /// What routers asked nodes.
    pub calls: Vec<NodeCall>,
    /// When routers and nodes heard nobody.
    pub silences: Vec<Silence>,
    /// What was still held when all was over.
    pub held: Vec<String>,
}

impl Outcome {
    /// A number that says all that came of it: two runs of one seed have the same.
    fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        format!("{:?} {:?}", self.answers, self.calls).hash(&mut hasher);
        hasher.finish()
    }
}

/// Runs a seed, and checks what has to hold. Gives a digest of all that came of it.
///
/// # Errors
/// What does not hold, with the plan.
pub fn simulate(shared: &Shared, seed: u64) -> Result<String, String> {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().map_err(|e| e.to_string())?;
    let plan = Plan::of(seed);
    let outcome = runtime.block_on(carry_out(shared, plan));
    invariants::check(&outcome).map(|()| format!("{:016x}", outcome.digest())).map_err(|mut told| {
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
    let pairs = &shared.pairs[..plan.pairs];
    let routers: Vec<Arc<Router>> = (0..plan.routers).map(|number| router(shared, &plan, number, &network, &discovery)).collect();
    let following: Vec<_> = routers.iter().map(|router| AbortOnDropHandle::new(tokio::spawn(router.clone().follow()))).collect();
    let mut random = StdRng::seed_from_u64(plan.seed ^ 1);
    let mut hosts: Vec<HostSlot> = Vec::new();
    for (number, node) in plan.nodes.iter().enumerate() {
        let mut slot = HostSlot::new(number, node.clone(), network.clone(), discovery.clone(), random.random());
        slot.start(pairs).await;
        hosts.push(slot);
    }
    let listed = discovery.watch().wait_for(|view| view.nodes.len() == plan.nodes.len()).await.is_ok();
    assert!(listed, "all nodes are listed");
    let (begun, mut asking) = (Instant::now(), JoinSet::new());
    let begun_after = network.tap.now();
    for (number, request) in plan.requests.iter().enumerate() {
        let (door, request) = (routers[request.router].grpc(), request.clone());
        asking.spawn(async move { client::ask(door, number, &request, begun).await });
    }
    let mut answers = Vec::new();
    let mut faults = timeline(&plan);
    while !asking.is_empty() || !faults.is_empty() {
        while let Some((_, fault, begins)) = faults.pop_if(|(at, ..)| begun + *at <= Instant::now()) {
            happen(&plan.faults[fault].what, begins, plan.faults[fault].lasts, &network, &mut hosts, plan.routers);
        }
        for slot in &mut hosts {
            slot.keep_up(pairs).await;
        }
        let next = faults.last().map_or(LOOK, |(at, ..)| (begun + *at).saturating_duration_since(Instant::now()).min(LOOK));
        tokio::select! {
            Some(answer) = asking.join_next() => answers.push(answer.expect("clients do not panic")),
            () = sleep(next) => {}
        }
    }
    let settled = Instant::now();
    let mut held = held(&routers, &hosts);
    while !held.is_empty() && settled.elapsed() < SETTLES {
        sleep(LOOK).await;
        for slot in &mut hosts {
            slot.keep_up(pairs).await;
        }
        held = self::held(&routers, &hosts);
    }
    let (calls, silences) = (network.tap.calls(), network.tap.silences());
    drop((following, hosts, routers));
    sleep(SETTLES).await;
    let tasks = Handle::current().metrics().num_alive_tasks();
    if tasks > 0 {
        held.push(format!("{tasks} tasks run when everything has ended"));
    }
    let manifests = pairs.iter().map(|pair| pair.manifest.clone()).collect();
    Outcome { manifests, begun: begun_after, plan, answers, calls, silences, held }
}

fn router(shared: &Shared, plan: &Plan, number: usize, network: &Network, discovery: &Discovery) -> Arc<Router> {
    let cli = overfill_router::config::Cli::parse_from(["router", "--pair", "opened"]);
    let config =
        RouterConfig { queue_timeout: plan.queue_timeout, keys: Some(shared.keys.clone()), ..RouterConfig::new(cli.pair, cli.bounds) };
    Router::new(config, shared.models.clone(), discovery, network.connector(&hosts::router(number)), Drain::new())
        .expect("a router can be made")
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
fn happen(fault: &Fault, begins: bool, lasts: Duration, network: &Network, nodes: &mut [HostSlot], routers: usize) {
    let host = |number: usize| number.checked_sub(nodes.len()).map_or_else(|| address(number), hosts::router);
    let between = |a: usize, b: usize| Hosts::new(&host(a), &host(b));
    let passes = |a, b| if begins { network.cut(&between(a, b)) } else { network.heal(&between(a, b)) };
    match *fault {
        Fault::Cut(a, b) => passes(a, b),
        Fault::Vanishes(node) => (0..nodes.len() + routers).filter(|other| *other != node).for_each(|other| passes(node, other)),
        Fault::Slow(a, b, by) => network.slow(&between(a, b), if begins { by } else { Duration::ZERO }),
        _ => {}
    }
    match *fault {
        Fault::Dies(node) | Fault::Vanishes(node) if begins => nodes[node].die(lasts),
        Fault::Hangs(node) if begins => nodes[node].hang(),
        Fault::Drains(node) if begins => nodes[node].drain(),
        Fault::Mangles(mangling) => network.mangle(if begins { mangling } else { Mangling::default() }),
        Fault::Forgets(node) => nodes[node].forgotten(begins),
        _ => {}
    }
}

/// What is held, a phrase each.
fn held(routers: &[Arc<Router>], hosts: &[HostSlot]) -> Vec<String> {
    let requests = routers.iter().map(|router| router.under_way()).enumerate().filter(|(_, requests)| *requests > 0);
    let requests = requests.map(|(number, requests)| format!("router {number} has {requests} requests under way"));
    requests.chain(hosts.iter().filter_map(HostSlot::held)).collect()
}
