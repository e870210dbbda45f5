//! What every request goes through before its door, whether it came by HTTP or by gRPC: one stack of layers.

use std::sync::Arc;
use std::time::Duration;

use axum::Router as Routes;
use axum::body::Body;
use axum::error_handling::HandleErrorLayer;
use axum::http::{HeaderMap, Request, Response, header};
use axum::response::IntoResponse;
use overfill_proto::error;
use overfill_types::{Code, ServiceError};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::{BoxError, ServiceBuilder};
use tower_http::sensitive_headers::SetSensitiveRequestHeadersLayer;
use tower_http::trace::TraceLayer;
use tower_http::validate_request::ValidateRequestHeaderLayer;
use tracing::Span;

use crate::Router;
use crate::clients::{API_KEY, Clients};
use crate::frontend::openai::Failed;
use crate::frontend::{bodies, messages};

/// How much longer than a request's own deadline its answer's head may take: that one tells more of what happened.
const GRACE: Duration = Duration::from_secs(5);

/// `routes` behind the stack. From the outside in:
/// keys are kept out of logs; a span for each request; what is refused further in becomes an answer of the door's protocol;
/// whose key it is; the whole request is read, so that what comes slowly holds nothing that others need;
/// beyond the limit on requests that are parsed or wait for their answer's head, over both doors, they are shed, not queued;
/// a timeout.
pub(crate) fn stack<S: Clone + Send + Sync + 'static>(router: &Arc<Router>, routes: Routes<S>) -> Routes<S> {
    let stack = ServiceBuilder::new()
        .layer(SetSensitiveRequestHeadersLayer::new([header::AUTHORIZATION, API_KEY]))
        .layer(TraceLayer::new_for_http().make_span_with(span))
        .layer(ValidateRequestHeaderLayer::custom(whose(router.clients.clone())))
        .layer(axum::middleware::from_fn_with_state(router.bodies.clone(), bodies::read_whole))
        .layer(HandleErrorLayer::new(refused))
        .load_shed()
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(router.heads.clone()))
        .timeout(Duration::from_secs(router.config.request_timeout) + GRACE);
    routes.layer(stack)
}

/// `routes` for those alone who have a key, where keys are asked for; whatever else the router has to do.
pub(super) fn keyed<S: Clone + Send + Sync + 'static>(router: &Arc<Router>, routes: Routes<S>) -> Routes<S> {
    routes.layer(ValidateRequestHeaderLayer::custom(whose(router.clients.clone())))
}

/// Notes whose key a request has, or refuses it.
#[expect(clippy::result_large_err, reason = "the layer asks for a whole response")]
fn whose(clients: Arc<Clients>) -> impl Fn(&mut Request<Body>) -> Result<(), Response<Body>> + Clone {
    move |request| match clients.of(request.headers()) {
        Ok(client) => {
            request.extensions_mut().insert(client);
            Ok(())
        }
        Err(error) => Err(answer(request.headers(), error.into())),
    }
}

fn span(request: &Request<Body>) -> Span {
    let door = if is_grpc(request.headers()) { "grpc" } else { "http" };
    tracing::info_span!("request", door, method = %request.method(), path = request.uri().path())
}

pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

async fn refused(headers: HeaderMap, error: BoxError) -> Response<Body> {
    let error = if error.is::<tower::load_shed::error::Overloaded>() {
        let message = "this router has as many requests under way as it takes: try again later";
        ServiceError::new(Code::Unavailable, message).retry_after(Duration::from_secs(1))
    } else if error.is::<tower::timeout::error::Elapsed>() {
        ServiceError::new(Code::DeadlineExceeded, "the request's time ran out: ask for fewer tokens, or give it a longer deadline")
    } else {
        ServiceError::new(Code::Internal, "the request failed in the router")
    };
    answer(&headers, error.into())
}

/// An error in the protocol that was asked in.
pub(super) fn answer(headers: &HeaderMap, failed: Failed) -> Response<Body> {
    if is_grpc(headers) {
        error::to_status(&failed.error).into_http()
    } else if messages::asked_so(headers) {
        messages::refused(&failed)
    } else {
        failed.into_response()
    }
}
