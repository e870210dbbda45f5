//! The view: all ready nodes, as known at one moment.

use std::sync::Arc;

use overfill_types::{Endpoint, Fingerprint, Role};
use tokio::sync::watch;

/// All ready nodes, as known at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// In order of node id.
    pub nodes: Vec<Endpoint>,
}

impl Snapshot {
    /// Of these nodes.
    pub fn new(nodes: impl IntoIterator<Item = Endpoint>) -> Self {
        let mut nodes: Vec<Endpoint> = nodes.into_iter().collect();
        nodes.sort_by(|a, b| a.id.cmp(&b.id));
        Self { nodes }
    }

    /// Ready nodes of a role that serve a pair.
    pub fn of<'a>(&'a self, role: Role, fingerprint: &'a Fingerprint) -> impl Iterator<Item = &'a Endpoint> {
        self.nodes.iter().filter(move |n| n.role == role && n.serves(fingerprint))
    }
}

/// Shows `snapshot` to whoever reads the view, if it differs from the last one.
pub(crate) fn publish(view: &watch::Sender<Arc<Snapshot>>, snapshot: Snapshot) {
    view.send_if_modified(|view| {
        let changed = **view != snapshot;
        if changed {
            *view = Arc::new(snapshot);
        }
        changed
    });
}
