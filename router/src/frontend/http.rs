//! The HTTP door: its paths.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router as Routes};
use overfill_lifecycle::profile;
use overfill_text::TextModel;
use overfill_types::{Code, ServiceError};
use serde_json::{Value, json};
use tower::util::{MapRequestLayer, option_layer};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::Router;
use crate::frontend::openai::{self, ChatRequest, CompletionRequest, Failed};
use crate::frontend::{docs, messages, page, responses, stack};

/// How long a browser may remember what it was allowed.
const PREFLIGHT: Duration = Duration::from_secs(600);
/// What someone who has lost their way may look for.
const PATHS: [&str; 5] = ["/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"];

/// The whole door: what clients ask, probes, and with `admin` what those ask who run the cluster.
pub(crate) fn door(router: Arc<Router>, admin: bool) -> Routes {
    let mut routes = clients(&router);
    routes = lost(if admin {
        // What clients may see of each other there, only they may see.
        routes.merge(for_admins()).merge(stack::keyed(&router, cluster())).merge(page::routes())
    } else {
        routes.route("/", get(page::sentence))
    });
    let origins = &router.config.cors_origins;
    let cors = (!origins.is_empty()).then(|| cors(origins));
    let routes = routes.with_state(router);
    // Around all routes: a path is looked up after it.
    Routes::new().fallback_service(routes).layer(option_layer(cors)).layer(MapRequestLayer::new(single_slashes))
}

/// Pages of these origins may ask, be it with keys or without.
fn cors(origins: &[HeaderValue]) -> CorsLayer {
    let allowed = if origins.iter().any(|origin| origin == "*") { AllowOrigin::any() } else { AllowOrigin::list(origins.iter().cloned()) };
    let told = ["x-request-id", "x-overfill-served-by", "retry-after", "x-trace-id"].map(HeaderName::from_static);
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::HEAD, Method::POST, Method::OPTIONS])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(told)
        .max_age(PREFLIGHT)
}

/// A base URL that ends with a slash, put before a path that begins with one, makes two.
fn single_slashes(mut request: Request) -> Request {
    let path = request.uri().path();
    if path.contains("//") {
        let mut single = String::with_capacity(path.len());
        path.chars().for_each(|c| {
            if c != '/' || !single.ends_with('/') {
                single.push(c)
            }
        });
        let rest = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
        if let Ok(uri) = format!("{single}{rest}").parse() {
            *request.uri_mut() = uri;
        }
    }
    request
}

fn clients(router: &Arc<Router>) -> Routes<Arc<Router>> {
    let asked = Routes::new()
        .route("/v1/chat/completions", post(openai::complete::<ChatRequest>))
        .route("/v1/completions", post(openai::complete::<CompletionRequest>))
        .route("/v1/responses", post(responses::create))
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/tokenize", post(openai::tokenize))
        .route("/detokenize", post(openai::detokenize))
        // They were read, and are no larger than they may be.
        .layer(DefaultBodyLimit::disable());
    stack(router, asked).merge(probes())
}

/// What those are answered who ask a path that is not there, or ask one in another way than it can be.
fn lost(routes: Routes<Arc<Router>>) -> Routes<Arc<Router>> {
    routes
        .fallback(async |headers: HeaderMap| {
            let message = format!("there is no such path: see /docs, {}", PATHS.join(", "));
            stack::answer(&headers, ServiceError::new(Code::NotFound, message).into())
        })
        .method_not_allowed_fallback(async |method: Method, headers: HeaderMap| {
            if method == Method::OPTIONS {
                // The header `allow` is there.
                return StatusCode::NO_CONTENT.into_response();
            }
            let error = ServiceError::new(Code::InvalidArgument, "this path is not asked with this method: see /docs");
            stack::answer(&headers, Failed { status: StatusCode::METHOD_NOT_ALLOWED, error })
        })
}

/// What probes ask; they are answered whatever happens, and to everyone.
fn probes() -> Routes<Arc<Router>> {
    Routes::new()
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        // vLLM's name, which load testers ask before they begin.
        .route("/health", get(ready))
}

/// What those ask who run the cluster, at a listener of their own.
pub(crate) fn admin(router: Arc<Router>) -> Routes {
    let own = for_admins().merge(cluster()).merge(page::routes()).merge(probes()).route("/profile", profile::route());
    own.merge(chat(&router)).with_state(router)
}

/// What the page asks where it is not at the door: as clients ask it there, within the same limits. This listener is in plain text,
/// and asks nobody for a certificate: what the doors encrypt is not told here.
fn chat(router: &Arc<Router>) -> Routes<Arc<Router>> {
    if router.config.tls.tls_cert.is_some() {
        return Routes::new().route(
            "/v1/{*path}",
            any(async |headers: HeaderMap| {
                let message = "this listener is in plain text, and the doors of this router speak TLS: ask there";
                stack::answer(&headers, ServiceError::new(Code::NotFound, message).into())
            }),
        );
    }
    let asked = Routes::new()
        .route("/v1/chat/completions", post(openai::complete::<ChatRequest>))
        .route("/v1/models", get(models))
        .layer(DefaultBodyLimit::disable());
    stack(router, asked)
}

/// The cluster as this router sees it.
fn cluster() -> Routes<Arc<Router>> {
    let told = async |State(router): State<Arc<Router>>| ([(header::CACHE_CONTROL, "no-store")], Json(router.overview()));
    Routes::new().route("/cluster", get(told))
}

fn for_admins() -> Routes<Arc<Router>> {
    Routes::new()
        .route("/docs", get(docs::page))
        .route("/openapi.json", get(docs::document))
        .route("/metrics", get(async |State(router): State<Arc<Router>>| router.metrics.registry.respond()))
}

async fn ready(State(router): State<Arc<Router>>) -> Response {
    match router.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn models(State(router): State<Arc<Router>>) -> Json<Value> {
    let data: Vec<Value> = router.models.names().iter().map(|(name, model)| described(&router, name, model)).collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn model(State(router): State<Arc<Router>>, Path(name): Path<String>) -> Response {
    match router.model(&name) {
        Ok(model) => Json(described(&router, &name, &model)).into_response(),
        Err(error) => Failed::from(error).into_response(),
    }
}

/// A model, as clients ask for it by `name`.
fn described(router: &Router, name: &str, model: &TextModel) -> Value {
    let manifest = &model.manifest;
    json!({
        "id": name, "object": "model", "created": router.started, "owned_by": "overfill", "root": manifest.name, "parent": null,
        "max_model_len": router.max_context(model), "fingerprint": manifest.fingerprint, "permission": [],
    })
}
