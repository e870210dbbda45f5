//! A cluster within this process: real servers on free ports, found through memory.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use overfill_cluster::Discovery;
use overfill_lifecycle::Drain;
use overfill_node::NodeListeners;
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_proto::v1::{Finished, GenerateRequest, NodeStatus, Quality, Sampling, TokenIds, generate_event, generate_request};
use overfill_types::{Endpoint, Role, SamplingParams};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tonic::transport::Channel;

use crate::nodes::status;
use crate::processes::binary;
use crate::security;

/// How the cluster of a test is made.
pub struct Builder {
    pair: PathBuf,
    also: Vec<PathBuf>,
    prefill: usize,
    decode: usize,
    prefill_flags: Vec<String>,
    decode_flags: Vec<String>,
    router_flags: Vec<String>,
    peer_flags: Vec<String>,
}

/// A running cluster; dropping it ends everything.
pub struct Cluster {
    /// `http://host:port` of the router's HTTP.
    pub http: String,
    /// `http://host:port` of the router's gRPC.
    pub grpc: String,
    /// Where the router and then its nodes, prefill nodes first, answer scrapes.
    pub metrics: Vec<String>,
    /// Where its nodes are found.
    pub discovery: Discovery,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Builder {
    /// One prefill and one decode node of `pair`.
    pub fn new(pair: &Path) -> Self {
        Self {
            pair: pair.to_owned(),
            also: vec![],
            prefill: 1,
            decode: 1,
            prefill_flags: vec![],
            decode_flags: vec![],
            router_flags: vec![],
            peer_flags: security::peer_flags(),
        }
    }

    /// Another pair of the same full model: the prefill nodes serve both, and it has as many decode nodes of its own.
    pub fn also(mut self, pair: &Path) -> Self {
        self.also.push(pair.to_owned());
        self
    }

    /// So many nodes of each kind.
    pub fn nodes(mut self, prefill: usize, decode: usize) -> Self {
        (self.prefill, self.decode) = (prefill, decode);
        self
    }

    /// Flags of the prefill nodes.
    pub fn prefill_flags(mut self, flags: &[&str]) -> Self {
        self.prefill_flags.extend(flags.iter().map(|f| (*f).to_owned()));
        self
    }

    /// Flags of the decode nodes.
    pub fn decode_flags(mut self, flags: &[&str]) -> Self {
        self.decode_flags.extend(flags.iter().map(|f| (*f).to_owned()));
        self
    }

    /// Flags of the router.
    pub fn router_flags(mut self, flags: &[&str]) -> Self {
        self.router_flags.extend(flags.iter().map(|f| (*f).to_owned()));
        self
    }

    /// Flags that say how its processes know each other: they are those of its discovery.
    pub fn peer_flags(mut self, flags: Vec<String>) -> Self {
        self.peer_flags = flags;
        self
    }

    /// Starts it and waits until every node is listed.
    pub async fn start(self) -> Cluster {
        let discovery = Discovery::memory().secured(security::peers(&self.peer_flags));
        let mut tasks = Vec::new();
        let mut metrics = Vec::new();
        let each: Vec<String> = [&self.pair].into_iter().chain(&self.also).map(|p| p.display().to_string()).collect();
        let pairs = each.join(",");
        // This program is a test, and compiles none.
        let compiler = binary("router").display().to_string();
        let node = |pair: &str, own: &[String]| {
            let mut flags: Vec<String> =
                ["node", "--pair", pair, "--threads", "1", "--guide-compiler", &compiler].map(str::to_owned).to_vec();
            if !own.contains(&"--kv-memory".to_owned()) {
                flags.extend(["--kv-memory", "32M"].map(str::to_owned));
            }
            flags.extend_from_slice(own);
            flags
        };
        let spawn = |task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| AbortOnDropHandle::new(tokio::spawn(task));
        for _ in 0..self.prefill {
            let config = overfill_prefill_node::config::Cli::parse_from(node(&pairs, &self.prefill_flags)).config;
            let run = overfill_prefill_node::run(config, sockets(&mut metrics).await, discovery.clone(), Drain::new());
            tasks.push(spawn(Box::pin(async move { run.await.unwrap() })));
        }
        for pair in each.iter().flat_map(|pair| std::iter::repeat_n(pair, self.decode)) {
            let config = overfill_decode_node::config::Cli::parse_from(node(pair, &self.decode_flags)).config;
            let run = overfill_decode_node::run(config, sockets(&mut metrics).await, discovery.clone(), Drain::new());
            tasks.push(spawn(Box::pin(async move { run.await.unwrap() })));
        }
        let mut flags: Vec<String> = ["router", "--pair", &pairs, "--guide-compiler", &compiler].map(str::to_owned).to_vec();
        flags.extend(security::door_flags());
        flags.extend(self.router_flags);
        let cli = overfill_router::config::Cli::parse_from(flags);
        let listeners = overfill_router::Listeners { http: listener().await, grpc: listener().await, admin: None };
        let url = |l: &TcpListener, grpc| format!("http://{}", security::without_tls(&l.local_addr().unwrap().to_string(), grpc));
        let (http, grpc) = (url(&listeners.http, false), url(&listeners.grpc, true));
        metrics.insert(0, format!("{http}/metrics"));
        let config = overfill_router::RouterConfig::new(cli.pair, cli.bounds);
        let run = overfill_router::run(config, listeners, discovery.clone(), Drain::new());
        tasks.push(spawn(Box::pin(async move { run.await.unwrap() })));
        let mut view = discovery.watch();
        let all = self.prefill + self.decode * each.len();
        tokio::time::timeout(Duration::from_secs(60), view.wait_for(|v| v.nodes.len() == all)).await.expect("nodes come up").unwrap();
        Cluster { http, grpc, metrics, discovery, _tasks: tasks }
    }
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

/// A node's; notes where it is to be scraped.
async fn sockets(metrics: &mut Vec<String>) -> NodeListeners {
    let scraped = listener().await;
    metrics.push(format!("http://{}/metrics", scraped.local_addr().unwrap()));
    NodeListeners { grpc: listener().await, admin: Some(scraped) }
}

impl Cluster {
    /// A gRPC client of the router.
    pub async fn client(&self) -> InferenceClient<Channel> {
        InferenceClient::connect(self.grpc.clone()).await.unwrap()
    }

    /// The nodes of a role.
    pub fn nodes(&self, role: Role) -> Vec<Endpoint> {
        self.discovery.watch().borrow().nodes.iter().filter(|n| n.role == role).cloned().collect()
    }

    /// What every node says of itself.
    pub async fn statuses(&self) -> Vec<NodeStatus> {
        let nodes = self.discovery.watch().borrow().nodes.clone();
        let mut statuses = Vec::new();
        for node in nodes {
            statuses.push(status(&node).await);
        }
        statuses
    }

    /// Asks until each node of `role` has answered, at most `limit`: one that is listed is not asked before it has said what it
    /// holds, as long as there are others.
    pub async fn each_has_answered(&self, role: Role, limit: Duration) {
        let mut unseen: Vec<String> = self.nodes(role).into_iter().map(|node| node.id.to_string()).collect();
        let client = self.client().await;
        let quality = if role == Role::Prefill { Quality::Full } else { Quality::Decode };
        let asking = async {
            while !unseen.is_empty() {
                let ask = GenerateRequest { quality: quality.into(), ..request(&[7], &SamplingParams::greedy(), 1) };
                let by = answer(client.clone(), ask).await.unwrap().1.served_by.unwrap();
                unseen.retain(|id| *id != by.prefill_node && *id != by.decode_node);
            }
        };
        tokio::time::timeout(limit, asking).await.expect("each node answers");
    }

    /// What the router holds for requests, a line of its metrics each.
    async fn held_by_the_router(&self) -> Vec<String> {
        let metrics = reqwest::get(format!("{}/metrics", self.http)).await.unwrap().text().await.unwrap();
        let held: Vec<String> = metrics.lines().filter(|line| line.starts_with("overfill_router_held")).map(str::to_owned).collect();
        assert_eq!(held.len(), 3, "requests, turns and calls are told: {held:?}");
        held.into_iter().filter(|line| !line.ends_with(" 0")).collect()
    }

    /// Waits until no node holds a sequence or a block, and the router neither a request, a turn or a call, at most `limit`.
    pub async fn nothing_is_held(&self, limit: Duration) {
        let until = Instant::now() + limit;
        loop {
            let (statuses, held) = (self.statuses().await, self.held_by_the_router().await);
            if statuses.iter().all(|s| s.sequences == 0 && s.blocks_held == 0) && held.is_empty() {
                return;
            }
            assert!(Instant::now() < until, "still held after {limit:?}: {held:?} {statuses:#?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A request for `max_tokens` tokens after `prompt`.
pub fn request(prompt: &[u32], sampling: &SamplingParams, max_tokens: u32) -> GenerateRequest {
    let sampling: Sampling = overfill_proto::convert::sampling_to_wire(sampling);
    GenerateRequest {
        input: Some(generate_request::Input::TokenIds(TokenIds { ids: prompt.to_vec() })),
        sampling: Some(sampling),
        max_tokens: Some(max_tokens),
        ..Default::default()
    }
}

/// The answer's token ids, and what is said at its end.
///
/// # Errors
/// The status that the request or its stream ended with.
pub async fn answer(mut client: InferenceClient<Channel>, request: GenerateRequest) -> Result<(Vec<u32>, Finished), Status> {
    let mut events = client.generate(request).await?.into_inner();
    let mut ids = Vec::new();
    let mut end = None;
    while let Some(event) = events.message().await? {
        match event.event.unwrap() {
            generate_event::Event::Delta(delta) => ids.extend(delta.tokens.iter().map(|t| t.id)),
            generate_event::Event::Finished(finished) => end = Some(finished),
            generate_event::Event::Started(_) => {}
        }
    }
    Ok((ids, end.expect("an answer ends with `finished` or an error")))
}

/// As [`answer`], the token ids alone.
///
/// # Errors
/// The status that the request or its stream ended with.
pub async fn tokens(client: InferenceClient<Channel>, request: GenerateRequest) -> Result<Vec<u32>, Status> {
    Ok(answer(client, request).await?.0)
}
