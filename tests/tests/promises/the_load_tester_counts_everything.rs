//! `overfill bench serve` against real clusters, and against servers that refuse, lie and die: every request that was planned is
//! answered, failed under its kind, or interrupted, and the sums are right.

use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use overfill_tests::cluster::Builder;
use overfill_tests::processes::{Process, binary};
use overfill_tests::tiny::{self, Kind};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

const VOCABULARY: &str = "260";

/// What a run left behind.
struct Ran {
    output: Output,
    results: Vec<Value>,
    folder: TempDir,
}

/// Runs the load tester with these flags.
async fn bench(flags: &[&str]) -> Ran {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(binary("overfill"));
    command.args(["bench", "serve", "--disable-tqdm", "--save-result", "--save-detailed", "--result-filename", "result.json"]);
    command.arg("--result-dir").arg(folder.path()).args(flags);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = std::fs::read_to_string(folder.path().join("result.json")).unwrap_or_default();
    let results = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    Ran { output, results, folder }
}

impl Ran {
    fn said(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned() + &String::from_utf8_lossy(&self.output.stderr)
    }

    /// The only result; its sums are checked.
    fn result(&self) -> &Value {
        assert_eq!(self.results.len(), 1, "{}", self.said());
        consistent(&self.results[0]);
        &self.results[0]
    }
}

/// Whatever happened, this holds.
fn consistent(result: &Value) {
    let number = |key: &str| result[key].as_u64().unwrap_or_else(|| panic!("{key}: {result}"));
    let own = &result["overfill"];
    let failures: u64 = own["failures"].as_object().unwrap().values().map(|f| f["count"].as_u64().unwrap()).sum();
    assert_eq!(failures, number("failed"), "every failure has a kind: {own}");
    assert_eq!(number("completed") + number("failed") + own["interrupted"].as_u64().unwrap(), number("num_prompts"));
    let list = |key: &str| result[key].as_array().unwrap_or_else(|| panic!("{key}"));
    for key in ["input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors", "start_times"] {
        assert_eq!(list(key).len() as u64, number("num_prompts"), "{key}");
    }
    assert_eq!(list("errors").iter().filter(|e| *e == "").count() as u64, number("completed"));
    assert_eq!(list("output_lens").iter().map(|n| n.as_u64().unwrap()).sum::<u64>(), number("total_output_tokens"));
    let answered = list("ttfts").iter().filter(|t| t.as_f64().unwrap() > 0.0).count() as u64;
    assert_eq!(answered, number("completed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_door_of_a_cluster() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).start().await;
    for (backend, url) in [("openai", &cluster.http), ("openai-chat", &cluster.http), ("grpc", &cluster.grpc)] {
        let ran = bench(&[
            "--backend",
            backend,
            "--base-url",
            url,
            "--vocab-size",
            VOCABULARY,
            "--num-prompts",
            "24",
            "--random-input-len",
            "12",
            "--random-output-len",
            "8",
            "--random-range-ratio",
            "0.5",
            "--request-rate",
            "40",
            "--num-warmups",
            "2",
            "--goodput",
            "ttft:60000",
            "e2el:60000",
            "--metric-percentiles",
            "50,99.9",
            "--metadata",
            "note=a b",
            "--label",
            "here",
        ])
        .await;
        assert!(ran.output.status.success(), "{backend}: {}", ran.said());
        let result = ran.result();
        assert_eq!((&result["completed"], &result["failed"]), (&24.into(), &0.into()), "{backend}");
        assert_eq!((&result["model_id"], &result["note"], &result["label"]), (&"tiny".into(), &"a b".into(), &"here".into()));
        assert_eq!(result["request_rate"], 40.0);
        assert!(result["duration"].as_f64().unwrap() >= 24.0 / 40.0, "the last is due after 0.6 s");
        // All met such goals: goodput is throughput, from either beginning.
        assert_eq!(result["request_goodput"], result["request_throughput"]);
        assert_eq!(result["overfill"]["due_request_goodput"], result["request_throughput"]);
        for key in ["mean_ttft_ms", "median_tpot_ms", "std_itl_ms", "p50_e2el_ms", "p99.9_e2el_ms"] {
            assert!(result[key].as_f64().is_some_and(|ms| ms >= 0.0), "{backend}: {key} in {result}");
        }
        let lens: Vec<u64> = result["output_lens"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        assert!(lens.iter().all(|n| (4..=12).contains(n)) && lens.iter().any(|n| *n != 8), "{backend}: {lens:?}");
        if backend != "openai-chat" {
            let lens = result["input_lens"].as_array().unwrap();
            assert!(lens.iter().all(|n| (6..=18).contains(&n.as_u64().unwrap())), "{backend}: {lens:?}");
        }
        // Never more gaps than tokens after the first. Over HTTP a last chunk may have text and no token: the rest of a character.
        let spare = u64::from(backend != "grpc");
        for (gaps, tokens) in result["itls"].as_array().unwrap().iter().zip(&lens) {
            assert!(gaps.as_array().unwrap().len() as u64 <= tokens - 1 + spare, "{backend}: {gaps} for {tokens} tokens");
        }
        assert!(ran.said().contains("Serving Benchmark Result"));
    }
    cluster.nothing_is_held(Duration::from_secs(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_grows_by_its_answers() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).start().await;
    for (backend, url) in [("openai-chat", &cluster.http), ("grpc", &cluster.grpc)] {
        // 7 requests: two chats of three turns, and one of one.
        let ran = bench(&[
            "--backend",
            backend,
            "--base-url",
            url,
            "--dataset-name",
            "multi-turn",
            "--num-prompts",
            "7",
            "--multi-turn-num-turns",
            "3",
            "--input-len",
            "2",
            "--output-len",
            "6",
            "--multi-turn-prefix-len",
            "2",
        ])
        .await;
        assert!(ran.output.status.success(), "{backend}: {}", ran.said());
        let lens: Vec<u64> = ran.result()["input_lens"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        for chat in lens.chunks(3) {
            assert!(chat.windows(2).all(|w| w[1] > w[0]), "{backend}: prompts grow: {lens:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn traces_sweeps_and_reports() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).start().await;
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.jsonl");
    let line = |at: u32, input: u32, ids: &str| {
        format!("{{\"timestamp\": {at}, \"input_length\": {input}, \"output_length\": 40, \"hash_ids\": {ids}}}\n")
    };
    std::fs::write(&trace, line(1000, 700, "[1, 2]") + &line(1600, 600, "[1, 7]") + &line(2000, 100, "[9]")).unwrap();
    let report = folder.path().join("report.html");
    let flags = ["--backend", "grpc", "--base-url", &cluster.grpc, "--vocab-size", VOCABULARY, "--report", report.to_str().unwrap()];
    let of_trace =
        ["--dataset-name", "trace", "--dataset-path", trace.to_str().unwrap(), "--trace-speed", "2", "--trace-length-scale", "0.1"];
    let ran = bench(&[&flags[..], &of_trace].concat()).await;
    assert!(ran.output.status.success(), "{}", ran.said());
    let result = ran.result();
    assert_eq!((&result["input_lens"], &result["output_lens"]), (&serde_json::json!([70, 60, 10]), &serde_json::json!([4, 4, 4])));
    let due: Vec<f64> = result["due_times"].as_array().unwrap().iter().map(|t| t.as_f64().unwrap()).collect();
    assert_eq!(due, [0.0, 0.3, 0.5]);
    // 51 tokens are the same: three whole blocks of 16 are found again.
    let hits: u64 = cluster.statuses().await.iter().map(|s| s.prefix_hits).sum();
    assert!(hits >= 48, "{hits}");
    assert!(!std::fs::read_to_string(&report).unwrap().contains("Over all rates"));

    let rates = ["--request-rate", "20,60", "--num-prompts", "12", "--input-len", "8", "--output-len", "4", "--goodput", "ttft:60000"];
    let ran = bench(&[&flags[..], &rates].concat()).await;
    assert!(ran.output.status.success(), "{}", ran.said());
    ran.results.iter().for_each(consistent);
    let told: Vec<f64> = ran.results.iter().map(|r| r["request_rate"].as_f64().unwrap()).collect();
    assert_eq!(told, [20.0, 60.0]);
    let html = std::fs::read_to_string(&report).unwrap();
    assert!(html.contains("Over all rates") && html.contains("goodput") && html.matches("<svg").count() >= 16, "{}", html.len());
    assert!(
        ["<script", "<link", "src=", "href=", "url(", "@import"].iter().all(|way| !html.contains(way)),
        "nothing is loaded from elsewhere"
    );
    assert!(!html.contains("NaN"));
    // The folder of a run has its result and nothing else.
    assert_eq!(std::fs::read_dir(ran.folder.path()).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cluster_is_counted() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).router_flags(&["--max-requests", "4"]).start().await;
    for (backend, url, kind) in [("openai", &cluster.http, "http_503"), ("grpc", &cluster.grpc, "grpc_unavailable")] {
        let flags = ["--backend", backend, "--base-url", url, "--vocab-size", VOCABULARY, "--num-prompts", "30", "--input-len", "8"];
        let ran = bench(&[&flags[..], &["--output-len", "200", "--allow-failures", "0.99"]].concat()).await;
        let result = ran.result();
        assert!(ran.output.status.success(), "some were answered: {}", ran.said());
        assert!(result["completed"].as_u64().unwrap() >= 1);
        assert!(result["overfill"]["failures"][kind]["count"].as_u64().unwrap() >= 1, "{}", result["overfill"]);
        assert!(!result["overfill"]["failures"][kind]["first"].as_str().unwrap().is_empty());
        assert!(ran.said().contains(kind), "{}", ran.said());
        // With a cap nothing is refused; the wait is not hidden.
        let ran = bench(&[&flags[..], &["--output-len", "20", "--max-concurrency", "1"]].concat()).await;
        let result = ran.result();
        assert_eq!((&result["completed"], &result["max_concurrent_requests"]), (&30.into(), &1.into()), "{}", ran.said());
        let (sent, due) = (result["mean_e2el_ms"].as_f64().unwrap(), result["overfill"]["mean_due_e2el_ms"].as_f64().unwrap());
        assert!(due > 4.0 * sent, "each waited for all before it: {due} ms, {sent} ms");
    }
}

/// What the server of a test does with the n-th request.
#[derive(Clone, Copy)]
enum Does {
    Refuse(u16),
    Answer,
    DieMidway,
    ErrorMidway,
    Hang,
    Empty,
    Babble,
}

/// A server that does what it is told, in turn.
async fn server(does: &'static [Does]) -> (String, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let task = tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(answer(socket, does, asked.clone()));
        }
    });
    (url, AbortOnDropHandle::new(task))
}

async fn answer(mut socket: TcpStream, does: &'static [Does], asked: Arc<AtomicUsize>) {
    let mut request = Vec::new();
    let body = loop {
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length: ").map(|n| n.parse::<usize>().unwrap()));
            if body.len() >= length.unwrap_or(0) {
                break body.to_owned();
            }
        }
        if socket.read_buf(&mut request).await.unwrap_or(0) == 0 {
            return;
        }
    };
    let mut write = async |text: String| drop(socket.write_all(text.as_bytes()).await);
    if body.is_empty() {
        let models = r#"{"data": [{"id": "org/fake"}]}"#;
        return write(format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{models}", models.len())).await;
    }
    let chunk = |body: String| format!("{:x}\r\n{body}\r\n", body.len());
    let token = |text: &str| chunk(format!("data: {{\"choices\": [{{\"text\": \"{text}\", \"finish_reason\": null}}]}}\n\n"));
    let stream = "HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    let end = chunk("data: {\"choices\": [{\"text\": \"\", \"finish_reason\": \"length\"}]}\n\n".into())
        + &chunk("data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 3, \"completion_tokens\": 2}}\n\n".into())
        + &chunk("data: [DONE]\n\n".into())
        + "0\r\n\r\n";
    match does[asked.fetch_add(1, Ordering::SeqCst) % does.len()] {
        Does::Refuse(status) => {
            let body = format!("{{\"error\": {{\"message\": \"refused with {status}\"}}}}");
            write(format!("HTTP/1.1 {status} No\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len()))
                .await;
        }
        Does::Answer => {
            write(stream + &token("a")).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            write(token("b") + &end).await;
        }
        Does::DieMidway => write(stream + &token("a")).await,
        Does::ErrorMidway => {
            write(stream + &token("a") + &chunk("data: {\"error\": {\"message\": \"lost a node\"}}\n\n".into()) + "0\r\n\r\n").await
        }
        Does::Hang => {
            write(stream + &token("a")).await;
            tokio::time::sleep(Duration::from_secs(600)).await;
        }
        Does::Empty => write(stream + &end).await,
        Does::Babble => write(stream + &chunk("data: {nonsense\n\n".into()) + "0\r\n\r\n").await,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_failure_has_its_kind() {
    use Does::{Answer, Babble, DieMidway, Empty, ErrorMidway, Hang, Refuse};
    let (url, _server) = server(&[Answer, Refuse(429), DieMidway, Refuse(503), ErrorMidway, Hang, Empty, Babble, Refuse(429)]).await;
    let begun = Instant::now();
    let ran =
        bench(&["--base-url", &url, "--num-prompts", "27", "--max-concurrency", "1", "--input-len", "3", "--request-timeout", "0.3"]).await;
    assert!(begun.elapsed() < Duration::from_secs(20), "a server that hangs holds nobody up");
    let result = ran.result();
    assert_eq!(ran.output.status.code(), Some(1), "{}", ran.said());
    assert!(ran.said().contains("24 of 27 requests failed, and 0 may (--allow-failures): 6 http_429, "), "{}", ran.said());
    let failures = &result["overfill"]["failures"];
    for (kind, count, first) in [
        ("http_429", 6, "refused with 429"),
        ("http_503", 3, "refused with 503"),
        ("broke_off", 3, ""),
        ("error_in_stream", 3, "lost a node"),
        ("timeout", 3, "0.3 s"),
        ("empty", 3, "no token"),
        ("malformed", 3, ""),
    ] {
        assert_eq!(failures[kind]["count"], count, "{kind}: {failures}");
        assert!(failures[kind]["first"].as_str().unwrap().contains(first), "{kind}: {failures}");
        assert!(ran.said().contains(kind), "{kind} is shown");
    }
    assert_eq!((&result["completed"], &result["total_output_tokens"]), (&3.into(), &6.into()), "what broke off counts for nothing");
    assert!(result["mean_tpot_ms"].as_f64().unwrap() >= 19.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_may_fail_as_are_allowed_to() {
    let (url, _server) = server(&[Does::Answer, Does::Answer, Does::Answer, Does::Refuse(503)]).await;
    let flags = ["--base-url", &url, "--num-prompts", "8", "--max-concurrency", "1", "--input-len", "3", "--allow-failures"];
    for (allowed, code) in [("0.25", 0), ("0.24", 1)] {
        let ran = bench(&[&flags[..], &[allowed]].concat()).await;
        assert_eq!((ran.output.status.code(), &ran.result()["failed"]), (Some(code), &2.into()), "{}", ran.said());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_turn_loses_the_rest_of_its_chat() {
    // Chats answer with `text` here, not with `delta`: what matters is which turns are sent at all.
    let (url, _server) = server(&[Does::Answer, Does::Refuse(503)]).await;
    let flags = ["--backend", "openai-chat", "--base-url", &url, "--dataset-name", "multi-turn", "--num-prompts", "8"];
    let ran = bench(&[&flags[..], &["--multi-turn-num-turns", "4", "--max-concurrency", "1", "--request-rate", "10"]].concat()).await;
    let failures = &ran.result()["overfill"]["failures"];
    assert_eq!((&failures["http_503"]["count"], &failures["earlier_turn"]["count"]), (&2.into(), &4.into()), "{failures}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_answered_is_an_error() {
    let (url, _server) = server(&[Does::Refuse(503)]).await;
    let ran = bench(&["--base-url", &url, "--num-prompts", "5", "--input-len", "3"]).await;
    assert!(!ran.output.status.success());
    let result = ran.result();
    assert_eq!((&result["failed"], &result["mean_ttft_ms"]), (&5.into(), &Value::Null));
    assert!(ran.said().contains("all 5 failed"), "{}", ran.said());
    // Nobody there at all: it says so in good time.
    let ran = bench(&["--port", "1", "--ready-check-timeout-sec", "1"]).await;
    assert!(!ran.output.status.success() && ran.said().contains("--base-url"), "{}", ran.said());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_tells_what_was_measured() {
    let (url, _server) = server(&[Does::Answer, Does::Hang]).await;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().display().to_string();
    let flags = ["bench", "serve", "--base-url", &url, "--num-prompts", "400", "--request-rate", "50", "--input-len", "3"];
    let saved = ["--save-result", "--save-detailed", "--result-dir", &dir, "--result-filename", "result.json"];
    let mut process = Process::ours("overfill", &[&flags[..], &saved].concat());
    tokio::time::sleep(Duration::from_secs(2)).await;
    process.signal("INT");
    let code = tokio::task::spawn_blocking(move || process.wait(Duration::from_secs(10))).await.unwrap();
    assert_eq!(code, Some(0));
    let result: Value = serde_json::from_str(&std::fs::read_to_string(folder.path().join("result.json")).unwrap()).unwrap();
    consistent(&result);
    let (completed, interrupted) = (result["completed"].as_u64().unwrap(), result["overfill"]["interrupted"].as_u64().unwrap());
    assert!(completed >= 1 && interrupted > completed, "{completed} and {interrupted}");
    assert_eq!(result["failed"], 0);
    assert!(result["duration"].as_f64().unwrap() < 7.0);
}
