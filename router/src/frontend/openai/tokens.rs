//! `/tokenize` and `/detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use overfill_text::Chat;
use overfill_types::{Code, ServiceError};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::Router;
use crate::frontend::openai::failed::Failed;
use crate::frontend::openai::guide::{self, Tool};
use crate::frontend::openai::handler::parse;
use crate::frontend::openai::object::Object;
use crate::frontend::openai::request::ChatMessage;
use crate::frontend::openai::whole::{self, Whole};

/// `POST /tokenize`: a prompt or a chat.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<ChatMessage>>,
    tools: Option<Vec<Object<Tool>>>,
    /// Whether what the tokenizer puts before every text is put before a prompt. Default true.
    add_special_tokens: Option<bool>,
    /// Whether the chat goes up to where the assistant's answer begins. Default true.
    add_generation_prompt: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
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
    let told = async { Ok(tokens(&router, parse(&body)?).await?) };
    answered(told.await)
}

pub(crate) async fn detokenize(State(router): State<Arc<Router>>, body: Bytes) -> Response {
    answered(parse(&body).map_err(Failed::from).and_then(|asked| Ok(text(&router, asked)?)))
}

fn answered(answer: Result<Value, Failed>) -> Response {
    answer.map_or_else(IntoResponse::into_response, |answer| Json(answer).into_response())
}

async fn tokens(router: &Router, request: TokenizeRequest) -> Result<Value, ServiceError> {
    let model = router.models.find(request.model.as_deref().unwrap_or_default())?;
    let (special, its) = (request.add_special_tokens.unwrap_or(true), model.clone());
    let tokens = match (request.prompt, request.messages) {
        (Some(prompt), None) => {
            let bytes = prompt.len();
            let encode = move || if special { its.encode(&prompt) } else { its.encode_plain(&prompt) };
            router.tokenising.run(bytes, encode).await?
        }
        (None, Some(messages)) => {
            let mut variables = request.chat_template_kwargs.unwrap_or_default();
            variables.insert("add_generation_prompt".into(), request.add_generation_prompt.unwrap_or(true).into());
            let messages = messages.into_iter().map(ChatMessage::into_value).collect::<Result<Vec<_>, _>>()?;
            let tools = guide::tools(request.tools.unwrap_or_default(), None, true)?.described;
            let chat = Chat { messages, tools, variables };
            router.tokenising.run(chat.bytes(), move || its.encode_whole_chat(&chat)).await?
        }
        _ => return Err(ServiceError::new(Code::InvalidArgument, "prompt: send either it or messages")),
    };
    let names: Option<Vec<String>> =
        request.return_token_strs.unwrap_or(false).then(|| tokens.iter().map(|&id| model.token_name(id).unwrap_or_default()).collect());
    Ok(json!({ "count": tokens.len(), "max_model_len": router.max_context(&model), "tokens": tokens, "token_strs": names }))
}

fn text(router: &Router, request: DetokenizeRequest) -> Result<Value, ServiceError> {
    let model = router.models.find(request.model.as_deref().unwrap_or_default())?;
    let tokens = whole::plain(request.tokens);
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= model.manifest.vocab_size()) {
        let message = format!("tokens: {id} is out of range, the vocabulary has {} tokens", model.manifest.vocab_size());
        return Err(ServiceError::new(Code::InvalidArgument, message));
    }
    Ok(json!({ "prompt": model.decode(&tokens, true) }))
}
