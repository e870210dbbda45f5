//! The cluster writes token for token what one process writes: for every KV transform, whatever the chunking, the company and
//! the number of nodes, greedy and sampled.

use std::ops::ControlFlow;

use overfill_model::solo::Solo;
use overfill_model::{Device, Threads};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::tiny::{self, Kind};
use overfill_types::{SamplingParams, StopConditions};

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
    let solo = Solo::load(&pair.open(), &Device::Cpu, Threads::new(2).unwrap()).unwrap();
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
async fn written(cluster: &Cluster, requests: &[(Vec<u32>, SamplingParams)], company: usize) -> Vec<Vec<u32>> {
    let client = cluster.client().await;
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
                written(&cluster, &requests, company).await,
                expected,
                "{kind:?}, {nodes:?} nodes, chunks of {chunk}, {company} at a time"
            );
        }
        cluster.nothing_is_held(std::time::Duration::from_secs(1)).await;
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
