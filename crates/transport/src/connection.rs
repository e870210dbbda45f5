//! A connection to a peer: one HTTP/2 connection whose small writes are gathered, made on first use and again after a failure.
//!
//! Whoever keeps connections has them made by a [`Connector`]: over TCP, unless it is given another one.

use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use overfill_types::{Code, ServiceError};
use tokio::net::TcpStream;
use tokio_util::either::Either;
use tonic::Status;
use tonic::body::Body;
use tower::util::BoxCloneSyncService;
use tower::{ServiceExt, service_fn};

use crate::gathering::Gathering;
use crate::security::{ClientTls, PeerSecurity, Unusable};

/// Bytes in flight on one stream and on one connection. HTTP/2's defaults (64 KiB) make a KV push five times slower
/// (measured on loopback). Two frames of a push fill a link of 10 Gbit/s over a millisecond; more only lies in memory
/// where the receiver is slower than the sender.
pub const STREAM_WINDOW: u32 = 2 << 20;
/// See [`STREAM_WINDOW`].
pub const CONNECTION_WINDOW: u32 = 4 << 20;
/// How often a connection to a peer is probed, and how long an answer may take: what was asked of one that hangs, or is cut off, is
/// asked elsewhere within five seconds. Probes are answered beside what computes, so one that only has much to do does not look so.
pub const PROBE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(3));
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
        Self::secured(PeerSecurity::default())
    }
}

impl Connector {
    /// One that connects to a peer at `host:port` by `connect`, at once: what takes time does so when the channel is called.
    pub fn new(connect: impl Fn(&str) -> Result<Channel, ServiceError> + Send + Sync + 'static) -> Self {
        Self(Arc::new(connect))
    }

    /// One that connects over TCP to peers that know it by `security`.
    pub fn secured(security: PeerSecurity) -> Self {
        let tls = security.client_tls();
        Self::new(move |address| {
            let security = security.clone();
            connect(address, tls.clone(), move |headers| security.add_to(headers))
        })
    }

    /// One that connects over TLS to servers of others, whose certificate the system's authorities vouch for, or those of the file
    /// that the variable `SSL_CERT_FILE` names.
    ///
    /// # Errors
    /// Where there are no authorities.
    pub fn to_servers() -> Result<Self, Unusable> {
        let tls = ClientTls::of_system()?;
        Ok(Self::new(move |address| connect(address, Some(tls.clone()), |_| {})))
    }

    /// A connection to a peer at `host:port`.
    ///
    /// # Errors
    /// [`Code::Unavailable`] where `address` is none: whoever told it is to blame.
    pub fn connect(&self, address: &str) -> Result<Channel, ServiceError> {
        (self.0)(address)
    }
}

/// A connection over TCP, and `tls` if it is given, to a peer at `host:port`; `headers` adds to those of each request.
///
/// # Errors
/// See [`Connector::connect`].
fn connect(
    address: &str,
    tls: Option<ClientTls>,
    headers: impl Fn(&mut HeaderMap) + Clone + Send + Sync + 'static,
) -> Result<Channel, ServiceError> {
    let connector = service_fn(move |peer: Uri| {
        let tls = tls.clone();
        async move {
            let (host, port) = (peer.host().unwrap_or_default(), peer.port_u16().unwrap_or_default());
            let stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
            stream.set_nodelay(true)?;
            let stream = match tls {
                Some(tls) => Either::Right(tls.connect(host, stream).await?),
                None => Either::Left(stream),
            };
            Ok::<_, std::io::Error>(TokioIo::new(Gathering::new(stream)))
        }
    });
    // TLS or not is the connector's affair, not the address's.
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| ServiceError::of_node(Code::Unavailable, format!("'{address}' is no address of a node: host:port is")))?;
    let channel = endpoint
        .connect_timeout(CONNECT_LIMIT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(PROBE.0)
        .keep_alive_timeout(PROBE.1)
        .connect_with_connector_lazy(connector);
    let channel = channel.map_request(move |mut request: Request<Body>| {
        headers(request.headers_mut());
        request
    });
    Ok(Channel::new(channel.map_err(|error| Status::from_error(error.into()))))
}
