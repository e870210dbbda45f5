//! Errors as Anthropic's clients know them.

use axum::Json;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::frontend::openai::Failed;

/// Whether a request with these headers comes from such a client: all of them say which version of the API they know.
pub(crate) fn asked_so(headers: &HeaderMap) -> bool {
    headers.contains_key("anthropic-version")
}

/// A request that is answered with an error.
pub(crate) fn refused(failed: &Failed) -> Response {
    let waits = failed.retry_after();
    let mut response = (failed.status, Json(body(failed))).into_response();
    response.headers_mut().extend(waits);
    response
}

pub(super) fn body(failed: &Failed) -> Value {
    let kind = match failed.status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        StatusCode::GATEWAY_TIMEOUT | StatusCode::REQUEST_TIMEOUT => "timeout_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "api_error",
    };
    json!({ "type": "error", "error": { "type": kind, "message": failed.error.message } })
}
