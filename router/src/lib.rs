//! The router: the front door of a cluster.
//!
//! A request comes in by gRPC or HTTP (`frontend`), becomes token ids within bounds (`admission`), gets a prefill and a decode
//! node at once (`pairing`), and its tokens are relayed as they are written (`relay`).
//!
//! [`Router`] is all of this, [`run`] gives it sockets.
//!
//! **Invariant:** the router holds no model and no KV cache, and neither passes through it.

mod admission;
mod clients;
pub mod config;
mod error;
pub mod frontend;
mod metrics;
mod models;
pub mod overview;
mod pairing;
mod relay;
mod status_streams;
mod suspicions;
mod tokenising;
mod traffic;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use overfill_cluster::{Discovery, Snapshot};
use overfill_lifecycle::{Drain, Parts};
use overfill_proto::DESCRIPTORS;
use overfill_proto::kserve::grpc_inference_service_server::GrpcInferenceServiceServer;
use overfill_proto::v1::inference_server::InferenceServer;
use overfill_text::TextModel;
use overfill_transport::security::watched::{LOOKED_AT, stamp};
use overfill_transport::server::{self, Closing, Health, Settings};
use overfill_transport::{Connector, Peers};
use overfill_types::Quality;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tonic::codec::CompressionEncoding;
use tonic::service::Routes;

use crate::clients::Clients;
pub use crate::config::RouterConfig;
pub use crate::error::RunError;
use crate::frontend::bodies::Bodies;
use crate::frontend::grpc::InferenceService;
use crate::frontend::kserve::KserveService;
use crate::metrics::{Held, Metrics};
pub use crate::models::Models;
use crate::overview::{Handoffs, Nodes};
use crate::pairing::Pairing;
use crate::relay::RetryBudget;
use crate::suspicions::Suspicions;
use crate::tokenising::Tokenising;

/// How long connections get to close once everything is finished.
const CLOSING: Duration = Duration::from_secs(4);

/// A router without its sockets: what all requests share.
pub struct Router {
    config: RouterConfig,
    models: Models,
    /// Seconds since 1970 at the start.
    started: u64,
    /// The same by the clock that intervals are taken by.
    begun: Instant,
    discovery: Discovery,
    view: watch::Receiver<Arc<Snapshot>>,
    pairing: Pairing,
    peers: Peers,
    retries: RetryBudget,
    suspicions: Arc<Suspicions>,
    /// As they say themselves, for whoever looks at the cluster.
    nodes: Nodes,
    handoffs: Handoffs,
    tokenising: Tokenising,
    metrics: Arc<Metrics>,
    clients: Arc<Clients>,
    /// One permit for each request that may be under way.
    permits: Arc<Semaphore>,
    /// One for each that may be parsed or wait for its answer's head.
    heads: Arc<Semaphore>,
    bodies: Arc<Bodies>,
    /// It is to be sent no requests any more; those that come are served.
    leaving: Drain,
    /// Requests that come are refused.
    drain: Drain,
}

/// The sockets of a router.
pub struct Listeners {
    /// OpenAI-compatible HTTP.
    pub http: TcpListener,
    /// `overfill.v1.Inference`, and `inference.GRPCInferenceService` (KServe v2).
    pub grpc: TcpListener,
    /// The page, metrics, probes, documentation and reflection, for those who run the cluster; without it they are at the doors.
    pub admin: Option<TcpListener>,
}

/// Opens the pairs' text side and serves both front ends until `drain` was given and what ran is finished. Needs no nodes to start.
///
/// # Errors
/// Where a pair cannot be opened or a transport fails.
pub async fn run(config: RouterConfig, listeners: Listeners, discovery: Discovery, drain: Drain) -> Result<(), RunError> {
    // What is wrong in a file is told before anything is loaded.
    let [grpc_tls, http_tls] = [config.tls.open(true)?, config.tls.open(false)?];
    let models = Models::open(&config)?;
    let router = Router::new(config, models, &discovery, discovery.connector(), drain.clone())?;
    let descriptors = if listeners.admin.is_some() { None } else { Some(DESCRIPTORS) };
    let (grpc, health) = server::with_health(Routes::from(router.grpc()), descriptors).await?;
    tracing::info!(http = %listeners.http.local_addr()?, grpc = %listeners.grpc.local_addr()?, models = ?router.models.names().into_iter().map(|(name, _)| name).collect::<Vec<_>>(), "router ready");

    // The page asks at the admin listener as clients do at the doors, unless these speak TLS.
    let chat = listeners.admin.as_ref().filter(|_| router.config.tls.tls_cert.is_none());
    for listener in [&listeners.http, &listeners.grpc].into_iter().chain(chat) {
        router.warn_where_open(listener.local_addr()?);
    }

    let (mut parts, end) = (Parts::default(), Drain::new());
    let closing = Closing { leaving: drain.clone(), end: end.clone() };
    let settings = |grpc, tls| Settings { grpc, limits: router.config.connections.limits(), busy_from_head: false, tls };
    parts.task("gRPC server", server::serve(listeners.grpc, grpc, settings(true, grpc_tls), closing.clone()));
    let http = router.http(listeners.admin.is_none());
    parts.task("HTTP server", server::serve(listeners.http, http, settings(false, http_tls), closing.clone()));
    if let Some(listener) = listeners.admin {
        let admin = frontend::http::admin(router.clone()).merge(server::reflection(DESCRIPTORS)?);
        let settings = Settings { busy_from_head: true, ..settings(false, None) };
        parts.task("admin server", server::serve(listener, admin, settings, closing));
    }
    parts.task("followers of the nodes' status", ended_by(end.clone(), router.clone().follow()));
    parts.task("file of keys", ended_by(end.clone(), follow_keys(router.clone())));
    parts.task("file of weights", ended_by(end.clone(), follow_traffic(router.clone())));
    parts.task("readiness", ended_by(end.clone(), tell_readiness(router.clone(), health.clone())));

    let mut served = parts.until(&drain).await;
    health.set_ready(false).await;
    if served.is_ok() {
        // Whoever sends requests here learns only now, and with some delay, that it is not to.
        let delay = tokio::time::timeout(router.config.drain_delay, parts.ended()).await;
        served = delay.map_or(Ok(()), Err);
        router.drain.start();
    }
    if let Err(ended) = served {
        // What supervises this process starts another; its clients go to one that is whole.
        tracing::error!(error = ended.to_string(), cause = ended.cause(), "this router cannot go on: it ends");
        return Err(ended.into());
    }
    let finished = router.permits.acquire_many(router.config.max_requests);
    if tokio::time::timeout(Duration::from_secs(router.config.drain_timeout), finished).await.is_err() {
        tracing::warn!(requests = router.under_way(), "drain limit reached: the rest is broken off");
    }
    end.start();
    Ok(parts.finish(CLOSING).await?)
}

/// Work that has no end of its own, until `end` is given. It ends before only where the view of the nodes does.
async fn ended_by(end: Drain, work: impl Future<Output = ()>) -> Result<(), &'static str> {
    tokio::select! {
        () = work => Err("the view of the nodes is not followed any more"),
        () = end.signaled() => Ok(()),
    }
}

/// Takes the file of keys anew when it has changed. Never ends.
async fn follow_keys(router: Arc<Router>) {
    follow_file(router.config.keys.as_deref(), "keys", |file| router.clients.reload(file)).await;
}

/// Takes the file of versions' weights anew when it has changed. Never ends.
async fn follow_traffic(router: Arc<Router>) {
    follow_file(router.config.traffic.as_deref(), "versions' weights", |file| router.models.shift_traffic(file)).await;
}

/// Calls `take` whenever the file of `what` has changed. Never ends.
async fn follow_file(file: Option<&Path>, what: &str, take: impl Fn(&Path) -> Result<(), String>) {
    let Some(file) = file else { return std::future::pending().await };
    let mut known = stamp(file);
    loop {
        tokio::time::sleep(LOOKED_AT).await;
        let now = stamp(file);
        if now != known {
            known = now;
            match take(file) {
                Ok(()) => tracing::info!(file = %file.display(), "the file of {what} has changed, and is taken as it is now"),
                Err(why) => tracing::error!(why, "the file of {what} has changed and cannot be taken: all stays as it was"),
            }
        }
    }
}

/// Says whether this router can serve, after each change of the view. Never ends while the view is followed.
async fn tell_readiness(router: Arc<Router>, health: Health) {
    let mut view = router.view.clone();
    loop {
        health.set_ready(router.ready().is_ok()).await;
        tokio::select! {
            changed = view.changed() => if changed.is_err() { return },
            () = router.leaving.signaled() => {
                health.set_ready(false).await;
                std::future::pending().await
            }
        }
    }
}

impl Router {
    /// A router for `models`, whose nodes are those of `discovery` and are reached by `connector`. Must be called inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// Where two metrics have one name, or the clients' keys cannot be read.
    pub fn new(
        config: RouterConfig,
        models: Models,
        discovery: &Discovery,
        connector: Connector,
        leaving: Drain,
    ) -> Result<Arc<Self>, RunError> {
        let most = config.max_requests as usize;
        let metrics = Arc::new(Metrics::new(models.iter().map(|model| &model.manifest))?);
        let (of_metrics, seen) = (discovery.watch(), discovery.clone());
        metrics.nodes(move |role| of_metrics.borrow().nodes.iter().filter(|n| n.role == role).count())?;
        metrics.registry.discovery(move || seen.connected())?;
        let suspicions = Arc::new(Suspicions::default());
        let known = suspicions.clone();
        metrics.quarantine(move || known.refused())?;
        let clients = Arc::new(Clients::open(config.keys.as_deref())?);
        let view = discovery.watch();
        let router = Arc::new(Self {
            models,
            started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            begun: Instant::now(),
            discovery: discovery.clone(),
            pairing: Pairing::new(view.clone(), config.max_waiting),
            view,
            peers: Peers::new(connector),
            retries: RetryBudget::default(),
            suspicions,
            nodes: Nodes::default(),
            handoffs: Handoffs::default(),
            tokenising: Tokenising::default(),
            metrics,
            clients,
            permits: Arc::new(Semaphore::new(most)),
            // Those that will be refused are looked at too.
            heads: Arc::new(Semaphore::new(2 * most)),
            bodies: Arc::new(Bodies::new(&config)),
            leaving,
            drain: Drain::new(),
            config,
        });
        // The metrics are the router's own: they do not keep it.
        let counted = Arc::downgrade(&router);
        router.metrics.held({
            let counted = counted.clone();
            move |what| counted.upgrade().map_or(0, |router| router.held(what))
        })?;
        router.metrics.waiting_for(move |role| counted.upgrade().map_or(0, |router| router.pairing.waiting_for(role)))?;
        Ok(router)
    }

    /// How much of this it holds.
    fn held(&self, what: Held) -> usize {
        match what {
            Held::Requests => self.under_way(),
            Held::Turns => self.pairing.held(),
            Held::Calls => self.peers.calls_under_way(),
        }
    }

    /// The door for gRPC: ours, and the KServe v2 protocol.
    pub fn grpc(self: &Arc<Self>) -> axum::Router {
        // Requests may be compressed; answers are a few bytes at a time, which compressing would only make dearer.
        let inference = InferenceServer::new(InferenceService::new(self.clone()))
            .max_decoding_message_size(self.config.max_body)
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Zstd);
        let kserve = GrpcInferenceServiceServer::new(KserveService::new(self.clone()))
            .max_decoding_message_size(self.config.max_body)
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Zstd);
        frontend::stack(self, Routes::new(inference).add_service(kserve).into_axum_router())
    }

    /// The door for HTTP, which OpenAI's clients know and Anthropic's; with `admin`, what those ask who run the cluster is there too.
    pub fn http(self: &Arc<Self>, admin: bool) -> axum::Router {
        frontend::http::door(self.clone(), admin)
    }

    /// Follows what the nodes say of themselves. Ends where the view of the nodes does.
    pub async fn follow(self: Arc<Self>) {
        status_streams::follow(self).await;
    }

    /// Requests under way, those that wait for room on the nodes among them.
    pub fn under_way(&self) -> usize {
        self.config.max_requests as usize - self.permits.available_permits()
    }

    /// Says it once where whoever reaches `listening` is served, and what is sent there can be read, unless only this machine is.
    fn warn_where_open(&self, listening: SocketAddr) {
        let missing = match (&self.config.keys, &self.config.tls.tls_cert) {
            _ if listening.ip().is_loopback() => return,
            (Some(_), Some(_)) => return,
            (None, None) => "no keys are asked for (--keys), and nothing is encrypted (--tls-cert, --tls-key)",
            // Who has to show a certificate is known.
            (None, Some(_)) if self.config.tls.tls_ca.is_some() => return,
            (None, Some(_)) => "no keys are asked for (--keys)",
            (Some(_), None) => "nothing is encrypted (--tls-cert, --tls-key)",
        };
        tracing::warn!(%listening, "{missing}: whoever comes by the network this door is on is trusted");
    }

    /// Whether a prefill and a decode node of some pair are there.
    ///
    /// # Errors
    /// What is missing.
    pub(crate) fn ready(&self) -> Result<(), String> {
        if self.leaving.draining() {
            return Err("the router is draining".into());
        }
        let missing: Vec<String> = self.models.iter().map(|m| self.pairing.missing(&m.manifest, Quality::Overfill)).collect();
        if missing.iter().any(String::is_empty) { Ok(()) } else { Err(missing.join("; ")) }
    }

    /// Longest sequence that a model's nodes take now, in tokens.
    pub(crate) fn max_context(&self, model: &TextModel) -> usize {
        let ours = model.manifest.max_context();
        self.pairing.max_context(&model.manifest.fingerprint).map_or(ours, |nodes| nodes.min(ours))
    }
}
