//! What nodes say of themselves: one stream a node, for as long as it is listed.
//!
//! A stream that breaks or falls silent is begun anew after a pause that grows. Until then the scheduler goes by what this
//! router has under way itself.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use overfill_lifecycle::status::HEARTBEAT;
use overfill_proto::v1::decode_client::DecodeClient;
use overfill_proto::v1::prefill_client::PrefillClient;
use overfill_proto::v1::{NodeStatus, StatusRequest};
use overfill_schedule::Report;
use overfill_types::{Endpoint, NodeId, Role, ServiceError};
use tokio::time::{interval, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};

use crate::Router;

/// Silence after which a stream is given up.
const SILENCE: Duration = HEARTBEAT.saturating_mul(3);
/// Pauses before a stream is begun anew: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How often those who wait are looked at although nothing was told: what is known grows old.
const LOOK: Duration = Duration::from_millis(250);

/// Keeps a stream to each node of the view. Never ends.
pub(crate) async fn follow(router: Arc<Router>) {
    let mut view = router.view.clone();
    // As many as the view has nodes.
    let mut streams: HashMap<NodeId, AbortOnDropHandle<()>> = HashMap::new();
    let mut looks = interval(LOOK);
    loop {
        let nodes = view.borrow_and_update().clone();
        streams.retain(|id, _| nodes.nodes.binary_search_by(|node| node.id.cmp(id)).is_ok());
        for node in &nodes.nodes {
            let stream = || AbortOnDropHandle::new(tokio::spawn(listen(router.clone(), node.clone())));
            streams.entry(node.id.clone()).or_insert_with(stream);
        }
        router.pairing.serve();
        loop {
            tokio::select! {
                changed = view.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                _ = looks.tick() => router.pairing.serve(),
            }
        }
    }
}

async fn listen(router: Arc<Router>, node: Endpoint) {
    let mut pause = PAUSES.0;
    loop {
        if let Ok(Ok(Ok(mut stream))) = timeout(SILENCE, open(&router, &node)).await {
            while let Ok(Ok(Some(status))) = timeout(SILENCE, stream.message()).await {
                router.pairing.told(&node.id, report(&status));
                pause = PAUSES.0;
            }
        }
        // Of different length, so that routers do not come all at once.
        sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

async fn open(router: &Router, node: &Endpoint) -> Result<Result<Streaming<NodeStatus>, Status>, ServiceError> {
    let channel = router.peers.channel(node)?;
    let opened = match node.role {
        Role::Prefill => PrefillClient::new(channel).watch_status(StatusRequest {}).await,
        Role::Decode => DecodeClient::new(channel).watch_status(StatusRequest {}).await,
    };
    Ok(opened.map(tonic::Response::into_inner))
}

fn report(status: &NodeStatus) -> Report {
    Report {
        sequences: status.sequences.into(),
        sequences_most: status.sequences_most.into(),
        unread_tokens: status.unread_tokens,
        unread_tokens_most: status.unread_tokens_most,
        block_tokens: status.block_tokens.into(),
        blocks: status.blocks_total,
        blocks_held: status.blocks_held,
        promised: status.blocks_promised,
        promised_most: status.blocks_promised_most,
        prefix_blocks_most: status.prefix_blocks_most,
    }
}
