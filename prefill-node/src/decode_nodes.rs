//! The decode nodes that this node hands over to: those that discovery knows. Whoever asks this node for a prompt names an
//! address; that alone makes it connect nowhere.

use std::sync::Arc;
use std::time::Duration;

use overfill_cluster::{Discovery, Snapshot};
use overfill_lifecycle::TraceHeaders;
use overfill_nccl::Nccl;
use overfill_proto::v1::{KvFrame, PushSummary};
use overfill_transport::Connector;
use overfill_transport::push::Pushes;
use overfill_transport::push::nccl::{Way, Ways};
use overfill_types::{Code, Fingerprint, Role, ServiceError};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_stream::Stream;

use crate::way::WhyTcp;

/// How long a router may have known a decode node before this node does: as long as etcd's watch may be behind.
const BEHIND: Duration = Duration::from_secs(2);

/// Decode nodes that may be handed over to. Clones share their connections.
#[derive(Clone, Default)]
pub struct DecodeNodes {
    pushes: Pushes,
    /// Those that may; `None`: any that a router names.
    view: Option<watch::Receiver<Arc<Snapshot>>>,
    /// Communicators to those that take rows so; `None`: this node sends none so.
    ways: Option<Ways>,
}

impl DecodeNodes {
    /// Those that `discovery` knows. Must be called inside a tokio runtime.
    pub fn found_by(discovery: &Discovery) -> Self {
        let view = discovery.knows_decode_nodes().then(|| discovery.watch());
        Self { pushes: Pushes::new(discovery.connector(), discovery.within().clone(), discovery.security().is_open()), view, ways: None }
    }

    /// Any that a router names.
    pub fn any(pushes: Pushes) -> Self {
        Self { pushes, view: None, ways: None }
    }

    /// The same, whose rows may go from this GPU to theirs.
    #[must_use]
    pub(crate) fn over(self, nccl: Nccl, connector: Connector) -> Self {
        Self { ways: Some(Ways::new(nccl, connector)), ..self }
    }

    /// Ends the communicators.
    pub(crate) async fn close(&self) {
        if let Some(ways) = &self.ways {
            ways.close().await;
        }
    }

    /// Whether rows may go over NCCL at all.
    pub(crate) fn over_nccl(&self) -> bool {
        self.ways.is_some()
    }

    /// The communicator to the node at `address`, which takes rows of this pair so. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Where there is none yet.
    pub(crate) fn way(&self, address: &str, pair: &Fingerprint) -> Result<Way, WhyTcp> {
        let ways = self.ways.as_ref().ok_or(WhyTcp::NotHere)?;
        if self.view.as_ref().is_some_and(|view| !knows(&view.borrow(), address, pair)) {
            return Err(WhyTcp::Unknown);
        }
        ways.to(address, pair).map_err(WhyTcp::NoWay)
    }

    /// Pushes `frames` of a pair to the node at `address`; returns when it has verified them all.
    ///
    /// # Errors
    /// As [`Pushes::push`], and where no decode node of that pair is known there.
    pub(crate) async fn push(
        &self,
        address: &str,
        fingerprint: &Fingerprint,
        frames: impl Stream<Item = KvFrame> + Send + 'static,
        trace: TraceHeaders,
    ) -> Result<PushSummary, ServiceError> {
        if let Some(mut view) = self.view.clone() {
            let known = view.wait_for(|view| knows(view, address, fingerprint));
            if !timeout(BEHIND, known).await.is_ok_and(|known| known.is_ok()) {
                let message = format!("no decode node of this pair is known at {address}: what is asked for there is not handed over");
                return Err(ServiceError::of_way(Code::Unavailable, message));
            }
        }
        self.pushes.push(address, frames, trace).await
    }
}

/// Whether a decode node of this pair is known at `address`.
fn knows(view: &Snapshot, address: &str, pair: &Fingerprint) -> bool {
    view.of(Role::Decode, pair).any(|node| node.address.as_str() == address)
}

#[cfg(test)]
mod tests {
    use overfill_types::{NodeId, NodeInfo, ServedPair};
    use tokio::net::TcpListener;
    use tokio_stream::empty;

    use super::*;

    async fn error(nodes: &DecodeNodes, address: &str, pair: &str) -> ServiceError {
        nodes.push(address, &Fingerprint::new(pair), empty(), TraceHeaders::default()).await.unwrap_err()
    }

    #[tokio::test]
    async fn nobody_makes_it_connect_to_what_is_no_decode_node_of_the_pair() {
        let discovery = Discovery::memory();
        let nodes = DecodeNodes::found_by(&discovery);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (connects, known) = tokio::join!(timeout(BEHIND * 2, listener.accept()), error(&nodes, &address, "pair"));
        assert!(connects.is_err() && known.message.contains(&address), "{known}");

        let pairs = vec![ServedPair { model: "m".into(), fingerprint: Fingerprint::new("pair") }];
        let info = NodeInfo { id: NodeId::new("d"), role: Role::Decode, address: address.parse().unwrap(), pairs, max_context: 8 };
        let prefill = discovery.register(NodeInfo { id: NodeId::new("p"), role: Role::Prefill, ..info.clone() });
        assert!(error(&nodes, &address, "pair").await.message.contains("is known at"), "it is no decode node");
        // A router may know of it sooner than this node does.
        let registered = async {
            tokio::time::sleep(BEHIND / 4).await;
            discovery.register(info)
        };
        let (accepted, decode, refused) =
            tokio::join!(async { drop(listener.accept().await.unwrap()) }, registered, async { error(&nodes, &address, "pair").await });
        assert!(!refused.message.contains("is known at"), "it was connected to, and hung up: {refused} {accepted:?}");
        assert!(error(&nodes, &address, "other").await.message.contains("is known at"), "it is one of another pair");
        drop((prefill, decode));
    }
}
