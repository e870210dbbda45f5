//! Why a node could not run.

use overfill_lifecycle::PartEnded;

use crate::advertise::AdvertiseError;
use crate::cores::CoresError;
use crate::nccl::NcclUnusable;

/// A node that could not start, or broke.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no one address to tell peers.
    #[error("the node has no address to register")]
    Advertise(#[from] AdvertiseError),
    /// Cores cannot be shared as it was asked to.
    #[error("the node cannot share cores")]
    Cores(#[from] CoresError),
    /// KV caches cannot be handed over as it was asked to.
    #[error("the node cannot use NCCL")]
    Nccl(#[from] NcclUnusable),
    /// The pair cannot be loaded.
    #[error("the pair cannot be loaded")]
    Model(#[from] overfill_model::ModelError),
    /// The reflection service could not be made.
    #[error("the gRPC descriptors are malformed")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Two metrics have one name.
    #[error("the metrics are malformed")]
    Metrics(#[from] overfill_lifecycle::metrics::Error),
    /// The system refused a thread or a socket's address.
    #[error("the system refused a thread or an address")]
    System(#[from] std::io::Error),
    /// A task that loads the pair panicked.
    #[error("loading the pair panicked")]
    Loading(#[from] tokio::task::JoinError),
    /// A part of the node ended unasked, so the node did.
    #[error("this node cannot go on")]
    Part(#[from] PartEnded),
}
