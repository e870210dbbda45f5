//! Discovery by way of the Kubernetes API: pods come, go, are relabelled and replaced while requests run, and the API server loses
//! events, forgets, falls silent and refuses. No request fails, and none goes to a pod that was taken out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use overfill_proto::v1::inference_client::InferenceClient;
use overfill_tests::cluster::{answer, request};
use overfill_tests::kubernetes::{ApiServer, Mood, Pod};
use overfill_tests::process_cluster::PATIENCE;
use overfill_tests::processes::{Process, eventually, free_port};
use overfill_tests::scrape::Scrape;
use overfill_tests::security;
use overfill_tests::tiny::{self, Kind};
use overfill_types::SamplingParams;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

/// Of `--discover`.
const DISCOVER: [&str; 4] = ["--discover", "kubernetes://", "--cluster", "test"];
/// How long a pod has to be ready before another one may go for it, as the chart has it: `minReadySeconds`, here less.
const MIN_READY: Duration = Duration::from_secs(1);
/// Requests at a time.
const CLIENTS: usize = 8;

/// A router and nodes that an API server knows.
struct Kubernetes {
    api: ApiServer,
    kubeconfig: PathBuf,
    folder: tempfile::TempDir,
    _router: Process,
    http: String,
    grpc: String,
    nodes: BTreeMap<String, Node>,
}

struct Node {
    process: Process,
    role: &'static str,
    address: String,
    admin: String,
}

impl Kubernetes {
    /// With a prefill and so many decode nodes, which the router sees.
    async fn start(pair: &Path, decode: usize) -> Self {
        let mut cluster = Self::router(&[pair]).await;
        cluster.start_node("p", "prefill", pair).await;
        for number in 0..decode {
            cluster.start_node(&format!("d{number}"), "decode", pair).await;
        }
        cluster.until_seen("prefill", 1).await;
        cluster.until_seen("decode", decode).await;
        cluster
    }

    /// A router alone. Its file of weights is not there yet.
    async fn router(pairs: &[&Path]) -> Self {
        let (api, folder) = (ApiServer::start().await, tempfile::tempdir().unwrap());
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig);
        let (http, grpc) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let dirs: Vec<String> = pairs.iter().map(|pair| pair.display().to_string()).collect();
        let (dirs, weights) = (dirs.join(","), folder.path().join("weights.json"));
        std::fs::write(&weights, "{}").unwrap();
        let weights = weights.display().to_string();
        let flags = [&["--pair", &dirs, "--traffic", &weights, "--http", &http, "--grpc", &grpc][..], &DISCOVER].concat();
        let secured = [security::peer_flags(), security::door_flags()].concat();
        let router = start("router", &flags, &secured, &kubeconfig);
        let (http, grpc) = (security::without_tls(&http, false), security::without_tls(&grpc, true));
        let (http, grpc) = (format!("http://{http}"), format!("http://{grpc}"));
        let nodes = BTreeMap::new();
        Self { api, kubeconfig, folder, _router: router, http, grpc, nodes }
    }

    /// What the versions of the model get from now on.
    fn weigh(&self, weights: &str) {
        // As Kubernetes changes a ConfigMap: the file is another one at once.
        let new = self.folder.path().join("new");
        std::fs::write(&new, weights).unwrap();
        std::fs::rename(new, self.folder.path().join("weights.json")).unwrap();
    }

    /// Starts a pod, which is listed from the first moment, and ready when its probe says so.
    async fn start_node(&mut self, name: &str, role: &'static str, pair: &Path) {
        let (address, admin) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        self.api.put(name, role, &address, Pod::NotReady);
        let pair = pair.display().to_string();
        let flags = ["--pair", &pair, "--listen", &address, "--admin", &admin, "--threads", "1", "--kv-memory", "32M"];
        let process = start(&format!("{role}-node"), &[&flags[..], &DISCOVER].concat(), &security::peer_flags(), &self.kubeconfig);
        self.nodes.insert(name.to_owned(), Node { process, role, address, admin });
        let ready = format!("http://{}/ready", self.nodes[name].admin);
        eventually(PATIENCE, "the node is ready", || async { reqwest::get(&ready).await.is_ok_and(|r| r.status().is_success()) }).await;
        self.say(name, Pod::Ready);
    }

    fn say(&self, name: &str, pod: Pod) {
        let node = &self.nodes[name];
        self.api.put(name, node.role, &node.address, pod);
    }

    /// Ends a pod as Kubernetes does: told to all that watch, and to itself; it is gone when its process is.
    async fn end_node(&mut self, name: &str) {
        self.say(name, Pod::Terminating);
        let mut node = self.nodes.remove(name).unwrap();
        node.process.signal("TERM");
        let code = tokio::task::spawn_blocking(move || node.process.wait(PATIENCE)).await.unwrap();
        assert_eq!(code, Some(0), "{name}");
        self.api.remove(name);
    }

    async fn seen(&self, role: &str) -> usize {
        Scrape::of(&format!("{}/metrics", self.http)).await.sum("overfill_nodes", &[("role", role)]) as usize
    }

    async fn until_seen(&self, role: &str, count: usize) {
        let up = || async { reqwest::get(format!("{}/live", self.http)).await.is_ok() };
        eventually(PATIENCE, "the router is up", up).await;
        eventually(PATIENCE, &format!("{count} {role} nodes are seen"), || async { self.seen(role).await == count }).await;
    }

    /// Whether the router says that the API server answers.
    async fn connected(&self) -> bool {
        Scrape::of(&format!("{}/metrics", self.http)).await.sum("overfill_discovery_connected", &[]) == 1.0
    }
}

fn start(name: &str, flags: &[&str], secured: &[String], kubeconfig: &Path) -> Process {
    let secured: Vec<&str> = secured.iter().map(String::as_str).collect();
    Process::with(name, &[flags, &secured].concat(), &[("KUBECONFIG", &kubeconfig.display().to_string())])
}

/// Clients that ask without a pause. Each answer has to be the one that the first of its pair was.
struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicUsize>,
    /// Pairs and decode nodes that wrote, since this was last taken.
    wrote: Arc<Mutex<BTreeSet<(String, String)>>>,
    clients: Vec<AbortOnDropHandle<()>>,
}

impl Load {
    async fn start(cluster: &Kubernetes) -> Self {
        let ask = || {
            let mut ask = request(&tiny::prompt(20, 1), &SamplingParams::greedy(), 8);
            ask.ignore_eos = true;
            ask
        };
        let client = InferenceClient::connect(cluster.grpc.clone()).await.unwrap();
        let expected: Arc<Mutex<BTreeMap<String, Vec<u32>>>> = Arc::default();
        let (stop, answers, wrote) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), Arc::<Mutex<BTreeSet<(String, String)>>>::default());
        let one = |_| {
            let (client, expected, stop, answers, wrote) = (client.clone(), expected.clone(), stop.clone(), answers.clone(), wrote.clone());
            AbortOnDropHandle::new(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let (tokens, finished) = answer(client.clone(), ask()).await.expect("no request fails");
                    let by = finished.served_by.unwrap();
                    assert_eq!(tokens, *expected.lock().await.entry(by.fingerprint.clone()).or_insert(tokens.clone()));
                    wrote.lock().await.insert((by.fingerprint, by.decode_node));
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            }))
        };
        let clients = (0..CLIENTS).map(one).collect();
        Self { stop, answers, wrote, clients }
    }

    /// Waits for so many further answers.
    async fn goes_on(&self, answers: usize) {
        let before = self.answers.load(Ordering::Relaxed);
        let more = || async {
            assert!(self.clients.iter().all(|client| !client.is_finished()), "a client has given up");
            self.answers.load(Ordering::Relaxed) >= before + answers
        };
        eventually(PATIENCE, "answers come", more).await;
    }

    /// Pairs that write from now on.
    async fn pairs(&self) -> BTreeSet<String> {
        self.writers().await.into_iter().map(|(pair, _)| pair).collect()
    }

    /// Pairs and decode nodes that write from now on.
    async fn writers(&self) -> BTreeSet<(String, String)> {
        // Those that are under way were begun before.
        self.goes_on(2 * CLIENTS).await;
        self.wrote.lock().await.clear();
        self.goes_on(50).await;
        self.wrote.lock().await.clone()
    }

    /// Ends it: none has failed.
    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_come_and_go_under_load() {
    let pair = tiny::pair(Kind::Identity, 5);
    let mut cluster = Kubernetes::start(&pair.dir, 1).await;
    let load = Load::start(&cluster).await;
    // Each decode node, then each prefill node, is replaced by a new one, three times over.
    for round in 0..3 {
        for (role, names) in [("decode", ["d0", "d1"]), ("prefill", ["p", "q"])] {
            let (old, new) = (names[round % 2], names[(round + 1) % 2]);
            cluster.start_node(new, role, &pair.dir).await;
            tokio::time::sleep(MIN_READY).await;
            cluster.end_node(old).await;
            cluster.until_seen(role, 1).await;
            load.goes_on(50).await;
        }
    }
    // A pod whose probe fails answers nevertheless.
    cluster.say("d1", Pod::NotReady);
    let over = Instant::now() + Duration::from_secs(3);
    while Instant::now() < over {
        assert_eq!(cluster.seen("decode").await, 1);
        load.goes_on(1).await;
    }
    load.end().await;
    // One that is killed goes before anything is told, when it is next looked for.
    cluster.nodes.remove("d1").unwrap().process.kill();
    cluster.until_seen("decode", 0).await;
    // Its container is started anew at its address, and Kubernetes says nothing new.
    cluster.start_node("d3", "decode", &pair.dir).await;
    cluster.until_seen("decode", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_other_labels_is_asked_nothing_more() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = Kubernetes::start(&pair.dir, 2).await;
    let load = Load::start(&cluster).await;
    assert_eq!(load.writers().await.len(), 2);
    cluster.api.remove("d0");
    cluster.until_seen("decode", 1).await;
    assert_eq!(load.writers().await.len(), 1, "it runs, and is somebody else's now");
    cluster.say("d0", Pod::Ready);
    cluster.until_seen("decode", 2).await;
    assert_eq!(load.writers().await.len(), 2);
    // A service that was deleted by mistake takes all its pods out of the list; those that answer stay.
    cluster.api.remove("d0");
    cluster.api.remove("d1");
    cluster.api.remove("p");
    load.goes_on(100).await;
    let over = Instant::now() + Duration::from_secs(3);
    while Instant::now() < over {
        load.goes_on(1).await;
    }
    load.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_api_server_does_fails_no_request() {
    let pair = tiny::pair(Kind::Identity, 5);
    let mut cluster = Kubernetes::start(&pair.dir, 1).await;
    let load = Load::start(&cluster).await;

    // An event that no watch was told of: the next watch begins before it.
    cluster.api.set(Mood::Loses);
    cluster.start_node("e0", "decode", &pair.dir).await;
    cluster.api.set(Mood::Well);
    cluster.api.cut();
    cluster.until_seen("decode", 2).await;
    // What happened since is not kept any more: a watch that begins is told so, then one that is open.
    for (name, count) in [("e1", 3), ("e2", 4)] {
        let (lists, _) = cluster.api.asked();
        cluster.api.set(Mood::Loses);
        cluster.start_node(name, "decode", &pair.dir).await;
        cluster.api.set(Mood::Well);
        cluster.api.forget();
        if count == 3 {
            cluster.api.cut()
        } else {
            cluster.api.tell_gone()
        }
        cluster.until_seen("decode", count).await;
        assert!(cluster.api.asked().0 > lists, "all was listed anew");
    }
    load.goes_on(50).await;

    // It lets nobody in any more.
    cluster.api.set(Mood::Forbids);
    cluster.api.cut();
    eventually(PATIENCE, "the router says that the API server is away", || async { !cluster.connected().await }).await;
    load.goes_on(100).await;
    assert_eq!(cluster.seen("decode").await, 4);
    cluster.end_node("e2").await;
    cluster.until_seen("decode", 3).await;
    cluster.api.set(Mood::Well);
    eventually(PATIENCE, "the router is let in again", || cluster.connected()).await;
    load.goes_on(50).await;
    load.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_and_lost_events_are_made_up_for() {
    // Both take their time, side by side.
    let pair = tiny::pair(Kind::Identity, 5);
    let silent = async {
        let mut cluster = Kubernetes::start(&pair.dir, 1).await;
        let load = Load::start(&cluster).await;
        // The connection stays, and nothing comes over it any more.
        cluster.api.set(Mood::Silent);
        cluster.start_node("d1", "decode", &pair.dir).await;
        load.goes_on(50).await;
        cluster.api.set(Mood::Well);
        eventually(3 * PATIENCE, "the pod that came in the silence is seen", || async { cluster.seen("decode").await == 2 }).await;
        load.end().await;
    };
    let lost = async {
        let mut cluster = Kubernetes::start(&pair.dir, 1).await;
        let load = Load::start(&cluster).await;
        let before = cluster.api.asked();
        // The watch has gone on past an event that it was never told of: only a list can tell.
        cluster.api.set(Mood::Loses);
        cluster.start_node("d1", "decode", &pair.dir).await;
        cluster.api.set(Mood::Well);
        cluster.api.bookmark();
        eventually(6 * PATIENCE, "the lost pod is seen", || async { cluster.seen("decode").await == 2 }).await;
        assert!(cluster.api.asked().0 > before.0);
        load.end().await;
    };
    tokio::join!(silent, lost);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_version_of_a_model_is_rolled_out_and_back() {
    let (old, new) = (tiny::pair(Kind::Identity, 5), tiny::pair(Kind::Identity, 6));
    let [of_old, of_new] = [&old, &new].map(|pair| pair.open().manifest.fingerprint.to_string());
    let mut cluster = Kubernetes::router(&[&old.dir, &new.dir]).await;
    cluster.start_node("old-p", "prefill", &old.dir).await;
    cluster.start_node("old-d", "decode", &old.dir).await;
    cluster.until_seen("decode", 1).await;
    cluster.until_seen("prefill", 1).await;
    let load = Load::start(&cluster).await;
    let only = |pair: &String| BTreeSet::from([pair.clone()]);
    let both = BTreeSet::from([of_old.clone(), of_new.clone()]);
    let reached = async |load: &Load, expected: BTreeSet<String>| {
        let until = Instant::now() + PATIENCE;
        while load.pairs().await != expected {
            assert!(Instant::now() < until, "{expected:?} is not what answers");
        }
    };
    assert_eq!(load.pairs().await, only(&of_old));
    // Half of the requests are the new version's, which has no nodes yet.
    cluster.weigh(&format!(r#"{{"tiny": {{"{of_old}": 1, "{of_new}": 1}}}}"#));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(load.pairs().await, only(&of_old));
    cluster.start_node("new-p", "prefill", &new.dir).await;
    cluster.start_node("new-d", "decode", &new.dir).await;
    reached(&load, both.clone()).await;
    // All of them, and the old version goes.
    cluster.weigh(&format!(r#"{{"tiny": {{"{of_new}": 1}}}}"#));
    reached(&load, only(&of_new)).await;
    cluster.end_node("old-d").await;
    cluster.end_node("old-p").await;
    assert_eq!(load.pairs().await, only(&of_new));
    // A file that says nonsense changes nothing. Then back to the old version.
    cluster.weigh("{");
    cluster.start_node("older-p", "prefill", &old.dir).await;
    cluster.start_node("older-d", "decode", &old.dir).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(load.pairs().await, only(&of_new));
    cluster.weigh("{}");
    reached(&load, only(&of_old)).await;
    load.end().await;

    // Who names a version gets it, at every door.
    let models: Value = reqwest::get(format!("{}/v1/models", cluster.http)).await.unwrap().json().await.unwrap();
    let listed: Vec<&str> = models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    let [short_old, short_new] = [&of_old, &of_new].map(|pair| format!("tiny@{}", &pair[..12]));
    assert_eq!(listed, ["tiny", &short_old, &short_new]);
    let client = InferenceClient::connect(cluster.grpc.clone()).await.unwrap();
    for (model, pair) in [("tiny", &of_old), ("", &of_old), (&short_old, &of_old), (&short_new, &of_new)] {
        let mut ask = request(&tiny::prompt(20, 1), &SamplingParams::greedy(), 4);
        ask.model = model.into();
        let (_, finished) = answer(client.clone(), ask).await.unwrap();
        assert_eq!(finished.served_by.unwrap().fingerprint, *pair, "{model}");
        let body = json!({ "model": model, "prompt": "a", "max_tokens": 4 });
        let sent = reqwest::Client::new().post(format!("{}/v1/completions", cluster.http)).json(&body).send().await.unwrap();
        let answered: Value = sent.json().await.unwrap();
        assert_eq!((answered["model"].as_str(), answered["served_by"]["fingerprint"].as_str()), (Some("tiny"), Some(&**pair)), "{model}");
    }
    let mut ask = request(&tiny::prompt(20, 1), &SamplingParams::greedy(), 4);
    ask.model = "tiny@0123456789ab".into();
    let refused = answer(client, ask).await.unwrap_err();
    assert!(refused.code() == tonic::Code::NotFound && refused.message().contains(&short_new), "{refused}");
    let scrape = Scrape::of(&format!("{}/metrics", cluster.http)).await;
    for pair in [&of_old, &of_new] {
        let of_pair = [("model_name", "tiny"), ("version", &pair[..12])];
        assert!(scrape.sum("vllm:generation_tokens_total", &of_pair) > 100.0, "{pair}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_without_a_way_to_kubernetes_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("none");
    for (discover, cluster, said) in [
        ("kubernetes://", "test", "no service account's token is mounted here"),
        ("kubernetes://", "no/label", "cannot be the cluster's name"),
        ("kubernetes://A", "test", "no namespace of Kubernetes"),
        ("etcd://here", "test", "write kubernetes://NAMESPACE"),
    ] {
        let mut command = std::process::Command::new(overfill_tests::processes::binary("decode-node"));
        command.args(["--pair", "/nowhere", "--discover", discover, "--cluster", cluster]);
        command.env("KUBECONFIG", &nowhere).env_remove("KUBERNETES_SERVICE_HOST");
        let ended = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert!(!ended.status.success() && stderr.contains(said), "{discover} {cluster}: {stderr}");
    }
}
