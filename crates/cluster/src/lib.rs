//! How nodes find each other: registration and a watched, cached view. The only home of etcd.

use std::sync::Arc;

use overfill_types::{Endpoint, Fingerprint, NodeInfo, Role};
use tokio::sync::watch;

/// All ready nodes, as known at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// In order of node id.
    pub nodes: Vec<Endpoint>,
}

impl Snapshot {
    /// Ready nodes of a role that serve a pair.
    pub fn of<'a>(&'a self, role: Role, fingerprint: &'a Fingerprint) -> impl Iterator<Item = &'a Endpoint> {
        self.nodes.iter().filter(move |n| n.role == role && n.fingerprint == *fingerprint)
    }
}

/// Where nodes register and are found: etcd, a fixed list, or this process. Clones share it.
#[derive(Clone)]
pub struct Discovery {}

#[allow(unused_variables)]
impl Discovery {
    /// Within this process.
    pub fn memory() -> Self {
        todo!()
    }

    /// The current view, and every later one. Keeps the last view while the source is away.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        todo!()
    }

    /// Lists a node as ready until the registration is withdrawn or dropped. Returns at once: if the source is away,
    /// it registers when the source comes, and again whenever its entry was lost.
    pub fn register(&self, node: NodeInfo) -> Registration {
        todo!()
    }
}

/// A node's entry. Dropping it withdraws the entry in the background.
pub struct Registration {}

impl Registration {
    /// Withdraws the entry and waits (with a limit of a few seconds) until it is gone.
    pub async fn withdraw(self) {
        todo!()
    }
}
