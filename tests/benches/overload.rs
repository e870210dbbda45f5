//! What overload does to a cluster of real processes with the default pair: goodput at its peak, and at three times the rate of the
//! peak for a minute.
//!
//! `cargo bench -p overfill-tests --bench overload` (some six minutes; it needs etcd, the binaries, and no other load)
//!
//! Fails if goodput under overload is below 85 % of the peak, if a request is neither answered in time nor refused as the
//! interface says, if client and router count refusals differently, or if a process's memory grows.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use overfill_tests::processes::{Etcd, Process, binary, eventually, free_port};
use overfill_tests::scrape::Scrape;
use serde_json::Value;

/// Tokens of a prompt and of an answer.
const LENGTHS: [&str; 2] = ["64", "32"];
/// What a good answer is, in milliseconds.
const GOALS: [&str; 2] = ["ttft:1000", "tpot:50"];
/// Seconds that a request may wait for room: well within the goal of the first token, so that what is taken can still be good.
const QUEUE_TIMEOUT: &str = "0.4";
/// Seconds after which the router gives a request up, and after which the load tester counts it as hung.
const DEADLINES: [&str; 2] = ["10", "12"];
/// Seconds of each rate below and at what the cluster can bear, and of the overload.
const WINDOWS: [f64; 2] = [30.0, 60.0];
/// Rates that are tried for the peak, of the requests a second that are answered in a closed loop.
const RATES: [f64; 5] = [0.6, 0.8, 1.0, 1.25, 1.5];
const OVERLOAD: f64 = 3.0;
/// How refusals arrive at a client.
const REFUSED: [&str; 2] = ["grpc_unavailable", "grpc_resource_exhausted"];

/// One run of the load tester.
struct Measured(Value);

impl Measured {
    fn number(&self, key: &str) -> f64 {
        self.0[key].as_f64().unwrap_or_else(|| panic!("{key}: {}", self.0))
    }

    /// Failures by kind.
    fn failures(&self) -> Vec<(&str, u64)> {
        let kinds = self.0["overfill"]["failures"].as_object().unwrap();
        kinds.iter().map(|(kind, told)| (kind.as_str(), told["count"].as_u64().unwrap())).collect()
    }

    fn tell(&self) {
        let failures: Vec<String> = self.failures().iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        println!(
            "{:>6.1} requests/s: {:>4.0} answered, goodput {:>5.2}/s; TTFT p99 {:>5.0} ms, TPOT p99 {:>4.1} ms, E2EL longest {:>5.0} ms; {}",
            self.0["request_rate"].as_f64().unwrap_or(f64::INFINITY),
            self.number("completed"),
            self.number("request_goodput"),
            self.number("p99_ttft_ms"),
            self.number("p99_tpot_ms"),
            self.number("p100_e2el_ms"),
            if failures.is_empty() { "none refused".into() } else { failures.join(", ") },
        );
        for warning in self.0["overfill"]["warnings"].as_array().unwrap() {
            println!("        {}", warning.as_str().unwrap());
        }
    }
}

/// The load tester at the router, with `flags`.
fn bench(router: &str, seed: usize, flags: &[&str]) -> Measured {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(binary("overfill"));
    command.args(["bench", "serve", "--disable-tqdm", "--save-result", "--result-filename", "result.json", "--backend", "grpc"]);
    command.arg("--result-dir").arg(folder.path()).args(["--base-url", router, "--seed", &seed.to_string()]);
    command.args(["--input-len", LENGTHS[0], "--output-len", LENGTHS[1], "--goodput"]).args(GOALS);
    command.args(["--metric-percentiles", "99,100", "--request-timeout", DEADLINES[1]]).args(flags);
    let output = command.output().unwrap();
    let text = std::fs::read_to_string(folder.path().join("result.json"));
    let text = text.unwrap_or_else(|e| panic!("no result ({e}): {}", String::from_utf8_lossy(&output.stderr)));
    Measured(serde_json::from_str(&text).unwrap())
}

/// The load tester at `rate` requests a second for `seconds`.
fn at_rate(router: &str, seed: usize, rate: f64, seconds: f64) -> Measured {
    let (count, rate) = ((rate * seconds).ceil().to_string(), format!("{rate:.2}"));
    bench(router, seed, &["--request-rate", &rate, "--num-prompts", &count])
}

/// Resident bytes of each process, each half second until it is over.
fn watch_memory(processes: &[(&str, Process)], over: &AtomicBool) -> Vec<Vec<u64>> {
    let mut seen = vec![Vec::new(); processes.len()];
    while !over.load(Ordering::Relaxed) {
        for ((_, process), seen) in processes.iter().zip(&mut seen) {
            seen.push(process.resident_bytes());
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    seen
}

/// Requests that the router refused or failed for want of room, ever.
async fn refusals(http: &str) -> f64 {
    let scrape = Scrape::of(&format!("{http}/metrics")).await;
    ["overfill_requests_refused_total", "overfill_requests_failed_total"].iter().map(|name| scrape.sum(name, &[])).sum()
}

#[tokio::main]
async fn main() {
    let fetched = Command::new(binary("overfill")).arg("fetch").output().unwrap();
    assert!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
    let pair = String::from_utf8(fetched.stdout).unwrap().trim().to_owned();
    let etcd = Etcd::start();
    let [http, grpc, prefill, decode] = std::array::from_fn(|_| format!("127.0.0.1:{}", free_port()));
    let found = ["--pair", &pair, "--etcd", &etcd.address];
    let start = |name: &'static str, flags: &[&str]| (name, Process::ours(name, &[&found, flags].concat()));
    let processes = Arc::new([
        start("router", &["--http", &http, "--grpc", &grpc, "--queue-timeout", QUEUE_TIMEOUT, "--request-timeout", DEADLINES[0]]),
        start("prefill-node", &["--listen", &prefill, "--threads", "1"]),
        start("decode-node", &["--listen", &decode, "--threads", "1"]),
    ]);
    let (http, grpc) = (format!("http://{http}"), format!("http://{grpc}"));
    let ready = || async { reqwest::get(format!("{http}/ready")).await.is_ok_and(|answer| answer.status().is_success()) };
    eventually(Duration::from_secs(60), "the cluster is ready", ready).await;
    println!("prompts of {} tokens, answers of {}; good: {}", LENGTHS[0], LENGTHS[1], GOALS.join(" "));

    let bears = bench(&grpc, 1, &["--max-concurrency", "8", "--num-prompts", "200"]).number("request_throughput");
    println!("closed loop of 8: {bears:.2} requests/s");
    let mut peak = (0.0, 0.0);
    for (i, share) in RATES.into_iter().enumerate() {
        let measured = at_rate(&grpc, 2 + i, share * bears, WINDOWS[0]);
        measured.tell();
        if measured.number("request_goodput") > peak.1 {
            peak = (share * bears, measured.number("request_goodput"));
        }
    }

    let before = refusals(&http).await;
    let over = Arc::new(AtomicBool::new(false));
    let watching = {
        let (processes, over) = (processes.clone(), over.clone());
        std::thread::spawn(move || watch_memory(&*processes, &over))
    };
    let measured = at_rate(&grpc, 2 + RATES.len(), OVERLOAD * peak.0, WINDOWS[1]);
    over.store(true, Ordering::Relaxed);
    let memory = watching.join().unwrap();
    measured.tell();
    let counted = refusals(&http).await - before;

    let kept = measured.number("request_goodput") / peak.1;
    println!("goodput at {OVERLOAD} x the rate of the peak: {:.0} % of the peak", kept * 100.0);
    let mib = |bytes: &u64| *bytes as f64 / f64::from(1 << 20);
    let mut flat = true;
    for ((name, _), seen) in processes.iter().zip(&memory) {
        let third = seen.len() / 3;
        let [first, last] = [&seen[..third], &seen[2 * third..]].map(|part| part.iter().max().map_or(0.0, mib));
        println!("memory of {name}: at most {first:.0} MiB in the first third, {last:.0} in the last");
        flat &= last <= 1.05 * first + 8.0;
    }
    let refused: u64 = measured.failures().iter().filter(|(kind, _)| REFUSED.contains(kind)).map(|(_, count)| count).sum();
    let failed = measured.number("failed") as u64;
    println!("{failed} failed, {refused} of them refused; the router counted {counted:.0}");
    assert_eq!(failed, refused, "what is not answered is refused: {:?}", measured.failures());
    assert_eq!(refused as f64, counted, "the router counts what clients get");
    assert!(flat, "memory grew");
    assert!(kept >= 0.85, "goodput fell to {:.0} % of its peak", kept * 100.0);
}
