//! The cluster writes token for token what one process writes: for every KV transform, whatever the chunking, the company and
//! the number of nodes, greedy and sampled.

use std::ops::ControlFlow;
use std::time::Duration;

use overfill_model::solo::Solo;
use overfill_model::{Device, ThreadPool};
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_tests::cluster::{Builder, request, tokens};
use overfill_tests::processes::{Etcd, Process, eventually, free_port};
use overfill_tests::tiny::{self, Kind};
use overfill_types::{SamplingParams, StopConditions};
use tonic::transport::Channel;

/// Lengths of prompts, in tokens; each is asked greedily and sampled, which makes 50 requests.
const LENGTHS: [usize; 25] = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 127, 200, 255, 256, 257, 300, 512, 700, 1000, 1499, 1500];
const NEW: usize = 24;

fn requests() -> Vec<(Vec<u32>, SamplingParams)> {
    let sampled = SamplingParams { temperature: 0.9, top_p: 0.95, min_p: 0.01, repetition_penalty: 1.1, ..SamplingParams::greedy() };
    LENGTHS
        .iter()
        .enumerate()
        .flat_map(|(i, &length)| {
            let prompt = tiny::prompt(length, i as u64);
            [(prompt.clone(), SamplingParams::greedy()), (prompt, SamplingParams { seed: i as u64, ..sampled.clone() })]
        })
        .collect()
}

/// One process, no network.
fn reference(pair: &tiny::TinyPair, requests: &[(Vec<u32>, SamplingParams)]) -> Vec<Vec<u32>> {
    let mut solo = Solo::load(&pair.open(), &Device::Cpu, ThreadPool::new(2, &[]).unwrap()).unwrap();
    let stop = StopConditions { max_tokens: NEW, stop_token_ids: vec![], ignore_eos: false };
    requests
        .iter()
        .map(|(prompt, sampling)| {
            let mut ids = Vec::new();
            solo.generate(prompt, sampling, &stop, |s| {
                ids.push(s.token);
                ControlFlow::Continue(())
            })
            .unwrap();
            ids
        })
        .collect()
}

/// `company` at a time.
async fn written(client: &InferenceClient<Channel>, requests: &[(Vec<u32>, SamplingParams)], company: usize) -> Vec<Vec<u32>> {
    let mut answers = Vec::new();
    for some in requests.chunks(company) {
        let tasks: Vec<_> =
            some.iter().map(|(prompt, sampling)| tokio::spawn(tokens(client.clone(), request(prompt, sampling, NEW as u32)))).collect();
        for task in tasks {
            answers.push(task.await.unwrap().unwrap());
        }
    }
    answers
}

async fn check(kind: Kind) {
    let pair = tiny::pair(kind, 11);
    let requests = requests();
    let expected = reference(&pair, &requests);
    let distinct: std::collections::HashSet<_> = expected.iter().collect();
    assert!(distinct.len() > requests.len() / 2, "answers depend on their prompts");
    for (nodes, chunk) in [((1, 1), "256"), ((2, 2), "7")] {
        let cluster = Builder::new(&pair.dir).nodes(nodes.0, nodes.1).prefill_flags(&["--chunk-tokens", chunk]).start().await;
        for company in [1, 16] {
            assert_eq!(
                written(&cluster.client().await, &requests, company).await,
                expected,
                "{kind:?}, {nodes:?} nodes, chunks of {chunk}, {company} at a time"
            );
        }
        cluster.nothing_is_held(Duration::from_secs(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn identity() {
    check(Kind::Identity).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prune_firstlast() {
    check(Kind::Prune("firstlast")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prune_first() {
    check(Kind::Prune("first")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prune_last() {
    check(Kind::Prune("last")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn projection() {
    check(Kind::Projection).await;
}

/// Real processes, whose nodes have `flags` too.
async fn check_processes(flags: &[&str]) {
    let pair = tiny::pair(Kind::Identity, 11);
    let requests = requests();
    let expected = reference(&pair, &requests);
    let dir = pair.dir.display().to_string();
    let etcd = Etcd::start();
    let (http, grpc) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let by_etcd = ["--pair", &dir, "--etcd", &etcd.address];
    let mut processes = vec![Process::ours("router", &[&by_etcd[..], &["--http", &http, "--grpc", &grpc]].concat())];
    for node in ["prefill-node", "prefill-node", "decode-node", "decode-node"] {
        let own = ["--listen", "127.0.0.1:0", "--threads", "1", "--kv-memory", "32M"];
        processes.push(Process::ours(node, &[&by_etcd[..], &own, flags].concat()));
    }
    eventually(Duration::from_secs(30), "the cluster is ready", || async {
        reqwest::get(format!("http://{http}/ready")).await.is_ok_and(|r| r.status().is_success())
    })
    .await;
    let client = InferenceClient::connect(format!("http://{grpc}")).await.unwrap();
    for company in [1, 16] {
        assert_eq!(written(&client, &requests, company).await, expected, "{company} at a time");
    }
    drop(processes);
}

#[tokio::test(flavor = "multi_thread")]
async fn real_processes_that_etcd_brings_together() {
    check_processes(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn real_processes_that_share_their_cores() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cores");
    check_processes(&["--share-cores", &file.display().to_string(), "--prefer", "itl"]).await;
    let used = std::fs::read(&file).unwrap();
    assert!(used.iter().any(|byte| *byte != 0), "nobody took a turn");
}
