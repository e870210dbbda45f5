//! Asks nodes themselves, as a router does.

use overfill_lifecycle::TraceHeaders;
use overfill_proto::v1::node_client::NodeClient;
use overfill_proto::v1::{DecodeEvent, DecodeRequest, NodeStatus, PrefillEvent, PrefillRequest, StatusRequest, call, said};
use overfill_transport::Peers;
use overfill_transport::calls::CallEvents;
use overfill_types::{Endpoint, ServiceError};

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

async fn call<E: TryFrom<said::What>>(node: &Endpoint, what: call::What) -> Result<CallEvents<E>, ServiceError> {
    let calls = Peers::default().calls(node.address.as_str())?;
    calls.begin(what, MOST, TraceHeaders::default()).await.accepted().await
}

/// What a node says of itself.
pub async fn status(node: &Endpoint) -> NodeStatus {
    let mut client = NodeClient::connect(format!("http://{}", node.address)).await.unwrap();
    client.status(StatusRequest {}).await.unwrap().into_inner()
}
