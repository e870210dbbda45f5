//! The source that is a list of addresses: each is asked for its status, and listed while it says that it is ready.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use overfill_proto::v1::node_client::NodeClient;
use overfill_proto::v1::{NodeStatus, Phase, StatusRequest};
use overfill_types::{Fingerprint, NodeId, NodeInfo, Role, ServedPair};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::snapshot::Snapshot;

/// Time between two questions.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time for an answer.
const LIMIT: Duration = Duration::from_secs(1);

pub(crate) async fn follow(prefill: Vec<String>, decode: Vec<String>, view: watch::Sender<Arc<Snapshot>>) {
    let nodes: Vec<(Role, String, Channel)> = [(Role::Prefill, prefill), (Role::Decode, decode)]
        .into_iter()
        .flat_map(|(role, addresses)| addresses.into_iter().map(move |a| (role, a)))
        .filter_map(|(role, address)| match Endpoint::from_shared(format!("http://{address}")) {
            Ok(endpoint) => Some((role, address, endpoint.connect_timeout(LIMIT).timeout(LIMIT).connect_lazy())),
            Err(error) => {
                tracing::error!(%address, %error, "no address: left out");
                None
            }
        })
        .collect();
    loop {
        let mut asked = JoinSet::new();
        for (role, address, channel) in nodes.clone() {
            asked.spawn(async move { (address.clone(), ask(role, address, channel).await) });
        }
        let answers: HashMap<String, Option<NodeInfo>> = asked.join_all().await.into_iter().collect();
        let ready = Snapshot::new(answers.into_values().flatten());
        view.send_if_modified(|view| {
            let changed = **view != ready;
            if changed {
                *view = Arc::new(ready);
            }
            changed
        });
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn ask(role: Role, address: String, channel: Channel) -> Option<NodeInfo> {
    let status = NodeClient::new(channel).status(StatusRequest {}).await;
    let status: NodeStatus = status.ok()?.into_inner();
    (status.phase() == Phase::Ready).then(|| NodeInfo {
        id: NodeId::new(status.node_id),
        role,
        address,
        pairs: status.pairs.into_iter().map(|p| ServedPair { model: p.model, fingerprint: Fingerprint::new(p.fingerprint) }).collect(),
        max_context: status.max_context as usize,
    })
}
