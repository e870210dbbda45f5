//! A cluster of real processes that find each other by way of a real etcd.

use std::path::Path;
use std::time::Duration;

use overfill_cluster::{Discovery, EtcdSecurity, EtcdSettings};
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_types::SamplingParams;
use tonic::Status;

use crate::cluster::{request, tokens};
use crate::processes::{Etcd, Process, eventually, free_port};
use crate::security;

/// How long it may take until something has come about.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Its name in etcd.
const NAME: &str = "test";
/// Seconds of its leases.
const LEASE: &str = "2";

/// A router and nodes of one pair.
pub struct ProcessCluster {
    /// What they find each other by.
    pub etcd: Etcd,
    /// The front door.
    pub router: Process,
    /// Its prefill nodes.
    pub prefill: Vec<Process>,
    /// Its decode nodes.
    pub decode: Vec<Process>,
    /// `http://host:port` of the router's HTTP.
    pub http: String,
    /// `http://host:port` of the router's gRPC.
    pub grpc: String,
    pair: String,
}

impl ProcessCluster {
    /// Starts one of so many nodes of `pair`; it is not ready yet.
    pub fn start(pair: &Path, prefill: usize, decode: usize) -> Self {
        let etcd = Etcd::start();
        let (http, grpc) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let pair = pair.display().to_string();
        let found = ["--etcd", &etcd.address, "--cluster", NAME, "--lease-ttl", LEASE];
        let secured = [security::peer_flags(), security::door_flags()].concat();
        let secured: Vec<&str> = secured.iter().map(String::as_str).collect();
        let router = Process::ours("router", &[&["--pair", &pair, "--http", &http, "--grpc", &grpc][..], &found, &secured].concat());
        let (http, grpc) = (security::without_tls(&http, false), security::without_tls(&grpc, true));
        let mut cluster =
            Self { router, prefill: vec![], decode: vec![], http: format!("http://{http}"), grpc: format!("http://{grpc}"), etcd, pair };
        cluster.prefill = (0..prefill).map(|_| cluster.node("prefill-node")).collect();
        cluster.decode = (0..decode).map(|_| cluster.node("decode-node")).collect();
        cluster
    }

    /// Starts another node, by its binary's name.
    pub fn node(&self, name: &str) -> Process {
        let flags = ["--pair", &self.pair, "--listen", "127.0.0.1:0", "--threads", "1", "--kv-memory", "32M"];
        let secured = security::peer_flags();
        let secured: Vec<&str> = secured.iter().map(String::as_str).collect();
        Process::ours(name, &[&flags[..], &["--etcd", &self.etcd.address, "--cluster", NAME, "--lease-ttl", LEASE], &secured].concat())
    }

    fn settings(&self) -> EtcdSettings {
        EtcdSettings {
            endpoints: vec![self.etcd.address.parse().unwrap()],
            cluster: NAME.into(),
            lease_ttl: Duration::from_secs(2),
            security: EtcdSecurity::default(),
        }
    }

    /// Its nodes as the router sees them.
    pub fn discovery(&self) -> Discovery {
        Discovery::etcd(self.settings()).secured(security::peers(&security::peer_flags()))
    }

    /// Whether the router says that it is ready.
    pub async fn ready(&self) -> bool {
        reqwest::get(format!("{}/ready", self.http)).await.is_ok_and(|r| r.status().is_success())
    }

    /// Waits until it does.
    pub async fn until_ready(&self) {
        eventually(PATIENCE, "the cluster is ready", || self.ready()).await;
    }

    /// The tokens of an answer, as many as are asked for.
    ///
    /// # Errors
    /// The status that it ended with.
    pub async fn answer(&self, prompt: &[u32], new: u32) -> Result<Vec<u32>, Status> {
        let client = InferenceClient::connect(self.grpc.clone()).await.unwrap();
        let mut request = request(prompt, &SamplingParams::greedy(), new);
        request.ignore_eos = true;
        tokens(client, request).await
    }
}
