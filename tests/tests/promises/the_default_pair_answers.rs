//! The real pair, `smollm2-135m`: one process, `serve` and a cluster of processes write the same tokens, in good English.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use overfill_proto::v1::inference_client::InferenceClient;
use overfill_tests::cluster::{request, tokens};
use overfill_tests::processes::{Etcd, Process, binary, eventually, free_port};
use overfill_types::SamplingParams;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
const PROMPTS: [&str; 4] =
    ["What is the capital of France?", "Count from one to five.", "Write a short poem about the sea.", "Explain gravity to a child."];

/// Where the default pair is; installs it if need be.
fn pair() -> PathBuf {
    let fetched = Command::new(binary("overfill")).arg("fetch").output().unwrap();
    assert!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
    String::from_utf8(fetched.stdout).unwrap().trim().into()
}

fn generate(prompt: &str, flags: &[&str]) -> Value {
    let told = Command::new(binary("overfill")).args(["generate", prompt, "--json", "--max-tokens", "40"]).args(flags).output().unwrap();
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    serde_json::from_slice(&told.stdout).unwrap()
}

async fn chat(http: &str, prompt: &str, sampling: &Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": prompt }], "max_tokens": 40, "return_token_ids": true });
    body.as_object_mut().unwrap().extend(sampling.as_object().unwrap().clone());
    let sent = reqwest::Client::new().post(format!("{http}/v1/chat/completions")).json(&body).send().await.unwrap();
    assert_eq!(sent.status(), 200);
    sent.json().await.unwrap()
}

async fn ready(http: &str) {
    eventually(PATIENCE, "the cluster is ready", || async {
        reqwest::get(format!("{http}/ready")).await.is_ok_and(|r| r.status().is_success())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_everywhere() {
    let pair = pair().display().to_string();
    let paris = generate(PROMPTS[0], &["--temperature", "0"]);
    assert!(paris["text"].as_str().unwrap().contains("Paris"), "{paris}");
    let greedy = json!({ "temperature": 0 });
    let sampled = json!({ "temperature": 0.8, "top_p": 0.9, "seed": 7 });
    let sampled_flags = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "7"];
    // Where nothing else is said, as the pair has it.
    let seeded = json!({ "seed": 7 });
    let expected: Vec<[Value; 3]> = PROMPTS
        .iter()
        .map(|p| [generate(p, &["--temperature", "0"]), generate(p, &sampled_flags), generate(p, &["--seed", "7"])])
        .collect();
    assert!(expected.iter().any(|[greedy, _, seeded]| greedy["token_ids"] != seeded["token_ids"]));

    let etcd = Etcd::start();
    let (serve, cluster) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let (serve_grpc, cluster_grpc) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let mut processes =
        vec![Process::ours("overfill", &["serve", "--pair", &pair, "--http", &serve, "--grpc", &serve_grpc, "--kv-memory", "256M"])];
    let by_etcd = ["--pair", &pair, "--etcd", &etcd.address];
    processes.push(Process::ours("router", &[&by_etcd[..], &["--http", &cluster, "--grpc", &cluster_grpc]].concat()));
    for node in ["prefill-node", "prefill-node", "decode-node", "decode-node"] {
        processes
            .push(Process::ours(node, &[&by_etcd[..], &["--listen", "127.0.0.1:0", "--threads", "1", "--kv-memory", "256M"]].concat()));
    }
    for http in [&serve, &cluster] {
        let http = format!("http://{http}");
        ready(&http).await;
        for (prompt, expected) in PROMPTS.iter().zip(&expected) {
            for (sampling, expected) in [&greedy, &sampled, &seeded].into_iter().zip(expected) {
                let answer = chat(&http, prompt, sampling).await;
                let choice = &answer["choices"][0];
                assert_eq!(choice["token_ids"], expected["token_ids"], "{prompt} on {http}");
                assert_eq!(choice["message"]["content"], expected["text"]);
                assert_eq!(choice["finish_reason"], expected["finish_reason"]);
            }
        }
    }

    // Long prompts of token ids, alone on the one, together on the other.
    let long: Vec<Vec<u32>> = [500, 900, 1500].iter().map(|n| (0..*n).map(|i| 300 + i * 7 % 1000).collect()).collect();
    let alone = InferenceClient::connect(format!("http://{serve_grpc}")).await.unwrap();
    let together = InferenceClient::connect(format!("http://{cluster_grpc}")).await.unwrap();
    let ask = |prompt: &Vec<u32>| request(prompt, &SamplingParams::greedy(), 20);
    let tasks: Vec<_> = long.iter().map(|p| tokio::spawn(tokens(together.clone(), ask(p)))).collect();
    for (prompt, task) in long.iter().zip(tasks) {
        assert_eq!(task.await.unwrap().unwrap(), tokens(alone.clone(), ask(prompt)).await.unwrap(), "{} tokens", prompt.len());
    }
    drop(processes);
}
