//! Why a router could not run.

/// A router that could not start, or broke.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A pair's manifest or tokenizer cannot be opened.
    #[error("a pair cannot be opened")]
    Pair(#[from] overfill_types::ServiceError),
    /// Two metrics have one name.
    #[error("the metrics are malformed")]
    Metrics(#[from] overfill_lifecycle::metrics::Error),
    /// The reflection service could not be made.
    #[error("the gRPC descriptors are malformed")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// TLS of a door cannot be set up.
    #[error("TLS cannot be spoken at the doors")]
    Tls(#[from] overfill_transport::security::Unusable),
    /// A socket failed.
    #[error("a socket failed")]
    System(#[from] std::io::Error),
    /// A part of the router ended unasked, so the router did.
    #[error("this router cannot go on")]
    Part(#[from] overfill_lifecycle::PartEnded),
}
