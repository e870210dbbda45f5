//! The closed set of reasons for which a request can fail.

use std::fmt;
use std::time::Duration;

/// What kind of failure it is: enough for a caller to decide what to do, and nothing more.
///
/// `overfill_proto::error` maps it to gRPC and back without loss, the router's HTTP side maps it to a status code.
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
    /// A node, or the connection to it, was lost in the middle of its work; the answer goes on elsewhere.
    NodeLost,
    /// The engine of a node died or hangs; the answer goes on elsewhere.
    EngineLost,
    /// A node took its blocks for an older sequence; it goes on from where it was, elsewhere or later.
    Preempted,
    /// Engines died under its prompt.
    Quarantined,
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
    pub const ALL: [Code; 16] = [
        Code::InvalidArgument,
        Code::NotFound,
        Code::Unauthenticated,
        Code::ResourceExhausted,
        Code::Unavailable,
        Code::NodeLost,
        Code::EngineLost,
        Code::Preempted,
        Code::Quarantined,
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
            Code::NodeLost => "node_lost",
            Code::EngineLost => "engine_lost",
            Code::Preempted => "preempted",
            Code::Quarantined => "quarantined",
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

/// What another attempt at a request may do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Retry {
    /// It would end the same way wherever it is tried.
    Never,
    /// It may succeed on another node, or over another connection, at once.
    Elsewhere,
    /// It may succeed where it failed, later: there was no room.
    Later,
}

impl Retry {
    /// All of them, for exhaustive tests.
    pub const ALL: [Retry; 3] = [Retry::Never, Retry::Elsewhere, Retry::Later];
}

/// Who is to blame for a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The request, or the client that sent it.
    Request,
    /// The node that tells of it: others are better asked first for a while, unless it only wants room.
    Node,
    /// The way between two processes, or a peer that nothing more is known of.
    Way,
}

impl Blame {
    /// All of them, for exhaustive tests.
    pub const ALL: [Blame; 3] = [Blame::Request, Blame::Node, Blame::Way];
}

/// A failure as it crosses a service boundary: a [`Code`], a sentence that names what was wrong and what to do, and what it
/// means for another attempt.
///
/// Where a failure arises it is decided whether another attempt may help and who is to blame: nobody further on knows as much.
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
    /// What another attempt may do.
    pub retry: Retry,
    /// Who is to blame.
    pub blame: Blame,
    /// The field of the request that is wrong, as the client calls it (`messages[2].role`), where it is one. Only the process that
    /// read the request knows it: it does not travel.
    pub field: Option<String>,
}

impl ServiceError {
    /// A failure of the request itself: it would fail everywhere.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None, retry: Retry::Never, blame: Blame::Request, field: None }
    }

    /// A field of the request that is wrong: [`Code::InvalidArgument`].
    pub fn of_field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: Some(field.into()), ..Self::new(Code::InvalidArgument, message) }
    }

    /// A failure of the node that tells of it: another may do better.
    pub fn of_node(code: Code, message: impl Into<String>) -> Self {
        Self { retry: Retry::Elsewhere, blame: Blame::Node, ..Self::new(code, message) }
    }

    /// A failure of the way between two processes: another attempt may do better.
    pub fn of_way(code: Code, message: impl Into<String>) -> Self {
        Self { retry: Retry::Elsewhere, blame: Blame::Way, ..Self::new(code, message) }
    }

    /// A node has no room now: it may have some later.
    pub fn no_room(code: Code, message: impl Into<String>) -> Self {
        Self { retry: Retry::Later, blame: Blame::Node, ..Self::new(code, message) }
    }

    /// The same, for a node that may be asked nothing of the kind, where others may.
    #[must_use]
    pub fn elsewhere(self) -> Self {
        Self { retry: Retry::Elsewhere, ..self }
    }

    /// The same, with when to try again.
    #[must_use]
    pub fn retry_after(self, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..self }
    }
}
