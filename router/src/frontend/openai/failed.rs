//! Errors as the OpenAI API tells them.

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
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
    /// The header that says when to try again, where that may help.
    pub(crate) fn retry_after(&self) -> Option<(HeaderName, HeaderValue)> {
        let later = matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        let seconds = self.error.retry_after.unwrap_or_default().as_secs_f64().ceil().max(1.0) as u64;
        later.then(|| (header::RETRY_AFTER, HeaderValue::from(seconds)))
    }

    pub(crate) fn body(&self) -> Value {
        let Self { status, error } = self;
        let kind = match *status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        let code = match (*status, error.code) {
            (StatusCode::UNAUTHORIZED, _) => "invalid_api_key",
            (StatusCode::TOO_MANY_REQUESTS, _) => "rate_limit_exceeded",
            (_, Code::NotFound) if error.field.as_deref() == Some("model") => "model_not_found",
            (_, code) => code.as_str(),
        };
        json!({ "error": { "message": error.message, "type": kind, "param": error.field, "code": code } })
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        response.headers_mut().extend(self.retry_after());
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
    fn the_field_is_told_where_one_is_wrong() {
        let body = Failed::from(ServiceError::of_field("messages[0].role", "there is no such role")).body();
        assert_eq!((&body["error"]["param"], &body["error"]["code"]), (&json!("messages[0].role"), &json!("invalid_argument")));
        let unknown = ServiceError { field: Some("model".into()), ..ServiceError::new(Code::NotFound, "model 'x' is not served here") };
        assert_eq!(Failed::from(unknown).body()["error"]["code"], "model_not_found");
        let path = Failed::from(ServiceError::new(Code::NotFound, "there: no such path")).body();
        assert_eq!((&path["error"]["param"], &path["error"]["code"]), (&Value::Null, &json!("not_found")));
    }
}
