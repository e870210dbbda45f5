//! Clients that we did not write, as they come from the package index: OpenAI's SDK, Anthropic's, Triton's client, gRPC by reflection, Prometheus' parser,
//! schemathesis.
//! Against the real pair they all get the same words; against a tiny one whose template knows tools, tools are called.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use overfill_tests::cluster::Builder;
use overfill_tests::processes::binary;
use overfill_tests::tiny::{self, Kind};
use serde_json::{Value, json};

const CLIENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients");
const PROMPT: &str = "The capital of France is";

fn run(command: &mut Command) -> Output {
    let ended = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(ended.status.success(), "{command:?}: {}\n{}", String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    ended
}

/// A Python that has the clients; made on first use and kept beside the build.
fn python() -> PathBuf {
    let requirements = Path::new(CLIENTS).join("requirements.txt");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients");
    let (python, made) = (folder.join("bin/python"), folder.join("requirements.txt"));
    if std::fs::read(&made).ok() != Some(std::fs::read(&requirements).unwrap()) {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--requirement"]).arg(&requirements));
        std::fs::copy(&requirements, &made).unwrap();
    }
    python
}

/// Runs one of the clients; gives what it prints.
async fn client(script: &str, arguments: &[&str]) -> String {
    let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
    let script = format!("{CLIENTS}/{script}");
    let ran = tokio::task::spawn_blocking(move || run(Command::new(python()).arg(script).args(arguments)));
    String::from_utf8(ran.await.unwrap().stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn same_words_and_tools() {
    let fetched = run(Command::new(binary("overfill")).arg("fetch"));
    let pair = PathBuf::from(String::from_utf8(fetched.stdout).unwrap().trim());
    let memory = ["--kv-memory", "256M"];
    let cluster = Builder::new(&pair).prefill_flags(&memory).decode_flags(&memory).start().await;
    let told: Value = serde_json::from_str(&client("openai_sdk.py", &[&cluster.http]).await).unwrap();
    assert!(told["text"].as_str().unwrap().contains("Paris"), "{told}");

    for script in ["openai_responses.py", "anthropic_sdk.py"] {
        let told: Value = serde_json::from_str(&client(script, &[&cluster.http]).await).unwrap();
        assert!(told["text"].as_str().unwrap().contains("Paris"), "{told}");
    }

    let ask = json!({ "prompt": PROMPT, "max_tokens": 24, "temperature": 0 });
    let sent = reqwest::Client::new().post(format!("{}/v1/completions", cluster.http)).json(&ask).send().await.unwrap();
    let answer: Value = sent.json().await.unwrap();
    let grpc = cluster.grpc.strip_prefix("http://").unwrap();
    let model = answer["model"].as_str().unwrap();
    for (script, arguments) in [("triton.py", &[grpc, model, PROMPT][..]), ("reflection.py", &[grpc, PROMPT])] {
        let told: Value = serde_json::from_str(&client(script, arguments).await).unwrap();
        assert_eq!(told["text"], answer["choices"][0]["text"], "{script}");
    }
    cluster.nothing_is_held(Duration::from_secs(5)).await;
    let scraped: Vec<&str> = cluster.metrics.iter().map(String::as_str).collect();
    let told: Vec<u32> = serde_json::from_str(&client("scrape.py", &scraped).await).unwrap();
    assert!(told.len() == 3 && told.iter().all(|samples| *samples > 50), "{told:?}");

    let pair = tiny::pair_with_tools(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    client("openai_tools.py", &[&cluster.http]).await;
    for script in ["openai_responses.py", "anthropic_sdk.py"] {
        client(script, &[&cluster.http, "tools"]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_http_door_is_as_it_is_described() {
    let pair = tiny::pair_with_tools(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).router_flags(&["--default-max-tokens", "16"]).start().await;
    let told = client("openapi.py", &[&cluster.http, "--max-examples", "20", "--seed", "1"]).await;
    assert!(told.contains("Tested: 13"), "{told}");
    cluster.nothing_is_held(Duration::from_secs(5)).await;
}
