//! Discovery by way of a real etcd: what is registered is seen, what died is given up, and no node that answers is lost,
//! whether etcd is silent, forgets everything, compacts its history, or has values that are no nodes. What no peer could
//! reach is refused before it is registered.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Parser;
use overfill_cluster::{Discovery, EtcdSecurity, EtcdSettings, Snapshot};
use overfill_lifecycle::Drain;
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_tests::cluster::request;
use overfill_tests::process_cluster::{PATIENCE, ProcessCluster};
use overfill_tests::processes::{Etcd, Process, binary, eventually, free_port};
use overfill_tests::tiny::{self, Kind};
use overfill_types::{Fingerprint, NodeId, NodeInfo, Role, SamplingParams, ServedPair};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

fn settings(etcd: &Etcd, cluster: &str) -> EtcdSettings {
    EtcdSettings {
        endpoints: vec![etcd.address.parse().unwrap()],
        cluster: cluster.into(),
        lease_ttl: Duration::from_secs(2),
        security: EtcdSecurity::default(),
    }
}

/// An entry without a node behind it: nobody listens at its address.
fn node(id: &str) -> NodeInfo {
    NodeInfo {
        id: NodeId::new(id),
        role: Role::Decode,
        address: "127.0.0.1:1".parse().unwrap(),
        pairs: vec![ServedPair { model: "m".into(), fingerprint: Fingerprint::new("f") }],
        max_context: 8,
    }
}

fn names(view: &watch::Receiver<Arc<Snapshot>>) -> Vec<String> {
    view.borrow().nodes.iter().map(|n| n.id.to_string()).collect()
}

/// A decode node in this process.
async fn decode_node(pair: &Path, discovery: &Discovery) -> AbortOnDropHandle<()> {
    let flags = ["node", "--pair", &pair.display().to_string(), "--threads", "1", "--kv-memory", "32M"];
    let config = overfill_decode_node::config::Cli::parse_from(flags).config;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let run = overfill_decode_node::run(config, listener, discovery.clone(), Drain::new());
    AbortOnDropHandle::new(tokio::spawn(async move { run.await.unwrap() }))
}

async fn until_seen(view: &watch::Receiver<Arc<Snapshot>>, nodes: usize) {
    eventually(PATIENCE, &format!("{nodes} nodes are seen"), || async { names(view).len() == nodes }).await;
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

/// The leases of all nodes' entries, by key; empty while etcd is away.
async fn leases(etcd: &Etcd, cluster: &str) -> HashMap<String, String> {
    let prefix = format!("/overfill/{cluster}/nodes/");
    // The end of the range is the prefix with a last byte that is one more.
    let range = json!({ "key": STANDARD.encode(&prefix), "range_end": STANDARD.encode(prefix.replace("nodes/", "nodes0")) });
    let sent = reqwest::Client::new().post(format!("http://{}/v3/kv/range", etcd.address)).json(&range).send().await;
    let Ok(answer) = sent else { return HashMap::new() };
    let answer: Value = answer.json().await.unwrap_or_default();
    let entries = answer["kvs"].as_array().cloned().unwrap_or_default();
    entries.iter().map(|kv| (kv["key"].as_str().unwrap().to_owned(), kv["lease"].as_str().unwrap_or_default().to_owned())).collect()
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
    let good = json!(node("c"));
    for (field, value) in [("address", "no address"), ("address", "0.0.0.0:7001"), ("id", "d"), ("role", "prefill")] {
        let mut bad = good.clone();
        bad[field] = value.into();
        put(&etcd, "/overfill/ours/nodes/decode/c", &bad.to_string()).await;
    }
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
        assert_eq!(discovery.connected(), Some(true));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_node_that_dies_is_given_up_after_its_lease() {
    let etcd = Etcd::start();
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    let (alive, dying) = (runtime(), runtime());
    let discovery = alive.block_on(async { Discovery::etcd(settings(&etcd, "c")) });
    let view = alive.block_on(async { discovery.watch() });
    let registration = dying.block_on(async { Discovery::etcd(settings(&etcd, "c")).register(node("a")) });
    alive.block_on(until(&view, &["a"]));
    // Everything of the node stops at once, as in a crash: nothing is withdrawn.
    dying.shutdown_background();
    alive.block_on(until(&view, &[]));
    drop(registration);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_somebody_deletes_is_registered_again() {
    let etcd = Etcd::start();
    let discovery = Discovery::etcd(settings(&etcd, "c"));
    let view = discovery.watch();
    let _registration = discovery.register(node("a"));
    until(&view, &["a"]).await;
    call(&etcd, "kv/deleterange", &json!({ "key": STANDARD.encode("/overfill/c/nodes/decode/a") })).await;
    until(&view, &[]).await;
    until(&view, &["a"]).await;
}

/// What may befall etcd, and how it goes on.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Stopped for so long that all leases end, and continued.
    Silent,
    /// Started again without its data.
    Wiped,
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_refused_while_etcd_is_silent_or_forgets() {
    let pair = tiny::pair(Kind::Identity, 5);
    for fault in [Fault::Silent, Fault::Wiped] {
        let mut cluster = ProcessCluster::start(&pair.dir, 2, 2);
        cluster.until_ready().await;
        eventually(PATIENCE, "all nodes are registered", || async { leases(&cluster.etcd, "test").await.len() == 4 }).await;
        let before = leases(&cluster.etcd, "test").await;
        let expected = cluster.answer(&tiny::prompt(20, 1), 5).await.unwrap();
        let mut fewest = usize::MAX;
        let (view, _discovery) = {
            let discovery = cluster.discovery();
            (discovery.watch(), discovery)
        };
        until_seen(&view, 4).await;
        let mut answered = async |cluster: &ProcessCluster| {
            let answer = cluster.answer(&tiny::prompt(20, 1), 5).await;
            assert_eq!(answer.unwrap_or_else(|e| panic!("{fault:?}: {e}")), expected);
            fewest = fewest.min(names(&view).len());
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        match fault {
            Fault::Silent => {
                cluster.etcd.process().signal("STOP");
                let over = Instant::now() + Duration::from_secs(8);
                while Instant::now() < over {
                    answered(&cluster).await;
                }
                cluster.etcd.process().signal("CONT");
            }
            Fault::Wiped => {
                cluster.etcd.wipe();
                cluster.etcd.resume();
            }
        }
        // Until each has registered again, under another lease, and the old ones have long ended.
        let limit = Instant::now() + PATIENCE;
        loop {
            answered(&cluster).await;
            let after = leases(&cluster.etcd, "test").await;
            if after.len() == 4 && after.iter().all(|(key, lease)| before.get(key).is_some_and(|old| old != lease)) {
                break;
            }
            assert!(Instant::now() < limit, "{fault:?}: before {before:?}, after {after:?}");
        }
        let over = Instant::now() + Duration::from_secs(3);
        while Instant::now() < over {
            answered(&cluster).await;
        }
        assert_eq!(fewest, 4, "{fault:?}: all nodes were up all the time");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_goes_though_etcd_cannot_tell() {
    type Befall = fn(&mut Etcd);
    let faults: [(&str, Befall, Befall); 3] = [
        ("silent", |etcd| etcd.process().signal("STOP"), |etcd| etcd.process().signal("CONT")),
        ("stopped", Etcd::stop, Etcd::resume),
        (
            "wiped",
            |etcd| {
                etcd.wipe();
                etcd.resume();
            },
            |_| {},
        ),
    ];
    let pair = tiny::pair(Kind::Identity, 5);
    for (name, befall, undo) in faults {
        let mut cluster = ProcessCluster::start(&pair.dir, 1, 2);
        let discovery = cluster.discovery();
        let view = discovery.watch();
        until_seen(&view, 3).await;
        cluster.until_ready().await;
        befall(&mut cluster.etcd);
        cluster.decode.remove(0).kill();
        eventually(PATIENCE, &format!("etcd {name}: the dead node is given up"), || async { names(&view).len() == 2 }).await;
        cluster.answer(&tiny::prompt(20, 1), 5).await.unwrap();
        undo(&mut cluster.etcd);
        eventually(PATIENCE, &format!("etcd {name}: those that live are listed again"), || async {
            assert_eq!(names(&view).len(), 2, "etcd {name}: neither does the dead one come back nor does another go");
            let listed = leases(&cluster.etcd, "test").await;
            let entry = |node: &NodeInfo| STANDARD.encode(format!("/overfill/test/nodes/{}/{}", node.role, node.id));
            listed.len() == 2 && view.borrow().nodes.iter().all(|node| listed.contains_key(&entry(node)))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_drains_is_left_out_while_it_finishes() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = ProcessCluster::start(&pair.dir, 1, 1);
    cluster.until_ready().await;
    let discovery = cluster.discovery();
    let view = discovery.watch();
    until_seen(&view, 2).await;
    let mut request = request(&tiny::prompt(100, 1), &SamplingParams::greedy(), 3900);
    request.ignore_eos = true;
    let mut client = InferenceClient::connect(cluster.grpc.clone()).await.unwrap();
    let mut events = client.generate(request).await.unwrap().into_inner();
    for _ in 0..10 {
        events.message().await.unwrap().unwrap();
    }
    cluster.decode[0].signal("TERM");
    until_seen(&view, 1).await;
    assert!(events.message().await.unwrap().is_some(), "it is left out before it has finished");
    while events.message().await.unwrap().is_some() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compacted_history_is_listed_anew() {
    let mut etcd = Etcd::start();
    let discovery = Discovery::etcd(settings(&etcd, "c"));
    let view = discovery.watch();
    let pair = tiny::pair(Kind::Identity, 5);
    let first = decode_node(&pair.dir, &discovery).await;
    until_seen(&view, 1).await;
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
    let second = decode_node(&pair.dir, &discovery).await;
    until_seen(&view, 2).await;
    drop((first, second));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_listens_everywhere_registers_where_it_is_reached_or_says_what_to_write() {
    let etcd = Etcd::start();
    let discovery = Discovery::etcd(settings(&etcd, "default"));
    let view = discovery.watch();
    let pair = tiny::pair(Kind::Identity, 5);
    let listen = format!("0.0.0.0:{}", free_port());
    let flags = ["--pair", &pair.dir.display().to_string(), "--listen", &listen, "--etcd", &etcd.address, "--threads", "1"];
    let stderr = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new(binary("decode-node"));
    command.args(flags).stdout(Stdio::null()).stderr(stderr.reopen().unwrap());
    let mut node = Process::start(command, "decode-node");
    let said = || std::fs::read_to_string(stderr.path()).unwrap();
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < PATIENCE, "{}", said());
        if let Some(code) = node.ended() {
            // This machine has several addresses, or none but loopback.
            assert_ne!(code, Some(0));
            assert!(said().contains("--advertise HOST:PORT"), "{}", said());
            break;
        }
        let address = view.borrow().nodes.first().map(|node| node.address.to_string());
        if let Some(address) = address {
            assert!(!address.starts_with("0.0.0.0"), "{address}");
            tokio::net::TcpStream::connect(&address).await.expect("peers reach it where it says");
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn an_address_that_nobody_could_reach_is_refused_at_the_start() {
    let malformed = ["http://10.0.0.5:7001", "10.0.0.5", "10.0.0.5:0", "0.0.0.0:7001", "[::]:7001", ":7001", "a b:7001", "fd00::5:7001"];
    for (name, flag) in [
        ("prefill-node", "--advertise"),
        ("decode-node", "--advertise"),
        ("router", "--prefill-nodes"),
        ("router", "--decode-nodes"),
        ("router", "--etcd"),
    ] {
        for address in malformed {
            // etcd's own tools write its members as URLs.
            if flag == "--etcd" && address.starts_with("http://") {
                continue;
            }
            let ended = Command::new(binary(name)).args(["--pair", "/nowhere", flag, address]).output().unwrap();
            let said = String::from_utf8_lossy(&ended.stderr);
            assert!(!ended.status.success(), "{name} {flag} {address}");
            assert!(said.contains("HOST:PORT") && said.contains(address), "{name} {flag} {address}: {said}");
        }
    }
}
