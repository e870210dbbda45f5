//! The prefill node: holds the full model, reads prompts.
//!
//! A prompt waits until the pool has blocks for it, is read in chunks together with others (`engine`, `queue`), and its KV
//! cache goes to a decode node layer by layer while it is computed (`rows`, `handoff`, `push`). What prompts left in the
//! cache is used by others that begin alike. One node may prefill for several pairs that have its full model (`pairs`).

pub mod config;
mod engine;
mod error;
mod handoff;
mod metrics;
mod pace;
mod pairs;
mod push;
mod queue;
mod rows;
mod service;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use overfill_cluster::Discovery;
use overfill_guide::Guides;
use overfill_kv::BlockPool;
use overfill_lifecycle::calls::CallsService;
use overfill_lifecycle::{Drain, NodeListeners, grpc};
use overfill_model::{KvCache, ModelError, Placement, Pool, Workspace, cache};
use overfill_proto::v1::calls_server::CallsServer;
use overfill_proto::v1::prefill_server::PrefillServer;
use overfill_proto::{DESCRIPTORS, MAX_MESSAGE};
use overfill_types::{Limits, NodeId, NodeInfo, PairManifest, Role};
use tonic::service::Routes;

use crate::engine::{Engine, Settings};
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::pairs::Offers;
use crate::service::{PrefillService, Served};

pub use crate::config::PrefillConfig;
pub use crate::error::RunError;

/// Loads the full model, serves on `listeners`, and registers once it is ready; returns when `drain` was given and what
/// ran is finished.
///
/// # Errors
/// Where the pair cannot be loaded or the transport fails.
pub async fn run(config: PrefillConfig, listeners: impl Into<NodeListeners>, discovery: Discovery, drain: Drain) -> Result<(), RunError> {
    let NodeListeners { grpc: listener, metrics: scraped } = listeners.into();
    let listening = listener.local_addr()?;
    // Before anything is loaded: a flag that is missing is told at once.
    let address = if discovery.registers() { Some(config.node.advertised(listening)?) } else { None };
    let node = config.node.clone();
    let id = NodeId::new(format!("prefill-{}", uuid::Uuid::new_v4()));
    let placement = Placement { cpus: node.cpus.clone(), nice: config.nice };
    let placement_of_pool = placement.clone();
    let dirs = config.pair.clone();
    let loading = tokio::task::spawn_blocking(move || {
        let pairs = pairs::open(&dirs)?;
        let Some(first) = pairs.first() else { return Err(ModelError::Mismatch("no pair is named: give at least one".into())) };
        let device = overfill_model::device::parse(&node.device)?;
        let pool = Pool::placed(node.threads(), &placement_of_pool)
            .map_err(|e| ModelError::Device(format!("{} compute threads cannot be started: {e}", node.threads())))?;
        let model = first.load_full(&device, &pool)?;
        let rows = pairs::rows(&pairs, &pool)?;
        let geometry = model.config().kv;
        let format = first.manifest.kv_formats.cache;
        let blocks = node.blocks(cache::bytes_per_token(geometry, format));
        let mut cache = KvCache::new(geometry, format, blocks as usize, node.block_tokens as usize, &device)?;
        cache.claim(&pool);
        let guides = Guides::open(&first.dir, &first.manifest);
        Ok::<_, ModelError>((pairs, Workspace::new(pool), model, rows, cache, blocks, guides))
    });
    let (pairs, workspace, model, rows, cache, blocks, guides) = loading.await??;

    let pool = BlockPool::new(blocks, config.node.block_tokens as usize);
    let manifests = || pairs.iter().map(|p| &p.manifest);
    let shortest = manifests().map(PairManifest::max_context).min().unwrap_or(0);
    let vocab_size = manifests().map(PairManifest::vocab_size).min().unwrap_or(0);
    let limits = Limits { max_context: config.node.max_context(shortest), vocab_size };
    let eos = manifests().next().map(|m| m.tokenizer.eos_token_ids.clone()).unwrap_or_default();
    let offers = Offers::new(&pairs);
    let settings = Settings { eos, chunk_tokens: config.chunk_tokens as usize, placement };
    let end = Drain::new();
    let pace = Pace::new(config.queue_seconds);
    let counts = Arc::new(Counts { unread_most: AtomicUsize::new(pace.at_first(settings.chunk_tokens)), ..Counts::default() });
    let metrics = Arc::new(Metrics::new(&pairs, &pool, &counts, limits.max_context, config.prefix_cache)?);
    let _scraped = scraped.map(|listener| metrics.registry.serve(listener, end.clone()));
    let seen = discovery.clone();
    metrics.registry.etcd(move || seen.etcd_connected())?;
    let engine = Engine { model, cache, rows, workspace, pool: pool.clone(), settings, counts: counts.clone(), metrics: metrics.clone() };
    let (jobs, engine_thread) = engine.start(pace, config.max_queue as usize, end.clone())?;
    let pairs = offers.served();
    let served = Served {
        id: id.clone(),
        offers,
        limits,
        pool,
        max_queue: config.max_queue as usize,
        prefix_cache: config.prefix_cache,
        guides: Arc::new(guides),
    };
    let service = Arc::new(PrefillService::new(served, jobs, counts.clone(), metrics, drain.clone()));
    let routes = Routes::new(PrefillServer::from_arc(service.clone()).max_decoding_message_size(MAX_MESSAGE))
        .add_service(CallsServer::new(CallsService::new(service, end.clone())).max_decoding_message_size(MAX_MESSAGE));
    let (routes, health) = grpc::with_health(routes, DESCRIPTORS).await?;

    for pair in &pairs {
        tracing::info!(model = %pair.model, pair = pair.fingerprint.short(), "prefills for");
    }
    tracing::info!(address = %listening, node = %id, blocks, threads = config.node.threads(), "prefill node ready");
    let serving = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(grpc::serve(listener, routes, end.clone())));
    health.set_ready(true).await;
    let registration =
        address.map(|address| discovery.register(NodeInfo { id, role: Role::Prefill, address, pairs, max_context: limits.max_context }));

    drain.signaled().await;
    health.set_ready(false).await;
    if let Some(registration) = registration {
        registration.withdraw().await;
    }
    let held = || counts.held.load(Ordering::Acquire);
    let finished = async {
        while held() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(config.node.drain_timeout(), finished).await.is_err() {
        tracing::warn!(sequences = held(), "drain limit reached: the rest is broken off");
    }
    end.start();
    serving.await??;
    tokio::task::spawn_blocking(move || engine_thread.join()).await?.map_err(|_| RunError::Engine)?;
    Ok(())
}

/// What this node holds and has done.
#[derive(Default)]
struct Counts {
    /// Prompts; each is counted by a guard that lives as long as anything of it.
    held: AtomicUsize,
    /// Of these, being read.
    running: AtomicUsize,
    /// Of these, waiting for blocks or for the engine.
    waiting: AtomicUsize,
    /// Tokens of the prompts held that are not read yet.
    unread: AtomicUsize,
    /// Unread tokens that keep the engine busy for a moment; 0 where that is not bounded.
    unread_most: AtomicUsize,
    /// Prompt tokens that were looked up in the prefix cache.
    prefix_queries: AtomicU64,
    /// Of these, found.
    prefix_hits: AtomicU64,
}

/// One prompt's count; dropping it counts down.
struct Counted(Arc<Counts>);

impl Counted {
    fn new(counts: &Arc<Counts>) -> Self {
        counts.held.fetch_add(1, Ordering::AcqRel);
        Self(counts.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::AcqRel);
    }
}
