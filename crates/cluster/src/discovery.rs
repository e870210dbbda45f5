//! One small interface over the three sources.

use std::sync::Arc;
use std::time::Duration;

use overfill_types::NodeInfo;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::etcd::{Etcd, EtcdSettings};
use crate::memory::Memory;
use crate::snapshot::Snapshot;
use crate::{etcd, fixed};

/// How long a withdrawal may take before the lease's end has to do.
const WITHDRAWAL_LIMIT: Duration = Duration::from_secs(3);

/// Where nodes register and are found: etcd, a fixed list, or this process. Clones share it.
#[derive(Clone)]
pub struct Discovery {
    view: watch::Receiver<Arc<Snapshot>>,
    source: Source,
    /// Keeps the view current; ends with the last clone.
    _follower: Option<Arc<AbortOnDropHandle<()>>>,
}

#[derive(Clone)]
enum Source {
    Memory(Memory),
    Fixed,
    Etcd(Arc<Etcd>),
}

impl Discovery {
    /// Within this process.
    pub fn memory() -> Self {
        let (memory, view) = Memory::new();
        Self { view, source: Source::Memory(memory), _follower: None }
    }

    /// Nodes at known addresses (`host:port`); those that say they are ready are listed. Must be called inside a tokio runtime.
    pub fn fixed(prefill: Vec<String>, decode: Vec<String>) -> Self {
        let (sender, view) = watch::channel(Arc::default());
        let follower = tokio::spawn(fixed::follow(prefill, decode, sender));
        Self { view, source: Source::Fixed, _follower: Some(Arc::new(AbortOnDropHandle::new(follower))) }
    }

    /// An etcd cluster, which need not be there yet. Must be called inside a tokio runtime.
    pub fn etcd(settings: EtcdSettings) -> Self {
        let (sender, view) = watch::channel(Arc::default());
        let etcd = Arc::new(Etcd::new(settings));
        let follower = tokio::spawn(etcd::follow(etcd.clone(), sender));
        Self { view, source: Source::Etcd(etcd), _follower: Some(Arc::new(AbortOnDropHandle::new(follower))) }
    }

    /// The current view, and every later one. Keeps the last view while the source is away.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.view.clone()
    }

    /// Whether etcd answers, where nodes are found there: then the view is current.
    pub fn etcd_connected(&self) -> Option<bool> {
        match &self.source {
            Source::Etcd(etcd) => Some(etcd.connected()),
            Source::Memory(_) | Source::Fixed => None,
        }
    }

    /// Lists a node as ready until the registration is withdrawn or dropped. Returns at once: if the source is away,
    /// it registers when the source comes, and again whenever its entry was lost. With a fixed list there is nothing to do.
    pub fn register(&self, node: NodeInfo) -> Registration {
        let stop = CancellationToken::new();
        let task = match &self.source {
            Source::Fixed => None,
            Source::Memory(memory) => Some(tokio::spawn(memory.clone().hold(node, stop.clone()))),
            Source::Etcd(etcd) => Some(tokio::spawn(etcd::hold(etcd.clone(), node, stop.clone()))),
        };
        Registration { stop, task }
    }
}

/// A node's entry. Dropping it withdraws the entry in the background.
#[must_use = "dropping a registration withdraws the node"]
pub struct Registration {
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Registration {
    /// Waits until the node is not kept registered any more, which nobody has asked for. Never comes where nothing keeps it.
    pub async fn lost(&mut self) {
        match &mut self.task {
            Some(task) => {
                let _ = task.await;
                self.task = None;
            }
            None => std::future::pending().await,
        }
    }

    /// Withdraws the entry and waits (at most some seconds) until it is gone.
    pub async fn withdraw(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take()
            && tokio::time::timeout(WITHDRAWAL_LIMIT, task).await.is_err()
        {
            tracing::warn!("the node could not be withdrawn in time: its lease will end");
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
