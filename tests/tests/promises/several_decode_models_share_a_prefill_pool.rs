//! Several pairs in one cluster: each is a model of its own name, and those that have the same full model share prefill nodes,
//! their caches included. Each answers as it does alone.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use clap::Parser;
use overfill_cluster::Discovery;
use overfill_lifecycle::Drain;
use overfill_model::solo::Solo;
use overfill_model::{Device, Sampled, ThreadPool};
use overfill_proto::v1::{GenerateRequest, generate_event};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::tiny::{self, Kind, TinyPair};
use overfill_types::{SamplingParams, StopConditions};
use serde_json::{Value, json};
use tokio::net::TcpListener;

const NEW: usize = 32;
const MODELS: [&str; 2] = ["shallow", "projected"];

fn pairs(seed: u64) -> [TinyPair; 2] {
    [tiny::pair_named(MODELS[0], Kind::Prune("firstlast"), seed), tiny::pair_named(MODELS[1], Kind::Projection, seed)]
}

fn reference(pair: &TinyPair, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut solo = Solo::load(&pair.open(), &Device::Cpu, ThreadPool::new(2, &[]).unwrap()).unwrap();
    let stop = StopConditions { max_tokens: NEW, stop_token_ids: vec![], ignore_eos: true };
    let mut answer = |prompt: &Vec<u32>| {
        let mut ids = Vec::new();
        let take = |s: &Sampled| {
            ids.push(s.token);
            ControlFlow::Continue(())
        };
        solo.generate(prompt, &SamplingParams::greedy(), &stop, take).unwrap();
        ids
    };
    prompts.iter().map(&mut answer).collect()
}

fn asked(model: &str, prompt: &[u32]) -> GenerateRequest {
    GenerateRequest { model: model.into(), ignore_eos: true, ..request(prompt, &SamplingParams::greedy(), NEW as u32) }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_answers_as_it_does_alone() {
    let pairs = pairs(51);
    let prompts: Vec<Vec<u32>> = [1, 16, 40, 130, 300].into_iter().enumerate().map(|(i, n)| tiny::prompt(n, i as u64)).collect();
    let expected = [reference(&pairs[0], &prompts), reference(&pairs[1], &prompts)];
    assert_ne!(expected[0], expected[1], "the decode models differ");
    for nodes in [1, 2] {
        let cluster = Builder::new(&pairs[0].dir).also(&pairs[1].dir).nodes(nodes, nodes).start().await;
        let client = cluster.client().await;
        let mut answers = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            for (model, expected) in MODELS.iter().zip(&expected) {
                answers.push((expected[i].clone(), tokio::spawn(tokens(client.clone(), asked(model, prompt)))));
            }
        }
        for (expected, answer) in answers {
            assert_eq!(answer.await.unwrap().unwrap(), expected, "{nodes} nodes");
        }
        cluster.nothing_is_held(Duration::from_secs(1)).await;
    }
}

async fn cached(cluster: &Cluster, model: &str, prompt: &[u32]) -> u32 {
    let mut events = cluster.client().await.generate(asked(model, prompt)).await.unwrap().into_inner();
    while let Some(event) = events.message().await.unwrap() {
        if let Some(generate_event::Event::Finished(finished)) = event.event {
            assert_eq!(finished.served_by.unwrap().mode, "overfill");
            return finished.cached_tokens;
        }
    }
    panic!("an answer ends with `finished`");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_full_model_read_for_one_is_there_for_the_other() {
    let pairs = pairs(52);
    let cluster = Builder::new(&pairs[0].dir).also(&pairs[1].dir).start().await;
    let prompt = tiny::prompt(100, 3);
    let found = [cached(&cluster, MODELS[0], &prompt).await, cached(&cluster, MODELS[1], &prompt).await];
    assert_eq!(found, [0, 96]);
    // Decode nodes hold different states of it, so none is taken from another.
    let fingerprints: Vec<String> = cluster.statuses().await.iter().flat_map(|s| s.pairs.iter().map(|p| p.fingerprint.clone())).collect();
    assert_eq!(fingerprints.len(), 4, "the prefill node names both pairs");
}

#[tokio::test(flavor = "multi_thread")]
async fn they_are_listed_by_name() {
    let pairs = pairs(53);
    let cluster = Builder::new(&pairs[0].dir).also(&pairs[1].dir).start().await;
    let models: Value = reqwest::get(format!("{}/v1/models", cluster.http)).await.unwrap().json().await.unwrap();
    let names: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, MODELS);
    let ask = |body: Value| reqwest::Client::new().post(format!("{}/v1/completions", cluster.http)).json(&body).send();
    let unnamed = ask(json!({ "prompt": "a", "max_tokens": 2 })).await.unwrap();
    assert_eq!(unnamed.status(), 404, "which of the two is not to be guessed");
    assert!(unnamed.text().await.unwrap().contains("shallow, projected"));
    let answered: Value = ask(json!({ "model": "projected", "prompt": "a", "max_tokens": 2 })).await.unwrap().json().await.unwrap();
    assert_eq!(answered["model"], "projected");
}

/// Why a prefill node for these pairs does not start.
async fn refused(pairs: [&Path; 2]) -> String {
    let pairs = pairs.map(|p| p.display().to_string()).join(",");
    let config = overfill_prefill_node::config::Cli::parse_from(["node", "--pair", &pairs, "--threads", "1", "--kv-memory", "8M"]).config;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = overfill_prefill_node::run(config, listener, Discovery::memory(), Drain::new()).await.unwrap_err();
    std::error::Error::source(&error).unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_belong_together_is_refused() {
    let [ours, also] = pairs(54);
    let [another, _] = pairs(55);
    let named_alike = tiny::pair_named(MODELS[0], Kind::Projection, 54);
    assert!(refused([&ours.dir, &another.dir]).await.contains("same full model"));
    assert!(refused([&ours.dir, &ours.dir]).await.contains("leave one out"));
    assert!(refused([&ours.dir, &named_alike.dir]).await.contains("named alike"));
    let other_format = tiny::pair_named("wide", Kind::Identity, 54);
    assert!(refused([&also.dir, &other_format.dir]).await.contains("cache format"));
}

#[tokio::test]
async fn a_pair_that_is_there_twice_is_refused_at_the_start() {
    // A fingerprint says nothing of names: these are the same models.
    let pairs = ["one", "another"].map(|name| tiny::pair_named(name, Kind::Identity, 51));
    let cli = overfill_router::config::Cli::parse_from(["router", "--pair", "unused"]);
    let config = overfill_router::RouterConfig::new(pairs.iter().map(|pair| pair.dir.clone()).collect(), cli.bounds);
    let listen = || TcpListener::bind("127.0.0.1:0");
    let listeners = overfill_router::Listeners { http: listen().await.unwrap(), grpc: listen().await.unwrap(), admin: None };
    let ran = overfill_router::run(config, listeners, Discovery::fixed(vec![], vec![]), Drain::new()).await;
    let overfill_router::RunError::Pair(error) = ran.unwrap_err() else { panic!("of the pairs") };
    assert!(error.message.contains("two of the pairs have one fingerprint"), "{error}");
}
