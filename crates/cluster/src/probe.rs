//! Asking a node for its status: whether a process answers at its address, which one, and whether it is ready.

use std::error::Error;
use std::io::ErrorKind;
use std::time::Duration;

use overfill_proto::v1::node_client::NodeClient;
use overfill_proto::v1::{self, NodeStatus, Phase, StatusRequest};
use overfill_transport::Connector;
use overfill_types::{Fingerprint, NodeId, NodeInfo, PeerAddress, Role, ServedPair};
use tokio::time::timeout;

/// Time for an answer, connecting included.
const LIMIT: Duration = Duration::from_secs(1);

/// Why there is no status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoStatus {
    /// Nobody listens there.
    Refused,
    /// No answer in time, or one that no node of this role gives.
    Silent,
}

/// The node that is ready there; `None` where one answers that is not.
pub(crate) type Reply = Result<Option<NodeInfo>, NoStatus>;

/// What the node at `address` says of itself. The connection is a new one each time: whether one can be made is part of
/// what is asked.
pub(crate) async fn ask(connector: &Connector, role: Role, address: &PeerAddress) -> Reply {
    let said = match role {
        Role::Prefill => v1::Role::Prefill,
        Role::Decode => v1::Role::Decode,
    };
    match timeout(LIMIT, status(connector, address)).await {
        Ok(Ok(status)) if status.role() == said => Ok(ready(status, role, address)),
        Ok(Ok(_)) => Err(NoStatus::Silent),
        Ok(Err(error)) if refused(&*error) => Err(NoStatus::Refused),
        Ok(Err(error)) => {
            tracing::debug!(%address, error, "a node gives no status");
            Err(NoStatus::Silent)
        }
        Err(_) => Err(NoStatus::Silent),
    }
}

/// The node, where it says that it is ready.
fn ready(status: NodeStatus, role: Role, address: &PeerAddress) -> Option<NodeInfo> {
    (status.phase() == Phase::Ready).then(|| NodeInfo {
        id: NodeId::new(status.node_id),
        role,
        address: address.clone(),
        pairs: status.pairs.into_iter().map(|p| ServedPair { model: p.model, fingerprint: Fingerprint::new(p.fingerprint) }).collect(),
        max_context: status.max_context as usize,
    })
}

async fn status(connector: &Connector, address: &PeerAddress) -> Result<NodeStatus, Box<dyn Error + Send + Sync>> {
    let channel = connector.connect(address.as_str())?;
    Ok(NodeClient::new(channel).status(StatusRequest {}).await?.into_inner())
}

/// Whether a refused connection is at the root of it.
fn refused(error: &(dyn Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.filter_map(|error| error.downcast_ref::<std::io::Error>()).any(|error| error.kind() == ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_closed_port_is_told_from_silence() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: PeerAddress = listener.local_addr().unwrap().to_string().parse().unwrap();
        for role in [Role::Prefill, Role::Decode] {
            let begun = Instant::now();
            assert_eq!(ask(&Connector::default(), role, &address).await.unwrap_err(), NoStatus::Silent, "it is bound, and nobody accepts");
            assert!(begun.elapsed() >= LIMIT);
        }
        drop(listener);
        assert_eq!(ask(&Connector::default(), Role::Decode, &address).await.unwrap_err(), NoStatus::Refused);
    }
}
