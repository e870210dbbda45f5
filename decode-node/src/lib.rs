//! The decode node: holds the decode model, writes answers.
//!
//! A request is admitted (`admission`: blocks are reserved or it is refused), waits for its KV cache (`receiver`), then runs
//! in the engine's batch until it ends (`engine`), or until an older sequence needs its blocks. Whatever ends it, dropping
//! its sequence frees its blocks.

mod admission;
mod assembly;
mod commands;
mod compute;
pub mod config;
mod engine;
mod load;
mod metrics;
mod receiver;
mod sequence;
mod service;

use overfill_cluster::Discovery;
use overfill_lifecycle::{Drain, Parts};
use overfill_node::{Life, NodeListeners, admin};
use overfill_proto::DESCRIPTORS;
use overfill_transport::calls::Signals;
use overfill_transport::push::machine;
use overfill_transport::server;
use overfill_types::NodeId;

pub use crate::assembly::{Assembled, assemble};
pub use crate::compute::Compute;
pub use crate::config::DecodeConfig;
pub use crate::engine::{Broken, Engine};
pub use crate::load::Loaded;
pub use overfill_node::RunError;

/// Loads the decode model, serves on `listeners`, and registers once its engine runs; returns when `drain` was given and what
/// ran is finished.
///
/// # Errors
/// Where the pair cannot be loaded, or where a part of the node ended or hangs.
pub async fn run(config: DecodeConfig, listeners: impl Into<NodeListeners>, discovery: Discovery, drain: Drain) -> Result<(), RunError> {
    let loading = load::load(config.clone());
    run_over(loading, config, listeners, discovery, drain).await
}

/// The same over whatever computes.
///
/// # Errors
/// Those of `loading`, and of [`run`].
pub async fn run_over<C: Compute>(
    loading: impl Future<Output = Result<Loaded<C>, RunError>>,
    config: DecodeConfig,
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
    let (id, pair, model) =
        (NodeId::new(format!("decode-{}", uuid::Uuid::new_v4())), loaded.manifest.fingerprint.clone(), loaded.manifest.name.clone());
    let signals = Signals { drain, ..Signals::default() };
    let node = assemble(id.clone(), &config, loaded, nccl, &signals)?;
    let (info, held) = (address.map(|address| node.info(address)), node.held());
    let Assembled { engine, pulse, routes, takes, blocks, metrics, joined, .. } = node;
    // By where it listens, not by what it advertises: who reaches it through something else is to go on doing so.
    let _open = discovery.within().open(&listening.to_string(), takes.clone());

    let (mut parts, end, security) = (Parts::default(), signals.end.clone(), discovery.security().clone());
    let seen = discovery.clone();
    metrics.discovery(move || seen.connected())?;
    let (routes, health) = server::with_health(routes, Some(DESCRIPTORS)).await?;
    if let Some(listener) = admin {
        parts.task("admin server", admin::serve(listener, metrics, health.clone(), signals.clone()));
    }
    if let Some(local) = security.is_open().then(|| machine::listen(listening)).flatten() {
        parts.task("Unix socket", machine::serve(local, takes, end.clone()));
    }
    let (until, placement) = (end.clone(), config.placement());
    parts.thread("decode engine", move || {
        placement.apply_to_caller();
        engine.run(&until);
    })?;

    tracing::info!(address = %listening, node = %id, pair = pair.short(), %model, blocks = blocks.total(), threads = config.node.threads(), "decode node ready");
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
    if let Some(joined) = joined {
        joined.close().await;
    }
    Ok(ended?)
}
