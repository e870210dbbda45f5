//! Asks nodes themselves, as a router does.

use overfill_lifecycle::TraceHeaders;
use overfill_proto::v1::node_client::NodeClient;
use overfill_proto::v1::{DecodeEvent, DecodeRequest, NodeStatus, PrefillEvent, PrefillRequest, StatusRequest, call, said};
use overfill_transport::calls::CallEvents;
use overfill_transport::{Connector, Peers};
use overfill_types::{Endpoint, ServiceError};

use crate::security;

/// Events that one call may tell of at most.
const MOST: usize = 10_000;

/// Has a prompt read; over a stream of its own, which lives as long as the call.
///
/// # Errors
/// Why the node has not taken it on.
pub async fn prefill(node: &Endpoint, request: PrefillRequest) -> Result<CallEvents<PrefillEvent>, ServiceError> {
    call(node, call::What::Prefill(request)).await
}

/// Asks for a reservation, as [`prefill`].
///
/// # Errors
/// Why the node has not taken it on.
pub async fn decode(node: &Endpoint, request: DecodeRequest) -> Result<CallEvents<DecodeEvent>, ServiceError> {
    call(node, call::What::Decode(request)).await
}

/// Connects to nodes as processes of this run's clusters do.
pub fn connector() -> Connector {
    Connector::secured(security::peers(&security::peer_flags()))
}

async fn call<E: TryFrom<said::What>>(node: &Endpoint, what: call::What) -> Result<CallEvents<E>, ServiceError> {
    let calls = Peers::new(connector()).calls(node.address.as_str())?;
    calls.begin(what, MOST, TraceHeaders::default()).await.accepted().await
}

/// What a node says of itself.
pub async fn status(node: &Endpoint) -> NodeStatus {
    let mut client = NodeClient::new(connector().connect(node.address.as_str()).unwrap());
    client.status(StatusRequest {}).await.unwrap().into_inner()
}
