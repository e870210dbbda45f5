//! The doors: gRPC (ours, and the KServe v2 protocol) and HTTP, as OpenAI's clients and Anthropic's know it. All lead to the same
//! relay.

pub(crate) mod bodies;
mod docs;
pub(crate) mod grpc;
pub(crate) mod http;
pub(crate) mod kserve;
mod messages;
mod openai;
mod page;
mod respond;
mod responses;
mod single;
mod stack;

pub(crate) use stack::stack;

use axum::http::HeaderMap;
use overfill_lifecycle::Trace;
use overfill_proto::v1::ServedBy;
use tracing::field::Empty;

/// The trace of a request that came with these headers.
fn trace(headers: &HeaderMap) -> Trace {
    let span = tracing::info_span!("request", otel.kind = "server", request_id = Empty, model = Empty, trace_id = Empty);
    Trace::begin(span, headers)
}

/// Who serves an answer, as one line: mode, pair, and the nodes that have a part in it.
fn served_by(by: &ServedBy) -> String {
    let parts = [&by.mode, &by.fingerprint, &by.prefill_node, &by.decode_node].map(String::as_str);
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}
