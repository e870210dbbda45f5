//! What a node answers those who run the cluster, in plain HTTP at a listener of its own: metrics, probes, profiles.

use std::time::Duration;

use axum::Router as Routes;
use axum::http::StatusCode;
use axum::routing::get;
use overfill_lifecycle::metrics::Registry;
use overfill_lifecycle::profile;
use overfill_transport::calls::Signals;
use overfill_transport::connections::ConnectionLimits;
use overfill_transport::server::{self, Closing, Health, Settings};
use tokio::net::TcpListener;

/// A few scrapers and probes.
const LIMITS: ConnectionLimits = ConnectionLimits { most: 256, first: Duration::from_secs(10), idle: Duration::from_secs(75), streams: 64 };

/// Answers until the node's calls are to end.
///
/// # Errors
/// Where the socket fails.
pub async fn serve(listener: TcpListener, metrics: Registry, health: Health, signals: Signals) -> std::io::Result<()> {
    let ready = move || {
        let ready = health.ready();
        async move { if ready { (StatusCode::OK, "ready\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") } }
    };
    let routes = Routes::new()
        .route("/metrics", get(move || async move { metrics.respond() }))
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .route("/profile", profile::route());
    let settings = Settings { grpc: false, limits: LIMITS, busy_from_head: true, tls: None };
    server::serve(listener, routes, settings, Closing { leaving: signals.drain, end: signals.end }).await
}
