//! A host of the cluster: the node that runs there, whatever becomes of it, and its entry in etcd.
//!
//! A process that ends is followed by another one, as a supervisor would see to it. What etcd lists is what nodes have registered:
//! an entry outlives a node that died by a lease, and etcd may forget one that lives.

use std::time::Duration;

use clap::Parser;
use overfill_cluster::{Discovery, Registration};
use overfill_prefill_node::DecodeNodes;
use overfill_transport::push::{Pushes, Within};
use overfill_types::{NodeId, Role};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::network::{Listening, Network};
use crate::node::{self, Node, Pair};
use crate::plan::{BLOCK, NodePlan};

/// How long a supervisor takes to start the next process.
const RESTARTS: Duration = Duration::from_secs(1);
/// The longest that an entry outlives its node.
const LEASE: Duration = Duration::from_secs(5);

/// A router's name in the network.
pub(crate) fn router(number: usize) -> String {
    format!("router-{number}")
}

/// Where a host's node is reached.
pub(crate) fn address(number: usize) -> String {
    format!("10.0.0.{}:7000", number + 1)
}

/// A host.
pub(crate) struct HostSlot {
    number: usize,
    plan: NodePlan,
    network: Network,
    etcd: Discovery,
    random: StdRng,
    starts: usize,
    running: Option<Running>,
    /// When the next process starts, where none runs.
    back: Instant,
    forgotten: watch::Sender<bool>,
}

/// A process. What comes first ends first: nobody reaches a node that is gone.
struct Running {
    _listening: Listening,
    _lives: DropGuard,
    node: Node,
}

impl HostSlot {
    pub(crate) fn new(number: usize, plan: NodePlan, network: Network, etcd: Discovery, seed: u64) -> Self {
        let (random, forgotten) = (StdRng::seed_from_u64(seed), watch::Sender::new(false));
        Self { number, plan, network, etcd, random, starts: 0, running: None, back: Instant::now(), forgotten }
    }

    pub(crate) async fn start(&mut self, pairs: &[Pair]) {
        self.starts += 1;
        let (at, own) = (address(self.number), Discovery::memory());
        let NodePlan { role, pairs: served, blocks, step, reservation, chunk, step_timeout } = &self.plan;
        let plan = node::Plan {
            id: NodeId::new(format!("{role}-{}-{}", self.number, self.starts)),
            address: at.parse().expect("it is one"),
            discovery: own.clone(),
            blocks: *blocks as u32,
            step: *step..*step * 2,
            random: StdRng::seed_from_u64(self.random.random()),
        };
        let block = BLOCK.to_string();
        let common = ["node", "--pair", "opened", "--drain-timeout", "5", "--block-tokens", &block];
        let step_timeout = step_timeout.as_secs().to_string();
        let flags = common.into_iter().chain(["--step-timeout", &step_timeout]);
        let node = match role {
            Role::Prefill => {
                let chunk = chunk.to_string();
                let cli = overfill_prefill_node::config::Cli::parse_from(flags.chain(["--chunk-tokens", &chunk]));
                Node::prefill(
                    &cli.config,
                    pairs,
                    DecodeNodes::any(Pushes::new(self.network.connector(&at), Within::default(), false)),
                    plan,
                )
                .await
            }
            Role::Decode => {
                let reservation = reservation.as_secs().to_string();
                let cli = overfill_decode_node::config::Cli::parse_from(flags.chain(["--reservation-timeout", &reservation]));
                Node::decode(&cli.config, &pairs[served[0]], plan).await
            }
        };
        let (lives, lease) = (CancellationToken::new(), LEASE.mul_f64(self.random.random_range(0.0..1.0)));
        let (etcd, forgotten, died) = (self.etcd.clone(), self.forgotten.subscribe(), lives.clone());
        // Ends with the lease that outlives the node.
        tokio::spawn(async move {
            let _entry = list(own, etcd, forgotten, died).await;
            sleep(lease).await;
        });
        let _listening = self.network.listen(&at, node.routes.clone());
        self.running = Some(Running { _listening, _lives: lives.drop_guard(), node });
    }

    /// Starts the next process when the one before has ended, and it is time.
    pub(crate) async fn keep_up(&mut self, pairs: &[Pair]) {
        if self.running.as_ref().is_some_and(|running| running.node.is_over()) {
            self.end(RESTARTS);
        }
        if self.running.is_none() && self.back <= Instant::now() {
            self.start(pairs).await;
        }
    }

    /// Its process is gone, and there is no other one for a while.
    pub(crate) fn die(&mut self, lasts: Duration) {
        self.end(lasts);
    }

    fn end(&mut self, lasts: Duration) {
        self.back = self.back.max(Instant::now() + lasts);
        self.running = None;
    }

    pub(crate) fn hang(&self) {
        self.running.iter().for_each(|running| running.node.hang());
    }

    pub(crate) fn drain(&self) {
        self.running.iter().for_each(|running| running.node.drain());
    }

    pub(crate) fn forgotten(&self, forgotten: bool) {
        self.forgotten.send_replace(forgotten);
    }

    /// What its node holds, as a phrase, or that there is none.
    pub(crate) fn held(&self) -> Option<String> {
        let Some(Running { node, .. }) = &self.running else { return Some(format!("node {} does not run", self.number)) };
        let (sequences, blocks) = (node.held(), node.blocks.held());
        (sequences + blocks > 0).then(|| format!("node {} holds {sequences} sequences and {blocks} blocks", self.number))
    }
}

/// Lists in `etcd` what a node has registered (`own`), unless etcd has forgotten it, until it has `died`. Gives what is listed then.
async fn list(own: Discovery, etcd: Discovery, mut forgotten: watch::Receiver<bool>, died: CancellationToken) -> Option<Registration> {
    let mut view = own.watch();
    let mut entry: Option<Registration> = None;
    loop {
        let node = view.borrow_and_update().nodes.first().cloned().filter(|_| !*forgotten.borrow_and_update());
        match node {
            None => entry = None,
            Some(node) => {
                entry.get_or_insert_with(|| etcd.register(node));
            }
        }
        tokio::select! {
            biased;
            () = died.cancelled() => return entry,
            Ok(()) = view.changed() => {}
            Ok(()) = forgotten.changed() => {}
        }
    }
}
