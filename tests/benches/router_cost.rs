//! What the router costs: requests a second and latency through it, against the same client at a server that answers the same
//! call with the same messages itself. The nodes are stubs that answer at once, so all that is left is the router and gRPC.
//!
//! `cargo bench -p overfill-tests --bench router_cost`
//!
//! Router, stubs and the echoing server are processes of their own; CPU seconds are the kernel's, of each process.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use overfill_cluster::Discovery;
use overfill_lifecycle::Drain;
use overfill_proto::v1::decode_server::DecodeServer;
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_proto::v1::inference_server::{Inference, InferenceServer};
use overfill_proto::v1::node_server::NodeServer;
use overfill_proto::v1::{self, *};
use overfill_tests::cluster::{request, tokens};
use overfill_tests::processes::{Process, eventually, free_port};
use overfill_tests::stub_node::{StubNode, ready, token};
use overfill_tests::tiny::{self, Kind};
use overfill_transport::calls::{NodeService, Signals};
use overfill_transport::server as transport;
use overfill_types::SamplingParams;
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

/// Tokens of the prompt.
const PROMPT: usize = 32;
/// Callers that ask one request after the other, over so many connections: enough that no process ever waits for another.
const CALLERS: usize = 256;
const CONNECTIONS: usize = 8;
/// How long each of the figures is taken.
const WINDOW: Duration = Duration::from_secs(4);
/// Rounds: router and echo take turns.
const ROUNDS: usize = 5;

/// As the router's executable has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    match arguments.get(1).map(String::as_str) {
        Some("serve-stubs") => runtime.block_on(stubs(&arguments[2], &arguments[3], &arguments[4])),
        Some("serve-echo") => runtime.block_on(echo(&arguments[2])),
        Some("serve-router") => router(&arguments[2], &arguments[3], &arguments[4], &arguments[5]),
        _ => runtime.block_on(measure()),
    }
}

struct Echo;

#[tonic::async_trait]
impl Inference for Echo {
    type GenerateStream = ReceiverStream<Result<GenerateEvent, Status>>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        use generate_event::Event;
        let most = request.into_inner().max_tokens();
        let started = Started { request_id: "request".into(), model: "tiny".into(), prompt_tokens: PROMPT as u32, ..Default::default() };
        let deltas = (0..most).map(|i| Event::Delta(Delta { text: "A".into(), tokens: vec![token(i)], ..Default::default() }));
        let served_by = Some(ServedBy { mode: "overfill".into(), ..Default::default() });
        let finished = Finished { reason: FinishReason::Length.into(), completion_tokens: most, served_by, ..Default::default() };
        let events = [Event::Started(started)].into_iter().chain(deltas).chain([Event::Finished(finished)]);
        Ok(Response::new(ReceiverStream::new(ready(events.map(|event| GenerateEvent { event: Some(event) })))))
    }

    async fn list_models(&self, _: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        Ok(Response::new(ListModelsResponse::default()))
    }
}

async fn stubs(fingerprint: &str, prefill: &str, decode: &str) {
    let stub = |id, role| StubNode::new(id, role, fingerprint);
    let node = |id, role| NodeServer::new(NodeService::new(Arc::new(stub(id, role)), Signals::default()));
    let prefill = serve(prefill, Routes::new(node("prefill-stub", v1::Role::Prefill)));
    let decode = serve(
        decode,
        Routes::new(node("decode-stub", v1::Role::Decode)).add_service(DecodeServer::new(stub("decode-stub", v1::Role::Decode))),
    );
    tokio::join!(prefill, decode);
}

/// A server as tonic makes it.
async fn echo(address: &str) {
    let server = tonic::transport::Server::builder().tcp_nodelay(true).add_service(InferenceServer::new(Echo));
    server.serve(address.parse().unwrap()).await.unwrap();
}

async fn serve(address: &str, routes: Routes) {
    let listener = TcpListener::bind(address).await.unwrap();
    transport::serve_peers(listener, routes.into_axum_router(), Drain::new(), overfill_transport::PeerSecurity::default()).await.unwrap();
}

/// As the executable starts one.
fn router(pair: &str, address: &str, prefill: &str, decode: &str) {
    let cli = overfill_router::config::Cli::parse_from(["router", "--pair", pair]);
    cli.runtime().unwrap().block_on(async {
        let listener = TcpListener::bind(address).await.unwrap();
        let listeners = overfill_router::Listeners { http: TcpListener::bind("127.0.0.1:0").await.unwrap(), grpc: listener, admin: None };
        let discovery = Discovery::fixed(vec![prefill.parse().unwrap()], vec![decode.parse().unwrap()]);
        let config = overfill_router::RouterConfig::new(cli.pair, cli.bounds);
        overfill_router::run(config, listeners, discovery, Drain::new()).await.unwrap();
    });
}

/// This program again, as a server.
fn server(name: &str, arguments: &[&str]) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(arguments);
    Process::start(command, name)
}

fn asked(most: u32) -> GenerateRequest {
    let mut asked = request(&tiny::prompt(PROMPT, 1), &SamplingParams::greedy(), most);
    asked.ignore_eos = true;
    asked
}

fn connect(address: &str) -> InferenceClient<Channel> {
    InferenceClient::new(Endpoint::from_shared(format!("http://{address}")).unwrap().tcp_nodelay(true).connect_lazy())
}

/// Requests in a second, of many callers.
async fn throughput(address: &str, most: u32) -> f64 {
    let clients: Vec<_> = (0..CONNECTIONS).map(|_| connect(address)).collect();
    let over = Arc::new(AtomicBool::new(false));
    let begun = Instant::now();
    let callers: Vec<_> = (0..CALLERS)
        .map(|i| {
            let (client, over) = (clients[i % CONNECTIONS].clone(), over.clone());
            tokio::spawn(async move {
                let mut done = 0u32;
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(tokens(client.clone(), asked(most)).await.unwrap().len(), most as usize);
                    done += 1;
                }
                done
            })
        })
        .collect();
    tokio::time::sleep(WINDOW).await;
    over.store(true, Ordering::Relaxed);
    let mut done = 0;
    for caller in callers {
        done += caller.await.unwrap();
    }
    f64::from(done) / begun.elapsed().as_secs_f64()
}

/// Seconds of each request of one caller, sorted.
async fn latencies(address: &str, most: u32) -> Vec<f64> {
    let client = connect(address);
    let begun = Instant::now();
    let mut seconds = Vec::new();
    while begun.elapsed() < WINDOW {
        let asked_at = Instant::now();
        tokens(client.clone(), asked(most)).await.unwrap();
        seconds.push(asked_at.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    seconds
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * q) as usize]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    quantile(&values, 0.5)
}

async fn measure() {
    let pair = tiny::pair(Kind::Identity, 1);
    let fingerprint = overfill_model::Pair::open(&pair.dir).unwrap().manifest.fingerprint.to_string();
    let [prefill, decode, routed, echoed] = std::array::from_fn(|_| format!("127.0.0.1:{}", free_port()));
    // With the place of what is measured when they work.
    let servers = [
        ("router", 0, server("router", &["serve-router", pair.dir.to_str().unwrap(), &routed, &prefill, &decode])),
        ("stub nodes", 0, server("stub nodes", &["serve-stubs", &fingerprint, &prefill, &decode])),
        ("echo", 1, server("echo", &["serve-echo", &echoed])),
    ];
    let measured = [&routed, &echoed];
    for address in measured {
        eventually(Duration::from_secs(20), "it answers", || async { tokens(connect(address), asked(2)).await.is_ok() }).await;
    }
    println!("prompts of {PROMPT} tokens; medians of {ROUNDS} rounds of {} s each", WINDOW.as_secs());
    for most in [2, 32] {
        let mut ratios = Vec::new();
        let (mut rates, mut alone) = ([vec![], vec![]], [vec![], vec![]]);
        let mut used = vec![vec![]; servers.len()];
        for _ in 0..ROUNDS {
            let before: Vec<f64> = servers.iter().map(|(_, _, server)| server.cpu_seconds()).collect();
            let mut now = [0.0; 2];
            for (place, address) in measured.into_iter().enumerate() {
                now[place] = throughput(address, most).await;
                rates[place].push(now[place]);
            }
            for (i, (_, place, server)) in servers.iter().enumerate() {
                used[i].push((server.cpu_seconds() - before[i]) / (now[*place] * WINDOW.as_secs_f64()));
            }
            ratios.push(now[0] / now[1]);
            for (place, address) in measured.into_iter().enumerate() {
                alone[place].push(latencies(address, most).await);
            }
        }
        let [through, echo] = rates.map(median);
        println!("\nanswers of {most} tokens");
        println!("  {CALLERS} callers: {through:.0} requests/s through the router, {echo:.0} at the echo: {:.0} %", median(ratios) * 100.0);
        for ((name, ..), used) in servers.iter().zip(used) {
            println!("    CPU of the {name}: {:.0} us a request", median(used) * 1e6);
        }
        for (name, q) in [("p50", 0.5), ("p99", 0.99)] {
            let [through, echo] = [0, 1].map(|i| median(alone[i].iter().map(|sorted| quantile(sorted, q)).collect()) * 1e6);
            println!("  one caller, {name}: {through:.0} us through the router, {echo:.0} at the echo: {:.0} us more", through - echo);
        }
    }
}
