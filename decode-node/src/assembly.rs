//! A decode node put together: all of it but its threads and its sockets, whatever computes for it.

use std::sync::Arc;

use overfill_kv::BlockPool;
use overfill_lifecycle::metrics::Registry;
use overfill_nccl::Nccl;
use overfill_node::{Cores, Faults, Pulse, RunError};
use overfill_proto::MAX_MESSAGE;
use overfill_proto::v1::decode_server::DecodeServer;
use overfill_proto::v1::node_server::NodeServer;
use overfill_transport::calls::{NodeService, Signals};
use overfill_transport::push::Takes;
use overfill_transport::push::nccl::Joined;
use overfill_types::{Limits, NodeId, NodeInfo, PeerAddress, Role, ServedPair, Ticket};
use tonic::service::Routes;

use crate::admission::{Admission, SequenceBounds};
use crate::commands::Commands;
use crate::compute::Compute;
use crate::config::DecodeConfig;
use crate::engine::{Engine, Settings};
use crate::load::Loaded;
use crate::metrics::Metrics;
use crate::service::DecodeService;

/// A decode node that only needs to be turned and asked.
pub struct Assembled<C> {
    /// What writes. It is turned by a thread of its own, or by a task.
    pub engine: Engine<C>,
    /// Beats with the engine's turns.
    pub pulse: Pulse,
    /// What it answers routers and prefill nodes.
    pub routes: Routes,
    /// What takes handoffs of prefill nodes in this process.
    pub takes: Arc<dyn Takes>,
    /// The blocks of its cache.
    pub blocks: BlockPool,
    /// What it counts.
    pub metrics: Registry,
    /// Its communicators, if it has any.
    pub(crate) joined: Option<Joined>,
    id: NodeId,
    pair: ServedPair,
    admission: Arc<Admission>,
}

/// Puts a decode node together, which takes rows over `nccl` too, if it is given and its cache takes them from there.
///
/// # Errors
/// Where its metrics are malformed.
pub fn assemble<C: Compute>(
    id: NodeId,
    config: &DecodeConfig,
    loaded: Loaded<C>,
    nccl: Option<Nccl>,
    signals: &Signals,
) -> Result<Assembled<C>, RunError> {
    let Loaded { manifest, compute, blocks, guides } = loaded;
    let blocks = BlockPool::new(blocks, config.node.block_tokens as usize);
    let limits = Limits { max_context: config.node.max_context(manifest.max_context()), vocab_size: manifest.vocab_size() };
    let bounds = SequenceBounds {
        sequences: config.max_sequences as usize,
        blocks: (blocks.total() as f64 * config.kv_overcommit) as usize,
        reservation_timeout: config.reservation_timeout(),
    };
    let admission = Arc::new(Admission::new(&manifest, limits, blocks.clone(), bounds));
    let metrics = Arc::new(Metrics::new(&manifest, &admission)?);
    let settings = Settings {
        eos: manifest.tokenizer.eos_token_ids.clone(),
        max_batch: config.max_batch,
        patience: config.reservation_timeout(),
        wire: manifest.kv_formats.wire,
    };
    let (pulse, faults) = (Pulse::default(), Faults::new(config.node.fault.clone()));
    let (commands, told) = Commands::new();
    let held = admission.clone();
    let joined = nccl
        .filter(|_| compute.on_gpu(manifest.kv_formats.wire))
        .map(|nccl| Joined::new(nccl, manifest.fingerprint.clone(), Arc::new(move |ticket: &Ticket| held.holds(ticket))));
    let cores = Cores::new(&config.node.cores, Role::Decode)?;
    let engine = Engine::new((compute, cores), told, settings, metrics.clone(), (pulse.clone(), faults));
    let pair = ServedPair { model: manifest.name, fingerprint: manifest.fingerprint };
    let registry = metrics.registry.clone();
    let node = (id.clone(), pair.clone());
    let service = Arc::new(DecodeService::new(node, (admission.clone(), joined.clone()), commands, guides, metrics, signals.clone()));
    let routes = Routes::new(DecodeServer::from_arc(service.clone()).max_decoding_message_size(MAX_MESSAGE))
        .add_service(NodeServer::new(NodeService::new(service.clone(), signals.clone())).max_decoding_message_size(MAX_MESSAGE));
    Ok(Assembled { engine, pulse, routes, takes: service, blocks, metrics: registry, joined, id, pair, admission })
}

impl<C> Assembled<C> {
    /// As what it is registered, where peers reach it at `address`.
    pub fn info(&self, address: PeerAddress) -> NodeInfo {
        let (id, pairs, max_context) = (self.id.clone(), vec![self.pair.clone()], self.admission.max_context());
        NodeInfo { id, role: Role::Decode, address, pairs, max_context }
    }

    /// Says how many sequences it holds.
    pub fn held(&self) -> impl Fn() -> usize + Clone + Send + Sync + 'static + use<C> {
        let admission = self.admission.clone();
        move || admission.sequences()
    }
}
