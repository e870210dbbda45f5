//! What every gRPC server of ours has: windows, health, reflection, and an end.

use std::time::Duration;

use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::ServiceExt;

use crate::deadline::DeadlineLayer;
use crate::drain::Drain;
use crate::gathering::Gathering;

/// Bytes in flight on one stream and on one connection. HTTP/2's defaults (64 KiB) make a KV push five times slower
/// (measured on loopback). Two frames of a push fill a link of 10 Gbit/s over a millisecond; more only lies in memory
/// where the receiver is slower than the sender.
pub const STREAM_WINDOW: u32 = 2 << 20;
/// See [`STREAM_WINDOW`].
pub const CONNECTION_WINDOW: u32 = 4 << 20;
/// Largest HTTP/2 frame that is taken. With HTTP/2's default of 16 KiB a push of 35 MB took 1.4 to 2.3 times as long (`overfill bench handoff`).
pub const HTTP2_FRAME: u32 = 1 << 20;
/// How often an HTTP/2 connection is probed, and how long an answer may take: a peer that hangs is noticed in seconds.
pub const PROBE: Duration = Duration::from_secs(5);
/// How long a peer may take to accept a connection.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// The health service's name for "this process lives", for liveness probes: serving until the process ends.
pub const LIVE: &str = "live";
/// How long connections get to close once everything is finished.
const CLOSING_LIMIT: Duration = Duration::from_secs(2);

/// One server's health: `""` is whether it is ready, `"live"` is always serving.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
}

impl Health {
    /// Says whether the server takes requests.
    pub async fn set_ready(&self, ready: bool) {
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status("", status).await;
    }
}

/// Adds health (not ready yet) and reflection of `descriptors` to `routes`.
///
/// # Errors
/// Where the descriptors are malformed.
pub async fn with_health(routes: Routes, descriptors: &'static [u8]) -> Result<(Routes, Health), tonic_reflection::server::Error> {
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_service_status("", ServingStatus::NotServing).await;
    reporter.set_service_status(LIVE, ServingStatus::Serving).await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(descriptors)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Both versions: Python's and older clients ask for the first.
    let routes = routes.add_service(service).add_service(reflection().build_v1alpha()?).add_service(reflection().build_v1()?);
    Ok((routes, Health { reporter }))
}

/// Serves until `end` is given and running calls are over, or a little longer at most.
///
/// # Errors
/// Where the transport fails.
pub async fn serve(listener: TcpListener, routes: Routes, end: Drain) -> Result<(), tonic::transport::Error> {
    let connections = TcpIncoming::from(listener).with_nodelay(Some(true)).map(|connection| connection.map(Gathering::new));
    let server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(Some(HTTP2_FRAME))
        .http2_keepalive_interval(Some(PROBE))
        .http2_keepalive_timeout(Some(PROBE))
        .layer(DeadlineLayer)
        .add_routes(routes)
        .serve_with_incoming_shutdown(connections, end.signaled());
    tokio::select! {
        served = server => served,
        () = async { end.signaled().await; tokio::time::sleep(CLOSING_LIMIT).await } => Ok(()),
    }
}

/// A channel to a peer at `host:port`, made on first use and again after a failure.
///
/// # Errors
/// Where `address` is none.
pub fn channel(address: &str) -> Result<tonic::transport::Channel, tonic::transport::Error> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let gathering = connector.map_response(|connected| TokioIo::new(Gathering::new(connected.into_inner())));
    Ok(tonic::transport::Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_LIMIT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(PROBE)
        .keep_alive_timeout(PROBE)
        .connect_with_connector_lazy(gathering))
}
