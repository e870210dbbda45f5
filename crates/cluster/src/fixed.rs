//! The source that is a list of addresses: each is asked for its status, and listed while it says that it is ready.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use overfill_proto::v1::Phase;
use overfill_transport::Connector;
use overfill_types::{Fingerprint, NodeId, NodeInfo, PeerAddress, Role, ServedPair};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::probe;
use crate::snapshot::{Snapshot, publish};

/// Time between two questions.
const INTERVAL: Duration = Duration::from_secs(1);

/// The addresses of a fixed list, by what they hold.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    pub(crate) prefill: Vec<PeerAddress>,
    pub(crate) decode: Vec<PeerAddress>,
}

/// Keeps the view current, for as long as it runs.
pub(crate) async fn follow(addresses: Addresses, connector: Connector, view: watch::Sender<Arc<Snapshot>>) {
    let Addresses { prefill, decode } = addresses;
    let of = |role, addresses: Vec<PeerAddress>| addresses.into_iter().map(move |address| (role, address));
    let nodes: BTreeSet<(Role, PeerAddress)> = of(Role::Prefill, prefill).chain(of(Role::Decode, decode)).collect();
    loop {
        // As many at a time as were named.
        let asked: JoinSet<_> = nodes.iter().cloned().map(|(role, address)| ask(connector.clone(), role, address)).collect();
        publish(&view, Snapshot::new(asked.join_all().await.into_iter().flatten()));
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn ask(connector: Connector, role: Role, address: PeerAddress) -> Option<NodeInfo> {
    let status = probe::ask(&connector, role, &address).await.ok()?;
    (status.phase() == Phase::Ready).then(|| NodeInfo {
        id: NodeId::new(status.node_id),
        role,
        address,
        pairs: status.pairs.into_iter().map(|p| ServedPair { model: p.model, fingerprint: Fingerprint::new(p.fingerprint) }).collect(),
        max_context: status.max_context as usize,
    })
}
