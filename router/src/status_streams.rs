//! What nodes say of themselves: one stream a node, for as long as it is listed. While a stream is broken the scheduler goes by
//! what this router has under way itself.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use overfill_proto::v1::{NodeStatus, Phase};
use overfill_schedule::Report;
use overfill_transport::node_status;
use overfill_types::NodeId;
use tokio::time::interval;
use tokio_util::task::AbortOnDropHandle;

use crate::Router;

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
        router.nodes.listed(&nodes.nodes);
        streams.retain(|id, _| nodes.nodes.binary_search_by(|node| node.id.cmp(id)).is_ok());
        for node in &nodes.nodes {
            let stream = || {
                let (router, node) = (router.clone(), node.clone());
                AbortOnDropHandle::new(tokio::spawn(async move {
                    let told = |told: NodeStatus| {
                        router.nodes.told(&node.id, &told);
                        router.suspicions.told(told.refused_prompts.iter().map(|prompt| &prompt[..]));
                        match told.phase() {
                            Phase::Ready => router.pairing.told(&node.id, report(&told)),
                            // It drains, or its engine has died: the view lets go of it any moment.
                            _ => router.pairing.suspect(&node.id),
                        }
                    };
                    node_status::follow(&router.peers, node.address.as_str(), told, || router.nodes.lost(&node.id)).await;
                }))
            };
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
