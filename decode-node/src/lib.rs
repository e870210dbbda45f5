//! The decode node: holds the decode model, writes answers.
//!
//! A request is admitted (`admission`: blocks are reserved or it is refused), waits for its KV cache (`receiver`), then runs
//! in the engine's batch until it ends (`engine`), or until an older sequence needs its blocks. Whatever ends it, dropping
//! its sequence frees its blocks.

mod admission;
pub mod config;
mod engine;
mod metrics;
mod receiver;
mod sequence;
mod service;

use std::sync::Arc;

use overfill_cluster::Discovery;
use overfill_guide::Guides;
use overfill_kv::BlockPool;
use overfill_lifecycle::{Drain, Parts};
use overfill_model::{KvCache, ModelError, Pair, Placement, Pool, Workspace, cache};
use overfill_node::{Faults, Life, NodeListeners, Pulse};
use overfill_proto::v1::decode_server::DecodeServer;
use overfill_proto::v1::node_server::NodeServer;
use overfill_proto::{DESCRIPTORS, MAX_MESSAGE};
use overfill_transport::calls::{NodeService, Signals};
use overfill_transport::server;
use overfill_types::{Limits, NodeId, NodeInfo, Role, ServedPair};
use tonic::service::Routes;

use crate::admission::{Admission, Bounds};
use crate::engine::{Engine, Settings};
use crate::metrics::Metrics;
use crate::service::DecodeService;

pub use crate::config::DecodeConfig;
pub use overfill_node::RunError;

/// Loads the decode model, serves on `listeners`, and registers once its engine runs; returns when `drain` was given and what
/// ran is finished.
///
/// # Errors
/// Where the pair cannot be loaded, or where a part of the node ended or hangs.
pub async fn run(config: DecodeConfig, listeners: impl Into<NodeListeners>, discovery: Discovery, drain: Drain) -> Result<(), RunError> {
    let NodeListeners { grpc: listener, metrics: scraped } = listeners.into();
    let listening = listener.local_addr()?;
    // Before anything is loaded: a flag that is missing is told at once.
    let address = if discovery.registers() { Some(config.node.advertised(listening)?) } else { None };
    let node = config.node.clone();
    let id = NodeId::new(format!("decode-{}", uuid::Uuid::new_v4()));
    let placement = Placement { cpus: node.cpus.clone(), nice: config.nice };
    let placement_of_pool = placement.clone();
    let dir = config.pair.clone();
    let loading = tokio::task::spawn_blocking(move || {
        let pair = Pair::open(&dir)?;
        let device = overfill_model::device::parse(&node.device)?;
        let pool = Pool::placed(node.threads(), &placement_of_pool)
            .map_err(|e| ModelError::Device(format!("{} compute threads cannot be started: {e}", node.threads())))?;
        let model = pair.load_decode(&device, &pool)?;
        let geometry = model.config().kv;
        let formats = pair.manifest.kv_formats;
        let blocks = node.blocks(cache::bytes_per_token(geometry, formats.cache));
        let mut cache = KvCache::new(geometry, formats.cache, blocks as usize, node.block_tokens as usize, &device)?;
        cache.claim(&pool);
        let guides = Guides::open(&pair.dir, &pair.manifest);
        Ok::<_, ModelError>((pair.manifest, Workspace::new(pool), model, cache, blocks, guides))
    });
    let (manifest, workspace, model, cache, blocks, guides) = loading.await??;

    let pool = BlockPool::new(blocks, config.node.block_tokens as usize);
    let limits = Limits { max_context: config.node.max_context(manifest.max_context()), vocab_size: manifest.vocab_size() };
    let bounds = Bounds {
        sequences: config.max_sequences as usize,
        blocks: (pool.total() as f64 * config.kv_overcommit) as usize,
        reservation_timeout: config.reservation_timeout(),
    };
    let admission = Arc::new(Admission::new(&manifest, limits, pool, bounds));
    let settings = Settings {
        eos: manifest.tokenizer.eos_token_ids.clone(),
        max_batch: config.max_batch,
        patience: config.reservation_timeout(),
        wire: manifest.kv_formats.wire,
        placement,
    };
    let pair = ServedPair { model: manifest.name.clone(), fingerprint: manifest.fingerprint.clone() };
    let signals = Signals { drain: drain.clone(), ..Signals::default() };
    let (mut parts, pulse, end) = (Parts::default(), Pulse::default(), signals.end.clone());
    let metrics = Arc::new(Metrics::new(&manifest, &admission)?);
    let seen = discovery.clone();
    metrics.registry.etcd(move || seen.etcd_connected())?;
    if let Some(listener) = scraped {
        parts.task("metrics server", metrics.registry.clone().serve(listener, end.clone()));
    }
    let faults = Faults::new(config.node.fault.clone());
    let engine = Engine { model, cache, workspace, settings, metrics: metrics.clone(), pulse: pulse.clone(), faults };
    let commands = engine.start(&mut parts, end.clone())?;
    let node = (id.clone(), pair.clone());
    let service = Arc::new(DecodeService::new(node, admission.clone(), commands, Arc::new(guides), metrics, signals.clone()));
    let routes = Routes::new(DecodeServer::from_arc(service.clone()).max_decoding_message_size(MAX_MESSAGE))
        .add_service(NodeServer::new(NodeService::new(service, signals.clone())).max_decoding_message_size(MAX_MESSAGE));
    let (routes, health) = server::with_health(routes, DESCRIPTORS).await?;

    tracing::info!(address = %listening, node = %id, pair = pair.fingerprint.short(), model = %pair.model, blocks, threads = config.node.threads(), "decode node ready");
    let max_context = limits.max_context;
    let info = address.map(|address| NodeInfo { id, role: Role::Decode, address, pairs: vec![pair], max_context });
    let life = Life {
        parts,
        pulse,
        step_timeout: config.node.step_timeout(),
        server: (listener, routes),
        health,
        discovery,
        info,
        signals,
        held: move || admission.sequences(),
        drain_timeout: config.node.drain_timeout(),
    };
    Ok(life.run().await?)
}
