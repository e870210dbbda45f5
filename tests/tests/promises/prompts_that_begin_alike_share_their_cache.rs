//! A prompt that begins like an earlier one costs a prefill node its new tokens only, and its answer is the same token for token.

use std::ops::ControlFlow;
use std::time::Duration;

use overfill_model::solo::Solo;
use overfill_model::{Device, ThreadPool};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::nodes::status;
use overfill_tests::tiny::{self, Kind, TinyPair};
use overfill_types::{Role, SamplingParams, StopConditions};

const KINDS: [Kind; 4] = [Kind::Identity, Kind::Prune("firstlast"), Kind::Prune("first"), Kind::Projection];
/// Tokens of an answer.
const NEW: usize = 12;
/// Tokens in a block.
const BLOCK: usize = 16;

/// What one process without any cache writes.
struct Reference(Solo);

impl Reference {
    fn new(pair: &TinyPair) -> Self {
        Self(Solo::load(&pair.open(), &Device::Cpu, ThreadPool::new(2, &[]).unwrap()).unwrap())
    }

    fn answer(&mut self, prompt: &[u32]) -> Vec<u32> {
        let stop = StopConditions { max_tokens: NEW, stop_token_ids: vec![], ignore_eos: true };
        let mut ids = Vec::new();
        let on_token = |s: &overfill_model::Sampled| {
            ids.push(s.token);
            ControlFlow::Continue(())
        };
        self.0.generate(prompt, &SamplingParams::greedy(), &stop, on_token).unwrap();
        ids
    }
}

async fn ask(cluster: &Cluster, prompt: &[u32]) -> Vec<u32> {
    let mut request = request(prompt, &SamplingParams::greedy(), NEW as u32);
    request.ignore_eos = true;
    tokens(cluster.client().await, request).await.unwrap()
}

/// Prompt tokens that the prefill node looked up, and those that it found.
async fn lookups(cluster: &Cluster) -> (usize, usize) {
    let status = status(&cluster.nodes(Role::Prefill)[0]).await;
    (status.prefix_queries as usize, status.prefix_hits as usize)
}

/// Prompts one after the other, each with the tokens at its front that must be found.
fn conversation(reference: &mut Reference) -> Vec<(Vec<u32>, usize)> {
    let first = tiny::prompt(100, 1);
    let fork = |at: usize, seed| [&first[..at], &tiny::prompt(60, seed)].concat();
    let turn = [first.clone(), reference.answer(&first), tiny::prompt(30, 2)].concat();
    let last = (turn.len() - 1) / BLOCK * BLOCK;
    vec![
        (first.clone(), 0),
        (first.clone(), 96),
        // Its last block is there, but the token after it has to come from somewhere.
        (first[..96].to_vec(), 80),
        (first[..97].to_vec(), 96),
        // Apart within a block, and at its edge.
        (fork(40, 3), 32),
        (fork(48, 4), 48),
        // The next turn of a chat: the answer is the decode model's, so the full model reads it for the first time.
        (turn.clone(), 96),
        (turn, last),
        ([&[first[0] ^ 1], &first[1..]].concat(), 0),
        (first[..16].to_vec(), 0),
        (first[..17].to_vec(), 16),
        (first[..1].to_vec(), 0),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_is_not_read_again() {
    for (kind, chunk) in KINDS.into_iter().zip(["256", "7", "1", "100"]) {
        let pair = tiny::pair(kind, 21);
        let mut reference = Reference::new(&pair);
        let conversation = conversation(&mut reference);
        let cluster = Builder::new(&pair.dir).prefill_flags(&["--chunk-tokens", chunk]).start().await;
        let (mut queries, mut hits) = (0, 0);
        for (i, (prompt, found)) in conversation.iter().enumerate() {
            assert_eq!(ask(&cluster, prompt).await, reference.answer(prompt), "{kind:?}, prompt {i}");
            (queries, hits) = (queries + prompt.len(), hits + found);
            assert_eq!(lookups(&cluster).await, (queries, hits), "{kind:?}, prompt {i}");
        }
        cluster.nothing_is_held(Duration::from_secs(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_turned_off() {
    let pair = tiny::pair(Kind::Identity, 21);
    let mut reference = Reference::new(&pair);
    let cluster = Builder::new(&pair.dir).prefill_flags(&["--prefix-cache", "off"]).start().await;
    for (prompt, _) in conversation(&mut reference) {
        assert_eq!(ask(&cluster, &prompt).await, reference.answer(&prompt));
    }
    assert_eq!(lookups(&cluster).await, (0, 0));
    cluster.nothing_is_held(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_used_longest_ago_makes_room() {
    let pair = tiny::pair(Kind::Identity, 22);
    let mut reference = Reference::new(&pair);
    // 768 bytes a token: 64 blocks.
    let cluster = Builder::new(&pair.dir).prefill_flags(&["--kv-memory", "768K"]).start().await;
    let (one, two) = (tiny::prompt(512, 1), tiny::prompt(512, 2));
    // The last needs 62 blocks: all of `two`, and `one` but for its first 2.
    let large = tiny::prompt(992, 3);
    let mut hits = 0;
    for (prompt, found) in [(&one, 0), (&two, 0), (&one, 496), (&large, 0), (&one, 32), (&two, 0)] {
        assert_eq!(ask(&cluster, prompt).await, reference.answer(prompt));
        hits += found;
        assert_eq!(lookups(&cluster).await.1, hits);
    }
    cluster.nothing_is_held(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_at_a_time_in_too_small_a_pool() {
    for kind in KINDS {
        let pair = tiny::pair(kind, 23);
        let mut reference = Reference::new(&pair);
        // Four families of prompts that fork at many places; those that come together fit the pool no more than half.
        let prompts: Vec<Vec<u32>> = (0..64)
            .map(|i| {
                let family = tiny::prompt(600, i % 4);
                [&family[..(i as usize * 37) % 600], &tiny::prompt(1 + (i as usize * 53) % 90, 100 + i % 48)].concat()
            })
            .collect();
        let expected: Vec<Vec<u32>> = prompts.iter().map(|p| reference.answer(p)).collect();
        let flags = ["--chunk-tokens", "64", "--kv-memory", "1200K"];
        let cluster = std::sync::Arc::new(Builder::new(&pair.dir).prefill_flags(&flags).start().await);
        for round in 0..2 {
            for (prompts, expected) in prompts.chunks(16).zip(expected.chunks(16)) {
                let tasks: Vec<_> = prompts
                    .iter()
                    .map(|prompt| {
                        let (cluster, prompt) = (cluster.clone(), prompt.clone());
                        tokio::spawn(async move { ask(&cluster, &prompt).await })
                    })
                    .collect();
                for (task, expected) in tasks.into_iter().zip(expected) {
                    assert_eq!(&task.await.unwrap(), expected, "{kind:?}, round {round}");
                }
            }
        }
        let (queries, hits) = lookups(&cluster).await;
        assert_eq!(queries, 2 * prompts.iter().map(Vec::len).sum::<usize>());
        assert!(hits > queries / 20 && hits < queries, "{hits} of {queries}");
        cluster.nothing_is_held(Duration::from_secs(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_of_the_same_at_once() {
    let pair = tiny::pair(Kind::Identity, 24);
    let prompt = tiny::prompt(700, 1);
    let expected = Reference::new(&pair).answer(&prompt);
    let cluster = std::sync::Arc::new(Builder::new(&pair.dir).prefill_flags(&["--chunk-tokens", "50"]).start().await);
    for _ in 0..3 {
        let tasks: Vec<_> = (0..16)
            .map(|_| {
                let (cluster, prompt) = (cluster.clone(), prompt.clone());
                tokio::spawn(async move { ask(&cluster, &prompt).await })
            })
            .collect();
        for task in tasks {
            assert_eq!(task.await.unwrap(), expected);
        }
    }
    assert!(lookups(&cluster).await.1 >= 2 * 16 * 688, "the second and third time all of it was there");
    cluster.nothing_is_held(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_still_read_or_was_broken_off_is_shared_as_far_as_it_came() {
    let pair = tiny::pair(Kind::Prune("firstlast"), 25);
    let mut reference = Reference::new(&pair);
    let cluster = std::sync::Arc::new(Builder::new(&pair.dir).prefill_flags(&["--chunk-tokens", "5"]).start().await);
    let start = |prompt: &[u32]| {
        let (cluster, prompt) = (cluster.clone(), prompt.to_vec());
        tokio::spawn(async move { ask(&cluster, &prompt).await })
    };
    let mut found = 0;
    for wait in [2, 5, 10, 20, 30] {
        let prompt = tiny::prompt(2000, wait);
        let expected = reference.answer(&prompt);
        let broken_off = start(&prompt);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        broken_off.abort();
        let mut tasks = Vec::new();
        for _ in 0..5 {
            tasks.push(start(&prompt));
            tokio::time::sleep(Duration::from_millis(wait)).await;
        }
        for task in tasks {
            assert_eq!(task.await.unwrap(), expected, "{wait} ms apart");
        }
        found = lookups(&cluster).await.1;
        assert!(found.is_multiple_of(BLOCK), "{found} found, {wait} ms apart");
    }
    assert!(found > 0);
    cluster.nothing_is_held(Duration::from_secs(1)).await;
}

/// Tokens that were found of a prompt of 100, which a client asks with a salt.
async fn found(cluster: &Cluster, key: &str, salt: &str) -> usize {
    let mut asked = request(&tiny::prompt(100, 77), &SamplingParams::greedy(), NEW as u32);
    (asked.ignore_eos, asked.cache_salt) = (true, salt.into());
    let mut asked = tonic::Request::new(asked);
    asked.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    let before = lookups(cluster).await.1;
    let mut events = cluster.client().await.generate(asked).await.unwrap().into_inner();
    while events.message().await.unwrap().is_some() {}
    lookups(cluster).await.1 - before
}

#[tokio::test(flavor = "multi_thread")]
async fn caches_are_shared_by_those_who_may_know_of_each_other() {
    let pair = tiny::pair(Kind::Identity, 23);
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.json");
    std::fs::write(&keys, r#"{"clients": [{"name": "a", "keys": ["a"]}, {"name": "b", "keys": ["b"]}]}"#).unwrap();
    let keys = keys.display().to_string();
    let apart = Builder::new(&pair.dir).router_flags(&["--keys", &keys]).start().await;
    assert_eq!(found(&apart, "a", "").await, 0);
    assert_eq!(found(&apart, "a", "").await, 96);
    assert_eq!(found(&apart, "b", "").await, 0, "it cannot tell what the other one has sent");
    assert_eq!(found(&apart, "b", "").await, 96);
    assert_eq!(found(&apart, "a", "one of its users").await, 0);
    assert_eq!(found(&apart, "a", "one of its users").await, 96);
    let shared = Builder::new(&pair.dir).router_flags(&["--keys", &keys, "--prefix-sharing", "all"]).start().await;
    assert_eq!(found(&shared, "a", "").await, 0);
    assert_eq!(found(&shared, "b", "").await, 96);
    assert_eq!(found(&shared, "b", "apart").await, 0);
}
