//! What every server of ours has: bounded connections, windows, health, reflection, deadlines, and an end.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router as Routes;
use axum::body::Body;
use axum::http::{HeaderValue, Request, Version, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use overfill_lifecycle::Drain;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::either::Either;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::HealthReporter;
use tower::ServiceExt;

use crate::connection::{CONNECTION_WINDOW, STREAM_WINDOW};
use crate::connections::{ConnectionLimits, Connections, Entry};
use crate::deadline::DeadlineLayer;
use crate::gathering::Gathering;
use crate::security::{PeerSecurity, ServerTls};

/// Largest HTTP/2 frame that is taken. With HTTP/2's default of 16 KiB a push of 35 MB took 1.4 to 2.3 times as long (`overfill bench handoff`).
pub const HTTP2_FRAME: u32 = 1 << 20;
/// The health service's name for "this process lives", for liveness probes: serving until the process ends.
pub const LIVE: &str = "live";
/// Largest head of a request, in bytes.
const HEAD: usize = 64 << 10;
/// How often a connection of HTTP/2 is probed, and how long an answer may take: a client that hangs is let go of in seconds.
const PROBE: Duration = Duration::from_secs(5);
/// How long it is waited after a connection could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);
/// How long connections get to close once everything is finished.
const CLOSING_LIMIT: Duration = Duration::from_secs(2);

/// One server's health: `""` is whether it is ready, `"live"` is always serving.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
    ready: Arc<AtomicBool>,
}

impl Health {
    /// Not ready yet, and the service that tells it.
    pub async fn new() -> (Self, HealthServer<impl tonic_health::pb::health_server::Health>) {
        let (reporter, service) = tonic_health::server::health_reporter();
        reporter.set_service_status("", ServingStatus::NotServing).await;
        reporter.set_service_status(LIVE, ServingStatus::Serving).await;
        (Self { reporter, ready: Arc::default() }, service)
    }

    /// What was said last.
    pub fn ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Says whether the server takes requests.
    pub async fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status("", status).await;
    }
}

/// Adds health (not ready yet), the clients' deadlines and, where descriptors are given, their reflection to `routes`.
///
/// # Errors
/// Where the descriptors are malformed.
pub async fn with_health(
    routes: tonic::service::Routes,
    descriptors: Option<&'static [u8]>,
) -> Result<(Routes, Health), tonic_reflection::server::Error> {
    let (health, service) = Health::new().await;
    let routes = routes.add_service(service).into_axum_router();
    let routes = match descriptors {
        Some(descriptors) => routes.merge(reflection(descriptors)?),
        None => routes,
    };
    Ok((routes.layer(DeadlineLayer), health))
}

/// Tells what gRPC services there are: those of `descriptors`, and health.
///
/// # Errors
/// Where they are malformed.
pub fn reflection(descriptors: &'static [u8]) -> Result<Routes, tonic_reflection::server::Error> {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(descriptors)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Both versions: Python's and older clients ask for the first.
    let services = tonic::service::Routes::new(builder().build_v1alpha()?).add_service(builder().build_v1()?);
    // Without what answers for services that are not there: others may lie beside it.
    Ok(services.into_axum_router().reset_fallback())
}

/// What a listener is for, and what bounds its connections.
#[derive(Clone)]
pub struct Settings {
    /// gRPC alone (HTTP/2), or HTTP of either version.
    pub grpc: bool,
    /// What bounds connections.
    pub limits: ConnectionLimits,
    /// Requests keep their connection busy from their head on. Else whoever serves them says from when on:
    /// [`Connection::busy`](crate::connections::Connection::busy).
    pub busy_from_head: bool,
    /// TLS, where it is spoken.
    pub tls: Option<ServerTls>,
}

/// What ends a server.
#[derive(Clone, Debug)]
pub struct Closing {
    /// Clients are asked to go elsewhere with their next request: connections of gRPC are told so (GOAWAY), answers of HTTP/1.1
    /// say so (`connection: close`). All that comes is served nevertheless, on new connections too.
    pub leaving: Drain,
    /// Nothing new is served; what runs may finish, for a moment.
    pub end: Drain,
}

/// Serves gRPC to peers of our own, which are known by `security`, until the end is given and running calls are over, or a little
/// longer at most. Peers are few, and trusted to send what they begin: what bounds them is that no process may run out of descriptors.
///
/// # Errors
/// As [`serve`].
pub async fn serve_peers(listener: TcpListener, app: Routes, end: Drain, security: PeerSecurity) -> io::Result<()> {
    security.warn_where_open(listener.local_addr()?);
    let limits = ConnectionLimits { most: 4096, first: Duration::from_secs(30), idle: Duration::from_secs(3600), streams: 4096 };
    let settings = Settings { grpc: true, limits, busy_from_head: true, tls: security.server_tls() };
    serve(listener, security.guard(app), settings, Closing { leaving: end.clone(), end }).await
}

/// Serves `app` until the end is given and running requests are over, or a little longer at most.
///
/// # Errors
/// Where the listener fails.
pub async fn serve(listener: TcpListener, app: Routes, settings: Settings, closing: Closing) -> io::Result<()> {
    let limits = ConnectionLimits { most: descriptors_for(settings.limits.most), ..settings.limits };
    let (connections, builder) = (Connections::new(limits), builder(&settings));
    let mut running = JoinSet::new();
    for number in 0_u64.. {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // Those that have ended are forgotten.
            Some(_) = running.join_next() => continue,
            () = closing.end.signaled() => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let Some(entry) = connections.enter(number) else { continue };
                // Where it cannot be set, messages are later by some milliseconds.
                let _ = stream.set_nodelay(true);
                running.spawn(serve_connection(stream, app.clone(), (builder.clone(), settings.clone()), entry, closing.clone()));
            }
            // The client has gone before it was accepted, or there are no descriptors for a moment.
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
    drop(listener);
    let finished = async { while running.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(CLOSING_LIMIT, finished).await;
    Ok(())
}

/// How many of `most` connections there are descriptors for: as many as the system gives this process are taken, and a quarter of
/// them is a listener's. Without descriptors no connection would be accepted that could take the place of one that waits.
fn descriptors_for(most: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    // Where it may not be raised it stays.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let descriptors = getrlimit(Resource::Nofile).current.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    most.min((descriptors / 4).max(1))
}

fn builder(settings: &Settings) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    if settings.grpc {
        builder = builder.http2_only();
    }
    builder.http1().timer(TokioTimer::new()).header_read_timeout(settings.limits.idle).max_buf_size(HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(HTTP2_FRAME)
        .max_concurrent_streams(settings.limits.streams)
        .max_header_list_size(HEAD as u32)
        .keep_alive_interval(PROBE)
        .keep_alive_timeout(PROBE);
    builder
}

async fn serve_connection(
    stream: TcpStream,
    app: Routes,
    (builder, settings): (Builder<TokioExecutor>, Settings),
    entry: Entry,
    closing: Closing,
) {
    let stream = match &settings.tls {
        Some(tls) => {
            let peer = stream.peer_addr();
            let greeting = async {
                tls.accept(stream).await.inspect_err(|error| {
                    let peer = peer.map_or_else(|_| "a client".to_owned(), |peer| peer.to_string());
                    tracing::info!(peer, %error, "a connection was refused: its TLS does not fit");
                })
            };
            let greeted = tokio::select! {
                greeted = greeting => greeted,
                () = entry.displaced() => return,
                () = entry.waited_too_long() => return,
                () = closing.end.signaled() => return,
            };
            let Ok(stream) = greeted else { return };
            Either::Right(stream)
        }
        None => Either::Left(stream),
    };
    let (of_requests, leaving) = (entry.connection(), closing.leaving.clone());
    let service = service_fn(move |request: Request<Incoming>| {
        let (app, leaving, mut request) = (app.clone(), leaving.clone(), request.map(Body::new));
        let busy = settings.busy_from_head.then(|| of_requests.busy());
        let closes = !settings.grpc && request.version() <= Version::HTTP_11;
        request.extensions_mut().insert(of_requests.clone());
        async move {
            let answer = app.oneshot(request).await?;
            let mut answer = match busy {
                Some(busy) => busy.through(answer),
                None => answer,
            };
            if closes && leaving.draining() {
                answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(answer)
        }
    });
    let mut serving = pin!(builder.serve_connection(TokioIo::new(Gathering::new(stream)), service));
    // A connection of HTTP/1.1 that has no request would be closed at once, while its client may just send one; and who connects
    // while the server leaves does not know it yet, and is served.
    let knows_by_goaway = settings.grpc && !closing.leaving.draining();
    let asked_to_leave = async {
        let signal = if knows_by_goaway { &closing.leaving } else { &closing.end };
        signal.signaled().await;
    };
    tokio::select! {
        // How connections of others end is their affair.
        _ = serving.as_mut() => return,
        () = entry.displaced() => return,
        () = entry.waited_too_long() => {}
        () = asked_to_leave => {}
    }
    serving.as_mut().graceful_shutdown();
    tokio::select! {
        _ = serving.as_mut() => {}
        () = entry.displaced() => {}
        () = async { closing.end.signaled().await; tokio::time::sleep(CLOSING_LIMIT).await } => {}
    }
}
