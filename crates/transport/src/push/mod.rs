//! Connections that KV caches are pushed over: a few for each decode node, kept from one push to the next.
//!
//! A push takes the connection to its node that carries the fewest: pushes on one connection share its window, so one that
//! the decode node takes slowly would hold up the others. Connecting again for each push would cost it a round trip, and its
//! first window. A decode node of the same process is handed the frames as they are (`within`), one of the same machine over a
//! Unix socket (`machine`).

pub mod machine;
pub mod nccl;
mod within;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use overfill_lifecycle::TraceHeaders;
use overfill_proto::v1::decode_client::DecodeClient;
use overfill_proto::v1::{KvFrame, PushSummary};
use overfill_proto::{MAX_MESSAGE, error};
use overfill_types::ServiceError;
use tokio::time::Instant;
use tokio_stream::Stream;
use tonic::Request;

use crate::connection::{Channel, Connector};

use self::machine::Streams;
pub use self::within::{Frames, Open, Taken, Takes, Within};

/// Connections to one decode node: as many as pushes that the network may have to carry at a time.
const CONNECTIONS: usize = 4;
/// Nodes whose connections are kept at most, beside those that pushes are under way to.
const NODES: usize = 256;
/// How long the connections to a node are kept after its last push.
const KEPT: Duration = Duration::from_secs(300);

/// The connections of one prefill node. Clones share them.
#[derive(Clone, Default)]
pub struct Pushes {
    connector: Connector,
    within: Within,
    /// `None`: none are looked for on this machine.
    machine: Option<Streams>,
    nodes: Arc<Mutex<HashMap<String, Connections>>>,
}

struct Connections {
    first: Connection,
    more: Vec<Connection>,
    used: Instant,
}

struct Connection {
    channel: Channel,
    /// One more than the pushes that it carries.
    carries: Arc<()>,
}

impl Pushes {
    /// Whose connections `connector` makes, but to the nodes of this process, and, if they are `looked_for`, those of this machine.
    pub fn new(connector: Connector, within: Within, looked_for: bool) -> Self {
        Self { connector, within, machine: looked_for.then(Streams::default), nodes: Arc::default() }
    }

    /// Pushes `frames` to the decode node at `address`; returns when it has verified them all.
    ///
    /// # Errors
    /// What the node refused, or that it is gone; the sentence names it.
    pub async fn push(
        &self,
        address: &str,
        frames: impl Stream<Item = KvFrame> + Send + 'static,
        trace: TraceHeaders,
    ) -> Result<PushSummary, ServiceError> {
        let peer = format!("decode node {address}");
        let pushed = if let Some(node) = self.within.at(address) {
            node.take(Box::pin(frames), trace).await
        } else if let Some(machine) = &self.machine
            && let Some(stream) = machine.to(address).await
        {
            machine.push(stream, frames, trace, &peer).await
        } else {
            let (channel, _carried) = self.connection(address)?;
            let mut request = Request::new(frames);
            trace.add_to(request.metadata_mut().as_mut());
            let pushed = DecodeClient::new(channel).max_encoding_message_size(MAX_MESSAGE).push_kv(request).await;
            pushed.map(tonic::Response::into_inner).map_err(|told| error::from_status(&told, &peer))
        };
        pushed.map_err(|error| ServiceError { message: format!("the handoff to {peer} failed: {error}"), ..error })
    }

    /// The connection to a node that carries the fewest pushes, and what counts one more on it.
    fn connection(&self, address: &str) -> Result<(Channel, Arc<()>), ServiceError> {
        let now = Instant::now();
        let connect = || Ok(Connection { channel: self.connector.connect(address)?, carries: Arc::default() });
        let mut nodes = self.lock();
        let most = nodes.len() >= NODES && !nodes.contains_key(address);
        nodes.retain(|_, node| node.carries() || !most && now.duration_since(node.used) < KEPT);
        let node = match nodes.entry(address.to_owned()) {
            Entry::Occupied(node) => node.into_mut(),
            Entry::Vacant(place) => place.insert(Connections { first: connect()?, more: Vec::new(), used: now }),
        };
        node.used = now;
        if node.more.len() + 1 < CONNECTIONS && node.all().all(|connection| connection.pushes() > 0) {
            node.more.push(connect()?);
        }
        let Connection { channel, carries } = node.least();
        Ok((channel.clone(), carries.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Connections>> {
        // A map of handles is whole whatever panicked beside it.
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connections {
    fn all(&self) -> impl Iterator<Item = &Connection> {
        std::iter::once(&self.first).chain(&self.more)
    }

    /// The one that carries the fewest.
    fn least(&self) -> &Connection {
        self.more.iter().fold(&self.first, |least, other| if other.pushes() < least.pushes() { other } else { least })
    }

    fn carries(&self) -> bool {
        self.all().any(|connection| connection.pushes() > 0)
    }
}

impl Connection {
    fn pushes(&self) -> usize {
        Arc::strong_count(&self.carries) - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(pushes: &Pushes, address: &str) -> usize {
        pushes.lock()[address].all().count()
    }

    #[tokio::test]
    async fn a_connection_is_kept_and_a_few_share_what_is_under_way() {
        let pushes = Pushes::default();
        for _ in 0..10 {
            pushes.connection("127.0.0.1:1").unwrap();
        }
        assert_eq!(open(&pushes, "127.0.0.1:1"), 1, "one after the other");
        let under_way: Vec<_> = (0..10).map(|_| pushes.connection("127.0.0.1:1").unwrap()).collect();
        assert_eq!(open(&pushes, "127.0.0.1:1"), CONNECTIONS);
        assert!(pushes.lock()["127.0.0.1:1"].all().all(|connection| (2..=3).contains(&connection.pushes())));
        drop(under_way);
        assert!(!pushes.lock()["127.0.0.1:1"].carries());
    }

    #[tokio::test]
    async fn nodes_that_are_remembered_are_bounded_and_those_in_use_stay() {
        let pushes = Pushes::default();
        let held = pushes.connection("127.0.0.1:1").unwrap();
        for port in 2..2 * NODES + 2 {
            pushes.connection(&format!("127.0.0.1:{port}")).unwrap();
            assert!(pushes.lock().len() <= NODES + 1);
        }
        assert!(pushes.lock().contains_key("127.0.0.1:1"));
        drop(held);
    }

    #[tokio::test]
    async fn what_is_no_address_is_refused() {
        let pushes = Pushes::default();
        assert!(pushes.connection("no address").is_err() && pushes.lock().is_empty());
    }
}
