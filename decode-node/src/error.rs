//! Why a decode node could not run.

/// A decode node that could not start, or broke.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no one address to tell peers.
    #[error("the node has no address to register")]
    Advertise(#[from] overfill_lifecycle::AdvertiseError),
    /// The pair cannot be loaded.
    #[error("the pair cannot be loaded")]
    Model(#[from] overfill_model::ModelError),
    /// The transport failed.
    #[error("the gRPC server failed")]
    Transport(#[from] tonic::transport::Error),
    /// The reflection service could not be made.
    #[error("the gRPC descriptors are malformed")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Two metrics have one name.
    #[error("the metrics are malformed")]
    Metrics(#[from] overfill_lifecycle::metrics::Error),
    /// The system refused a thread or a socket's address.
    #[error("the system refused a thread or an address")]
    System(#[from] std::io::Error),
    /// A task panicked.
    #[error("a task panicked")]
    Task(#[from] tokio::task::JoinError),
    /// The engine's thread panicked.
    #[error("the engine panicked")]
    Engine,
}
