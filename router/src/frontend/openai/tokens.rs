//! `/tokenize` and `/detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use overfill_types::ServiceError;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Router;
use crate::admission::Input;
use crate::frontend::openai::failed::Failed;
use crate::frontend::openai::prompt::ChatPrompt;
use crate::frontend::openai::whole::{self, Whole};
use crate::frontend::respond::parse;

/// `POST /tokenize`: a prompt, or a chat ([`ChatPrompt`]).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    /// Whether what the tokenizer puts before every text is put before it. Default: as where it is answered.
    add_special_tokens: Option<bool>,
    /// Whether tokens are named too.
    return_token_strs: Option<bool>,
}

/// `POST /detokenize`.
#[derive(Debug, Deserialize)]
pub(crate) struct DetokenizeRequest {
    #[serde(default)]
    model: Option<String>,
    tokens: Vec<Whole<u32>>,
}

pub(crate) async fn tokenize(State(router): State<Arc<Router>>, body: Bytes) -> Response {
    let told = async { Ok(tokens(&router, parse(&body)?, parse(&body)?).await?) };
    answered(told.await)
}

pub(crate) async fn detokenize(State(router): State<Arc<Router>>, body: Bytes) -> Response {
    answered(parse(&body).map_err(Failed::from).and_then(|asked| Ok(text(&router, asked)?)))
}

fn answered(answer: Result<Value, Failed>) -> Response {
    answer.map_or_else(IntoResponse::into_response, |answer| Json(answer).into_response())
}

async fn tokens(router: &Router, request: TokenizeRequest, chat: ChatPrompt) -> Result<Value, ServiceError> {
    let model = router.model(request.model.as_deref().unwrap_or_default())?;
    let special_tokens = request.add_special_tokens;
    let input = match (request.prompt, chat.messages.is_some()) {
        (Some(text), false) => Input::Text { text, special_tokens: special_tokens.unwrap_or(true) },
        (None, true) => Input::Chat(chat.chat(&model, special_tokens.unwrap_or(false))?.0),
        _ => return Err(ServiceError::of_field("prompt", "prompt: send either it or messages")),
    };
    let tokens = router.tokens(&model, input).await?;
    let names: Option<Vec<String>> =
        request.return_token_strs.unwrap_or(false).then(|| tokens.iter().map(|&id| model.token_name(id).unwrap_or_default()).collect());
    Ok(json!({ "count": tokens.len(), "max_model_len": router.max_context(&model), "tokens": tokens, "token_strs": names }))
}

fn text(router: &Router, request: DetokenizeRequest) -> Result<Value, ServiceError> {
    let model = router.model(request.model.as_deref().unwrap_or_default())?;
    let tokens = whole::plain(request.tokens);
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= model.manifest.vocab_size()) {
        let message = format!("tokens: {id} is out of range, the vocabulary has {} tokens", model.manifest.vocab_size());
        return Err(ServiceError::of_field("tokens", message));
    }
    Ok(json!({ "prompt": model.decode(&tokens, true) }))
}
