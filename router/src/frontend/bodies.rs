//! Requests are read whole before anything is done with them.
//!
//! So a request that comes slowly, or never ends, holds no place among those that are served. What it holds is memory, of which
//! there is so much for all: where it is used up, the one that has been read for longest goes. A client of good will sends
//! its request in some milliseconds, and is never that one, however many there are who do not.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use overfill_transport::connections::Connection;
use overfill_types::{Code, ServiceError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::RouterConfig;
use crate::frontend::openai::Failed;
use crate::frontend::stack::{answer, is_grpc};

/// Bytes a second that a body has to come with, after its first seconds.
const LEAST_RATE: f64 = 16.0 * 1024.0;
/// What gRPC sends before a message.
const PREFIX: usize = 5;
/// A stream of requests: it is not read whole, and each of its requests is read as it comes.
const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

/// The requests that are being read, over both doors.
pub(crate) struct Bodies {
    /// Bytes of all of them.
    memory: usize,
    /// And of one.
    largest: usize,
    /// How long one may take before its rate counts.
    patience: Duration,
    held: AtomicUsize,
    /// Those that are not whole yet, by age.
    coming: Mutex<(u64, BTreeMap<u64, CancellationToken>)>,
}

impl Bodies {
    pub(crate) fn new(config: &RouterConfig) -> Self {
        let memory = usize::try_from(config.connections.read_memory).unwrap_or(usize::MAX);
        let patience = Duration::from_secs_f64(config.connections.read_timeout);
        Self { memory, largest: config.max_body, patience, held: AtomicUsize::new(0), coming: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, CancellationToken>)> {
        self.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>) -> Held {
        let (mut coming, goes) = (self.lock(), CancellationToken::new());
        coming.0 += 1;
        let number = coming.0;
        coming.1.insert(number, goes.clone());
        drop(coming);
        Held { bytes: 0, number, goes, of: self.clone() }
    }
}

/// A request's part of the memory. Dropping it gives it back.
struct Held {
    bytes: usize,
    number: u64,
    /// Given where it has to go.
    goes: CancellationToken,
    of: Arc<Bodies>,
}

impl Held {
    /// Takes more; where there is no more, the oldest that is not whole has to go. Gives whether that helps.
    fn take(&mut self, bytes: usize) -> bool {
        self.bytes += bytes;
        let held = self.of.held.fetch_add(bytes, Ordering::AcqRel) + bytes;
        if held <= self.of.memory {
            return true;
        }
        let mut coming = self.of.lock();
        match coming.1.pop_first() {
            Some((number, goes)) if number != self.number => {
                goes.cancel();
                true
            }
            _ => false,
        }
    }

    /// It is whole: it goes no more.
    fn whole(&self) {
        self.of.lock().1.remove(&self.number);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.whole();
        self.of.held.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Reads a request whole and passes it on; its connection is busy from then on.
pub(crate) async fn read_whole(State(bodies): State<Arc<Bodies>>, request: Request, next: Next) -> Response {
    if request.uri().path() == STREAM {
        return next.run(request).await;
    }
    let connection = request.extensions().get::<Connection>().cloned();
    let (head, body) = request.into_parts();
    match bodies.read(&head.headers, body).await {
        Err(unread) => unread.answer(&head.headers, bodies.largest),
        Ok((body, held)) => {
            let busy = connection.as_ref().map(Connection::busy);
            let answer = next.run(Request::from_parts(head, Body::from(body))).await;
            drop(held);
            match busy {
                Some(busy) => busy.through(answer),
                None => answer,
            }
        }
    }
}

impl Bodies {
    async fn read(self: &Arc<Self>, headers: &HeaderMap, mut body: Body) -> Result<(Bytes, Held), Unread> {
        let (begun, mut held, mut parts) = (Instant::now(), self.begin(), Vec::new());
        let largest = self.largest + if is_grpc(headers) { PREFIX } else { 0 };
        // Told before any of it is read.
        let announced = headers.get("content-length").and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        let mut size = announced.filter(|size| *size > largest).unwrap_or(0);
        while size <= largest {
            let until = begun + self.patience + Duration::from_secs_f64(held.bytes as f64 / LEAST_RATE);
            let frame = tokio::select! {
                biased;
                frame = body.frame() => frame,
                () = held.goes.cancelled() => return Err(Unread::NoRoom),
                () = tokio::time::sleep_until(until) => return Err(Unread::TooSlow),
            };
            let Some(frame) = frame else {
                held.whole();
                return Ok((joined(parts), held));
            };
            let Ok(data) = frame.map_err(|_| Unread::BrokeOff)?.into_data() else { continue };
            size = held.bytes + data.len();
            if !held.take(data.len()) {
                return Err(Unread::NoRoom);
            }
            parts.push(data);
        }
        Err(Unread::TooLarge)
    }
}

/// Why a request was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unread {
    TooLarge,
    TooSlow,
    BrokeOff,
    NoRoom,
}

impl Unread {
    fn answer(self, headers: &HeaderMap, largest: usize) -> Response {
        let (status, code, message) = match self {
            Self::TooLarge => {
                let message = format!("the body is larger than {largest} bytes, this router's most: send less");
                (StatusCode::PAYLOAD_TOO_LARGE, Code::ResourceExhausted, message)
            }
            Self::TooSlow => {
                let message = "the body came too slowly: send it again, at once".to_owned();
                (StatusCode::REQUEST_TIMEOUT, Code::DeadlineExceeded, message)
            }
            Self::BrokeOff => (StatusCode::BAD_REQUEST, Code::InvalidArgument, "the body broke off".to_owned()),
            Self::NoRoom => {
                let message = "this router is reading as many requests as it has memory for: try again later".to_owned();
                (StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable, message)
            }
        };
        answer(headers, Failed { status, error: ServiceError::new(code, message) })
    }
}

fn joined(mut parts: Vec<Bytes>) -> Bytes {
    if parts.len() == 1 {
        return parts.swap_remove(0);
    }
    let mut joined = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
    parts.iter().for_each(|part| joined.extend_from_slice(part));
    joined.freeze()
}
