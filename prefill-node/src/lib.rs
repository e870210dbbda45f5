//! The prefill node: holds the full model, reads prompts.
//!
//! A prompt waits until the pool has blocks for it, is read in chunks together with others (`engine`, `queue`), and its KV
//! cache goes to a decode node layer by layer while it is computed (`rows`, `handoff`, `push`). What prompts left in the
//! cache is used by others that begin alike. One node may prefill for several pairs that have its full model (`pairs`).

mod assembly;
mod compute;
pub mod config;
mod decode_nodes;
mod engine;
mod framing;
mod handoff;
mod load;
mod metrics;
mod pace;
mod pairs;
mod push;
mod queue;
mod rows;
mod service;
mod way;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use overfill_cluster::Discovery;
use overfill_lifecycle::{Drain, Parts};
use overfill_node::{Life, NodeListeners, admin};
use overfill_proto::DESCRIPTORS;
use overfill_transport::calls::Signals;
use overfill_transport::server;
use overfill_types::NodeId;

pub use crate::assembly::{Assembled, assemble};
pub use crate::compute::{CachedRows, Compute, OnLayer};
pub use crate::config::PrefillConfig;
pub use crate::decode_nodes::DecodeNodes;
pub use crate::engine::{Broken, Engine};
pub use crate::load::Loaded;
pub use crate::rows::Piece;
pub use overfill_node::RunError;

/// Loads the full model, serves on `listeners`, and registers once its engine runs; returns when `drain` was given and what
/// ran is finished.
///
/// # Errors
/// Where the pair cannot be loaded, or where a part of the node ended or hangs.
pub async fn run(config: PrefillConfig, listeners: impl Into<NodeListeners>, discovery: Discovery, drain: Drain) -> Result<(), RunError> {
    let loading = load::load(config.clone());
    run_over(loading, config, listeners, discovery, drain).await
}

/// The same over whatever computes.
///
/// # Errors
/// Those of `loading`, and of [`run`].
pub async fn run_over<C: Compute>(
    loading: impl Future<Output = Result<Loaded<C>, RunError>>,
    config: PrefillConfig,
    listeners: impl Into<NodeListeners>,
    discovery: Discovery,
    drain: Drain,
) -> Result<(), RunError> {
    let NodeListeners { grpc: listener, admin } = listeners.into();
    let listening = listener.local_addr()?;
    // Before anything is loaded: a flag that is missing is told at once.
    let address = if discovery.registers() { Some(config.node.advertised(listening)?) } else { None };
    let nccl = config.node.nccl.open(&config.node.device, discovery.security())?;
    let loaded = loading.await?;
    let id = NodeId::new(format!("prefill-{}", uuid::Uuid::new_v4()));
    let signals = Signals { drain, ..Signals::default() };
    let mut decode_nodes = DecodeNodes::found_by(&discovery);
    if let Some(nccl) = nccl {
        decode_nodes = decode_nodes.over(nccl, discovery.connector());
    }
    let node = assemble(id.clone(), &config, loaded, decode_nodes.clone(), &signals)?;
    let (info, held) = (address.map(|address| node.info(address)), node.held());
    let Assembled { engine, pulse, routes, blocks, metrics, pairs, .. } = node;

    let (mut parts, end, security) = (Parts::default(), signals.end.clone(), discovery.security().clone());
    let seen = discovery.clone();
    metrics.discovery(move || seen.connected())?;
    let (routes, health) = server::with_health(routes, Some(DESCRIPTORS)).await?;
    if let Some(listener) = admin {
        parts.task("admin server", admin::serve(listener, metrics, health.clone(), signals.clone()));
    }
    let (until, placement) = (end.clone(), config.placement());
    parts.thread("prefill engine", move || {
        placement.apply_to_caller();
        engine.run(&until);
    })?;

    for pair in &pairs {
        tracing::info!(model = %pair.model, pair = pair.fingerprint.short(), "prefills for");
    }
    tracing::info!(address = %listening, node = %id, blocks = blocks.total(), threads = config.node.threads(), "prefill node ready");
    let life = Life {
        parts,
        pulse,
        step_timeout: config.node.step_timeout(),
        server: server::serve_peers(listener, routes, end, security),
        health,
        discovery,
        info,
        signals,
        held,
        drain_delay: config.node.drain_delay(),
        drain_timeout: config.node.drain_timeout(),
    };
    let ended = life.run().await;
    decode_nodes.close().await;
    Ok(ended?)
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
