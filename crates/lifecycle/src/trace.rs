//! One trace through all processes: where it comes from, and how it goes on.
//!
//! A caller says which trace it is in by the W3C header `traceparent` (HTTP, or metadata of gRPC). The server's span becomes a
//! child of the caller's, and calls to others name the span that makes them. Where nothing is exported the header is passed on
//! as it came, or made up, so that log lines of all processes have one id.

use std::sync::{Arc, OnceLock};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{SpanContext, TraceContextExt, TraceFlags, TraceState};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The response header, and metadata, that names the trace of a request.
pub const TRACE_ID: &str = "x-trace-id";

/// A request's place in a trace. Clones share it.
#[derive(Clone, Debug)]
pub struct Trace {
    /// What this server does for the request.
    span: Span,
    /// What is passed on where `span` is not exported.
    caller: Context,
    /// `caller` as headers, once they were wanted: a request is passed on more than once.
    headers: Arc<OnceLock<TraceHeaders>>,
}

/// The W3C headers of a call, by their names; empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceHeaders {
    /// Trace and span that the call is made by.
    pub traceparent: String,
    /// What vendors add.
    pub tracestate: String,
}

impl Trace {
    /// Puts `span` under the span that `headers` name, and its field `trace_id` to the id.
    pub fn begin(span: Span, headers: &HeaderMap) -> Self {
        let mut caller = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
        if caller.span().span_context().is_valid() {
            // It fails where nothing is exported: then there is nothing to put under it.
            let _ = span.set_parent(caller.clone());
        } else {
            let (id, ids) = (RandomIdGenerator::default(), TraceFlags::NOT_SAMPLED);
            let made = SpanContext::new(id.new_trace_id(), id.new_span_id(), ids, true, TraceState::NONE);
            caller = Context::new().with_remote_span_context(made);
        }
        let trace = Self { span, caller, headers: Arc::default() };
        if !trace.span.is_disabled() {
            trace.span.record("trace_id", trace.id());
        }
        trace
    }

    /// What this server does for the request: parent of its stages.
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// The trace's id: 32 hexadecimal digits.
    pub fn id(&self) -> String {
        self.context().span().span_context().trace_id().to_string()
    }

    /// Headers of a call that `span` makes, which is a part of this trace.
    pub fn headers(&self, span: &Span) -> TraceHeaders {
        if let Some(own) = exported(span) {
            return TraceHeaders::of(&own);
        }
        self.headers.get_or_init(|| TraceHeaders::of(&self.caller)).clone()
    }

    /// Adds the trace's id to a response's headers.
    pub fn tell(&self, headers: &mut HeaderMap) {
        if let Ok(id) = HeaderValue::from_str(&self.id()) {
            headers.insert(TRACE_ID, id);
        }
    }

    fn context(&self) -> Context {
        exported(&self.span).unwrap_or_else(|| self.caller.clone())
    }
}

/// A span's context, where it is exported.
fn exported(span: &Span) -> Option<Context> {
    (!span.is_disabled()).then(|| span.context()).filter(|own| own.span().span_context().is_valid())
}

impl TraceHeaders {
    fn of(context: &Context) -> Self {
        let mut headers = Self::default();
        TraceContextPropagator::new().inject_context(context, &mut headers);
        headers
    }

    /// Adds them to those of a request.
    pub fn add_to(&self, headers: &mut HeaderMap) {
        for (name, value) in [("traceparent", &self.traceparent), ("tracestate", &self.tracestate)] {
            if let Ok(value) = HeaderValue::from_str(value)
                && !value.is_empty()
            {
                headers.insert(name, value);
            }
        }
    }
}

impl Injector for TraceHeaders {
    fn set(&mut self, key: &str, value: String) {
        match key {
            "traceparent" => self.traceparent = value,
            "tracestate" => self.tracestate = value,
            _ => {}
        }
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn passed_on(headers: &HeaderMap) -> HeaderMap {
        let mut written = HeaderMap::new();
        Trace::begin(Span::none(), headers).headers(&Span::none()).add_to(&mut written);
        written
    }

    #[test]
    fn without_export_the_header_goes_on_as_it_came() {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", HeaderValue::from_static(PARENT));
        headers.insert("tracestate", HeaderValue::from_static("vendor=1"));
        assert_eq!(Trace::begin(Span::none(), &headers).id(), "0af7651916cd43dd8448eb211c80319c");
        let written = passed_on(&headers);
        assert_eq!((&written["traceparent"], &written["tracestate"]), (&headers["traceparent"], &headers["tracestate"]));
    }

    #[test]
    fn without_a_caller_there_is_an_id_all_the_same() {
        let mut malformed = HeaderMap::new();
        malformed.insert("traceparent", HeaderValue::from_static("00-xyz"));
        for headers in [HeaderMap::new(), malformed] {
            let (one, two) = (passed_on(&headers), passed_on(&headers));
            assert_ne!(one["traceparent"], two["traceparent"]);
            assert!(one["traceparent"].to_str().unwrap().ends_with("-00"), "nobody is asked to export it: {one:?}");
        }
    }
}
