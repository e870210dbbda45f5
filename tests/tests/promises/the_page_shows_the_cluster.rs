//! The page at `/`, and what it shows: answers side by side, the cluster as it lives, a killed node in red within three seconds.
//! And who is told of the cluster: whoever runs it, at a listener of theirs, or who has a key.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use overfill_tests::authority::{Authority, HOST};
use overfill_tests::cluster::Builder;
use overfill_tests::process_cluster::{PATIENCE, ProcessCluster};
use overfill_tests::processes::{Process, binary, eventually, free_port};
use overfill_tests::tiny::{self, Kind};
use reqwest::{Client, RequestBuilder, StatusCode};
use serde_json::{Value, json};

const CLIENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients");
const KEY: &str = "sk-of-the-page";

/// A folder beside the build that has the script and what it needs of npm's registry; filled on first use.
fn browser() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("browser");
    std::fs::create_dir_all(&folder).unwrap();
    let (wanted, installed) = (Path::new(CLIENTS).join("package.json"), folder.join("package.json"));
    if std::fs::read(&installed).ok() != Some(std::fs::read(&wanted).unwrap()) || !folder.join("node_modules").exists() {
        std::fs::copy(&wanted, &installed).unwrap();
        let install = ["install", "--no-audit", "--no-fund", "--no-package-lock", "--prefix"];
        let ran = Command::new("npm").args(install).arg(&folder).output().expect("npm is there (Debian's package npm has it)");
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    }
    std::fs::copy(Path::new(CLIENTS).join("page.mjs"), folder.join("page.mjs")).unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_stand_side_by_side_and_a_killed_node_turns_red() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = ProcessCluster::start(&pair.dir, 1, 2);
    eventually(PATIENCE, "three nodes are ready", || async {
        let told = told(Client::new().get(format!("{}/cluster", cluster.http))).await;
        told.is_some_and(|told| conditions(&told) == ["ready"; 3])
    })
    .await;
    let arguments = [cluster.http.clone(), cluster.decode[1].id().to_string(), cluster.router.id().to_string()];
    let looked = tokio::task::spawn_blocking(move || {
        Command::new("node").current_dir(browser()).arg("page.mjs").args(arguments).output().expect("node is there (nodejs)")
    });
    let looked = looked.await.unwrap();
    let (said, wrong) = (String::from_utf8_lossy(&looked.stdout), String::from_utf8_lossy(&looked.stderr));
    assert!(looked.status.success(), "{said}\n{wrong}");
    let told: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert!(told["red_after_ms"].as_u64().unwrap() < 3000, "{told}");
}

/// A body, where the answer is 200.
async fn told(asked: RequestBuilder) -> Option<Value> {
    let response = asked.send().await.ok().filter(|response| response.status().is_success())?;
    response.json().await.ok()
}

fn conditions(overview: &Value) -> Vec<&str> {
    overview["nodes"].as_array().unwrap().iter().map(|node| node["condition"].as_str().unwrap()).collect()
}

/// Tokens of an answer: it is not over before the prefill node has said what came of the handoff.
const ANSWER: u64 = 300;

fn question(words: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": words }], "max_tokens": ANSWER, "ignore_eos": true, "temperature": 0 })
}

/// What the router tells is what happened: the nodes that an answer names, what they found of a prompt that came before, the
/// handoff with its bytes. No word of a prompt is in it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_told_is_what_happened() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    let overview = async || told(Client::new().get(format!("{}/cluster", cluster.http))).await.unwrap();
    let words = "unmistakable ".repeat(12);
    let mut by = Value::Null;
    for _ in 0..2 {
        let asked = Client::new().post(format!("{}/v1/chat/completions", cluster.http)).json(&question(&words));
        let answer = told(asked).await.unwrap();
        by = answer["choices"][0]["served_by"].clone();
    }
    let too_much = json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 1_000_000 });
    let refused = status(Client::new().post(format!("{}/v1/chat/completions", cluster.http)).json(&too_much)).await;
    assert_eq!(refused, StatusCode::BAD_REQUEST);
    eventually(PATIENCE, "two handoffs, and nodes that are idle and have counted", || async {
        let told = overview().await;
        let nodes = told["nodes"].as_array().unwrap();
        let idle = nodes.iter().all(|node| node["load"]["sequences"] == 0 && node["load"]["prefix_hits"].as_u64() > Some(0));
        told["handoffs"].as_array().unwrap().len() == 2 && idle
    })
    .await;
    let told = overview().await;
    assert!(!told.to_string().contains("unmistakable"));
    assert_eq!(conditions(&told), ["ready", "ready"]);
    let names: Vec<&Value> = told["nodes"].as_array().unwrap().iter().map(|node| &node["id"]).collect();
    assert_eq!(names, [&by["prefill_node"], &by["decode_node"]]);

    let [last, first] = [&told["handoffs"][0], &told["handoffs"][1]];
    assert_eq!((&last["number"], &last["from"], &last["to"]), (&json!(2), &by["prefill_node"], &by["decode_node"]));
    let of = |handoff: &Value, what: &str| handoff[what].as_u64().unwrap();
    // Keys and values of each token that the decode node did not hold, as wide as the pair sends them.
    let sent = |handoff: &Value| of(handoff, "prompt_tokens") - of(handoff, "held_tokens");
    assert!(
        of(first, "held_tokens") == 0 && of(first, "cached_tokens") == 0 && of(last, "held_tokens") > 0 && of(last, "cached_tokens") > 0
    );
    assert_eq!(of(first, "bytes") * sent(last), of(last, "bytes") * sent(first));
    assert!(last["transfer"].as_f64().unwrap() > 0.0 && last["ago"].as_f64() <= first["ago"].as_f64());

    let model = &told["models"][0];
    assert_eq!((&model["finished"], &model["generation_tokens"], &model["running"]), (&json!(2), &json!(2 * ANSWER), &json!(0)));
    assert_eq!(of(model, "cached_tokens"), of(last, "cached_tokens"));
    assert_eq!(told["router"]["refused"], json!({ "invalid_argument": 1 }));
}

/// A router with these flags, and where it listens: its door, and where it has one its listener for those who run it.
fn router(pair: &Path, admin: bool, flags: &[&str]) -> (Process, String, String) {
    let [http, grpc, own] = [(); 3].map(|()| format!("{HOST}:{}", free_port()));
    let pair = pair.display().to_string();
    let all = [&["--pair", &pair, "--http", &http, "--grpc", &grpc, "--prefill-nodes", "127.0.0.1:1"][..], flags];
    let admin: &[&str] = if admin { &["--admin", &own] } else { &[] };
    (Process::ours("router", &[&all.concat()[..], admin].concat()), format!("http://{http}"), format!("http://{own}"))
}

async fn listens(address: &str) {
    eventually(PATIENCE, "the router listens", || async { reqwest::get(format!("{address}/live")).await.is_ok() }).await;
}

async fn status(asked: RequestBuilder) -> StatusCode {
    asked.send().await.unwrap().status()
}

fn browse(path: &str) -> RequestBuilder {
    Client::new().get(path).header("accept", "text/html,*/*;q=0.8")
}

async fn is_page(path: &str) -> bool {
    browse(path).send().await.unwrap().text().await.unwrap().starts_with("<!doctype html>")
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_look_may_and_nobody_else() {
    let pair = tiny::pair(Kind::Identity, 5);
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), json!({ "clients": [{ "name": "page", "keys": [KEY] }] }).to_string()).unwrap();
    let keys = ["--keys", keys.path().to_str().unwrap()];

    // At the door: with the key, where keys are asked for.
    let (_router, door, _) = router(&pair.dir, false, &keys);
    listens(&door).await;
    assert!(is_page(&door).await);
    assert_eq!(status(Client::new().get(format!("{door}/cluster"))).await, StatusCode::UNAUTHORIZED);
    assert!(told(Client::new().get(format!("{door}/cluster")).bearer_auth(KEY)).await.is_some());

    // At a listener of its own: there alone, and the chat asks for the key as the door does.
    let (_router, door, own) = router(&pair.dir, true, &keys);
    listens(&own).await;
    assert!(!is_page(&door).await && is_page(&own).await);
    assert_eq!(status(browse(&format!("{door}/page/main.js"))).await, StatusCode::NOT_FOUND);
    assert_eq!(status(Client::new().get(format!("{door}/cluster")).bearer_auth(KEY)).await, StatusCode::NOT_FOUND);
    assert!(told(Client::new().get(format!("{own}/cluster"))).await.is_some());
    let ask = || Client::new().post(format!("{own}/v1/chat/completions")).json(&question("Hello"));
    assert_eq!(status(ask()).await, StatusCode::UNAUTHORIZED);
    let answer = ask().bearer_auth(KEY).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE, "it is asked, and there are no nodes");
    assert_eq!(status(Client::new().post(format!("{own}/v1/completions")).bearer_auth(KEY)).await, StatusCode::NOT_FOUND);

    // Where the doors speak TLS nothing of what they encrypt is told in plain text.
    let authority = Authority::new();
    let tls = authority.issue("door", HOST).flags("", None);
    let tls: Vec<&str> = tls.iter().map(String::as_str).collect();
    let (_router, _, own) = router(&pair.dir, true, &tls);
    listens(&own).await;
    assert!(is_page(&own).await && told(Client::new().get(format!("{own}/cluster"))).await.is_some());
    let refused = Client::new().post(format!("{own}/v1/chat/completions")).json(&question("Hello")).send().await.unwrap();
    assert_eq!(refused.status(), StatusCode::NOT_FOUND);
    assert!(refused.text().await.unwrap().contains("TLS: ask there"));
}

/// `overfill top` tells the same in a terminal, and goes on where the router goes away.
#[tokio::test(flavor = "multi_thread")]
async fn top_tells_it_in_a_terminal() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    let top = async |flags: &[&str]| {
        let mut command = Command::new(binary("overfill"));
        command.args(["top", "--url", &cluster.http]).args(flags);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    };
    let json = top(&["--once", "--json"]).await;
    let overview: Value = serde_json::from_slice(&json.stdout).unwrap();
    eventually(PATIENCE, "both nodes are ready", || async {
        let told = serde_json::from_slice::<Value>(&top(&["--once", "--json"]).await.stdout).unwrap();
        conditions(&told) == ["ready"; 2]
    })
    .await;
    let plain = String::from_utf8(top(&["--once"]).await.stdout).unwrap();
    for node in overview["nodes"].as_array().unwrap() {
        let (role, address) = (node["role"].as_str().unwrap(), node["address"].as_str().unwrap());
        assert!(plain.lines().any(|line| line.contains(role) && line.contains(address) && line.contains("ready")), "{plain}");
    }
    let gone = Command::new(binary("overfill")).args(["top", "--once", "--url", "http://127.0.0.1:1"]).output().unwrap();
    assert!(!gone.status.success() && String::from_utf8_lossy(&gone.stderr).contains("http://127.0.0.1:1"), "{gone:?}");

    let mut watching = Process::ours("overfill", &["top", "--url", "http://127.0.0.1:1", "--interval", "0.1"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(watching.ended(), None, "it keeps trying");
    watching.signal("INT");
    assert_eq!(tokio::task::spawn_blocking(move || watching.wait(Duration::from_secs(5))).await.unwrap(), Some(0));
}
