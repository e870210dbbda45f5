//! `quality`: the full model writes all of an answer, the decode model does, or both have a part; it is the answer that one
//! process gives, in any company and after a failure, and it says who wrote it. Nothing else is given instead unless the router may.

use std::ops::ControlFlow;
use std::time::Duration;

use clap::Parser;
use overfill_lifecycle::Drain;
use overfill_model::solo::Solo;
use overfill_model::{Device, Sampled, ThreadPool};
use overfill_proto::v1::{self, GenerateRequest, ServedBy, generate_event};
use overfill_tests::cluster::{Builder, Cluster, answer, request};
use overfill_tests::nodes::status;
use overfill_tests::processes::eventually;
use overfill_tests::tiny::{self, Kind, TinyPair};
use overfill_types::{Quality, Role, SamplingParams, StopConditions};
use serde_json::{Value, json};
use tonic::Code;

const SECOND: Duration = Duration::from_secs(1);
const QUALITIES: [Quality; 3] = [Quality::Full, Quality::Decode, Quality::Overfill];

/// Prompts of several lengths, asked greedily and sampled.
fn requests() -> Vec<(Vec<u32>, SamplingParams)> {
    let sampled = SamplingParams { temperature: 0.9, repetition_penalty: 1.1, presence_penalty: 0.3, ..SamplingParams::greedy() };
    [1, 2, 16, 17, 64, 65, 200]
        .into_iter()
        .enumerate()
        .flat_map(|(i, length)| {
            let prompt = tiny::prompt(length, i as u64);
            [(prompt.clone(), SamplingParams::greedy()), (prompt, SamplingParams { seed: i as u64, ..sampled.clone() })]
        })
        .collect()
}

/// One process, no network.
fn reference(pair: &TinyPair, quality: Quality, requests: &[(Vec<u32>, SamplingParams)], new: usize) -> Vec<Vec<u32>> {
    let mut solo = Solo::load(&pair.open(), &Device::Cpu, ThreadPool::new(2, &[]).unwrap()).unwrap().writing(quality);
    let stop = StopConditions { max_tokens: new, stop_token_ids: vec![], ignore_eos: true };
    let mut answer = |(prompt, sampling): &(Vec<u32>, SamplingParams)| {
        let mut ids = Vec::new();
        let take = |s: &Sampled| {
            ids.push(s.token);
            ControlFlow::Continue(())
        };
        solo.generate(prompt, sampling, &stop, take).unwrap();
        ids
    };
    requests.iter().map(&mut answer).collect()
}

fn asked(quality: Quality, prompt: &[u32], sampling: &SamplingParams, new: usize) -> GenerateRequest {
    let wire = match quality {
        Quality::Overfill => v1::Quality::Overfill,
        Quality::Full => v1::Quality::Full,
        Quality::Decode => v1::Quality::Decode,
    };
    GenerateRequest { quality: wire.into(), ignore_eos: true, ..request(prompt, sampling, new as u32) }
}

/// Which models and kinds of node an answer names.
fn named(by: &ServedBy) -> (String, bool, bool) {
    (by.mode.clone(), by.prefill_node.starts_with("prefill-"), by.decode_node.starts_with("decode-"))
}

fn expected_names(quality: Quality) -> (String, bool, bool) {
    (quality.to_string(), quality != Quality::Decode, quality != Quality::Full)
}

async fn check(kind: Kind) {
    let pair = tiny::pair(kind, 31);
    let requests = requests();
    let expected = QUALITIES.map(|q| reference(&pair, q, &requests, 40));
    assert!(expected[0] != expected[1] && expected[1] != expected[2] && expected[0] != expected[2], "these are different models");
    for (nodes, chunk) in [(1, "256"), (2, "7")] {
        let cluster = Builder::new(&pair.dir).nodes(nodes, nodes).prefill_flags(&["--chunk-tokens", chunk]).start().await;
        let client = cluster.client().await;
        // All qualities at once, twice over: what one has left in a cache is nothing that another reads.
        for _ in 0..2 {
            let mut tasks = Vec::new();
            for (i, (prompt, sampling)) in requests.iter().enumerate() {
                for (quality, expected) in QUALITIES.into_iter().zip(&expected) {
                    let task = tokio::spawn(answer(client.clone(), asked(quality, prompt, sampling, 40)));
                    tasks.push((quality, expected[i].clone(), task));
                }
            }
            for (quality, expected, task) in tasks {
                let (ids, finished) = task.await.unwrap().unwrap();
                assert_eq!(ids, expected, "{kind:?}, {quality}, chunks of {chunk}");
                assert_eq!(named(&finished.served_by.unwrap()), expected_names(quality));
            }
        }
        cluster.nothing_is_held(SECOND).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_same_geometry() {
    check(Kind::Identity).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_fewer_layers() {
    check(Kind::Prune("firstlast")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_projected_states() {
    check(Kind::Projection).await;
}

/// A second node of `role` comes, both write, and it goes without waiting for what it writes.
async fn goes_on_elsewhere(role: Role, quality: Quality) {
    let pair = tiny::pair(Kind::Identity, 32);
    let requests: Vec<_> = requests().into_iter().take(6).collect();
    let expected = reference(&pair, quality, &requests, 1200);
    let cluster = Builder::new(&pair.dir).start().await;
    let dir = pair.dir.display().to_string();
    let flags = ["node", "--pair", &dir, "--threads", "1", "--kv-memory", "32M", "--drain-timeout", "0"];
    let (listener, drain) = (tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap(), Drain::new());
    let (discovery, ending) = (cluster.discovery.clone(), drain.clone());
    let second = match role {
        Role::Prefill => {
            let config = overfill_prefill_node::config::Cli::parse_from(flags).config;
            tokio::spawn(async move { overfill_prefill_node::run(config, listener, discovery, ending).await.map_err(|e| e.to_string()) })
        }
        Role::Decode => {
            let config = overfill_decode_node::config::Cli::parse_from(flags).config;
            tokio::spawn(async move { overfill_decode_node::run(config, listener, discovery, ending).await.map_err(|e| e.to_string()) })
        }
    };
    eventually(SECOND * 30, "the second node is listed", || async { cluster.nodes(role).len() == 2 }).await;
    cluster.each_has_answered(role, SECOND * 10).await;
    let client = cluster.client().await;
    let answers: Vec<_> =
        requests.iter().map(|(prompt, sampling)| tokio::spawn(answer(client.clone(), asked(quality, prompt, sampling, 1200)))).collect();
    eventually(SECOND * 10, "both nodes write", || async {
        let nodes = cluster.nodes(role);
        nodes.len() == 2 && status(&nodes[0]).await.running > 0 && status(&nodes[1]).await.running > 0
    })
    .await;
    drain.start();
    for (answer, expected) in answers.into_iter().zip(expected) {
        assert_eq!(answer.await.unwrap().unwrap().0, expected, "{quality}");
    }
    second.await.unwrap().unwrap();
    cluster.nothing_is_held(SECOND).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_full_model_goes_on_elsewhere() {
    goes_on_elsewhere(Role::Prefill, Quality::Full).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_decode_model_goes_on_elsewhere() {
    goes_on_elsewhere(Role::Decode, Quality::Decode).await;
}

async fn post(cluster: &Cluster, quality: Value) -> (u16, Option<String>, Value) {
    let body = json!({ "prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": true, "quality": quality });
    let sent = reqwest::Client::new().post(format!("{}/v1/completions", cluster.http)).json(&body).send().await.unwrap();
    let by = sent.headers().get("x-overfill-served-by").map(|by| by.to_str().unwrap().to_owned());
    (sent.status().as_u16(), by, sent.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_half_is_missed_by_those_who_need_it() {
    let pair = tiny::pair(Kind::Identity, 33);
    for (prefill, decode, able) in [(1, 0, Quality::Full), (0, 1, Quality::Decode)] {
        let cluster = Builder::new(&pair.dir).nodes(prefill, decode).start().await;
        for quality in QUALITIES {
            let (code, by, body) = post(&cluster, json!(quality)).await;
            if quality == able {
                assert_eq!((code, body["served_by"]["mode"].as_str()), (200, Some(able.as_str())), "{body}");
                assert!(by.unwrap().starts_with(able.as_str()));
            } else {
                let message = body["error"]["message"].as_str().unwrap();
                assert!(code == 503 && by.is_none() && message.contains("node of model"), "{code} {body}");
            }
        }
        let (code, _, body) = post(&cluster, json!("best")).await;
        assert!(code == 400 && body["error"]["message"].as_str().unwrap().contains("quality"), "{code} {body}");
        cluster.nothing_is_held(SECOND).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_router_may_fall_back_to_is_said() {
    let pair = tiny::pair(Kind::Identity, 33);
    for (prefill, decode, fallback, able) in [(1, 0, "full", true), (0, 1, "decode", true), (0, 1, "full", false), (1, 0, "decode", false)]
    {
        let cluster = Builder::new(&pair.dir).nodes(prefill, decode).router_flags(&["--fallback", fallback]).start().await;
        let (code, by, body) = post(&cluster, json!("overfill")).await;
        if able {
            assert_eq!((code, body["served_by"]["mode"].as_str()), (200, Some(fallback)), "{body}");
            assert!(by.unwrap().starts_with(fallback));
            let chosen = post(&cluster, json!(fallback)).await.2;
            assert_eq!(body["choices"], chosen["choices"], "the same answer as if it had been asked for");
        } else {
            assert_eq!(code, 503, "{body}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_full_model_reads_what_it_has_read_before_from_its_cache() {
    let pair = tiny::pair(Kind::Identity, 34);
    let cluster = Builder::new(&pair.dir).start().await;
    let client = cluster.client().await;
    let prompt = tiny::prompt(100, 1);
    let mut answers = Vec::new();
    for (quality, cached) in [(Quality::Full, 0), (Quality::Full, 96), (Quality::Overfill, 96), (Quality::Decode, 0)] {
        let (ids, finished) = answer(client.clone(), asked(quality, &prompt, &SamplingParams::greedy(), 20)).await.unwrap();
        assert_eq!(finished.cached_tokens, cached, "{quality}");
        answers.push(ids);
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0][0], answers[2][0], "the first token is the full model's");
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_of_a_prompt_are_the_full_models() {
    let pair = tiny::pair(Kind::Identity, 34);
    let cluster = Builder::new(&pair.dir).start().await;
    let sampling = SamplingParams { prompt_logprobs: Some(1), ..SamplingParams::greedy() };
    let client = cluster.client().await;
    let error = answer(client.clone(), asked(Quality::Decode, &[1, 2, 3], &sampling, 4)).await.unwrap_err();
    assert!(error.code() == Code::InvalidArgument && error.message().contains("full model's"), "{error}");
    let mut both = Vec::new();
    for quality in [Quality::Full, Quality::Overfill] {
        let mut events = client.clone().generate(asked(quality, &[1, 2, 3], &sampling, 4)).await.unwrap().into_inner();
        while let Some(event) = events.message().await.unwrap() {
            if let Some(generate_event::Event::Delta(delta)) = event.event
                && !delta.prompt_logprobs.is_empty()
            {
                both.push(delta.prompt_logprobs);
            }
        }
    }
    assert!(both.len() == 2 && both[0] == both[1] && both[0].len() == 2, "{both:?}");
}
