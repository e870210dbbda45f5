//! From the events of a request's answers to what is sent: whole, or as a stream of server-sent events. How it looks is its API's
//! affair ([`Form`]).

use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use overfill_lifecycle::Trace;
use overfill_proto::v1::ServedBy;
use overfill_types::{Code, ServiceError};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::frontend;
use crate::frontend::openai::{Failed, NumberedEvents};
use crate::relay::Event;

/// Comments that keep an idle stream's connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Pieces that wait for a slow client.
const PIECES: usize = 16;
/// Asks proxies of nginx's kind to pass pieces on as they come.
const UNBUFFERED: HeaderName = HeaderName::from_static("x-accel-buffering");

/// How an API tells of the answers to one request, which it takes in as they come.
pub(crate) trait Form: Send + Sized + 'static {
    /// The request's name in this API.
    fn id(&self) -> &str;

    /// Takes an event of an answer, by its number, for the whole.
    fn keep(&mut self, index: usize, event: Event) {
        self.pieces(index, event);
    }

    /// The pieces that an event of an answer, by its number, brings to a stream.
    fn pieces(&mut self, index: usize, event: Event) -> Vec<Piece>;

    /// Whether all answers have ended.
    fn ended(&self) -> bool;

    /// All of it, once that is so.
    fn whole(&mut self) -> Value;

    /// The last pieces of a stream, after all others.
    fn last(&mut self) -> Vec<Piece> {
        Vec::new()
    }

    /// Which models and nodes serve the first answer, as far as that is known.
    fn served_by(&self) -> Option<&ServedBy>;

    /// A failure before any answer.
    fn failure(failed: Failed) -> Response {
        failed.into_response()
    }

    /// A failure in a stream: its last piece.
    fn failure_piece(&mut self, failed: &Failed) -> Piece;
}

/// One server-sent event.
#[derive(Debug)]
pub(crate) struct Piece {
    /// Its type, where the API has some.
    pub(crate) event: Option<&'static str>,
    pub(crate) data: String,
}

impl Piece {
    /// Without a type.
    pub(crate) fn of(data: &Value) -> Self {
        Self { event: None, data: data.to_string() }
    }

    /// Of the type that its data names too.
    pub(crate) fn typed(event: &'static str, data: Value) -> Self {
        let mut typed = json!({ "type": event });
        if let (Some(fields), Value::Object(data)) = (typed.as_object_mut(), data) {
            fields.extend(data);
        }
        Self { event: Some(event), data: typed.to_string() }
    }

    fn into_event(self) -> sse::Event {
        let event = self.event.map_or_else(sse::Event::default, |name| sse::Event::default().event(name));
        event.data(self.data)
    }
}

/// A body as JSON.
///
/// # Errors
/// [`Code::InvalidArgument`] naming the field.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ServiceError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    serde_path_to_error::deserialize(&mut json).map_err(|e| match e.path().to_string().as_str() {
        "." | "?" => ServiceError::new(Code::InvalidArgument, format!("the body is not understood: {}", e.inner())),
        path => ServiceError::of_field(path, format!("{path}: {}", e.inner())),
    })
}

/// What a stream of events is when it ends before its answers do.
fn broken_off() -> ServiceError {
    ServiceError::new(Code::Internal, "the answer broke off: send the request again")
}

/// A request that is under way: how its answers are told of, their events, and whether they are streamed.
pub(crate) struct Begun<F> {
    pub(crate) form: F,
    pub(crate) events: NumberedEvents,
    pub(crate) stream: bool,
}

/// The response to a request that was begun, or refused.
pub(crate) async fn respond<F: Form>(begun: Result<Begun<F>, Failed>, trace: &Trace) -> Response {
    let mut response = match begun {
        Ok(begun) => answered(begun).await,
        Err(failed) => F::failure(failed),
    };
    trace.tell(response.headers_mut());
    response
}

async fn answered<F: Form>(Begun { form, mut events, stream }: Begun<F>) -> Response {
    let id = HeaderValue::from_str(form.id()).unwrap_or(HeaderValue::from_static("unknown"));
    // Until the first event the answer can still be a plain error.
    let mut response = match events.recv().await {
        None => F::failure(Failed::from(broken_off())),
        Some((_, Err(error))) => F::failure(Failed::from(error)),
        Some((index, Ok(first))) if stream => streamed(form, events, index, first),
        Some((index, Ok(first))) => whole(form, events, index, first).await,
    };
    response.headers_mut().insert("x-request-id", id);
    response
}

async fn whole<F: Form>(mut form: F, mut events: NumberedEvents, index: usize, first: Event) -> Response {
    let mut next = Some((index, Ok(first)));
    loop {
        match next {
            Some((index, Ok(event))) => form.keep(index, event),
            Some((_, Err(error))) => return F::failure(Failed::from(error)),
            None => return F::failure(Failed::from(broken_off())),
        }
        if form.ended() {
            break;
        }
        next = events.recv().await;
    }
    let answer = form.whole();
    told(Json(answer).into_response(), form.served_by())
}

fn streamed<F: Form>(mut form: F, mut events: NumberedEvents, index: usize, first: Event) -> Response {
    let by = match &first {
        Event::PromptRead(read) => Some(read.served_by.clone()),
        _ => None,
    };
    let (sender, pieces) = mpsc::channel::<Piece>(PIECES);
    // Owned by the response: it ends when the client has gone, and the answers with it.
    tokio::spawn(async move {
        // Closed: the client has gone.
        let _ = write(&mut form, &mut events, index, first, &sender).await;
    });
    let events = ReceiverStream::new(pieces).map(|piece| Ok::<_, Infallible>(piece.into_event()));
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    response.headers_mut().insert(UNBUFFERED, HeaderValue::from_static("no"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    told(response, by.as_ref())
}

async fn write<F: Form>(
    form: &mut F,
    events: &mut NumberedEvents,
    index: usize,
    first: Event,
    to: &mpsc::Sender<Piece>,
) -> Result<(), mpsc::error::SendError<Piece>> {
    let mut next = Some((index, Ok(first)));
    loop {
        match next {
            Some((index, Ok(event))) => {
                for piece in form.pieces(index, event) {
                    to.send(piece).await?;
                }
            }
            // The status line is long gone: the error is the last event.
            Some((_, Err(error))) => return to.send(form.failure_piece(&Failed::from(error))).await,
            None => return to.send(form.failure_piece(&Failed::from(broken_off()))).await,
        }
        if form.ended() {
            break;
        }
        next = tokio::select! {
            next = events.recv() => next,
            () = to.closed() => return Ok(()),
        };
    }
    for piece in form.last() {
        to.send(piece).await?;
    }
    Ok(())
}

/// With a header that says which models and nodes serve the answer.
fn told(mut response: Response, by: Option<&ServedBy>) -> Response {
    if let Some(by) = by.and_then(|by| HeaderValue::from_str(&frontend::served_by(by)).ok()) {
        response.headers_mut().insert("x-overfill-served-by", by);
    }
    response
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
