//! Real processes and a real etcd: they start in any order, survive etcd's absence and each other's death, and stop cleanly.

use std::time::{Duration, Instant};

use overfill_proto::v1::inference_client::InferenceClient;
use overfill_tests::cluster::{request, tokens};
use overfill_tests::process_cluster::{PATIENCE, ProcessCluster};
use overfill_tests::processes::{Process, eventually, free_port};
use overfill_tests::tiny::{self, Kind};
use overfill_types::SamplingParams;

#[tokio::test(flavor = "multi_thread")]
async fn etcd_may_go_and_come_back() {
    let pair = tiny::pair(Kind::Identity, 5);
    let mut cluster = ProcessCluster::start(&pair.dir, 2, 2);
    cluster.until_ready().await;
    let prompt = tiny::prompt(50, 1);
    let expected = cluster.answer(&prompt, 20).await.unwrap();

    cluster.etcd.stop();
    for _ in 0..5 {
        assert_eq!(cluster.answer(&prompt, 20).await.unwrap(), expected, "the last view serves");
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    cluster.etcd.resume();
    // A node that comes now is found: leases and watches have recovered.
    cluster.decode.clear();
    eventually(PATIENCE, "dead decode nodes are given up", || async { !cluster.ready().await }).await;
    cluster.decode.push(cluster.node("decode-node"));
    cluster.until_ready().await;
    assert_eq!(cluster.answer(&prompt, 20).await.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_etcd_changes_nothing() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = ProcessCluster::start(&pair.dir, 1, 1);
    cluster.until_ready().await;
    cluster.etcd.process().signal("STOP");
    for _ in 0..5 {
        cluster.answer(&tiny::prompt(20, 1), 5).await.unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    cluster.etcd.process().signal("CONT");
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.until_ready().await;
    cluster.answer(&tiny::prompt(20, 1), 5).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_costs_no_answer_where_there_is_another() {
    let pair = tiny::pair(Kind::Identity, 5);
    for role in ["prefill", "decode"] {
        let mut cluster = ProcessCluster::start(&pair.dir, 2, 2);
        cluster.until_ready().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut undisturbed = Vec::new();
        for i in 0..12 {
            undisturbed.push(cluster.answer(&tiny::prompt(300, i), 600).await.unwrap());
        }
        let load: Vec<_> = (0..12)
            .map(|i| {
                let grpc = cluster.grpc.clone();
                tokio::spawn(async move {
                    let client = InferenceClient::connect(grpc).await.unwrap();
                    let mut request = request(&tiny::prompt(300, i), &SamplingParams::greedy(), 600);
                    request.ignore_eos = true;
                    tokens(client, request).await
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let nodes = if role == "prefill" { &mut cluster.prefill } else { &mut cluster.decode };
        nodes.remove(0).kill();
        for (request, undisturbed) in load.into_iter().zip(&undisturbed) {
            let answer = tokio::time::timeout(Duration::from_secs(60), request).await.expect("no request hangs").unwrap();
            assert_eq!(&answer.unwrap(), undisturbed, "one of two {role} nodes was killed");
        }
        assert_eq!(cluster.answer(&tiny::prompt(300, 0), 600).await.unwrap(), undisturbed[0], "the nodes that live go on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_node_that_dies_ends_its_answers_with_one_clear_error() {
    let pair = tiny::pair(Kind::Identity, 5);
    let mut cluster = ProcessCluster::start(&pair.dir, 1, 1);
    cluster.until_ready().await;
    let mut request = request(&tiny::prompt(100, 1), &SamplingParams::greedy(), 3000);
    request.ignore_eos = true;
    let client = InferenceClient::connect(cluster.grpc.clone()).await.unwrap();
    let mut events = client.clone().generate(request).await.unwrap().into_inner();
    for _ in 0..10 {
        events.message().await.unwrap().unwrap();
    }
    cluster.decode.remove(0).kill();
    let killed = Instant::now();
    let error = loop {
        match events.message().await {
            Ok(event) => assert!(event.is_some(), "the answer is not whole"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), tonic::Code::Unavailable, "{error}");
    assert!(error.message().contains("decode node"), "{error}");
    assert!(killed.elapsed() < Duration::from_secs(3), "told at once, not after {:?}", killed.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_may_start_before_its_peers_and_stops_when_told() {
    let pair = tiny::pair(Kind::Identity, 5);
    let mut cluster = ProcessCluster::start(&pair.dir, 0, 0);
    eventually(PATIENCE, "the router listens", || async { reqwest::get(format!("{}/live", cluster.http)).await.is_ok() }).await;
    let response = reqwest::get(format!("{}/health", cluster.http)).await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.text().await.unwrap().contains("no prefill node and no decode node"));
    let body = serde_json::json!({ "model": "tiny", "prompt": "x" });
    let refused = reqwest::Client::new().post(format!("{}/v1/completions", cluster.http)).json(&body).send().await.unwrap();
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));

    cluster.prefill.push(cluster.node("prefill-node"));
    cluster.decode.push(cluster.node("decode-node"));
    cluster.until_ready().await;

    // What runs is finished, then every process ends with 0.
    let (grpc, prompt) = (cluster.grpc.clone(), tiny::prompt(100, 1));
    let running = tokio::spawn(async move {
        let client = InferenceClient::connect(grpc).await.unwrap();
        let mut request = request(&prompt, &SamplingParams::greedy(), 2000);
        request.ignore_eos = true;
        tokens(client, request).await
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut all: Vec<Process> = cluster.prefill.drain(..).chain(cluster.decode.drain(..)).chain([cluster.router]).collect();
    all.iter().for_each(|p| p.signal("TERM"));
    assert_eq!(running.await.unwrap().unwrap().len(), 2000);
    for process in &mut all {
        assert_eq!(process.wait(PATIENCE), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fixed_list_of_nodes_needs_no_etcd() {
    let pair = tiny::pair(Kind::Identity, 5);
    let dir = pair.dir.display().to_string();
    let address = || format!("127.0.0.1:{}", free_port());
    let (prefill, decode, http, grpc) = (address(), address(), address(), address());
    let router = Process::ours(
        "router",
        &["--pair", &dir, "--http", &http, "--grpc", &grpc, "--prefill-nodes", &prefill, "--decode-nodes", &decode],
    );
    let node =
        |name: &str, listen: &str| Process::ours(name, &["--pair", &dir, "--listen", listen, "--threads", "1", "--kv-memory", "32M"]);
    let ready = || async { reqwest::get(format!("http://{http}/ready")).await.is_ok_and(|r| r.status().is_success()) };
    let first = node("prefill-node", &prefill);
    let second = node("decode-node", &decode);
    eventually(PATIENCE, "both nodes are found", ready).await;
    let client = InferenceClient::connect(format!("http://{grpc}")).await.unwrap();
    assert_eq!(tokens(client, request(&[1, 2, 3], &SamplingParams::greedy(), 1)).await.unwrap().len(), 1);
    second.kill();
    eventually(PATIENCE, "a dead node is no longer listed", || async { !ready().await }).await;
    drop((first, router));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_answers_those_who_run_it() {
    let pair = tiny::pair(Kind::Identity, 5);
    for name in ["prefill-node", "decode-node"] {
        let admin = format!("127.0.0.1:{}", free_port());
        let flags = ["--pair", pair.dir.to_str().unwrap(), "--listen", "127.0.0.1:0", "--threads", "1", "--kv-memory", "32M"];
        let mut node = Process::ours(name, &[&flags[..], &["--admin", &admin, "--drain-delay", "1"]].concat());
        let get = |path: &'static str| {
            let url = format!("http://{admin}{path}");
            async move {
                let answer = reqwest::get(url).await.ok()?;
                Some((answer.status().as_u16(), answer.text().await.ok()?))
            }
        };
        let status = |path| async move { get(path).await.map(|(status, _)| status) };
        eventually(PATIENCE, "the node is ready", || async { status("/ready").await == Some(200) }).await;
        assert_eq!(status("/live").await, Some(200));
        let (metrics, profile) = tokio::join!(get("/metrics"), get("/profile?seconds=1"));
        assert!(metrics.unwrap().1.contains("vllm:num_requests_running"));
        let (taken, stacks) = profile.unwrap();
        assert_eq!(taken, 200, "{stacks}");
        assert!(stacks.lines().all(|line| line.is_empty() || line.rsplit_once(' ').unwrap().1.parse::<u64>().is_ok()), "{stacks}");
        assert_eq!((status("/profile?seconds=3600").await, status("/elsewhere").await), (Some(400), Some(404)));
        node.signal("TERM");
        eventually(PATIENCE, "it says that it leaves", || async { status("/ready").await == Some(503) }).await;
        assert_eq!(node.wait(PATIENCE), Some(0));
    }
}
