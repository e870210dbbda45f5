//! How far a cluster goes: routers and etcd with ten, a hundred, a thousand and more nodes. The nodes are stubs: each has an address
//! of its own, registers under a lease of its own, tells its status, and answers at once.
//!
//! `cargo bench -p overfill-tests --bench scale -- 10 100 1000`, or `… -- 1000x10` for so many routers
//!
//! CPU is of each process by the kernel's count, while nothing is asked and under requests; memory is what is resident.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use overfill_cluster::{Discovery, EtcdSecurity, EtcdSettings};
use overfill_lifecycle::Drain;
use overfill_proto::v1;
use overfill_proto::v1::decode_server::DecodeServer;
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_proto::v1::node_server::NodeServer;
use overfill_tests::cluster::{request, tokens};
use overfill_tests::processes::{Etcd, Process, eventually, free_port};
use overfill_tests::scrape::Scrape;
use overfill_tests::stub_node::StubNode;
use overfill_tests::tiny::{self, Kind};
use overfill_transport::calls::{NodeService, Signals};
use overfill_transport::server as transport;
use overfill_types::{Fingerprint, NodeId, NodeInfo, Role, SamplingParams, ServedPair};
use tokio::net::TcpListener;
use tonic::service::Routes;

/// Nodes of one process of stubs: each has a connection to etcd, and one from every router.
const OF_A_PROCESS: usize = 1000;
/// Name of the cluster in etcd.
const CLUSTER: &str = "scale";
/// How long each figure is taken.
const WINDOW: Duration = Duration::from_secs(10);
/// How long all may take to be seen.
const PATIENCE: Duration = Duration::from_secs(180);
/// Callers that ask one request after the other.
const CALLERS: usize = 64;
/// Tokens of the prompts, all of them different.
const PROMPT: usize = 256;
/// Tokens of the answers.
const ANSWER: u32 = 8;

/// As the router's executable has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    match arguments.first().map(String::as_str) {
        Some("serve-stubs") => {
            runtime.block_on(stubs(&arguments[1], &arguments[2], arguments[3].parse().unwrap(), arguments[4].parse().unwrap()))
        }
        _ => {
            // Cargo says `--bench` as well.
            let sizes: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
            println!(
                "| nodes | routers | all are seen after | again, routers started anew | all started anew | a router: CPU at rest, memory | etcd: CPU at rest, memory | stubs: CPU | requests/s | CPU of a router a request |"
            );
            println!("|---|---|---|---|---|---|---|---|---|---|");
            for size in if sizes.is_empty() {
                vec!["10".to_owned(), "100".to_owned(), "1000".to_owned()]
            } else {
                sizes.into_iter().cloned().collect()
            } {
                let (nodes, routers) = size.split_once('x').unwrap_or((&size, "1"));
                runtime.block_on(measure(nodes.parse().unwrap(), routers.parse().unwrap()));
            }
        }
    }
}

/// So many stub nodes, half of them prefill nodes, from the `first` on. All share two sockets, which are bound to every address.
async fn stubs(fingerprint: &str, etcd: &str, first: usize, count: usize) {
    let settings = EtcdSettings {
        endpoints: vec![etcd.parse().unwrap()],
        security: EtcdSecurity::default(),
        cluster: CLUSTER.into(),
        lease_ttl: Duration::from_secs(5),
    };
    let mut registrations = Vec::new();
    for (place, role, of_wire) in [(0, Role::Prefill, v1::Role::Prefill), (1, Role::Decode, v1::Role::Decode)] {
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stub = StubNode::new("stub", of_wire, fingerprint);
        let node = NodeServer::new(NodeService::new(Arc::new(stub.clone()), Signals::default()));
        let routes = Routes::new(node).add_service(DecodeServer::new(stub)).into_axum_router();
        tokio::spawn(transport::serve_peers(listener, routes, Drain::new(), overfill_transport::PeerSecurity::default()));
        for number in (first..first + count).filter(|number| number % 2 == place) {
            let info = NodeInfo {
                id: NodeId::new(format!("{role}-{number}")),
                role,
                address: format!("127.{}.{}.{}:{port}", 1 + number / 62_500, number / 250 % 250, 1 + number % 250).parse().unwrap(),
                pairs: vec![ServedPair { model: "tiny".into(), fingerprint: Fingerprint::new(fingerprint) }],
                max_context: 4096,
            };
            // A connection to etcd for each, as nodes have it.
            registrations.push(Discovery::etcd(settings.clone()).register(info));
        }
    }
    std::future::pending::<()>().await;
    drop(registrations);
}

/// This program again.
fn start_stubs(fingerprint: &str, etcd: &str, nodes: usize) -> Vec<Process> {
    let start = |first: usize| {
        let count = OF_A_PROCESS.min(nodes - first);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["serve-stubs", fingerprint, etcd, &first.to_string(), &count.to_string()]).stdout(Stdio::null());
        Process::start(command, "stub nodes")
    };
    (0..nodes).step_by(OF_A_PROCESS).map(start).collect()
}

struct Router {
    process: Process,
    http: String,
    grpc: String,
}

fn start_router(pair: &str, etcd: &str) -> Router {
    let (http, grpc) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let flags = ["--pair", pair, "--http", &http, "--grpc", &grpc, "--etcd", etcd, "--cluster", CLUSTER];
    Router { process: Process::ours("router", &flags), http, grpc }
}

/// Seconds until each router sees so many nodes.
async fn seen(routers: &[Router], nodes: usize) -> f64 {
    let begun = Instant::now();
    for router in routers {
        let url = format!("http://{}/metrics", router.http);
        eventually(PATIENCE, "the router is up", || async { reqwest::get(&url).await.is_ok() }).await;
        eventually(PATIENCE, "all nodes are seen", || async { Scrape::of(&url).await.sum("overfill_nodes", &[]) as usize == nodes }).await;
    }
    begun.elapsed().as_secs_f64()
}

async fn measure(nodes: usize, routers: usize) {
    let pair = tiny::pair(Kind::Identity, 1);
    let fingerprint = pair.open().manifest.fingerprint.to_string();
    let (etcd, folder) = (Etcd::start(), pair.dir.display().to_string());
    let start_routers = || (0..routers).map(|_| start_router(&folder, &etcd.address)).collect::<Vec<_>>();
    let mut stubs = start_stubs(&fingerprint, &etcd.address, nodes);
    let mut all = start_routers();
    let first = seen(&all, nodes).await;
    all.clear();
    all = start_routers();
    let again = seen(&all, nodes).await;
    all.clear();
    stubs.clear();
    // Their leases have ended.
    tokio::time::sleep(Duration::from_secs(8)).await;
    stubs = start_stubs(&fingerprint, &etcd.address, nodes);
    all = start_routers();
    let anew = seen(&all, nodes).await;
    tokio::time::sleep(WINDOW / 2).await;

    let cpu = |process: &Process| process.cpu_seconds();
    let of_stubs = |stubs: &[Process]| stubs.iter().map(Process::cpu_seconds).sum::<f64>();
    let before = (cpu(&all[0].process), cpu(etcd.process()), of_stubs(&stubs));
    tokio::time::sleep(WINDOW).await;
    let window = WINDOW.as_secs_f64();
    let rest =
        ((cpu(&all[0].process) - before.0) / window, (cpu(etcd.process()) - before.1) / window, (of_stubs(&stubs) - before.2) / window);
    let before = cpu(&all[0].process);
    let rate = throughput(&all[0].grpc).await;
    let asked = (cpu(&all[0].process) - before - rest.0 * window) / (rate * window);
    let mb = |process: &Process| process.resident_bytes() as f64 / 1e6;
    println!(
        "| {nodes} | {routers} | {first:.1} s | {again:.1} s | {anew:.1} s | {:.1} %, {:.0} MB | {:.1} %, {:.0} MB | {:.1} % | {rate:.0} | {:.0} us |",
        rest.0 * 100.0,
        mb(&all[0].process),
        rest.1 * 100.0,
        mb(etcd.process()),
        rest.2 * 100.0,
        asked * 1e6,
    );
}

/// Requests a second, of many callers, each with a prompt of its own.
async fn throughput(address: &str) -> f64 {
    let over = Arc::new(AtomicBool::new(false));
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap().tcp_nodelay(true).connect_lazy();
    let client = InferenceClient::new(channel);
    let begun = Instant::now();
    let callers: Vec<_> = (0..CALLERS as u64)
        .map(|caller| {
            let (client, over) = (client.clone(), over.clone());
            tokio::spawn(async move {
                let mut done = 0;
                while !over.load(Ordering::Relaxed) {
                    let mut asked = request(&tiny::prompt(PROMPT, caller << 32 | done), &SamplingParams::greedy(), ANSWER);
                    asked.ignore_eos = true;
                    assert_eq!(tokens(client.clone(), asked).await.unwrap().len(), ANSWER as usize);
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
    done as f64 / begun.elapsed().as_secs_f64()
}
