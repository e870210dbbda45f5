//! How far a cluster goes: routers and etcd with ten, a hundred, a thousand and more nodes. The nodes are stubs: each has an address
//! of its own, registers under a lease of its own, tells its status, and answers at once.
//!
//! `cargo bench -p overfill-tests --bench scale -- 10 100 1000`, or `… -- 1000x10` for so many routers, `… -- 10000@kubernetes` for
//! nodes that are found by the Kubernetes API (which the tests' stand-in plays) and write nothing
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
use overfill_tests::kubernetes::{ApiServer, Pod};
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
/// Name of the cluster.
const CLUSTER: &str = "test";
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
            let number = |place: usize| arguments[place].parse::<usize>().unwrap();
            runtime.block_on(stubs(&arguments[1], (number(2), number(3)), number(4) as u16, arguments.get(5).map(String::as_str)))
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
                let (size, kubernetes) = size.strip_suffix("@kubernetes").map_or((&*size, false), |size| (size, true));
                let (nodes, routers) = size.split_once('x').unwrap_or((size, "1"));
                runtime.block_on(measure(nodes.parse().unwrap(), routers.parse().unwrap(), kubernetes));
            }
        }
    }
}

/// Whose stub it is, and where it listens: half of them are prefill nodes.
fn place(number: usize, port: u16) -> (Role, String) {
    let role = if number.is_multiple_of(2) { Role::Prefill } else { Role::Decode };
    (role, format!("127.{}.{}.{}:{port}", 1 + number / 62_500, number / 250 % 250, 1 + number % 250))
}

/// The stub nodes of these numbers, which register in etcd if there is one.
async fn stubs(fingerprint: &str, (first, count): (usize, usize), port: u16, etcd: Option<&str>) {
    let discovery = etcd.map(|etcd| EtcdSettings {
        endpoints: vec![etcd.parse().unwrap()],
        security: EtcdSecurity::default(),
        cluster: CLUSTER.into(),
        lease_ttl: Duration::from_secs(5),
    });
    let mut registrations = Vec::new();
    for number in first..first + count {
        let (role, address) = place(number, port);
        let of_wire = if role == Role::Prefill { v1::Role::Prefill } else { v1::Role::Decode };
        let id = format!("{role}-{number}");
        let listener = TcpListener::bind(&address).await.unwrap();
        let stub = StubNode::new(&id, of_wire, fingerprint);
        let node = NodeServer::new(NodeService::new(Arc::new(stub.clone()), Signals::default()));
        let routes = Routes::new(node).add_service(DecodeServer::new(stub)).into_axum_router();
        tokio::spawn(transport::serve_peers(listener, routes, Drain::new(), overfill_transport::PeerSecurity::default()));
        let Some(settings) = &discovery else { continue };
        let info = NodeInfo {
            id: NodeId::new(id),
            role,
            address: address.parse().unwrap(),
            pairs: vec![ServedPair { model: "tiny".into(), fingerprint: Fingerprint::new(fingerprint) }],
            max_context: 4096,
        };
        // A connection to etcd for each, as nodes have it.
        registrations.push(Discovery::etcd(settings.clone()).register(info));
    }
    std::future::pending::<()>().await;
    drop(registrations);
}

/// Where routers learn of the nodes.
enum Source {
    Etcd(Etcd),
    /// The API server, and a folder with the way there.
    Kubernetes(ApiServer, tempfile::TempDir),
}

impl Source {
    fn etcd(&self) -> Option<&Etcd> {
        match self {
            Self::Etcd(etcd) => Some(etcd),
            Self::Kubernetes(..) => None,
        }
    }
}

/// This program again.
fn start_stubs(fingerprint: &str, source: &Source, nodes: usize, port: u16) -> Vec<Process> {
    let start = |first: usize| {
        let count = OF_A_PROCESS.min(nodes - first);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["serve-stubs", fingerprint, &first.to_string(), &count.to_string(), &port.to_string()]).stdout(Stdio::null());
        command.args(source.etcd().map(|etcd| &etcd.address));
        Process::start(command, "stub nodes")
    };
    let started = (0..nodes).step_by(OF_A_PROCESS).map(start).collect();
    if let Source::Kubernetes(api, _) = source {
        for number in 0..nodes {
            let (role, address) = place(number, port);
            api.put(&format!("{role}-{number}"), &role.to_string(), &address, Pod::Ready);
        }
    }
    started
}

struct Router {
    process: Process,
    http: String,
    grpc: String,
}

fn start_router(pair: &str, source: &Source) -> Router {
    let (http, grpc) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let flags = ["--pair", pair, "--http", &http, "--grpc", &grpc, "--cluster", CLUSTER];
    let process = match source {
        Source::Etcd(etcd) => Process::ours("router", &[&flags[..], &["--etcd", &etcd.address]].concat()),
        Source::Kubernetes(_, way) => {
            let kubeconfig = way.path().join("kubeconfig").display().to_string();
            Process::with("router", &[&flags[..], &["--discover", "kubernetes://"]].concat(), &[("KUBECONFIG", &kubeconfig)])
        }
    };
    Router { process, http, grpc }
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

async fn measure(nodes: usize, routers: usize, kubernetes: bool) {
    let pair = tiny::pair(Kind::Identity, 1);
    let fingerprint = pair.open().manifest.fingerprint.to_string();
    let source = if kubernetes {
        let (api, way) = (ApiServer::start().await, tempfile::tempdir().unwrap());
        api.write_kubeconfig(&way.path().join("kubeconfig"));
        Source::Kubernetes(api, way)
    } else {
        Source::Etcd(Etcd::start())
    };
    let (folder, port) = (pair.dir.display().to_string(), free_port());
    let start_routers = || (0..routers).map(|_| start_router(&folder, &source)).collect::<Vec<_>>();
    let mut stubs = start_stubs(&fingerprint, &source, nodes, port);
    let mut all = start_routers();
    let first = seen(&all, nodes).await;
    all.clear();
    all = start_routers();
    let again = seen(&all, nodes).await;
    all.clear();
    stubs.clear();
    // Their leases have ended.
    tokio::time::sleep(Duration::from_secs(8)).await;
    stubs = start_stubs(&fingerprint, &source, nodes, port);
    all = start_routers();
    let anew = seen(&all, nodes).await;
    tokio::time::sleep(WINDOW / 2).await;

    let cpu = |process: &Process| process.cpu_seconds();
    let of_stubs = |stubs: &[Process]| stubs.iter().map(Process::cpu_seconds).sum::<f64>();
    let of_etcd = || source.etcd().map(|etcd| cpu(etcd.process()));
    let before = (cpu(&all[0].process), of_etcd(), of_stubs(&stubs));
    tokio::time::sleep(WINDOW).await;
    let window = WINDOW.as_secs_f64();
    let rest = ((cpu(&all[0].process) - before.0) / window, (of_stubs(&stubs) - before.2) / window);
    let etcd_at_rest = before.1.zip(of_etcd()).map(|(before, now)| (now - before) / window);
    let before = cpu(&all[0].process);
    let rate = throughput(&all[0].grpc).await;
    let asked = (cpu(&all[0].process) - before - rest.0 * window) / (rate * window);
    let mb = |process: &Process| process.resident_bytes() as f64 / 1e6;
    let etcd = source.etcd().zip(etcd_at_rest);
    let etcd = etcd.map_or("none".into(), |(etcd, share)| format!("{:.1} %, {:.0} MB", share * 100.0, mb(etcd.process())));
    println!(
        "| {nodes} | {routers} | {first:.1} s | {again:.1} s | {anew:.1} s | {:.1} %, {:.0} MB | {etcd} | {:.1} % | {rate:.0} | {:.0} us |",
        rest.0 * 100.0,
        mb(&all[0].process),
        rest.1 * 100.0,
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
