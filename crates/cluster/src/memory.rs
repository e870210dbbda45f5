//! The source within one process.

use std::sync::Arc;

use overfill_types::NodeInfo;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::snapshot::Snapshot;

/// Lists the node until `stop`.
pub(crate) async fn hold(view: watch::Sender<Arc<Snapshot>>, node: NodeInfo, stop: CancellationToken) {
    let id = node.id.clone();
    view.send_modify(|view| *view = Arc::new(Snapshot::new(view.nodes.iter().cloned().chain([node]))));
    stop.cancelled().await;
    view.send_modify(|view| *view = Arc::new(Snapshot::new(view.nodes.iter().filter(|n| n.id != id).cloned())));
}

#[cfg(test)]
mod tests {
    use overfill_types::{Fingerprint, NodeId, Role, ServedPair};

    use crate::Discovery;

    #[tokio::test]
    async fn a_node_is_listed_until_it_withdraws() {
        let discovery = Discovery::memory();
        let mut view = discovery.watch();
        let node = |id: &str, role| overfill_types::NodeInfo {
            id: NodeId::new(id),
            role,
            address: "127.0.0.1:1".parse().unwrap(),
            pairs: vec![ServedPair { model: "m".into(), fingerprint: Fingerprint::new("f") }],
            max_context: 8,
        };
        let b = discovery.register(node("b", Role::Decode));
        let a = discovery.register(node("a", Role::Prefill));
        let both = view.wait_for(|v| v.nodes.len() == 2).await.unwrap().clone();
        assert_eq!(both.of(Role::Prefill, &Fingerprint::new("f")).count(), 1);
        assert_eq!(both.of(Role::Prefill, &Fingerprint::new("other")).count(), 0);
        a.withdraw().await;
        assert_eq!(view.borrow_and_update().nodes.len(), 1);
        drop(b);
        view.wait_for(|v| v.nodes.is_empty()).await.unwrap();
    }
}
