//! The cluster under test: real processes, each on a host of its own, that find each other by a real etcd of several members.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use overfill_tests::processes::{Process, binary, eventually};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::network::{Host, Network};

/// How long it may take until all is as it should be.
pub const PATIENCE: Duration = Duration::from_secs(60);
const HTTP: u16 = 8000;
const GRPC: u16 = 8001;
const NODE: u16 = 7000;
const ADMIN: u16 = 9100;
const ETCD: u16 = 2379;
const ETCD_PEER: u16 = 2380;

/// What a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `router`.
    Router,
    /// `prefill-node`.
    Prefill,
    /// `decode-node`.
    Decode,
    /// A member of etcd.
    Etcd,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Router, Self::Prefill, Self::Decode, Self::Etcd];

    /// As it is called in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Etcd => "etcd",
        }
    }
}

/// How many of each there are, and what they serve.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Routers.
    pub routers: usize,
    /// Prefill nodes.
    pub prefill: usize,
    /// Decode nodes.
    pub decode: usize,
    /// Members of etcd.
    pub etcd: usize,
    /// The pair's folder.
    pub pair: PathBuf,
    /// Memory of each node's KV cache.
    pub kv_memory: String,
    /// Where processes write their logs; `None`: nowhere.
    pub logs: Option<PathBuf>,
}

/// One process and where it runs.
pub struct Member {
    /// What it is.
    pub kind: Kind,
    /// Where.
    pub host: Host,
    number: usize,
    process: Option<Process>,
    data: TempDir,
}

/// All of it.
pub struct Cluster {
    /// All processes. They end before their hosts do.
    pub members: Vec<Member>,
    /// What connects them.
    pub network: Network,
    /// This program's own host.
    pub own: Host,
    shape: Shape,
    client: reqwest::Client,
}

impl Cluster {
    /// Starts it and waits until each router sees each node.
    pub async fn start(shape: Shape) -> Self {
        let (mut network, own) = Network::new();
        let kinds = [(Kind::Etcd, shape.etcd), (Kind::Router, shape.routers), (Kind::Prefill, shape.prefill), (Kind::Decode, shape.decode)];
        let mut members = Vec::new();
        for (kind, many) in kinds {
            for number in 0..many {
                members.push(Member { kind, host: network.host(), number, process: None, data: tempfile::tempdir().unwrap() });
            }
        }
        let client = reqwest::Client::builder().pool_max_idle_per_host(0).timeout(Duration::from_secs(5)).build().unwrap();
        let mut cluster = Self { network, own, members, shape, client };
        for member in 0..cluster.members.len() {
            cluster.restart(member);
        }
        cluster.whole().await;
        cluster
    }

    /// Members of a kind, by their place among all.
    pub fn of(&self, kind: Kind) -> Vec<usize> {
        (0..self.members.len()).filter(|member| self.members[*member].kind == kind).collect()
    }

    /// Starts a member that has ended, with the data that it left.
    pub fn restart(&mut self, member: usize) {
        let mut command = self.command(member);
        let Member { kind, number, .. } = self.members[member];
        match &self.shape.logs {
            Some(folder) => {
                let log = File::options().create(true).append(true).open(folder.join(format!("{}-{number}.log", kind.name()))).unwrap();
                command.stdout(log.try_clone().unwrap()).stderr(log);
            }
            None => {
                command.stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        self.members[member].process = Some(Process::start(command, kind.name()));
    }

    fn command(&self, member: usize) -> Command {
        let Member { kind, host, number, data, .. } = &self.members[member];
        if *kind == Kind::Etcd {
            return self.etcd_command(host, *number, data.path());
        }
        let name = match kind {
            Kind::Router => "router",
            Kind::Prefill => "prefill-node",
            _ => "decode-node",
        };
        let mut command = host.command(binary(name).to_str().unwrap());
        let etcd: Vec<String> = self.of(Kind::Etcd).into_iter().map(|member| self.members[member].host.at(ETCD)).collect();
        command.arg("--pair").arg(&self.shape.pair).args(["--etcd", &etcd.join(","), "--lease-ttl", "2", "--admin", &host.at(ADMIN)]);
        match kind {
            Kind::Router => {
                let waiting = ["--queue-timeout", "120", "--drain-delay", "5", "--threads", "2"];
                command.args(["--http", &host.at(HTTP), "--grpc", &host.at(GRPC)]).args(waiting)
            }
            _ => command.args(["--listen", &host.at(NODE), "--threads", "1", "--kv-memory", &self.shape.kv_memory]),
        };
        command.env("OVERFILL_LOG", "info");
        command
    }

    fn etcd_command(&self, host: &Host, number: usize, data: &Path) -> Command {
        let mut command = host.command("etcd");
        let name = |number: usize| format!("m{number}");
        let url = |host: &Host, port| format!("http://{}", host.at(port));
        let all = self.of(Kind::Etcd).into_iter().map(|member| &self.members[member]);
        let all: Vec<String> = all.map(|m| format!("{}={}", name(m.number), url(&m.host, ETCD_PEER))).collect();
        let (client, peer) = (url(host, ETCD), url(host, ETCD_PEER));
        command.args(["--name", &name(number), "--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer, "--initial-cluster", &all.join(",")]);
        // Cores are shared with everything else here.
        command.args(["--heartbeat-interval", "300", "--election-timeout", "3000"]).arg("--data-dir").arg(data.join("data"));
        command
    }

    /// The process of a member that runs.
    pub fn process(&self, member: usize) -> &Process {
        self.members[member].process.as_ref().expect("it runs")
    }

    /// Kills a member.
    pub fn kill(&mut self, member: usize) {
        if let Some(process) = self.members[member].process.take() {
            process.kill();
        }
    }

    /// Waits until a member that was asked to has ended; gives its exit code.
    pub async fn ended(&mut self, member: usize, limit: Duration) -> Option<i32> {
        let mut process = self.members[member].process.take()?;
        tokio::task::spawn_blocking(move || process.wait(limit)).await.unwrap()
    }

    /// Kills all members of etcd and forgets what they knew.
    pub fn wipe_etcd(&mut self) {
        for member in self.of(Kind::Etcd) {
            self.kill(member);
            self.members[member].data = tempfile::tempdir().unwrap();
        }
    }

    /// Has etcd forget all revisions but the last.
    pub async fn compact_etcd(&self) {
        for member in self.of(Kind::Etcd) {
            let url = format!("http://{}/v3", self.members[member].host.at(ETCD));
            let post = async |path: &str, body: Value| {
                self.client.post(format!("{url}/{path}")).json(&body).send().await.ok()?.json::<Value>().await.ok()
            };
            let Some(told) = post("kv/range", json!({ "key": "AA==" })).await else { continue };
            let revision = told["header"]["revision"].clone();
            if post("kv/compaction", json!({ "revision": revision, "physical": true })).await.is_some() {
                return;
            }
        }
        panic!("no member of etcd compacts");
    }

    /// `http://ip:port` of each router's door.
    pub fn doors(&self) -> Vec<String> {
        self.of(Kind::Router).into_iter().map(|member| format!("http://{}", self.door(member))).collect()
    }

    /// `ip:port` of a router's door.
    pub fn door(&self, member: usize) -> String {
        self.members[member].host.at(HTTP)
    }

    /// What a member counts, `None` where it does not answer.
    pub async fn metrics(&self, member: usize) -> Option<Vec<(String, f64)>> {
        let url = format!("http://{}/metrics", self.members[member].host.at(ADMIN));
        let text = self.client.get(url).send().await.ok()?.text().await.ok()?;
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Some(lines.filter_map(|line| Some((line.rsplit_once(' ')?.0.to_owned(), line.rsplit_once(' ')?.1.parse().ok()?))).collect())
    }

    /// The sum of a member's metric over its labels.
    pub async fn metric(&self, member: usize, name: &str) -> Option<f64> {
        let of_name = |sample: &str| sample == name || sample.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'));
        Some(self.metrics(member).await?.iter().filter(|(sample, _)| of_name(sample)).map(|(_, value)| value).sum())
    }

    /// Whether a router says that it is ready.
    pub async fn ready(&self, member: usize) -> bool {
        let url = format!("http://{}/ready", self.members[member].host.at(ADMIN));
        self.client.get(url).send().await.is_ok_and(|answer| answer.status().is_success())
    }

    /// Waits until each router sees each node.
    pub async fn whole(&self) {
        let nodes = (self.shape.prefill + self.shape.decode) as f64;
        for router in self.of(Kind::Router) {
            let whole = || async { self.metric(router, "overfill_nodes").await == Some(nodes) };
            eventually(PATIENCE, "each router sees each node", whole).await;
        }
    }

    /// What is held anywhere for requests, by member and metric; empty where nothing is.
    pub async fn held(&self) -> Vec<String> {
        let mut held = Vec::new();
        for member in 0..self.members.len() {
            let Member { kind, number, .. } = self.members[member];
            let names: &[&str] = match kind {
                Kind::Router => &["overfill_router_held"],
                Kind::Prefill => &["overfill_requests_held", "vllm:kv_cache_usage_perc"],
                Kind::Decode => &["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"],
                Kind::Etcd => &[],
            };
            for name in names {
                match self.metric(member, name).await {
                    Some(0.0) => {}
                    Some(value) => held.push(format!("{} {number}: {name} {value}", kind.name())),
                    None => held.push(format!("{} {number} does not answer", kind.name())),
                }
            }
        }
        held
    }

    /// Waits until nothing is held; what still is after `limit`.
    pub async fn nothing_is_held(&self, limit: Duration) -> Vec<String> {
        let until = Instant::now() + limit;
        loop {
            let held = self.held().await;
            if held.is_empty() || Instant::now() > until {
                return held;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
