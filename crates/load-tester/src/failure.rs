//! Why a request was not answered. Every one is counted under its kind; the first message of each kind is shown.

use tonic::{Code, Status};

/// Characters of a message that are kept: a server may answer with a page.
const MESSAGE: usize = 300;

/// A request that was not answered whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    /// What the server or the transport said.
    pub(super) message: String,
}

/// Kinds of failures: what they are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// No connection, or it broke before the answer's head.
    Connect,
    /// An HTTP status other than success.
    Http(u16),
    /// A gRPC status other than OK.
    Grpc(Code),
    /// The answer began and broke off.
    BrokeOff,
    /// The server reported an error inside a stream.
    ErrorInStream,
    /// The answer is not what the protocol says.
    Malformed,
    /// The answer ended well, without one token.
    Empty,
    /// Not within `--request-timeout`.
    Timeout,
    /// Never sent: an earlier turn of its chat failed.
    EarlierTurn,
}

impl Kind {
    /// Its name in tables and results.
    pub(super) fn name(self) -> String {
        match self {
            Self::Connect => "connect".into(),
            Self::Http(status) => format!("http_{status}"),
            Self::Grpc(code) => {
                // `ResourceExhausted` as `resource_exhausted`.
                let mut name = String::from("grpc");
                for letter in format!("{code:?}").chars() {
                    if letter.is_ascii_uppercase() {
                        name.push('_');
                    }
                    name.push(letter.to_ascii_lowercase());
                }
                name
            }
            Self::BrokeOff => "broke_off".into(),
            Self::ErrorInStream => "error_in_stream".into(),
            Self::Malformed => "malformed".into(),
            Self::Empty => "empty".into(),
            Self::Timeout => "timeout".into(),
            Self::EarlierTurn => "earlier_turn".into(),
        }
    }
}

impl Failure {
    pub(super) fn new(kind: Kind, message: impl Into<String>) -> Self {
        let message: String = message.into();
        Self { kind, message: message.chars().take(MESSAGE).collect() }
    }

    /// A failure of `kind` with the whole chain of `error`: what a transport says of itself is rarely the reason.
    pub(super) fn caused(kind: Kind, error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_says = cause.to_string();
            if !message.ends_with(&cause_says) {
                message = format!("{message}: {cause_says}");
            }
            source = cause.source();
        }
        Self::new(kind, message)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        match std::error::Error::source(&status) {
            Some(cause) => Self::caused(Kind::Grpc(status.code()), cause),
            None => Self::new(Kind::Grpc(status.code()), status.message()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_names() {
        assert_eq!(Kind::Http(503).name(), "http_503");
        assert_eq!(Kind::Grpc(Code::ResourceExhausted).name(), "grpc_resource_exhausted");
        assert_eq!(Failure::from(Status::unavailable("full")), Failure::new(Kind::Grpc(Code::Unavailable), "full"));
    }

    #[test]
    fn a_page_is_cut() {
        assert_eq!(Failure::new(Kind::Http(500), "ä".repeat(10_000)).message.chars().count(), MESSAGE);
    }
}
