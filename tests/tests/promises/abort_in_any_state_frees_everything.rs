//! A client that goes away, whatever its request is doing: within a second no node holds a sequence or a block.

use std::time::Duration;

use overfill_proto::v1::{DecodeRequest, StopTokens, decode_event, generate_event};
use overfill_tests::cluster::{Builder, request};
use overfill_tests::nodes;
use overfill_tests::tiny::{self, Kind};
use overfill_types::{Code, Retry, Role, SamplingParams};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn queued_reserved_computing_and_pushing() {
    let pair = tiny::pair(Kind::Identity, 3);
    // One token a step: the prompts are in every state for a long time, and leave one by one.
    let cluster = Builder::new(&pair.dir)
        .prefill_flags(&["--chunk-tokens", "1", "--queue-seconds", "0"])
        .decode_flags(&["--kv-memory", "128M"])
        .start()
        .await;
    let client = cluster.client().await;
    for wait in [0, 1, 5, 20, 100, 300] {
        let tasks: Vec<_> = (0..32)
            .map(|i| {
                // All of them different, so that each is read to its end.
                let prompt = tiny::prompt(3000, wait * 100 + i);
                let (mut client, request) = (client.clone(), request(&prompt, &SamplingParams::greedy(), 50));
                tokio::spawn(async move {
                    let mut events = client.generate(request).await.unwrap().into_inner();
                    while events.message().await.unwrap().is_some() {}
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(wait)).await;
        if wait >= 100 {
            let statuses = cluster.statuses().await;
            assert!(statuses.iter().all(|s| s.sequences > 8), "many are under way: {statuses:?}");
            assert!(statuses.iter().any(|s| s.running > 0), "one is read: {statuses:?}");
        }
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
        let mut aborted = 0;
        for task in tasks {
            match task.await {
                // The first ones may be through by then.
                Ok(()) => {}
                Err(error) => {
                    assert!(error.is_cancelled(), "{error}");
                    aborted += 1;
                }
            }
        }
        assert!(aborted > 8, "{aborted} were under way after {wait} ms");
        cluster.nothing_is_held(SECOND).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_the_full_models_blocks() {
    let pair = tiny::pair(Kind::Identity, 3);
    // 768 bytes a token: room for one prompt, all others wait behind it.
    let flags = ["--chunk-tokens", "1", "--queue-seconds", "0", "--kv-memory", "3M"];
    let cluster = Builder::new(&pair.dir).prefill_flags(&flags).decode_flags(&["--kv-memory", "128M"]).start().await;
    let client = cluster.client().await;
    let tasks: Vec<_> = (0..20)
        .map(|i| {
            let request = request(&tiny::prompt(3000, i), &SamplingParams::greedy(), 50);
            tokio::spawn(overfill_tests::cluster::tokens(client.clone(), request))
        })
        .collect();
    let prefill = cluster.nodes(Role::Prefill).remove(0);
    overfill_tests::processes::eventually(SECOND * 5, "one runs and many wait", || async {
        let status = overfill_tests::nodes::status(&prefill).await;
        status.sequences > 10 && status.running == 1
    })
    .await;
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    cluster.nothing_is_held(SECOND).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_decoding() {
    let pair = tiny::pair(Kind::Identity, 3);
    let cluster = Builder::new(&pair.dir).start().await;
    let mut request = request(&tiny::prompt(40, 1), &SamplingParams::greedy(), 3000);
    request.ignore_eos = true;
    let mut events = cluster.client().await.generate(request).await.unwrap().into_inner();
    let mut tokens = 0;
    while tokens < 5 {
        if let Some(generate_event::Event::Delta(delta)) = events.message().await.unwrap().unwrap().event {
            tokens += delta.tokens.len();
        }
    }
    drop(events);
    cluster.nothing_is_held(SECOND).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_whose_cache_never_comes_runs_out() {
    let pair = tiny::pair(Kind::Identity, 3);
    let cluster = Builder::new(&pair.dir).decode_flags(&["--reservation-timeout", "1"]).start().await;
    let node = cluster.nodes(Role::Decode).remove(0);
    let request = DecodeRequest {
        fingerprint: node.pairs[0].fingerprint.to_string(),
        request_id: "r".into(),
        epoch: 1,
        prompt: vec![1, 2, 3],
        sampling: None,
        stop: Some(StopTokens { max_tokens: 10, ..Default::default() }),
        ..DecodeRequest::default()
    };
    let mut events = nodes::decode(&node, request).await.unwrap();
    assert!(matches!(events.message().await.unwrap().unwrap().event, Some(decode_event::Event::Reserved(_))));
    assert_eq!(cluster.statuses().await.iter().map(|s| s.blocks_held).sum::<u64>(), 1);
    let error = events.message().await.unwrap_err();
    assert_eq!((error.code, error.retry), (Code::Unavailable, Retry::Elsewhere), "not the client's deadline: {error}");
    cluster.nothing_is_held(SECOND).await;
}
