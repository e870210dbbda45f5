//! The closed set of reasons for which a request can fail.

use std::fmt;
use std::time::Duration;

/// What kind of failure it is: enough for a caller to decide what to do, and nothing more.
///
/// `overfill_proto::status` maps it to gRPC and back without loss, the router's HTTP side maps it to a status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The request itself is wrong; sending it again does not help.
    InvalidArgument,
    /// It names a model, ticket or pair that is not here.
    NotFound,
    /// The client's key is missing or unknown.
    Unauthenticated,
    /// A bound is reached (KV blocks, a client's limits, message size); later may help.
    ResourceExhausted,
    /// A node or a whole pair of them is away; another node or later may help.
    Unavailable,
    /// A node took its blocks for an older sequence; it goes on from where it was, elsewhere or later.
    Preempted,
    /// Its time ran out.
    DeadlineExceeded,
    /// The one who asked went away.
    Cancelled,
    /// Two sides do not fit together: other pair, KV geometry, tokenizer.
    Mismatch,
    /// It belongs to an older epoch, or to a ticket that was used already.
    Stale,
    /// Bytes were lost or changed on the way: checksum, order, digest.
    DataLoss,
    /// It is not built.
    Unimplemented,
    /// A defect of ours.
    Internal,
}

impl Code {
    /// All of them, for exhaustive tests.
    pub const ALL: [Code; 13] = [
        Code::InvalidArgument,
        Code::NotFound,
        Code::Unauthenticated,
        Code::ResourceExhausted,
        Code::Unavailable,
        Code::Preempted,
        Code::DeadlineExceeded,
        Code::Cancelled,
        Code::Mismatch,
        Code::Stale,
        Code::DataLoss,
        Code::Unimplemented,
        Code::Internal,
    ];

    /// Stable name in snake case, as it stands in logs and in HTTP error bodies.
    pub fn as_str(self) -> &'static str {
        match self {
            Code::InvalidArgument => "invalid_argument",
            Code::NotFound => "not_found",
            Code::Unauthenticated => "unauthenticated",
            Code::ResourceExhausted => "resource_exhausted",
            Code::Unavailable => "unavailable",
            Code::Preempted => "preempted",
            Code::DeadlineExceeded => "deadline_exceeded",
            Code::Cancelled => "cancelled",
            Code::Mismatch => "mismatch",
            Code::Stale => "stale",
            Code::DataLoss => "data_loss",
            Code::Unimplemented => "unimplemented",
            Code::Internal => "internal",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failure as it crosses a service boundary: a [`Code`] and a sentence that names what was wrong and what to do.
///
/// The sentence is read by clients: it holds no prompt, no answer and no path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ServiceError {
    /// What kind of failure.
    pub code: Code,
    /// What was wrong and what to do about it.
    pub message: String,
    /// When to try again, where that is known.
    pub retry_after: Option<Duration>,
}

impl ServiceError {
    /// A failure of kind `code` with the sentence `message`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None }
    }

    /// The same, with when to try again.
    #[must_use]
    pub fn retry_after(self, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..self }
    }
}
