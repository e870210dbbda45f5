//! Anthropic's messages (`/v1/messages`, `/v1/messages/count_tokens`): what a request says (`request`), how its answer looks
//! (`answer`), and errors as that API's clients know them (`failed`).

mod answer;
mod failed;
mod request;

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use overfill_lifecycle::Trace;
use serde_json::{Value, json};

use crate::Router;
use crate::clients::Client;
use crate::frontend::messages::answer::Answer;
pub(crate) use crate::frontend::messages::failed::{asked_so, refused};
#[cfg(test)]
pub(crate) use crate::frontend::messages::request::MessageRequest;
use crate::frontend::openai::{Failed, start};
use crate::frontend::respond::{Begun, parse, respond};
use crate::frontend::single::Single;

/// `POST /v1/messages`.
pub(crate) async fn create(
    State(router): State<Arc<Router>>,
    headers: HeaderMap,
    Extension(client): Extension<Arc<Client>>,
    body: Bytes,
) -> Response {
    let trace = crate::frontend::trace(&headers);
    respond(begin(&router, &client, &body, &trace).await, &trace).await
}

async fn begin(router: &Arc<Router>, client: &Arc<Client>, body: &[u8], trace: &Trace) -> Result<Begun<Answer>, Failed> {
    let request: request::MessageRequest = parse(body)?;
    let model = router.model(request.model())?;
    let read = request.read(parse(body)?, &model)?;
    let stream = read.stream;
    let request = router.admit_one(client, &model, read.asked, trace).await?;
    let single = Single::new(request.prompt.clone(), read.calls.as_ref());
    let answer = Answer::new(format!("msg_{}", request.id), model.manifest.name.clone(), single);
    Ok(Begun { form: answer, events: start(router, vec![request], 1), stream })
}

/// `POST /v1/messages/count_tokens`.
pub(crate) async fn count(State(router): State<Arc<Router>>, body: Bytes) -> Response {
    match counted(&router, &body).await {
        Ok(counted) => Json(counted).into_response(),
        Err(error) => refused(&error),
    }
}

async fn counted(router: &Router, body: &[u8]) -> Result<Value, Failed> {
    let request: request::MessageRequest = parse(body)?;
    let model = router.model(request.model())?;
    let tokens = router.tokens(&model, request.input(&model)?.0).await?;
    Ok(json!({ "input_tokens": tokens.len() }))
}
