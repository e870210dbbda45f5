//! The HTTP door: its paths.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router as Routes};
use overfill_lifecycle::profile;
use overfill_text::TextModel;
use overfill_types::{Code, ServiceError};
use serde_json::{Value, json};

use crate::Router;
use crate::frontend::openai::{self, ChatRequest, CompletionRequest, Failed};
use crate::frontend::{docs, stack};

/// What clients ask.
pub(crate) fn app(router: Arc<Router>) -> Routes {
    let asked = Routes::new()
        .route("/v1/chat/completions", post(openai::complete::<ChatRequest>))
        .route("/v1/completions", post(openai::complete::<CompletionRequest>))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/tokenize", post(openai::tokenize))
        .route("/detokenize", post(openai::detokenize))
        // They were read, and are no larger than they may be.
        .layer(DefaultBodyLimit::disable());
    stack(&router, asked)
        .merge(probes())
        .fallback(|| async {
            Failed::from(ServiceError::new(
                Code::NotFound,
                "there is no such path: see /docs, /v1/models, /v1/chat/completions, /v1/completions",
            ))
        })
        .method_not_allowed_fallback(|| async {
            let error = ServiceError::new(Code::InvalidArgument, "this path is not asked with this method: see /docs");
            Failed { status: StatusCode::METHOD_NOT_ALLOWED, error }
        })
        .with_state(router)
}

/// What probes ask; they are answered whatever happens, and to everyone.
fn probes() -> Routes<Arc<Router>> {
    Routes::new()
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        // vLLM's name, which load testers ask before they begin.
        .route("/health", get(ready))
}

/// What those ask who run the cluster, beside the clients or, with probes, at a listener of their own.
pub(crate) fn admin(router: Arc<Router>, own_listener: bool) -> Routes {
    let routes = if own_listener { probes().route("/profile", profile::route()) } else { Routes::new() };
    routes
        .route("/docs", get(docs::page))
        .route("/openapi.json", get(docs::document))
        .route("/metrics", get(async |State(router): State<Arc<Router>>| router.metrics.registry.respond()))
        .with_state(router)
}

async fn ready(State(router): State<Arc<Router>>) -> Response {
    match router.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn models(State(router): State<Arc<Router>>) -> Json<Value> {
    let data: Vec<Value> = router.models.iter().map(|model| described(&router, model)).collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn model(State(router): State<Arc<Router>>, Path(name): Path<String>) -> Response {
    match router.models.find(&name) {
        Ok(model) => Json(described(&router, &model)).into_response(),
        Err(error) => Failed::from(error).into_response(),
    }
}

fn described(router: &Router, model: &TextModel) -> Value {
    let manifest = &model.manifest;
    json!({
        "id": manifest.name, "object": "model", "created": router.started, "owned_by": "overfill", "root": manifest.name, "parent": null,
        "max_model_len": router.max_context(model), "fingerprint": manifest.fingerprint, "permission": [],
    })
}
