//! [`Code`] to gRPC status and back, without loss. The only such mapping.

use std::error::Error;
use std::time::Duration;

use overfill_types::{Code, ServiceError};
use tonic::Status;
use tonic::metadata::{MetadataMap, MetadataValue};

use crate::v1::Ended;

/// Metadata that names our code, since gRPC has fewer fitting ones.
const CODE: &str = "overfill-code";
/// Metadata that says in how many milliseconds to try again (gRPC's own name for it: proposal A6).
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// gRPC's code for ours: what a client that knows only gRPC goes by.
pub fn grpc_code(code: Code) -> tonic::Code {
    match code {
        Code::InvalidArgument => tonic::Code::InvalidArgument,
        Code::NotFound => tonic::Code::NotFound,
        Code::Unauthenticated => tonic::Code::Unauthenticated,
        Code::ResourceExhausted => tonic::Code::ResourceExhausted,
        Code::Unavailable | Code::Preempted => tonic::Code::Unavailable,
        Code::DeadlineExceeded => tonic::Code::DeadlineExceeded,
        Code::Cancelled => tonic::Code::Cancelled,
        Code::Mismatch => tonic::Code::FailedPrecondition,
        Code::Stale => tonic::Code::Aborted,
        Code::DataLoss => tonic::Code::DataLoss,
        Code::Unimplemented => tonic::Code::Unimplemented,
        Code::Internal => tonic::Code::Internal,
    }
}

/// The status that tells a caller of this error.
pub fn to_status(error: &ServiceError) -> Status {
    let mut metadata = MetadataMap::new();
    metadata.insert(CODE, MetadataValue::from_static(error.code.as_str()));
    if let Some(wait) = error.retry_after {
        metadata.insert(PUSHBACK, MetadataValue::from(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)));
    }
    Status::with_metadata(grpc_code(error.code), error.message.clone(), metadata)
}

/// The error that a peer's status tells of. `peer` names the peer in the sentence, for errors that it did not send itself.
///
/// A status that was made here because the connection broke or could not be made (it has a source) is [`Code::Unavailable`].
pub fn from_status(status: &Status, peer: &str) -> ServiceError {
    if let Some(source) = status.source() {
        return ServiceError::new(Code::Unavailable, format!("the connection to {peer} failed: {}", innermost(source)));
    }
    let pushback = status.metadata().get(PUSHBACK).and_then(|ms| ms.to_str().ok()).and_then(|ms| ms.parse().ok());
    let error = |code| ServiceError { retry_after: pushback.map(Duration::from_millis), ..ServiceError::new(code, status.message()) };
    let named = status.metadata().get(CODE).and_then(|name| Code::ALL.into_iter().find(|code| *name == code.as_str()));
    if let Some(code) = named.filter(|code| grpc_code(*code) == status.code()) {
        return error(code);
    }
    let code = match status.code() {
        tonic::Code::InvalidArgument | tonic::Code::OutOfRange => Code::InvalidArgument,
        tonic::Code::NotFound => Code::NotFound,
        tonic::Code::Unauthenticated => Code::Unauthenticated,
        tonic::Code::ResourceExhausted => Code::ResourceExhausted,
        tonic::Code::Unavailable => Code::Unavailable,
        tonic::Code::DeadlineExceeded => Code::DeadlineExceeded,
        tonic::Code::Cancelled => Code::Cancelled,
        tonic::Code::FailedPrecondition => Code::Mismatch,
        tonic::Code::Aborted => Code::Stale,
        tonic::Code::DataLoss => Code::DataLoss,
        tonic::Code::Unimplemented => Code::Unimplemented,
        _ => Code::Internal,
    };
    error(code)
}

/// How a call that ended with `status` is told of on a stream of calls.
pub fn to_ended(status: &Status) -> Ended {
    let error = from_status(status, "the peer of this node");
    let retry_after_ms = error.retry_after.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
    Ended { code: error.code.as_str().into(), message: error.message, retry_after_ms }
}

/// What a call that ended has to say.
///
/// # Errors
/// The status that it would have ended with on a stream of its own.
pub fn from_ended(ended: Ended) -> Result<(), Status> {
    if ended.code.is_empty() {
        return Ok(());
    }
    let code = Code::ALL.into_iter().find(|code| ended.code == code.as_str()).unwrap_or(Code::Internal);
    let retry_after = ended.retry_after_ms.map(Duration::from_millis);
    Err(to_status(&ServiceError { retry_after, ..ServiceError::new(code, ended.message) }))
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
    fn every_code_survives_the_wire() {
        for code in Code::ALL {
            let error = ServiceError::new(code, "why");
            assert_eq!(from_status(&to_status(&error), "peer"), error);
            let later = error.retry_after(Duration::from_millis(1500));
            assert_eq!(from_status(&to_status(&later), "peer"), later);
            let told = from_ended(to_ended(&to_status(&later))).unwrap_err();
            assert_eq!(from_status(&told, "peer"), later);
        }
    }

    #[test]
    fn a_call_that_ended_well_has_no_status() {
        assert!(from_ended(Ended::default()).is_ok());
        let unknown = Ended { code: "of a later version".into(), message: "why".into(), retry_after_ms: None };
        assert_eq!(from_status(&from_ended(unknown).unwrap_err(), "peer"), ServiceError::new(Code::Internal, "why"));
    }

    #[test]
    fn a_status_that_names_no_code_of_ours_is_read_by_grpcs() {
        let mut status = to_status(&ServiceError::new(Code::Preempted, "why"));
        status.metadata_mut().insert(CODE, MetadataValue::from_static("stale"));
        assert_eq!(from_status(&status, "peer").code, Code::Unavailable, "the two codes contradict each other");
        assert_eq!(from_status(&Status::aborted("why"), "peer").code, Code::Stale);
    }

    #[test]
    fn a_broken_connection_is_unavailable() {
        let status = Status::from_error(Box::new(std::io::Error::other("reset")));
        let error = from_status(&status, "decode node d");
        assert_eq!(error.code, Code::Unavailable);
        assert!(error.message.contains("decode node d") && error.message.contains("reset"), "{error}");
    }
}
