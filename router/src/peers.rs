//! Connections to nodes, one for each address.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use overfill_lifecycle::grpc;
use overfill_types::{Code, Endpoint, ServiceError};
use tonic::transport::Channel;

/// Addresses that are remembered; beyond it all are forgotten and made anew when needed.
const MOST: usize = 4096;

#[derive(Default)]
pub(crate) struct Peers {
    channels: Mutex<HashMap<String, Channel>>,
}

impl Peers {
    /// The connection to a node; it is made on first use.
    ///
    /// # Errors
    /// [`Code::Internal`] where the node registered an address that is none.
    pub(crate) fn channel(&self, node: &Endpoint) -> Result<Channel, ServiceError> {
        // A map of handles is whole whatever panicked beside it.
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(&node.address) {
            return Ok(channel.clone());
        }
        let channel = grpc::channel(&node.address)
            .map_err(|_| ServiceError::new(Code::Internal, format!("{} registered '{}', which is no address", node.id, node.address)))?;
        if channels.len() >= MOST {
            channels.clear();
        }
        channels.insert(node.address.clone(), channel.clone());
        Ok(channel)
    }
}
