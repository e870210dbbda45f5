//! OpenAI's responses (`/v1/responses`): what a request says (`request`), how its answer looks (`answer`). Nothing is stored: a
//! chat comes whole with each request.

mod answer;
mod request;

use std::sync::Arc;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use overfill_lifecycle::Trace;

use crate::Router;
use crate::clients::Client;
use crate::frontend::openai::{Failed, TokenNames, start};
use crate::frontend::respond::{Begun, now, parse, respond};
use crate::frontend::responses::answer::Answer;
#[cfg(test)]
pub(crate) use crate::frontend::responses::request::ResponseRequest;
use crate::frontend::single::Single;

/// `POST /v1/responses`.
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
    let request: request::ResponseRequest = parse(body)?;
    let model = router.model(request.model())?;
    let names = TokenNames { guides: router.models.guides(&model)?, model: model.clone() };
    let read = request.read(parse(body)?, &model)?;
    let stream = read.stream;
    let request = router.admit_one(client, &model, read.asked, trace).await?;
    let single = Single::new(request.prompt.clone(), read.calls.as_ref());
    let answer = Answer::new(format!("resp_{}", request.id), now(), single, names, read.logprobs, read.said);
    Ok(Begun { form: answer, events: start(router, vec![request], 1), stream })
}
