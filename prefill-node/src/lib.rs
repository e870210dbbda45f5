//! The prefill node: holds the full model, reads prompts.
//!
//! A prompt waits until the pool has blocks for it, is read in chunks together with others (`engine`, `queue`), and its KV
//! cache goes to a decode node layer by layer while it is computed (`rows`, `handoff`, `push`). What prompts left in the
//! cache is used by others that begin alike. One node may prefill for several pairs that have its full model (`pairs`).

pub mod config;
mod engine;
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

use overfill_cluster::Discovery;
use overfill_guide::Guides;
use overfill_kv::BlockPool;
use overfill_lifecycle::{Drain, Parts};
use overfill_model::{KvCache, ModelError, Placement, Pool, Workspace, cache};
use overfill_node::{Faults, Life, NodeListeners, Pulse};
use overfill_proto::v1::node_server::NodeServer;
use overfill_proto::{DESCRIPTORS, MAX_MESSAGE};
use overfill_transport::calls::{NodeService, Signals};
use overfill_transport::server;
use overfill_types::{Limits, NodeId, NodeInfo, PairManifest, Role};
use tonic::service::Routes;

use crate::engine::{Engine, Settings};
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::pairs::Offers;
use crate::service::{PrefillService, Served};

pub use crate::config::PrefillConfig;
pub use overfill_node::RunError;

/// Loads the full model, serves on `listeners`, and registers once its engine runs; returns when `drain` was given and what
/// ran is finished.
///
/// # Errors
/// Where the pair cannot be loaded, or where a part of the node ended or hangs.
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
    let signals = Signals { drain: drain.clone(), ..Signals::default() };
    let (mut parts, pulse, end) = (Parts::default(), Pulse::default(), signals.end.clone());
    let pace = Pace::new(config.queue_seconds);
    let counts = Arc::new(Counts { unread_most: AtomicUsize::new(pace.at_first(settings.chunk_tokens)), ..Counts::default() });
    let metrics = Arc::new(Metrics::new(&pairs, &pool, &counts, limits.max_context, config.prefix_cache)?);
    if let Some(listener) = scraped {
        parts.task("metrics server", metrics.registry.clone().serve(listener, end.clone()));
    }
    let seen = discovery.clone();
    metrics.registry.etcd(move || seen.etcd_connected())?;
    let engine = Engine {
        model,
        cache,
        rows,
        workspace,
        pool: pool.clone(),
        settings,
        counts: counts.clone(),
        metrics: metrics.clone(),
        pulse: pulse.clone(),
        faults: Faults::new(config.node.fault.clone()),
    };
    let jobs = engine.start(pace, config.max_queue as usize, &mut parts, end.clone())?;
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
    let service = Arc::new(PrefillService::new(served, jobs, counts.clone(), metrics, signals.clone()));
    let service = NodeService::new(service, signals.clone());
    let routes = Routes::new(NodeServer::new(service).max_decoding_message_size(MAX_MESSAGE));
    let (routes, health) = server::with_health(routes, DESCRIPTORS).await?;

    for pair in &pairs {
        tracing::info!(model = %pair.model, pair = pair.fingerprint.short(), "prefills for");
    }
    tracing::info!(address = %listening, node = %id, blocks, threads = config.node.threads(), "prefill node ready");
    let max_context = limits.max_context;
    let info = address.map(|address| NodeInfo { id, role: Role::Prefill, address, pairs, max_context });
    let life = Life {
        parts,
        pulse,
        step_timeout: config.node.step_timeout(),
        server: (listener, routes),
        health,
        discovery,
        info,
        signals,
        held: move || counts.held.load(Ordering::Acquire),
        drain_timeout: config.node.drain_timeout(),
    };
    Ok(life.run().await?)
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
