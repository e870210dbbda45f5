//! A connection to a peer: one HTTP/2 connection whose small writes are gathered, made on first use and again after a failure.
//!
//! Whoever keeps connections has them made by a [`Connector`]: over TCP, unless it is given another one.

use std::sync::Arc;
use std::time::Duration;

use axum::http::{Request, Response};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use overfill_types::{Code, ServiceError};
use tonic::Status;
use tonic::body::Body;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use crate::gathering::Gathering;

/// Bytes in flight on one stream and on one connection. HTTP/2's defaults (64 KiB) make a KV push five times slower
/// (measured on loopback). Two frames of a push fill a link of 10 Gbit/s over a millisecond; more only lies in memory
/// where the receiver is slower than the sender.
pub const STREAM_WINDOW: u32 = 2 << 20;
/// See [`STREAM_WINDOW`].
pub const CONNECTION_WINDOW: u32 = 4 << 20;
/// How often an HTTP/2 connection is probed, and how long an answer may take: a peer that hangs is noticed in seconds.
pub const PROBE: Duration = Duration::from_secs(5);
/// How long a peer may take to accept a connection.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// What gRPC clients call a peer over. Clones share a connection.
pub type Channel = BoxCloneSyncService<Request<Body>, Response<Body>, Status>;

/// What makes connections to peers: over TCP, unless it is told otherwise. Clones share it.
#[derive(Clone)]
pub struct Connector(Arc<Connect>);

type Connect = dyn Fn(&str) -> Result<Channel, ServiceError> + Send + Sync;

impl Default for Connector {
    fn default() -> Self {
        Self::new(connect)
    }
}

impl Connector {
    /// One that connects to a peer at `host:port` by `connect`, at once: what takes time does so when the channel is called.
    pub fn new(connect: impl Fn(&str) -> Result<Channel, ServiceError> + Send + Sync + 'static) -> Self {
        Self(Arc::new(connect))
    }

    /// A connection to a peer at `host:port`.
    ///
    /// # Errors
    /// [`Code::Unavailable`] where `address` is none: whoever told it is to blame.
    pub fn connect(&self, address: &str) -> Result<Channel, ServiceError> {
        (self.0)(address)
    }
}

/// A connection over TCP to a peer at `host:port`.
///
/// # Errors
/// See [`Connector::connect`].
pub fn connect(address: &str) -> Result<Channel, ServiceError> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let gathering = connector.map_response(|connected| TokioIo::new(Gathering::new(connected.into_inner())));
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| ServiceError::of_node(Code::Unavailable, format!("'{address}' is no address of a node: host:port is")))?;
    let channel = endpoint
        .connect_timeout(CONNECT_LIMIT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(PROBE)
        .keep_alive_timeout(PROBE)
        .connect_with_connector_lazy(gathering);
    Ok(Channel::new(channel.map_err(|error| Status::from_error(error.into()))))
}
