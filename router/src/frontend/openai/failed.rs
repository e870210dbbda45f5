//! Errors as the OpenAI API tells them.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use overfill_types::{Code, ServiceError};
use serde_json::{Value, json};

/// A request that is answered with an error.
pub(crate) struct Failed {
    pub(crate) status: StatusCode,
    pub(crate) error: ServiceError,
}

impl From<ServiceError> for Failed {
    fn from(error: ServiceError) -> Self {
        Self { status: status_of(error.code), error }
    }
}

impl Failed {
    pub(super) fn body(&self) -> Value {
        let Self { status, error } = self;
        let kind = match *status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        let code = match (*status, error.code) {
            (StatusCode::UNAUTHORIZED, _) => "invalid_api_key",
            (StatusCode::TOO_MANY_REQUESTS, _) => "rate_limit_exceeded",
            (_, Code::NotFound) if param(&error.message) == Some("model") => "model_not_found",
            (_, code) => code.as_str(),
        };
        json!({ "error": { "message": error.message, "type": kind, "param": param(&error.message), "code": code } })
    }
}

/// The field that a message is about: it begins with its name, followed by a colon or by what is wrong with it.
fn param(message: &str) -> Option<&str> {
    let (word, rest) = message.split_once(' ')?;
    let field =
        word.strip_suffix(':').or_else(|| Some(word).filter(|_| rest.starts_with("is ") || (word == "model" && rest.starts_with('\''))))?;
    Some(field)
        .filter(|f| f.starts_with(|c: char| c.is_ascii_lowercase()) && f.chars().all(|c| c.is_ascii_alphanumeric() || "_.[]".contains(c)))
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let wait = self.error.retry_after;
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            let seconds = wait.unwrap_or_default().as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

fn status_of(code: Code) -> StatusCode {
    match code {
        Code::InvalidArgument | Code::Quarantined => StatusCode::BAD_REQUEST,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable | Code::NodeLost | Code::EngineLost | Code::Preempted => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Mismatch | Code::Stale | Code::DataLoss => StatusCode::BAD_GATEWAY,
        Code::Cancelled | Code::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_is_named() {
        for (message, field) in [
            ("n is 0: it must be from 1 to 128", Some("n")),
            ("messages: a message has no content", Some("messages")),
            ("messages[0].role: missing", Some("messages[0].role")),
            ("model 'x' is not served here", Some("model")),
            ("the prompt is empty: send at least one token", None),
            ("3 prompts are too many", None),
        ] {
            assert_eq!(param(message), field, "{message}");
        }
        let body = Failed::from(ServiceError::new(Code::NotFound, "model 'x' is not served here")).body();
        assert_eq!(body["error"]["code"], "model_not_found");
    }
}
