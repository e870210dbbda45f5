//! A prefill node put together: all of it but its threads and its sockets, whatever computes for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use overfill_kv::BlockPool;
use overfill_lifecycle::metrics::Registry;
use overfill_node::{Cores, Faults, Pulse, RunError};
use overfill_proto::MAX_MESSAGE;
use overfill_proto::v1::node_server::NodeServer;
use overfill_transport::calls::{NodeService, Signals};
use overfill_types::{Limits, NodeId, NodeInfo, PairManifest, PeerAddress, Role, ServedPair};
use tonic::service::Routes;

use crate::Counts;
use crate::compute::Compute;
use crate::config::PrefillConfig;
use crate::decode_nodes::DecodeNodes;
use crate::engine::{Engine, Settings};
use crate::load::Loaded;
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::pairs::Offers;
use crate::service::{PrefillService, Served};

/// A prefill node that only needs to be turned and asked.
pub struct Assembled<C> {
    /// What reads. It is turned by a thread of its own, or by a task.
    pub engine: Engine<C>,
    /// Beats with the engine's turns.
    pub pulse: Pulse,
    /// What it answers routers.
    pub routes: Routes,
    /// The blocks of its cache.
    pub blocks: BlockPool,
    /// What it counts.
    pub metrics: Registry,
    /// The pairs that it prefills for.
    pub pairs: Vec<ServedPair>,
    id: NodeId,
    max_context: usize,
    counts: Arc<Counts>,
}

/// Puts a prefill node together, which hands over to `decode_nodes`.
///
/// # Errors
/// Where its metrics are malformed.
pub fn assemble<C: Compute>(
    id: NodeId,
    config: &PrefillConfig,
    loaded: Loaded<C>,
    decode_nodes: DecodeNodes,
    signals: &Signals,
) -> Result<Assembled<C>, RunError> {
    let Loaded { manifests, compute, blocks, guides } = loaded;
    let blocks = BlockPool::new(blocks, config.node.block_tokens as usize);
    let shortest = manifests.iter().map(PairManifest::max_context).min().unwrap_or(0);
    let vocab_size = manifests.iter().map(PairManifest::vocab_size).min().unwrap_or(0);
    let limits = Limits { max_context: config.node.max_context(shortest), vocab_size };
    let eos = manifests.first().map(|m| m.tokenizer.eos_token_ids.clone()).unwrap_or_default();
    let settings = Settings { eos, chunk_tokens: config.chunk_tokens as usize };
    let pace = Pace::new(config.queue_seconds);
    let counts = Arc::new(Counts { unread_most: AtomicUsize::new(pace.at_first(settings.chunk_tokens)), ..Counts::default() });
    let metrics = Arc::new(Metrics::new(&manifests, &blocks, &counts, limits.max_context, config.prefix_cache)?);
    let (pulse, faults) = (Pulse::default(), Faults::new(config.node.fault.clone()));
    // As many may be on their way to the engine as the node holds.
    let (jobs, told) = flume::bounded(config.max_queue as usize);
    let cores = Cores::new(&config.node.cores, Role::Prefill)?;
    let (kept, counted) = ((blocks.clone(), pace), (counts.clone(), metrics.clone()));
    let offers = Offers::new(&manifests, |pair| compute.gpu(pair));
    let engine = Engine::new((compute, cores), told, settings, kept, counted, (pulse.clone(), faults));
    let pairs = offers.served();
    let registry = metrics.registry.clone();
    let served = Served {
        id: id.clone(),
        offers,
        limits,
        pool: blocks.clone(),
        max_queue: config.max_queue as usize,
        prefix_cache: config.prefix_cache,
        guides,
        decode_nodes,
        nccl_checksums: config.nccl_checksums,
    };
    let service = Arc::new(PrefillService::new(served, jobs, counts.clone(), metrics, signals.clone()));
    let service = NodeService::new(service, signals.clone());
    let routes = Routes::new(NodeServer::new(service).max_decoding_message_size(MAX_MESSAGE));
    Ok(Assembled { engine, pulse, routes, blocks, metrics: registry, pairs, id, max_context: limits.max_context, counts })
}

impl<C> Assembled<C> {
    /// As what it is registered, where peers reach it at `address`.
    pub fn info(&self, address: PeerAddress) -> NodeInfo {
        NodeInfo { id: self.id.clone(), role: Role::Prefill, address, pairs: self.pairs.clone(), max_context: self.max_context }
    }

    /// Says how many prompts it holds.
    pub fn held(&self) -> impl Fn() -> usize + Clone + Send + Sync + 'static + use<C> {
        let counts = self.counts.clone();
        move || counts.held.load(Ordering::Acquire)
    }
}
