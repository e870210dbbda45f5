//! Connections to nodes, one for each address.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use overfill_lifecycle::grpc;
use overfill_types::{Code, Endpoint, PeerAddress, ServiceError};
use tonic::transport::Channel;

use crate::calls::Calls;

/// Addresses that are remembered; beyond it all are forgotten and made anew when needed.
const MOST: usize = 4096;

#[derive(Default)]
pub(crate) struct Peers {
    peers: Mutex<HashMap<PeerAddress, Peer>>,
}

struct Peer {
    channel: Channel,
    calls: Option<Calls>,
}

impl Peers {
    /// The connection to a node; it is made on first use.
    ///
    /// # Errors
    /// [`Code::Internal`] where the node registered an address that is none.
    pub(crate) fn channel(&self, node: &Endpoint) -> Result<Channel, ServiceError> {
        self.with(node, |peer| peer.channel.clone())
    }

    /// The stream of all calls to a node, which is opened on first use.
    ///
    /// # Errors
    /// As [`Self::channel`].
    pub(crate) fn calls(&self, node: &Endpoint) -> Result<Calls, ServiceError> {
        self.with(node, |peer| {
            let calls = peer.calls.take().filter(|calls| !calls.are_over());
            peer.calls.insert(calls.unwrap_or_else(|| Calls::open(peer.channel.clone()))).clone()
        })
    }

    fn with<T>(&self, node: &Endpoint, act: impl FnOnce(&mut Peer) -> T) -> Result<T, ServiceError> {
        // A map of handles is whole whatever panicked beside it.
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get_mut(&node.address) {
            return Ok(act(peer));
        }
        let channel = grpc::channel(node.address.as_str())
            .map_err(|_| ServiceError::new(Code::Internal, format!("{} registered '{}', which is no address", node.id, node.address)))?;
        if peers.len() >= MOST {
            peers.clear();
        }
        Ok(act(peers.entry(node.address.clone()).or_insert(Peer { channel, calls: None })))
    }
}
