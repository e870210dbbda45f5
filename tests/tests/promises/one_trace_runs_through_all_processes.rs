//! A client's `traceparent` leads to one trace with the spans of router, prefill node and decode node, by way of OTLP; and a
//! collector that is not there changes nothing.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_tests::cluster::{request, tokens};
use overfill_tests::processes::{Process, eventually, free_port};
use overfill_tests::tiny::{self, Kind};
use overfill_types::SamplingParams;
use serde_json::json;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};

const PATIENCE: Duration = Duration::from_secs(20);
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// A span that was exported.
#[derive(Clone, Debug)]
struct Span {
    service: String,
    name: String,
    trace: String,
    id: String,
    parent: String,
    start: u64,
    end: u64,
}

/// Keeps what is exported to it.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap().attributes;
            let service = attributes.into_iter().find(|a| a.key == "service.name").and_then(|a| a.value?.value);
            let Some(Value::StringValue(service)) = service else { panic!("a resource without a name") };
            let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans).map(|span| Span {
                service: service.clone(),
                name: span.name,
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                start: span.start_time_unix_nano,
                end: span.end_time_unix_nano,
            });
            self.0.lock().unwrap().extend(spans);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Starts it; gives its address.
    async fn start(&self) -> (String, AbortOnDropHandle<()>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(self.clone()));
        let serving = server.serve_with_incoming(TcpListenerStream::new(listener));
        (url, AbortOnDropHandle::new(tokio::spawn(async move { serving.await.unwrap() })))
    }

    /// Spans of a trace by service and name.
    fn of(&self, trace: &str) -> HashMap<(String, String), Span> {
        let spans = self.0.lock().unwrap();
        let ours = spans.iter().filter(|s| s.trace == trace).cloned();
        ours.map(|s| ((s.service.clone(), s.name.clone()), s)).collect()
    }
}

/// A router, a prefill and a decode node as processes.
struct Cluster {
    http: String,
    grpc: String,
    processes: Vec<Process>,
}

impl Cluster {
    async fn start(pair: &Path, collector: &str) -> Self {
        let at = || format!("127.0.0.1:{}", free_port());
        let (http, grpc, prefill, decode) = (at(), at(), at(), at());
        let pair = pair.display().to_string();
        let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector), ("OTEL_BSP_SCHEDULE_DELAY", "50")];
        let node = |name, listen: &str| {
            Process::with(name, &["--pair", &pair, "--listen", listen, "--threads", "1", "--kv-memory", "32M"], &environment)
        };
        let found = ["--prefill-nodes", &prefill, "--decode-nodes", &decode];
        let router = ["--pair", &pair, "--http", &http, "--grpc", &grpc];
        let processes = vec![
            Process::with("router", &[&router[..], &found].concat(), &environment),
            node("prefill-node", &prefill),
            node("decode-node", &decode),
        ];
        let cluster = Self { http: format!("http://{http}"), grpc: format!("http://{grpc}"), processes };
        eventually(PATIENCE, "the cluster is ready", || async {
            reqwest::get(format!("{}/ready", cluster.http)).await.is_ok_and(|r| r.status().is_success())
        })
        .await;
        cluster
    }

    /// Asks for some tokens, by HTTP, as a part of a trace.
    async fn ask(&self, traceparent: Option<&str>) -> reqwest::Response {
        let body = json!({ "prompt": tiny::prompt(40, 1), "max_tokens": 8, "temperature": 0, "ignore_eos": true });
        let mut request = reqwest::Client::new().post(format!("{}/v1/completions", self.http)).json(&body);
        if let Some(parent) = traceparent {
            request = request.header("traceparent", parent);
        }
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_client_to_the_last_token() {
    let pair = tiny::pair(Kind::Identity, 3);
    let collector = Collector::default();
    let (url, _serving) = collector.start().await;
    let mut cluster = Cluster::start(&pair.dir, &url).await;

    let parent = format!("00-{TRACE}-{CALLER}-01");
    let answer = cluster.ask(Some(&parent)).await;
    assert_eq!(answer.headers()["x-trace-id"], TRACE);
    assert!(answer.headers().contains_key("x-request-id"));
    answer.text().await.unwrap();

    // Child, and its parent; all of the same trace.
    let links = [
        ("router", "request", "", CALLER),
        ("router", "admit", "router", "request"),
        ("router", "choose", "router", "request"),
        ("router", "attempt", "router", "request"),
        ("router", "reserve", "router", "attempt"),
        ("router", "first_token", "router", "attempt"),
        ("router", "decode", "router", "attempt"),
        ("prefill-node", "prefill", "router", "attempt"),
        ("prefill-node", "queue", "prefill-node", "prefill"),
        ("prefill-node", "read", "prefill-node", "prefill"),
        ("prefill-node", "push", "prefill-node", "prefill"),
        ("decode-node", "decode", "router", "reserve"),
        ("decode-node", "wait_for_kv", "decode-node", "decode"),
        ("decode-node", "write", "decode-node", "decode"),
        ("decode-node", "receive", "prefill-node", "push"),
    ];
    let named = |service: &str, name: &str| (service.to_owned(), name.to_owned());
    eventually(PATIENCE, "every span is exported", || async {
        let spans = collector.of(TRACE);
        links.iter().all(|(service, name, ..)| spans.contains_key(&named(service, name)))
    })
    .await;
    let spans = collector.of(TRACE);
    for (service, name, above, parent) in links {
        let span = &spans[&named(service, name)];
        let above = if above.is_empty() { parent } else { &spans[&named(above, parent)].id };
        assert_eq!(span.parent, above, "{service}: {name}");
        assert!(span.start <= span.end, "{span:?}");
    }
    assert_eq!(spans.len(), links.len(), "{spans:#?}");
    // Stages follow each other.
    for (service, first, then) in [
        ("router", "admit", "choose"),
        ("router", "choose", "attempt"),
        ("router", "first_token", "decode"),
        ("prefill-node", "queue", "read"),
    ] {
        assert!(spans[&named(service, first)].end <= spans[&named(service, then)].start + 1_000_000, "{first} before {then}");
    }

    // By gRPC too.
    let other = "1af7651916cd43dd8448eb211c80319c";
    let mut asked = Request::new(request(&tiny::prompt(20, 1), &SamplingParams::greedy(), 4));
    asked.metadata_mut().insert("traceparent", format!("00-{other}-{CALLER}-01").parse().unwrap());
    let mut client = InferenceClient::connect(cluster.grpc.clone()).await.unwrap();
    let answered = client.generate(asked).await.unwrap();
    assert_eq!(answered.metadata().get("x-trace-id").unwrap(), other);
    let mut events = answered.into_inner();
    while events.message().await.unwrap().is_some() {}
    eventually(PATIENCE, "gRPC's spans are exported", || async {
        let spans = collector.of(other);
        [("router", "request"), ("decode-node", "write")].iter().all(|(service, name)| spans.contains_key(&named(service, name)))
    })
    .await;
    assert_eq!(collector.of(other)[&named("router", "request")].parent, CALLER);

    // Without a parent the request is the root of a trace of its own, and the client learns its name.
    let answer = cluster.ask(None).await;
    let own = answer.headers()["x-trace-id"].to_str().unwrap().to_owned();
    eventually(PATIENCE, "the root is exported", || async { collector.of(&own).contains_key(&named("router", "request")) }).await;
    assert_eq!(collector.of(&own)[&named("router", "request")].parent, "");

    // A client that does not want to be traced is not.
    let silent = "2af7651916cd43dd8448eb211c80319c";
    cluster.ask(Some(&format!("00-{silent}-{CALLER}-00"))).await;
    // At a drain the last spans are sent.
    let last = "3af7651916cd43dd8448eb211c80319c";
    cluster.ask(Some(&format!("00-{last}-{CALLER}-01"))).await;
    for process in &mut cluster.processes {
        process.signal("TERM");
        assert_eq!(process.wait(PATIENCE), Some(0));
    }
    let spans = collector.of(last);
    for (service, name) in [("router", "request"), ("prefill-node", "prefill"), ("decode-node", "decode")] {
        assert!(spans.contains_key(&named(service, name)), "{service}: {name} is not among {spans:#?}");
    }
    assert!(collector.of(silent).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_collector_changes_nothing() {
    let pair = tiny::pair(Kind::Identity, 3);
    // One that refuses connections, and one that takes them and never answers.
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let urls = [format!("http://127.0.0.1:{}", free_port()), format!("http://{}", mute.local_addr().unwrap())];
    let mut answers = Vec::new();
    for url in urls {
        let mut cluster = Cluster::start(&pair.dir, &url).await;
        for _ in 0..3 {
            let begun = Instant::now();
            cluster.ask(Some(&format!("00-{TRACE}-{CALLER}-01"))).await.text().await.unwrap();
            assert!(begun.elapsed() < Duration::from_secs(3), "an answer took {:?}", begun.elapsed());
        }
        let client = InferenceClient::connect(cluster.grpc.clone()).await.unwrap();
        answers.push(tokens(client, request(&tiny::prompt(30, 2), &SamplingParams::greedy(), 10)).await.unwrap());
        for process in &mut cluster.processes {
            process.signal("TERM");
        }
        for process in &mut cluster.processes {
            assert_eq!(process.wait(PATIENCE), Some(0), "it ends as it should");
        }
    }
    assert_eq!(answers[0], answers[1]);
}
