//! Where nodes have no room requests wait their turn, those that would wait too long are refused at once, and clients share by
//! their keys: with the right codes at both doors.

use std::time::{Duration, Instant};

use overfill_proto::v1::{DecodeRequest, StopTokens};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::nodes;
use overfill_tests::processes::{binary, eventually};
use overfill_tests::tiny::{self, Kind};
use overfill_types::{Role, SamplingParams};
use serde_json::{Value, json};
use tonic::Code;
use tonic::metadata::MetadataValue;

const SECOND: Duration = Duration::from_secs(1);

async fn grpc(cluster: &Cluster, seed: u64, new: u32) -> Result<Vec<u32>, tonic::Status> {
    let mut asked = request(&tiny::prompt(40, seed), &SamplingParams::greedy(), new);
    asked.ignore_eos = true;
    tokens(cluster.client().await, asked).await
}

async fn http(cluster: &Cluster, key: Option<&str>, body: Value) -> (u16, Option<String>, Value) {
    let mut sent = reqwest::Client::new().post(format!("{}/v1/completions", cluster.http)).body(body.to_string());
    if let Some(key) = key {
        sent = sent.bearer_auth(key);
    }
    let answer = sent.send().await.unwrap();
    let retry = answer.headers().get("retry-after").map(|v| v.to_str().unwrap().to_owned());
    (answer.status().as_u16(), retry, answer.json().await.unwrap())
}

fn body(new: u32) -> Value {
    json!({ "prompt": [1, 2, 3], "max_tokens": new, "temperature": 0, "ignore_eos": true })
}

#[tokio::test(flavor = "multi_thread")]
async fn who_finds_no_room_waits() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = std::sync::Arc::new(
        Builder::new(&pair.dir).decode_flags(&["--max-sequences", "2"]).router_flags(&["--queue-timeout", "60"]).start().await,
    );
    // The nodes have said what they hold by then.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let expected = grpc(&cluster, 1, 60).await.unwrap();
    let asked: Vec<_> = (0..30)
        .map(|_| {
            let cluster = cluster.clone();
            tokio::spawn(async move { grpc(&cluster, 1, 60).await })
        })
        .collect();
    for answer in asked {
        assert_eq!(answer.await.unwrap().unwrap(), expected);
    }
    cluster.nothing_is_held(SECOND).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_would_wait_too_long_is_refused() {
    let pair = tiny::pair(Kind::Identity, 31);
    let flags = ["--queue-timeout", "0.3", "--max-waiting", "4", "--request-timeout", "20"];
    let cluster = std::sync::Arc::new(Builder::new(&pair.dir).decode_flags(&["--max-sequences", "1"]).router_flags(&flags).start().await);
    // Its only place is held by someone else, as by another router.
    let node = cluster.nodes(Role::Decode).remove(0);
    let held = DecodeRequest {
        fingerprint: node.pairs[0].fingerprint.to_string(),
        request_id: "another's".into(),
        epoch: 1,
        prompt: tiny::prompt(40, 1),
        stop: Some(StopTokens { max_tokens: 10, ..Default::default() }),
        ..Default::default()
    };
    let held = nodes::decode(&node, held).await.unwrap();
    // The router is told of it by then.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    let refused: Vec<_> = (0..20)
        .map(|i| {
            let cluster = cluster.clone();
            tokio::spawn(async move {
                if i % 2 == 0 {
                    let error = grpc(&cluster, i, 20).await.unwrap_err();
                    assert!(error.code() == Code::Unavailable && error.message().contains("full"), "{error}");
                    assert!(error.metadata().contains_key("grpc-retry-pushback-ms"), "{error:?}");
                } else {
                    let (status, retry, answer) = http(&cluster, None, body(20)).await;
                    assert!(status == 503 && retry.is_some(), "{status}: {answer}");
                }
            })
        })
        .collect();
    for refused in refused {
        refused.await.unwrap();
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(held);
    cluster.nothing_is_held(SECOND).await;
    assert_eq!(grpc(&cluster, 1, 20).await.unwrap().len(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_limits() {
    let pair = tiny::pair(Kind::Identity, 31);
    let keys = json!({ "clients": [
        { "name": "slow", "keys": ["sk-slow"], "requests_per_second": 0.01, "burst_seconds": 200 },
        { "name": "free", "keys": ["sk-free"], "weight": 2 },
    ] });
    let file = pair.dir.join("keys.json");
    std::fs::write(&file, keys.to_string()).unwrap();
    let cluster = Builder::new(&pair.dir).router_flags(&["--keys", file.to_str().unwrap()]).start().await;
    for (key, word) in [(None, "API key"), (Some("sk-other"), "Incorrect")] {
        let (status, _, answer) = http(&cluster, key, body(5)).await;
        assert_eq!((status, &answer["error"]["code"]), (401, &"invalid_api_key".into()), "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(word), "{answer}");
    }
    assert_eq!(grpc(&cluster, 1, 5).await.unwrap_err().code(), Code::Unauthenticated);
    let with_key = async |key: &str| {
        let mut asked = request(&tiny::prompt(9, 1), &SamplingParams::greedy(), 5);
        asked.priority = -3;
        let mut asked = tonic::Request::new(asked);
        asked.metadata_mut().insert("authorization", MetadataValue::try_from(format!("Bearer {key}")).unwrap());
        cluster.client().await.generate(asked).await.map(drop)
    };
    with_key("sk-slow").await.unwrap();
    assert_eq!(http(&cluster, Some("sk-slow"), body(5)).await.0, 200);
    let (status, retry, answer) = http(&cluster, Some("sk-slow"), body(5)).await;
    assert_eq!((status, &answer["error"]["code"]), (429, &"rate_limit_exceeded".into()), "{answer}");
    assert!(retry.unwrap().parse::<u64>().unwrap() > 10);
    let error = with_key("sk-slow").await.unwrap_err();
    assert!(error.code() == Code::ResourceExhausted && error.metadata().contains_key("grpc-retry-pushback-ms"), "{error:?}");
    for _ in 0..5 {
        assert_eq!(http(&cluster, Some("sk-free"), body(5)).await.0, 200);
        with_key("sk-free").await.unwrap();
    }
    let live = reqwest::get(format!("{}/live", cluster.http)).await.unwrap();
    assert!(live.status().is_success(), "probes need no key");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quick_client_finds_its_place_free() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).router_flags(&["--max-requests", "1"]).start().await;
    for i in 0..200 {
        grpc(&cluster, i, 2).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_made_is_taken_without_a_restart_and_one_that_is_taken_out_is_not() {
    let pair = tiny::pair(Kind::Identity, 62);
    let made = |name: &str| {
        let output = std::process::Command::new(binary("overfill")).args(["key", "--name", name]).output().unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        let after = |what: &str| told.lines().find_map(|line| line.split_once(what)).unwrap().1.to_owned();
        let (key, entry): (String, Value) = (after("kept nowhere: "), serde_json::from_str(&after("file of keys: ")).unwrap());
        assert!(!entry.to_string().contains(&key) && key.len() > 40, "the file of keys does not hold the key: {told}");
        (key, entry)
    };
    let ((first, of_first), (second, of_second)) = (made("first"), made("second"));
    assert_ne!(first, second);
    let file = pair.dir.join("made.json");
    let write = |clients: &[&Value]| std::fs::write(&file, json!({ "clients": clients }).to_string()).unwrap();
    write(&[&of_first]);
    let cluster = Builder::new(&pair.dir).router_flags(&["--keys", file.to_str().unwrap()]).start().await;
    let status = async |key: &str| {
        let url = format!("{}/v1/models", cluster.http);
        reqwest::Client::new().get(url).bearer_auth(key).send().await.unwrap().status().as_u16()
    };
    assert_eq!((status(&first).await, status(&second).await), (200, 401));
    write(&[&of_second]);
    eventually(Duration::from_secs(10), "the file is read again", || async { status(&second).await == 200 }).await;
    assert_eq!(status(&first).await, 401);
}
