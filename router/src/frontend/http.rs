//! OpenAI-compatible HTTP.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router as Routes};
use overfill_types::{Code, ServiceError};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::Router;
use crate::frontend::openai::{ChatRequest, Common, CompletionRequest, Frame, OpenAiRequest, Shape};
use crate::relay::{self, Answer, End, Event};

/// Comments that keep an idle stream's connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Pieces that wait for a slow client.
const PIECES: usize = 16;

/// All routes.
pub(crate) fn app(router: Arc<Router>) -> Routes {
    let limit = DefaultBodyLimit::max(router.config.max_body);
    Routes::new()
        .route("/v1/chat/completions", post(complete::<ChatRequest>))
        .route("/v1/completions", post(complete::<CompletionRequest>))
        .route("/v1/models", get(models))
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .fallback(|| async {
            Failed::from(ServiceError::new(Code::NotFound, "there is no such path: see /v1/models, /v1/chat/completions, /v1/completions"))
        })
        .layer(limit)
        .with_state(router)
}

async fn ready(State(router): State<Arc<Router>>) -> Response {
    match router.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn models(State(router): State<Arc<Router>>) -> Json<Value> {
    let created = now();
    let data: Vec<Value> = router
        .models
        .iter()
        .map(|m| {
            let name = &m.manifest.name;
            json!({
                "id": name, "object": "model", "created": created, "owned_by": "overfill", "root": name,
                "max_model_len": router.max_context(m), "fingerprint": m.manifest.fingerprint,
            })
        })
        .collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn complete<R: OpenAiRequest>(State(router): State<Arc<Router>>, body: Result<Bytes, BytesRejection>) -> Response {
    match begin::<R>(&router, body) {
        Ok(begun) => begun.respond().await,
        Err(error) => error.into_response(),
    }
}

/// A request that is under way.
struct Begun {
    frame: Frame,
    answer: Answer,
    stream: bool,
    include_usage: bool,
}

fn begin<R: OpenAiRequest>(router: &Arc<Router>, body: Result<Bytes, BytesRejection>) -> Result<Begun, Failed> {
    let body = body.map_err(|rejection| {
        let (code, message) = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => (Code::ResourceExhausted, format!("the body is larger than {} bytes", router.config.max_body)),
            _ => (Code::InvalidArgument, "the body broke off".to_owned()),
        };
        Failed { status: rejection.status(), error: ServiceError::new(code, message) }
    })?;
    // Twice, so that an error names the field: with both parts in one the path to it is lost.
    let request: R = parse(&body)?;
    let mut common: Common = parse(&body)?;
    let asked = request.asked(&mut common)?;
    let valid = router.admit(asked)?;
    let frame = Frame {
        shape: R::SHAPE,
        id: format!("{}-{}", if R::SHAPE == Shape::Chat { "chatcmpl" } else { "cmpl" }, valid.id),
        created: now(),
        model: valid.model.clone(),
        prompt: valid.prompt.clone(),
        token_ids: common.return_token_ids.unwrap_or(false),
        logprobs: valid.sampling.logprobs.is_some(),
    };
    Ok(Begun {
        frame,
        stream: common.stream.unwrap_or(false),
        include_usage: common.stream_options.unwrap_or_default().include_usage,
        answer: relay::start(router.clone(), valid),
    })
}

fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ServiceError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let message = match e.path().to_string().as_str() {
            "." | "?" => format!("the body is not understood: {}", e.inner()),
            path => format!("{path}: {}", e.inner()),
        };
        ServiceError::new(Code::InvalidArgument, message)
    })
}

impl Begun {
    async fn respond(mut self) -> Response {
        let id = HeaderValue::from_str(&self.frame.id).unwrap_or(HeaderValue::from_static("unknown"));
        // Until the first event the answer can still be a plain error.
        let mut response = match self.answer.recv().await {
            None => Failed::from(ServiceError::new(Code::Internal, "the answer broke off before it began")).into_response(),
            Some(Err(error)) => Failed::from(error).into_response(),
            Some(Ok(first)) if self.stream => self.streamed(first),
            Some(Ok(first)) => self.whole(first).await,
        };
        response.headers_mut().insert("x-request-id", id);
        response
    }

    async fn whole(mut self, first: Event) -> Response {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        let mut event = Some(Ok(first));
        loop {
            match event {
                Some(Ok(Event::Delta { text: more, tokens: new })) => {
                    text += &more;
                    tokens.extend(new);
                }
                Some(Ok(Event::Finished(end))) => {
                    let mut response = Json(self.frame.whole(&text, &tokens, &end)).into_response();
                    if let Ok(by) = HeaderValue::from_str(&served_by(&end)) {
                        response.headers_mut().insert("x-overfill-served-by", by);
                    }
                    return response;
                }
                Some(Err(error)) => return Failed::from(error).into_response(),
                None => return Failed::from(ServiceError::new(Code::Internal, "the answer broke off")).into_response(),
            }
            event = self.answer.recv().await;
        }
    }

    fn streamed(self, first: Event) -> Response {
        let (sender, pieces) = mpsc::channel::<String>(PIECES);
        // Owned by the response: it ends when the client has gone, and the answer with it.
        tokio::spawn(async move {
            // Closed: the client has gone.
            let _ = self.write(first, &sender).await;
        });
        let events = ReceiverStream::new(pieces).map(|data| Ok::<_, Infallible>(sse::Event::default().data(data)));
        Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
    }

    async fn write(mut self, first: Event, to: &mpsc::Sender<String>) -> Result<(), mpsc::error::SendError<String>> {
        if let Some(opening) = self.frame.opening() {
            to.send(opening.to_string()).await?;
        }
        let mut event = Some(Ok(first));
        let mut begun = false;
        loop {
            match event {
                Some(Ok(Event::Delta { text, tokens })) => {
                    to.send(self.frame.delta(&text, &tokens, !begun).to_string()).await?;
                    begun = true;
                }
                Some(Ok(Event::Finished(end))) => {
                    to.send(self.frame.closing(&end).to_string()).await?;
                    if self.include_usage {
                        to.send(self.frame.usage_chunk(&end).to_string()).await?;
                    }
                    return to.send("[DONE]".to_owned()).await;
                }
                // The status line is long gone: the error is the last event, and no [DONE] follows.
                Some(Err(error)) => return to.send(error_body(&error, status_of(error.code)).to_string()).await,
                None => return Ok(()),
            }
            event = tokio::select! {
                event = self.answer.recv() => event,
                () = to.closed() => return Ok(()),
            };
        }
    }
}

fn served_by(end: &End) -> String {
    let by = &end.served_by;
    format!("{} {} {} {}", by.mode, by.fingerprint, by.prefill_node, by.decode_node).trim_end().to_owned()
}

/// An error as the OpenAI API tells it.
struct Failed {
    status: StatusCode,
    error: ServiceError,
}

impl From<ServiceError> for Failed {
    fn from(error: ServiceError) -> Self {
        Self { status: status_of(error.code), error }
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let Self { status, error } = self;
        let mut response = (status, Json(error_body(&error, status))).into_response();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

fn status_of(code: Code) -> StatusCode {
    match code {
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable | Code::Preempted => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Mismatch | Code::Stale | Code::DataLoss => StatusCode::BAD_GATEWAY,
        Code::Cancelled | Code::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn error_body(error: &ServiceError, status: StatusCode) -> Value {
    let kind = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
    // A message that begins with a field's name says which one is meant.
    let param = error.message.split_once(':').map(|(field, _)| field).filter(|f| !f.contains(' '));
    json!({ "error": { "message": error.message, "type": kind, "param": param, "code": error.code.as_str() } })
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
