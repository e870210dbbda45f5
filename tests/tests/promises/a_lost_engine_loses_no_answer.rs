//! Whatever an engine does under load (it panics, hangs, aborts, fails each sequence that it meets), its node ends and is known to
//! have ended, and every answer is the one that nothing disturbed.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use overfill_model::solo::Solo;
use overfill_model::{Device, ThreadPool};
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_tests::cluster::{Builder, request, tokens};
use overfill_tests::processes::{Etcd, Process, eventually, free_port};
use overfill_tests::scrape::Scrape;
use overfill_tests::tiny::{self, Kind, TinyPair};
use overfill_types::{SamplingParams, StopConditions};

const PATIENCE: Duration = Duration::from_secs(30);
/// Answers under way at a time.
const STREAMS: usize = 16;
/// Tokens of each.
const TOKENS: usize = 60;

struct Cluster {
    etcd: Etcd,
    pair: String,
    http: String,
    grpc: String,
    /// A router, and one good node of each kind.
    _processes: Vec<Process>,
}

impl Cluster {
    async fn start(pair: &TinyPair) -> Self {
        let (etcd, pair) = (Etcd::start(), pair.dir.display().to_string());
        let (http, grpc) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let router = ["--pair", &pair, "--http", &http, "--grpc", &grpc, "--etcd", &etcd.address, "--lease-ttl", "2"];
        let router = Process::ours("router", &router);
        let mut cluster = Self { etcd, pair, http: format!("http://{http}"), grpc: format!("http://{grpc}"), _processes: vec![router] };
        for kind in ["prefill-node", "decode-node"] {
            let node = cluster.node(kind, &[]);
            cluster._processes.push(node);
        }
        cluster.has_nodes(2, PATIENCE).await;
        cluster
    }

    fn node(&self, kind: &str, flags: &[&str]) -> Process {
        let own = ["--pair", &self.pair, "--listen", "127.0.0.1:0", "--threads", "1", "--kv-memory", "32M", "--etcd", &self.etcd.address];
        let own = [&own[..], &["--lease-ttl", "2", "--step-timeout", "0.5"], flags].concat();
        Process::with(kind, &own, &[("OVERFILL_LOG", "off")])
    }

    /// Waits until the router sees so many nodes.
    async fn has_nodes(&self, count: usize, limit: Duration) {
        let url = format!("{}/metrics", self.http);
        eventually(limit, "the router sees the nodes", || async {
            let Ok(answer) = reqwest::get(&url).await else { return false };
            Scrape::parse(&answer.text().await.unwrap()).sum("overfill_nodes", &[]) == count as f64
        })
        .await;
    }
}

/// What nothing disturbs writes.
fn undisturbed(pair: &TinyPair, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut solo = Solo::load(&pair.open(), &Device::Cpu, ThreadPool::new(1, &[]).unwrap()).unwrap();
    let stop = StopConditions { max_tokens: TOKENS, stop_token_ids: vec![], ignore_eos: true };
    let mut answer = |prompt: &Vec<u32>| {
        let mut ids = Vec::new();
        let take = |sampled: &overfill_model::Sampled| {
            ids.push(sampled.token);
            ControlFlow::Continue(())
        };
        solo.generate(prompt, &SamplingParams::greedy(), &stop, take).unwrap();
        ids
    };
    prompts.iter().map(&mut answer).collect()
}

/// An answer under way.
type Stream = tokio::task::JoinHandle<Result<Vec<u32>, tonic::Status>>;

/// Asks the router at `grpc` for an answer to each prompt, all at once.
fn asked_at_once(grpc: &str, prompts: &[Vec<u32>]) -> Vec<Stream> {
    let ask = |prompt: &Vec<u32>| {
        let (grpc, mut asked) = (grpc.to_owned(), request(prompt, &SamplingParams::greedy(), TOKENS as u32));
        asked.ignore_eos = true;
        tokio::spawn(async move { tokens(InferenceClient::connect(grpc).await.unwrap(), asked).await })
    };
    prompts.iter().map(ask).collect()
}

/// Asks until `process` has ended, with as many answers at a time as there are prompts; each is as expected. Gives when it ended.
async fn asked_until_it_ends(cluster: &Cluster, prompts: &[Vec<u32>], expected: &[Vec<u32>], process: &mut Process) -> Instant {
    let until = Instant::now() + PATIENCE;
    let mut ended = None;
    while ended.is_none() {
        assert!(Instant::now() < until, "the node lives on");
        for (stream, expected) in asked_at_once(&cluster.grpc, prompts).into_iter().zip(expected) {
            let answer = stream.await.unwrap();
            assert_eq!(answer.as_ref().map_err(ToString::to_string), Ok(expected), "not the answer that nothing disturbed");
            if ended.is_none() && process.ended().is_some() {
                ended = Some(Instant::now());
            }
        }
    }
    ended.unwrap()
}

async fn faults(kind: &str, faults: &[&str]) {
    let pair = tiny::pair(Kind::Identity, 17);
    let prompts: Vec<Vec<u32>> = (0..STREAMS).map(|i| tiny::prompt(30 + 9 * i, i as u64)).collect();
    let expected = undisturbed(&pair, &prompts);
    let cluster = Cluster::start(&pair).await;
    for fault in faults {
        let mut node = cluster.node(kind, &["--fault", fault]);
        cluster.has_nodes(3, PATIENCE).await;
        let ended = asked_until_it_ends(&cluster, &prompts, &expected, &mut node).await;
        // One that aborts says nothing: its lease of two seconds has to end.
        let aborts = fault.ends_with("abort");
        cluster.has_nodes(2, Duration::from_secs(if aborts { 5 } else { 2 })).await;
        println!("{kind} {fault}: withdrawn {:?} after its end", ended.elapsed());
        let code = node.wait(Duration::from_secs(1));
        assert!(code.is_none_or(|code| code != 0), "{fault}: it ended as if all were well");
        assert!(aborts == code.is_none(), "{fault}: {code:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_decode_node() {
    let phases =
        ["turn:300=panic", "sweep:300=panic", "step:600=hang", "step:600=panic", "rows:60=panic", "begin:20=panic", "step:600=abort"];
    faults("decode-node", &phases).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_prefill_node() {
    faults("prefill-node", &["turn:300=panic", "step:30=hang", "step:30=panic", "rows:200=panic", "step:30=abort"]).await;
}

/// A prompt at which a node's engine panics fails, wherever that is; what runs beside it writes the same tokens, and the node
/// lives on.
#[tokio::test(flavor = "multi_thread")]
async fn one_bad_sequence_fails_alone() {
    let pair = tiny::pair(Kind::Identity, 17);
    let prompts: Vec<Vec<u32>> = (0..STREAMS).map(|i| tiny::prompt(30 + 9 * i, i as u64)).collect();
    let expected = undisturbed(&pair, &prompts);
    let digest: String = overfill_types::prompt_digest(&prompts[5]).iter().map(|byte| format!("{byte:02x}")).collect();
    for (role, point) in [("decode", "step"), ("decode", "rows"), ("decode", "begin"), ("prefill", "step"), ("prefill", "rows")] {
        let fault = format!("{point}@{digest}=panic");
        let flags = ["--fault", &fault];
        let builder = Builder::new(&pair.dir);
        let cluster = if role == "decode" { builder.decode_flags(&flags) } else { builder.prefill_flags(&flags) }.start().await;
        for _ in 0..3 {
            for (i, (stream, expected)) in asked_at_once(&cluster.grpc, &prompts).into_iter().zip(&expected).enumerate() {
                match stream.await.unwrap() {
                    Ok(answer) => assert!(i != 5 && answer == *expected, "{role} {point}: {i}"),
                    Err(error) => assert!(i == 5 && error.code() == tonic::Code::Internal, "{role} {point}: {i}: {error}"),
                }
            }
        }
        cluster.nothing_is_held(PATIENCE).await;
    }
}
