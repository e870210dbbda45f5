//! What every gRPC server of ours has: windows, health, reflection, deadlines, and an end.

use std::time::Duration;

use overfill_lifecycle::Drain;
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::HealthReporter;

use crate::connection::{CONNECTION_WINDOW, PROBE, STREAM_WINDOW};
use crate::deadline::DeadlineLayer;
use crate::gathering::Gathering;

/// Largest HTTP/2 frame that is taken. With HTTP/2's default of 16 KiB a push of 35 MB took 1.4 to 2.3 times as long (`overfill bench handoff`).
pub const HTTP2_FRAME: u32 = 1 << 20;
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
    /// Not ready yet, and the service that tells it.
    pub async fn new() -> (Self, HealthServer<impl tonic_health::pb::health_server::Health>) {
        let (reporter, service) = tonic_health::server::health_reporter();
        reporter.set_service_status("", ServingStatus::NotServing).await;
        reporter.set_service_status(LIVE, ServingStatus::Serving).await;
        (Self { reporter }, service)
    }

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
    let (health, service) = Health::new().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(descriptors)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Both versions: Python's and older clients ask for the first.
    let routes = routes.add_service(service).add_service(reflection().build_v1alpha()?).add_service(reflection().build_v1()?);
    Ok((routes, health))
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
