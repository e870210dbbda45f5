//! Connections to nodes that are kept, one for each address.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use overfill_types::ServiceError;

use crate::calls::Calls;
use crate::connection::{Channel, Connector};

/// Addresses that are remembered. Beyond it those are forgotten that have no call, and are made anew when needed: nodes that
/// have gone, and in a larger cluster the idle ones.
const MOST: usize = 16_384;

/// What a router has open to nodes.
#[derive(Default)]
pub struct Peers {
    connector: Connector,
    peers: Mutex<HashMap<String, Peer>>,
}

struct Peer {
    channel: Channel,
    calls: Option<Calls>,
}

impl Peers {
    /// Whose connections `connector` makes.
    pub fn new(connector: Connector) -> Self {
        Self { connector, peers: Mutex::default() }
    }

    /// The connection to the node at `address` (`host:port`); it is made on first use.
    ///
    /// # Errors
    /// Where that is no address.
    pub fn channel(&self, address: &str) -> Result<Channel, ServiceError> {
        self.with(address, |peer| peer.channel.clone())
    }

    /// The stream of all calls to the node at `address`, which is opened on first use.
    ///
    /// # Errors
    /// Where that is no address.
    pub fn calls(&self, address: &str) -> Result<Calls, ServiceError> {
        self.with(address, |peer| {
            let calls = peer.calls.take().filter(|calls| !calls.are_over());
            peer.calls.insert(calls.unwrap_or_else(|| Calls::open(peer.channel.clone()))).clone()
        })
    }

    /// Calls to all nodes that have not ended.
    pub fn calls_under_way(&self) -> usize {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.values().filter_map(|peer| peer.calls.as_ref()).map(Calls::under_way).sum()
    }

    fn with<T>(&self, address: &str, act: impl FnOnce(&mut Peer) -> T) -> Result<T, ServiceError> {
        // A map of handles is whole whatever panicked beside it.
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get_mut(address) {
            return Ok(act(peer));
        }
        let channel = self.connector.connect(address)?;
        if peers.len() >= MOST {
            peers.retain(|_, peer| peer.calls.as_ref().is_some_and(|calls| calls.under_way() > 0));
        }
        Ok(act(peers.entry(address.to_owned()).or_insert(Peer { channel, calls: None })))
    }
}
