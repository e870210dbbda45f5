//! [`ServiceError`] to a gRPC status or the end of a call, and back, without loss. The only such mapping.

use std::error::Error;
use std::time::Duration;

use overfill_types::{Blame, Code, Retry, ServiceError};
use tonic::Status;
use tonic::metadata::{MetadataMap, MetadataValue};

use crate::v1::{self, Ended};

/// Metadata that names our code, since gRPC has fewer fitting ones.
const CODE: &str = "overfill-code";
/// Metadata that says in how many milliseconds to try again (gRPC's own name for it: proposal A6).
const PUSHBACK: &str = "grpc-retry-pushback-ms";
/// Metadata that says what another attempt may do.
const RETRY: &str = "overfill-retry";
/// Metadata that says who is to blame.
const BLAME: &str = "overfill-blame";

/// gRPC's code for ours: what a client that knows only gRPC goes by.
pub fn grpc_code(code: Code) -> tonic::Code {
    match code {
        Code::InvalidArgument | Code::Quarantined => tonic::Code::InvalidArgument,
        Code::NotFound => tonic::Code::NotFound,
        Code::Unauthenticated => tonic::Code::Unauthenticated,
        Code::ResourceExhausted => tonic::Code::ResourceExhausted,
        Code::Unavailable | Code::NodeLost | Code::EngineLost | Code::Preempted => tonic::Code::Unavailable,
        Code::DeadlineExceeded => tonic::Code::DeadlineExceeded,
        Code::Cancelled => tonic::Code::Cancelled,
        Code::Mismatch => tonic::Code::FailedPrecondition,
        Code::Stale => tonic::Code::Aborted,
        Code::DataLoss => tonic::Code::DataLoss,
        Code::Unimplemented => tonic::Code::Unimplemented,
        Code::Internal => tonic::Code::Internal,
    }
}

/// The status that tells a client of this error.
pub fn to_status(error: &ServiceError) -> Status {
    let mut metadata = MetadataMap::new();
    metadata.insert(CODE, MetadataValue::from_static(error.code.as_str()));
    if let Some(wait) = error.retry_after {
        metadata.insert(PUSHBACK, MetadataValue::from(milliseconds(wait)));
    }
    Status::with_metadata(grpc_code(error.code), error.message.clone(), metadata)
}

/// The status that tells one of our own servers of this error: with what it means for another attempt.
pub fn to_peer(error: &ServiceError) -> Status {
    let mut status = to_status(error);
    let metadata = status.metadata_mut();
    metadata.insert(RETRY, MetadataValue::from_static(name_of_retry(error.retry)));
    metadata.insert(BLAME, MetadataValue::from_static(name_of_blame(error.blame)));
    status
}

/// The error that a peer's status tells of. `peer` names the peer in the sentence, for errors that it did not send itself.
///
/// A status that was made here because the connection broke or could not be made (it has a source) is [`Code::Unavailable`]
/// and the way's fault, and so is whatever the peer's transport, not its service, has told.
pub fn from_status(status: &Status, peer: &str) -> ServiceError {
    if let Some(source) = status.source() {
        return ServiceError::of_way(Code::Unavailable, format!("the connection to {peer} failed: {}", innermost(source)));
    }
    let told = |name| status.metadata().get(name).and_then(|value| value.to_str().ok());
    let pushback = told(PUSHBACK).and_then(|ms| ms.parse().ok()).map(Duration::from_millis);
    let retry = told(RETRY).and_then(|name| Retry::ALL.into_iter().find(|retry| name_of_retry(*retry) == name));
    let blame = told(BLAME).and_then(|name| Blame::ALL.into_iter().find(|blame| name_of_blame(*blame) == name));
    let named = told(CODE).and_then(|name| Code::ALL.into_iter().find(|code| name == code.as_str()));
    let code = match named.filter(|code| grpc_code(*code) == status.code()) {
        Some(code) => code,
        None => match status.code() {
            tonic::Code::InvalidArgument | tonic::Code::OutOfRange => Code::InvalidArgument,
            tonic::Code::NotFound => Code::NotFound,
            tonic::Code::ResourceExhausted => Code::ResourceExhausted,
            // Of no request, but of our process: the peer does not know it.
            tonic::Code::Unauthenticated => Code::Unavailable,
            // A stream that is reset is how a peer that goes away looks from here.
            tonic::Code::Unavailable | tonic::Code::Cancelled => Code::Unavailable,
            tonic::Code::DeadlineExceeded => Code::DeadlineExceeded,
            tonic::Code::FailedPrecondition => Code::Mismatch,
            tonic::Code::Aborted => Code::Stale,
            tonic::Code::DataLoss => Code::DataLoss,
            tonic::Code::Unimplemented => Code::Unimplemented,
            _ => Code::Internal,
        },
    };
    let (retry, blame) = (retry.unwrap_or(Retry::Elsewhere), blame.unwrap_or(Blame::Way));
    ServiceError { code, message: status.message().into(), retry_after: pushback, retry, blame, field: None }
}

/// How a call that ended with `error` is told of on a stream of calls.
pub fn to_ended(error: ServiceError) -> Ended {
    let ServiceError { code, message, retry_after, retry, blame, field: _ } = error;
    let retry = match retry {
        Retry::Never => v1::Retry::Never,
        Retry::Elsewhere => v1::Retry::Elsewhere,
        Retry::Later => v1::Retry::Later,
    };
    let blame = match blame {
        Blame::Request => v1::Blame::Request,
        Blame::Node => v1::Blame::Node,
        Blame::Way => v1::Blame::Way,
    };
    let retry_after_ms = retry_after.map(milliseconds);
    Ended { code: code.as_str().into(), message, retry_after_ms, retry: retry.into(), blame: blame.into() }
}

/// What a call that ended has to say.
///
/// # Errors
/// The one that it ended with.
pub fn from_ended(ended: Ended) -> Result<(), ServiceError> {
    if ended.code.is_empty() {
        return Ok(());
    }
    let retry = match ended.retry() {
        v1::Retry::Never => Retry::Never,
        v1::Retry::Later => Retry::Later,
        // A node of another version knows more than this one: to be tried elsewhere is the least that can be right.
        v1::Retry::Elsewhere | v1::Retry::Unspecified => Retry::Elsewhere,
    };
    let blame = match ended.blame() {
        v1::Blame::Request => Blame::Request,
        v1::Blame::Node => Blame::Node,
        v1::Blame::Way | v1::Blame::Unspecified => Blame::Way,
    };
    let code = Code::ALL.into_iter().find(|code| ended.code == code.as_str()).unwrap_or(Code::Internal);
    let retry_after = ended.retry_after_ms.map(Duration::from_millis);
    Err(ServiceError { code, message: ended.message, retry_after, retry, blame, field: None })
}

fn milliseconds(wait: Duration) -> u64 {
    u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)
}

fn name_of_retry(retry: Retry) -> &'static str {
    match retry {
        Retry::Never => "never",
        Retry::Elsewhere => "elsewhere",
        Retry::Later => "later",
    }
}

fn name_of_blame(blame: Blame) -> &'static str {
    match blame {
        Blame::Request => "request",
        Blame::Node => "node",
        Blame::Way => "way",
    }
}

fn innermost<'a>(mut error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    while let Some(source) = error.source() {
        error = source;
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_survives_the_wire() {
        for code in Code::ALL {
            for retry in Retry::ALL {
                for blame in Blame::ALL {
                    let error = ServiceError { retry, blame, ..ServiceError::new(code, "why") };
                    assert_eq!(from_status(&to_peer(&error), "peer"), error);
                    let later = error.retry_after(Duration::from_millis(1500));
                    assert_eq!(from_status(&to_peer(&later), "peer"), later);
                    assert_eq!(from_ended(to_ended(later.clone())), Err(later));
                }
            }
        }
    }

    #[test]
    fn clients_are_not_told_of_what_goes_on_within() {
        let status = to_status(&ServiceError::of_node(Code::Unavailable, "why"));
        assert!(status.metadata().get(RETRY).is_none() && status.metadata().get(BLAME).is_none());
    }

    #[test]
    fn a_call_that_ended_well_has_no_error() {
        assert!(from_ended(Ended::default()).is_ok());
        let unknown = Ended { code: "of a later version".into(), message: "why".into(), ..Ended::default() };
        assert_eq!(from_ended(unknown), Err(ServiceError::of_way(Code::Internal, "why")));
    }

    #[test]
    fn a_status_that_names_no_code_of_ours_is_read_by_grpcs() {
        let mut status = to_peer(&ServiceError::new(Code::Preempted, "why"));
        status.metadata_mut().insert(CODE, MetadataValue::from_static("stale"));
        assert_eq!(from_status(&status, "peer").code, Code::Unavailable, "the two codes contradict each other");
        assert_eq!(from_status(&Status::aborted("why"), "peer").code, Code::Stale);
    }

    #[test]
    fn what_the_transport_says_is_the_ways_fault_and_may_be_tried_elsewhere() {
        let broken = Status::from_error(Box::new(std::io::Error::other("reset")));
        let error = from_status(&broken, "decode node d");
        assert!(error.message.contains("decode node d") && error.message.contains("reset"), "{error}");
        for status in [broken, Status::cancelled("reset"), Status::out_of_range("too long"), Status::unavailable("connect")] {
            let error = from_status(&status, "peer");
            assert_eq!((error.retry, error.blame), (Retry::Elsewhere, Blame::Way), "{status}");
        }
    }
}
