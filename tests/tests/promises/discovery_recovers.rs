//! Discovery by way of a real etcd: what is registered is seen, what died is given up after its lease, and neither a wiped
//! etcd nor a compacted history nor a value that is no node confuses anyone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use overfill_cluster::{Discovery, EtcdSettings, Snapshot};
use overfill_tests::processes::{Etcd, eventually};
use overfill_types::{Fingerprint, NodeId, NodeInfo, Role, ServedPair};
use serde_json::{Value, json};
use tokio::sync::watch;

const PATIENCE: Duration = Duration::from_secs(15);

fn settings(etcd: &Etcd, cluster: &str) -> EtcdSettings {
    EtcdSettings { endpoints: vec![etcd.address.clone()], cluster: cluster.into(), lease_ttl: Duration::from_secs(2) }
}

fn node(id: &str) -> NodeInfo {
    NodeInfo {
        id: NodeId::new(id),
        role: Role::Decode,
        address: "127.0.0.1:1".into(),
        pairs: vec![ServedPair { model: "m".into(), fingerprint: Fingerprint::new("f") }],
        max_context: 8,
    }
}

fn names(view: &watch::Receiver<Arc<Snapshot>>) -> Vec<String> {
    view.borrow().nodes.iter().map(|n| n.id.to_string()).collect()
}

async fn until(view: &watch::Receiver<Arc<Snapshot>>, expected: &[&str]) {
    eventually(PATIENCE, &format!("the view is {expected:?}"), || async { names(view) == expected }).await;
}

/// A call of etcd's own HTTP gateway.
async fn call(etcd: &Etcd, path: &str, body: &Value) -> Value {
    let sent = reqwest::Client::new().post(format!("http://{}/v3/{path}", etcd.address)).json(body).send().await.unwrap();
    assert!(sent.status().is_success(), "{path}: {}", sent.text().await.unwrap());
    sent.json().await.unwrap()
}

/// Puts a value; gives the revision.
async fn put(etcd: &Etcd, key: &str, value: &str) -> String {
    let answer = call(etcd, "kv/put", &json!({ "key": STANDARD.encode(key), "value": STANDARD.encode(value) })).await;
    answer["header"]["revision"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_come_and_go() {
    let etcd = Etcd::start();
    let (ours, theirs) = (Discovery::etcd(settings(&etcd, "ours")), Discovery::etcd(settings(&etcd, "theirs")));
    let view = ours.watch();
    let first = Discovery::etcd(settings(&etcd, "ours")).register(node("a"));
    let second = ours.register(node("b"));
    until(&view, &["a", "b"]).await;
    put(&etcd, "/overfill/ours/nodes/decode/garbage", "{ no node").await;
    first.withdraw().await;
    until(&view, &["b"]).await;
    assert!(names(&theirs.watch()).is_empty(), "another cluster sees nothing of it");
    drop(second);
    until(&view, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_cluster_stays_connected() {
    let etcd = Etcd::start();
    let discovery = Discovery::etcd(settings(&etcd, "idle"));
    let view = discovery.watch();
    let _node = discovery.register(node("a"));
    until(&view, &["a"]).await;
    // etcd breaks off at the third ping that comes too early.
    let over = Instant::now() + Duration::from_secs(20);
    while Instant::now() < over {
        assert_eq!(discovery.etcd_connected(), Some(true));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_node_that_dies_is_given_up_after_its_lease() {
    let etcd = Etcd::start();
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    let (alive, dying) = (runtime(), runtime());
    let discovery = alive.block_on(async { Discovery::etcd(settings(&etcd, "c")) });
    let view = discovery.watch();
    let registration = dying.block_on(async { Discovery::etcd(settings(&etcd, "c")).register(node("a")) });
    alive.block_on(until(&view, &["a"]));
    // Everything of the node stops at once, as in a crash: nothing is withdrawn.
    dying.shutdown_background();
    alive.block_on(until(&view, &[]));
    drop(registration);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_etcd_is_filled_again_and_nobody_is_dropped_meanwhile() {
    let mut etcd = Etcd::start();
    let discovery = Discovery::etcd(settings(&etcd, "c"));
    let view = discovery.watch();
    let registration = discovery.register(node("a"));
    until(&view, &["a"]).await;
    etcd.wipe();
    etcd.resume();
    let mut smallest = usize::MAX;
    eventually(PATIENCE, "the node has registered again", || {
        smallest = smallest.min(names(&view).len());
        let etcd = &etcd;
        async move {
            let key = STANDARD.encode("/overfill/c/nodes/decode/a");
            let sent =
                reqwest::Client::new().post(format!("http://{}/v3/kv/range", etcd.address)).json(&json!({ "key": key })).send().await;
            match sent {
                Ok(answer) => answer.json::<Value>().await.is_ok_and(|v| v["count"] == "1"),
                Err(_) => false,
            }
        }
    })
    .await;
    assert_eq!(smallest, 1, "the node stayed in the view all the time");
    registration.withdraw().await;
    until(&view, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compacted_history_is_listed_anew() {
    let mut etcd = Etcd::start();
    let discovery = Discovery::etcd(settings(&etcd, "c"));
    let view = discovery.watch();
    let first = discovery.register(node("a"));
    until(&view, &["a"]).await;
    // The watch is away while history goes on and is compacted: what it would have to continue from is gone.
    etcd.stop();
    etcd.resume();
    eventually(PATIENCE, "etcd is back", || async {
        reqwest::get(format!("http://{}/health", etcd.address)).await.is_ok_and(|r| r.status().is_success())
    })
    .await;
    let mut revision = String::new();
    for i in 0..20 {
        revision = put(&etcd, "/elsewhere", &i.to_string()).await;
    }
    call(&etcd, "kv/compaction", &json!({ "revision": revision, "physical": true })).await;
    let second = discovery.register(node("b"));
    until(&view, &["a", "b"]).await;
    drop((first, second));
}
