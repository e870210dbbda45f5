//! From a body to its answer: whole, or as a stream of server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use overfill_lifecycle::Trace;
use overfill_proto::v1::ServedBy;
use overfill_types::{Code, ServiceError};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::Router;
use crate::clients::Client;
use crate::frontend;
use crate::frontend::openai::answer::{Choice, Frame};
use crate::frontend::openai::choices::{self, NumberedEvents};
use crate::frontend::openai::failed::Failed;
use crate::frontend::openai::object::Object;
use crate::frontend::openai::request::{Body, Common, OpenAiRequest, Shape};
use crate::relay::Event;

/// Comments that keep an idle stream's connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Pieces that wait for a slow client.
const PIECES: usize = 16;

/// `POST` of either endpoint.
pub(crate) async fn complete<R: OpenAiRequest>(
    State(router): State<Arc<Router>>,
    headers: HeaderMap,
    Extension(client): Extension<Arc<Client>>,
    body: Bytes,
) -> Response {
    let trace = crate::frontend::trace(&headers);
    let mut response = match begin::<R>(&router, &client, body, &trace).await {
        Ok(begun) => begun.respond().await,
        Err(error) => error.into_response(),
    };
    trace.tell(response.headers_mut());
    response
}

/// A request that is under way.
struct Begun {
    frame: Frame,
    choices: Vec<Choice>,
    /// Answers to each prompt.
    n: usize,
    events: NumberedEvents,
    stream: bool,
    include_usage: bool,
}

async fn begin<R: OpenAiRequest>(router: &Arc<Router>, client: &Arc<Client>, body: Bytes, trace: &Trace) -> Result<Begun, Failed> {
    // Several times, so that an error names the field: with all parts in one the path to it is lost.
    let common: Common = parse(&body)?;
    let (stream, include_usage) =
        (common.stream.unwrap_or(false), common.stream_options.and_then(|Object(o)| o.include_usage).unwrap_or(false));
    let token_ids = common.return_token_ids.unwrap_or(false);
    let parsed = R::parsed(Body { own: parse(&body)?, sampling: parse(&body)?, guide: parse(&body)?, common })?;
    let n = parsed.asked.n;
    let requests = router.admit(client, parsed.asked, trace).await?;
    let Some(first) = requests.first() else {
        return Err(ServiceError::new(Code::InvalidArgument, "prompt is empty: send at least one").into());
    };
    let frame = Frame {
        shape: R::SHAPE,
        id: format!("{}-{}", if R::SHAPE == Shape::Chat { "chatcmpl" } else { "cmpl" }, first.id),
        created: now(),
        model: first.model.clone(),
        guides: router.models.guides(&first.model)?,
        token_ids,
        logprobs: first.sampling.logprobs.is_some(),
        echo: parsed.echo,
        prompt_only: parsed.prompt_only,
        calls: parsed.calls,
    };
    let choices = requests.iter().enumerate().map(|(i, request)| Choice::new(i, request.prompt.clone(), &frame)).collect();
    Ok(Begun { frame, choices, n, events: choices::start(router, requests, n), stream, include_usage })
}

/// A body as JSON.
///
/// # Errors
/// [`Code::InvalidArgument`] naming the field.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ServiceError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let message = match e.path().to_string().as_str() {
            "." | "?" => format!("the body is not understood: {}", e.inner()),
            path => format!("{path}: {}", e.inner()),
        };
        ServiceError::new(Code::InvalidArgument, message)
    })
}

/// What a stream of events is when it ends before its answers do.
fn broken_off() -> ServiceError {
    ServiceError::new(Code::Internal, "the answer broke off: send the request again")
}

impl Begun {
    async fn respond(mut self) -> Response {
        let id = HeaderValue::from_str(&self.frame.id).unwrap_or(HeaderValue::from_static("unknown"));
        // Until the first event the answer can still be a plain error.
        let mut response = match self.events.recv().await {
            None => Failed::from(broken_off()).into_response(),
            Some((_, Err(error))) => Failed::from(error).into_response(),
            Some((index, Ok(first))) if self.stream => self.streamed(index, first),
            Some((index, Ok(first))) => self.whole(index, first).await,
        };
        response.headers_mut().insert("x-request-id", id);
        response
    }

    async fn whole(mut self, index: usize, first: Event) -> Response {
        let mut next = Some((index, Ok(first)));
        loop {
            match next {
                Some((index, Ok(event))) => self.keep(index, event),
                Some((_, Err(error))) => return Failed::from(error).into_response(),
                None => return Failed::from(broken_off()).into_response(),
            }
            if self.choices.iter().all(Choice::ended) {
                break;
            }
            next = self.events.recv().await;
        }
        let answer = self.frame.whole(&mut self.choices, self.n);
        told(Json(answer).into_response(), self.choices.first().and_then(Choice::served_by))
    }

    fn keep(&mut self, index: usize, event: Event) {
        let Some(choice) = self.choices.get_mut(index) else { return };
        match event {
            Event::PromptRead(read) => self.frame.read(choice, *read),
            Event::Delta { text, tokens } => self.frame.grow(choice, &text, tokens),
            Event::Finished(end) => {
                self.frame.end(choice, *end);
            }
        }
    }

    fn streamed(mut self, index: usize, first: Event) -> Response {
        let by = match &first {
            Event::PromptRead(read) => Some(read.served_by.clone()),
            _ => None,
        };
        let (sender, pieces) = mpsc::channel::<String>(PIECES);
        // Owned by the response: it ends when the client has gone, and the answers with it.
        tokio::spawn(async move {
            // Closed: the client has gone.
            let _ = self.write(index, first, &sender).await;
        });
        let events = ReceiverStream::new(pieces).map(|data| Ok::<_, Infallible>(sse::Event::default().data(data)));
        told(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response(), by.as_ref())
    }

    async fn write(&mut self, index: usize, first: Event, to: &mpsc::Sender<String>) -> Result<(), mpsc::error::SendError<String>> {
        let mut next = Some((index, Ok(first)));
        loop {
            match next {
                Some((index, Ok(event))) => {
                    for piece in self.pieces(index, event).into_iter().flatten() {
                        to.send(piece.to_string()).await?;
                    }
                }
                // The status line is long gone: the error is the last event, and no [DONE] follows.
                Some((_, Err(error))) => return to.send(Failed::from(error).body().to_string()).await,
                None => return to.send(Failed::from(broken_off()).body().to_string()).await,
            }
            if self.choices.iter().all(Choice::ended) {
                break;
            }
            next = tokio::select! {
                next = self.events.recv() => next,
                () = to.closed() => return Ok(()),
            };
        }
        if self.include_usage {
            to.send(self.frame.usage_chunk(&self.choices, self.n).to_string()).await?;
        }
        to.send("[DONE]".to_owned()).await
    }

    /// What the client is told of an event.
    fn pieces(&mut self, index: usize, event: Event) -> [Option<Value>; 2] {
        let Some(choice) = self.choices.get_mut(index) else { return [None, None] };
        match event {
            Event::PromptRead(read) => {
                self.frame.read(choice, *read);
                [self.frame.opening(choice), None]
            }
            Event::Delta { text, tokens } => [self.frame.delta(choice, &text, &tokens), None],
            Event::Finished(end) => [self.frame.end(choice, *end), Some(self.frame.closing(choice))],
        }
    }
}

/// With a header that says which models and nodes serve the answer.
fn told(mut response: Response, by: Option<&ServedBy>) -> Response {
    if let Some(by) = by.and_then(|by| HeaderValue::from_str(&frontend::served_by(by)).ok()) {
        response.headers_mut().insert("x-overfill-served-by", by);
    }
    response
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
