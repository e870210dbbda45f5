//! The source that is an etcd cluster: a key under a lease for each node, and a watch over all of them.
//!
//! etcd may come later than the nodes and may go away while they serve. A lost lease is granted anew, a broken watch lists
//! and watches again; nothing needs a restart. Nodes that are missing from a new list may just not have had the time to
//! register again, so they stay in the view for a while.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions, Error, EventType, GetOptions, PutOptions, WatchOptions};
use overfill_types::NodeInfo;
use rand::Rng;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::snapshot::Snapshot;

/// Time for one answer of etcd.
const LIMIT: Duration = Duration::from_secs(2);
/// How often a silent connection is tried. etcd breaks off those that are tried more often than every 5 s
/// (its `--grpc-keepalive-min-time`), or while nothing is asked on them.
const KEEP_ALIVE: Duration = Duration::from_secs(6);
/// Longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Which etcd, and how.
#[derive(Clone, Debug)]
pub struct EtcdSettings {
    /// `host:port` of its members.
    pub endpoints: Vec<String>,
    /// Nodes of other clusters are not seen.
    pub cluster: String,
    /// How long a node that died stays listed.
    pub lease_ttl: Duration,
}

pub(crate) struct Etcd {
    settings: EtcdSettings,
    /// Whether the watch is up.
    connected: AtomicBool,
}

impl Etcd {
    pub(crate) fn new(settings: EtcdSettings) -> Self {
        Self { settings, connected: AtomicBool::new(false) }
    }

    /// Whether it answers, and the view is current.
    pub(crate) fn connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    async fn connect(&self) -> Result<Client, Error> {
        let options = ConnectOptions::new()
            .with_connect_timeout(LIMIT)
            .with_timeout(LIMIT)
            .with_keep_alive(KEEP_ALIVE, LIMIT)
            .with_keep_alive_while_idle(false);
        within(Client::connect(&self.settings.endpoints, Some(options))).await
    }

    /// Prefix of all nodes' keys.
    fn prefix(&self) -> String {
        format!("/overfill/{}/nodes/", self.settings.cluster)
    }
}

/// An answer within [`LIMIT`], or an error: a stopped etcd is silent.
async fn within<T>(answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match timeout(LIMIT, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::IoError(std::io::Error::new(std::io::ErrorKind::TimedOut, "etcd did not answer in time"))),
    }
}

/// A pause that grows with each failure, and differs between nodes so that they do not all come back at once.
fn pause(failures: u32) -> Duration {
    let longest = LONGEST_WAIT.min(Duration::from_millis(50) * 2u32.saturating_pow(failures.min(10)));
    longest.mul_f64(rand::rng().random_range(0.5..1.0))
}

/// Keeps `node` registered until `stop`.
pub(crate) async fn hold(etcd: Arc<Etcd>, node: NodeInfo, stop: CancellationToken) {
    let key = format!("{}{}/{}", etcd.prefix(), node.role, node.id);
    let value = match serde_json::to_string(&node) {
        Ok(value) => value,
        Err(error) => {
            tracing::error!(%error, "the node cannot be written as JSON");
            return;
        }
    };
    let mut failures = 0;
    loop {
        let mut registered = false;
        match hold_lease(&etcd, &key, &value, &stop, &mut registered).await {
            Ok(()) => return,
            Err(error) => tracing::warn!(%key, %error, "registration lost: trying again"),
        }
        failures = if registered { 0 } else { failures + 1 };
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause(failures)) => {}
        }
    }
}

/// Registers under a new lease and keeps it alive; `Ok` after `stop`.
async fn hold_lease(etcd: &Etcd, key: &str, value: &str, stop: &CancellationToken, registered: &mut bool) -> Result<(), Error> {
    let ttl = etcd.settings.lease_ttl;
    let begin = async {
        let mut client = etcd.connect().await?;
        let lease = within(client.lease_grant(ttl.as_secs().max(1) as i64, None)).await?.id();
        within(client.put(key, value, Some(PutOptions::new().with_lease(lease)))).await?;
        let keeper = within(client.lease_keep_alive(lease)).await?;
        Ok::<_, Error>((client, lease, keeper))
    };
    let (mut client, lease, (mut keeper, mut answers)) = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        begun = begin => begun?,
    };
    *registered = true;
    tracing::info!(%key, lease, "registered");
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            () = sleep(ttl / 3) => {}
        }
        within(keeper.keep_alive()).await?;
        let alive = within(answers.message()).await?.is_some_and(|answer| answer.ttl() > 0);
        if !alive {
            return Err(Error::LeaseKeepAliveError(format!("lease {lease} has ended")));
        }
    }
    within(client.lease_revoke(lease)).await?;
    tracing::info!(%key, "withdrawn");
    Ok(())
}

/// Keeps the view current, for as long as it runs.
pub(crate) async fn follow(etcd: Arc<Etcd>, view: watch::Sender<Arc<Snapshot>>) {
    let mut nodes = Nodes { known: HashMap::new(), grace: etcd.settings.lease_ttl * 2 };
    let mut failures = 0;
    loop {
        let mut listed = false;
        if let Err(error) = list_and_watch(&etcd, &mut nodes, &view, &mut listed).await {
            tracing::warn!(%error, nodes = nodes.known.len(), "etcd is away: the last view stays");
        }
        etcd.connected.store(false, Ordering::Relaxed);
        failures = if listed { 0 } else { failures + 1 };
        sleep(pause(failures)).await;
    }
}

/// The nodes by key, and for each that was missing from the last list when to give it up.
struct Nodes {
    known: HashMap<String, (NodeInfo, Option<Instant>)>,
    grace: Duration,
}

impl Nodes {
    fn listed(&mut self, listed: HashMap<String, NodeInfo>, now: Instant) {
        for (key, (_, doubt)) in &mut self.known {
            if !listed.contains_key(key) && doubt.is_none() {
                *doubt = Some(now + self.grace);
            }
        }
        self.known.extend(listed.into_iter().map(|(key, node)| (key, (node, None))));
    }

    fn give_up_the_missing(&mut self, now: Instant) {
        self.known.retain(|_, (_, doubt)| doubt.is_none_or(|until| until > now));
    }

    fn next_to_give_up(&self) -> Option<Instant> {
        self.known.values().filter_map(|(_, doubt)| *doubt).min()
    }

    fn publish(&self, view: &watch::Sender<Arc<Snapshot>>) {
        let snapshot = Snapshot::new(self.known.values().map(|(node, _)| node.clone()));
        view.send_if_modified(|view| {
            let changed = **view != snapshot;
            if changed {
                *view = Arc::new(snapshot);
            }
            changed
        });
    }
}

/// Lists all nodes, then follows every change. Returns where the watch ended (etcd went away, or compacted what was due).
async fn list_and_watch(etcd: &Etcd, nodes: &mut Nodes, view: &watch::Sender<Arc<Snapshot>>, listed: &mut bool) -> Result<(), Error> {
    let mut client = etcd.connect().await?;
    let prefix = etcd.prefix();
    let list = within(client.get(prefix.as_str(), Some(GetOptions::new().with_prefix()))).await?;
    let revision = list.header().map_or(0, |h| h.revision());
    let entries = list.kvs().iter().filter_map(|kv| parse(kv.key(), kv.value())).collect();
    nodes.listed(entries, Instant::now());
    nodes.publish(view);
    *listed = true;
    let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
    let mut changes = within(client.watch(prefix.as_str(), Some(options))).await?;
    etcd.connected.store(true, Ordering::Relaxed);
    loop {
        let wake = nodes.next_to_give_up().map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        let change = tokio::select! {
            change = changes.message() => change?,
            () = sleep(wake) => {
                nodes.give_up_the_missing(Instant::now());
                nodes.publish(view);
                continue;
            }
        };
        let Some(change) = change.filter(|c| !c.canceled()) else { return Ok(()) };
        for event in change.events() {
            let Some(kv) = event.kv() else { continue };
            match event.event_type() {
                EventType::Put => nodes.known.extend(parse(kv.key(), kv.value()).map(|(key, node)| (key, (node, None)))),
                EventType::Delete => {
                    nodes.known.remove(&*String::from_utf8_lossy(kv.key()));
                }
            }
        }
        nodes.publish(view);
    }
}

/// A node's key and what it says; `None` for what is no node's.
fn parse(key: &[u8], value: &[u8]) -> Option<(String, NodeInfo)> {
    let key = String::from_utf8_lossy(key).into_owned();
    match serde_json::from_slice(value) {
        Ok(node) => Some((key, node)),
        Err(error) => {
            tracing::warn!(%key, %error, "a value that is no node: left out");
            None
        }
    }
}
