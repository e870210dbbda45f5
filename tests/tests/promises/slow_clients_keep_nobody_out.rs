//! Clients that begin something and then say nothing, or say it slowly, keep nobody out, however many they are; and who sends to a
//! router that leaves is served until it can know.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use overfill_proto::v1::inference_client::InferenceClient;
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::process_cluster::ProcessCluster;
use overfill_tests::processes::eventually;
use overfill_tests::tiny::{self, Kind};
use overfill_types::SamplingParams;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn address(cluster: &Cluster) -> String {
    cluster.http.trim_start_matches("http://").to_owned()
}

const HEAD: &str = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 4000000\r\n\r\n";

/// A connection that has said so much.
async fn said(cluster: &Cluster, what: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address(cluster)).await.unwrap();
    stream.write_all(what).await.unwrap();
    stream
}

/// All that comes until the connection ends.
async fn heard(mut stream: TcpStream) -> String {
    let mut all = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut all)).await.expect("the connection is closed");
    String::from_utf8_lossy(&all).into_owned()
}

async fn ask(cluster: &Cluster) {
    let body = json!({ "prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": true });
    let asked = Instant::now();
    let client = reqwest::Client::builder().pool_max_idle_per_host(0).build().unwrap();
    let answer = client.post(format!("{}/v1/completions", cluster.http)).json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    answer.bytes().await.unwrap();
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_without_bodies() {
    let pair = tiny::pair(Kind::Identity, 41);
    let cluster = Builder::new(&pair.dir).router_flags(&["--max-requests", "64", "--read-timeout", "60"]).start().await;
    let mut silent = Vec::new();
    for number in 0..600 {
        silent.push(said(&cluster, HEAD.as_bytes()).await);
        if number % 100 == 99 {
            ask(&cluster).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn more_connections_than_there_may_be() {
    let pair = tiny::pair(Kind::Identity, 42);
    let flags = ["--max-connections", "40", "--read-timeout", "60", "--idle-timeout", "60"];
    let cluster = Builder::new(&pair.dir).router_flags(&flags).start().await;
    let first = said(&cluster, b"").await;
    let mut others = Vec::new();
    for number in 0..200 {
        let what: &[u8] = [&b""[..], b"POST /v1/comp", HEAD.as_bytes()][number % 3];
        others.push(said(&cluster, what).await);
        if number % 50 == 49 {
            ask(&cluster).await;
        }
    }
    assert_eq!(heard(first).await, "", "it has waited longest, and had to go");
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_and_slowness_end() {
    let pair = tiny::pair(Kind::Identity, 43);
    let flags = ["--read-timeout", "1", "--idle-timeout", "2"];
    let cluster = Builder::new(&pair.dir).router_flags(&flags).start().await;
    let begun = Instant::now();
    let nothing = said(&cluster, b"").await;
    let half_a_head = said(&cluster, b"GET /v1/models HTTP/1.1\r\nhost").await;
    let no_body = said(&cluster, HEAD.as_bytes()).await;
    let mut idle = said(&cluster, b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut answer = [0; 15];
    idle.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    assert_eq!(heard(nothing).await, "");
    assert_eq!(heard(half_a_head).await, "");
    let told = heard(no_body).await;
    assert!(told.starts_with("HTTP/1.1 408"), "{told}");
    heard(idle).await;
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_share_their_memory() {
    let pair = tiny::pair(Kind::Identity, 44);
    let flags = ["--read-memory", "2M", "--read-timeout", "60"];
    let cluster = Builder::new(&pair.dir).router_flags(&flags).start().await;
    let begun = [HEAD.as_bytes(), &vec![b' '; 700_000]].concat();
    let mut slow = Vec::new();
    for _ in 0..8 {
        let stream = said(&cluster, &begun).await;
        slow.push(stream);
        ask(&cluster).await;
    }
    let first = heard(slow.remove(0)).await;
    assert!(first.starts_with("HTTP/1.1 503"), "the oldest goes: {first}");
}

/// What hyper's client says of a call that it had not sent yet when its connection was told to end, once a connection. Clients in C
/// and Go send it again by themselves.
fn never_sent(status: &tonic::Status) -> bool {
    let status = format!("{status:?}");
    status.contains("Canceled, \"connection closed\"") || status.contains("GoAway(b\"\", NO_ERROR, Remote)")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_leaves_serves_who_does_not_know_it_yet() {
    let pair = tiny::pair(Kind::Identity, 45);
    let mut cluster = ProcessCluster::start(&pair.dir, 1, 1);
    cluster.until_ready().await;
    let left = Arc::new(AtomicBool::new(false));
    let by_http = (0..6).map(|_| {
        let (left, url) = (left.clone(), format!("{}/v1/completions", cluster.http));
        tokio::spawn(async move {
            let (client, mut answers) = (reqwest::Client::new(), 0);
            while !left.load(Ordering::Relaxed) {
                let body = json!({ "prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": true });
                let answer = client.post(&url).json(&body).send().await.unwrap();
                assert_eq!(answer.status(), 200);
                answer.bytes().await.unwrap();
                answers += 1;
            }
            answers
        })
    });
    let by_grpc = (0..6).map(|i| {
        let (left, grpc) = (left.clone(), cluster.grpc.clone());
        tokio::spawn(async move {
            let (client, mut answers, mut told) = (InferenceClient::connect(grpc).await.unwrap(), 0, false);
            while !left.load(Ordering::Relaxed) {
                match tokens(client.clone(), request(&tiny::prompt(9, i), &SamplingParams::greedy(), 3)).await {
                    Ok(_) => answers += 1,
                    Err(status) => {
                        assert!(never_sent(&status) && !told, "{status:?}");
                        told = true;
                    }
                }
            }
            answers
        })
    });
    let asking: Vec<_> = by_http.chain(by_grpc).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    cluster.router.signal("TERM");
    let asked_to_leave = Instant::now();
    eventually(Duration::from_secs(1), "the router is unready at once", || async { !cluster.ready().await }).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    left.store(true, Ordering::Relaxed);
    for asking in asking {
        assert!(asking.await.expect("every request is served") > 0);
    }
    assert_eq!(cluster.router.wait(Duration::from_secs(20)), Some(0));
    assert!(asked_to_leave.elapsed() >= Duration::from_secs(5), "it has waited for those who did not know");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_a_router_at_once() {
    let pair = tiny::pair(Kind::Identity, 46);
    let mut cluster = ProcessCluster::start(&pair.dir, 1, 1);
    cluster.until_ready().await;
    cluster.router.signal("TERM");
    eventually(Duration::from_secs(2), "the router is unready at once", || async { !cluster.ready().await }).await;
    cluster.router.signal("TERM");
    assert_eq!(cluster.router.wait(Duration::from_secs(2)), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_has_so_many_requests_at_a_time() {
    let pair = tiny::pair(Kind::Identity, 44);
    let cluster = Builder::new(&pair.dir).router_flags(&["--max-streams", "3"]).start().await;
    let long = |seed| {
        let mut asked = request(&tiny::prompt(50, seed), &SamplingParams::greedy(), 1500);
        asked.ignore_eos = true;
        asked
    };
    let (shared, other) = (cluster.client().await, cluster.client().await);
    let mut answers = Vec::new();
    for seed in 0..3 {
        answers.push(shared.clone().generate(long(seed)).await.unwrap().into_inner());
    }
    let fourth = shared.clone();
    let fourth = tokio::spawn(async move { tokens(fourth, request(&[1, 2, 3], &SamplingParams::greedy(), 1)).await });
    assert_eq!(
        tokens(other, request(&[1, 2, 3], &SamplingParams::greedy(), 1)).await.unwrap().len(),
        1,
        "others have connections of their own"
    );
    assert!(!fourth.is_finished(), "it waits within its client until one of the three is through");
    answers.pop();
    assert_eq!(fourth.await.unwrap().unwrap().len(), 1);
}
