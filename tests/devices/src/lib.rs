//! Clusters whose nodes hand over from GPU to GPU, over stand-ins for the driver and for NCCL.
//!
//! The stand-ins (`fakes/`) are C, made by each test that wants them: memory of the host in place of a GPU's, a thread for each
//! stream, a socket for each communicator. What is tested is all of ours: the bindings, the protocol, the nodes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use memmap2::MmapRaw;
use overfill_model::Pair;
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_simulation::model::undisturbed;
use overfill_tests::cluster::{request, tokens};
use overfill_tests::processes::{Etcd, Process, binary, eventually, free_port};
use overfill_tests::scrape::Scrape;
use overfill_tests::tiny::{self, Kind, TinyPair};
use overfill_types::{PairManifest, Quality, SamplingParams, StopConditions};
use tempfile::TempDir;

/// How long it may take until something has come about.
pub const LIMIT: Duration = Duration::from_secs(30);
/// Tokens of each answer.
const ANSWER: usize = 24;
/// What the stand-ins count, in their order.
const COUNTS: [&str; 8] = ["bytes", "streams", "events", "communicators", "sent", "received", "aborted", "pinned"];

/// The folder of the stand-ins, made once a process.
fn fakes() -> &'static Path {
    static MADE: OnceLock<TempDir> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let (folder, sources) = (tempfile::tempdir().unwrap(), Path::new(env!("CARGO_MANIFEST_DIR")).join("fakes"));
        let compile = |source: &str, library: &str, with: &[&str]| {
            let mut compiler = Command::new("cc");
            compiler.args(["-O1", "-g", "-Wall", "-Werror", "-std=gnu11", "-shared", "-fPIC", "-pthread"]);
            compiler.arg(sources.join(source)).arg("-o").arg(folder.path().join(library)).arg(format!("-Wl,-soname,{library}"));
            let told = compiler.arg("-L").arg(folder.path()).args(with).output().unwrap();
            assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
        };
        compile("cuda.c", "libcuda.so.1", &[]);
        compile("nccl.c", "libnccl.so.2", &["-l:libcuda.so.1"]);
        folder
    });
    made.path()
}

/// What two GPUs have when numbers of theirs were added twice, as `device-node sums` prints it.
pub fn sums() -> String {
    let told = Command::new(binary("device-node")).arg("sums").env("LD_LIBRARY_PATH", fakes()).output().unwrap();
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    String::from_utf8(told.stdout).unwrap()
}

/// What is taken of a stand-in at this moment, and what it has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts([i64; COUNTS.len()]);

impl Counts {
    /// One of them, by its name in `fakes/fake.h`.
    pub fn get(&self, name: &str) -> i64 {
        self.0[COUNTS.iter().position(|count| *count == name).unwrap()]
    }
}

/// How a node is started.
#[derive(Clone, Copy, Default)]
pub struct Told<'a> {
    /// What goes wrong with its NCCL: see `fakes/nccl.c`.
    pub fault: &'a str,
    /// It is told to use TCP alone.
    pub tcp: bool,
    /// Flags beside those that all have.
    pub flags: &'a [&'a str],
}

/// A node, and what its stand-ins count.
pub struct Node {
    /// It.
    pub process: Process,
    admin: String,
    counts: MmapRaw,
    _folder: TempDir,
}

impl Node {
    /// What its stand-ins count now; also when it is dead.
    pub fn counts(&self) -> Counts {
        let numbers = self.counts.as_ptr().cast::<AtomicI64>();
        // SAFETY: the file was made as long as all counts, which the process writes atomically.
        Counts(std::array::from_fn(|i| unsafe { &*numbers.add(i) }.load(Ordering::SeqCst)))
    }

    /// Its metrics.
    pub async fn scrape(&self) -> Scrape {
        Scrape::of(&format!("http://{}/metrics", self.admin)).await
    }

    /// Handoffs that it began by a way, for a reason.
    pub async fn ways(&self, way: &str, reason: &str) -> f64 {
        self.scrape().await.sum("overfill_handoff_ways_total", &[("way", way), ("reason", reason)])
    }

    /// Waits until it holds nothing of a GPU but what stands with its communicators.
    pub async fn until_nothing_is_held(&self) {
        eventually(LIMIT, "no memory of a GPU is held", || async { self.counts().get("bytes") == 0 }).await;
    }
}

/// A router, and nodes that are started one by one.
pub struct Devices {
    pair: TinyPair,
    manifest: PairManifest,
    etcd: Etcd,
    grpc: String,
    http: String,
    _router: Process,
}

impl Devices {
    /// Without nodes.
    pub fn start() -> Self {
        let pair = tiny::pair(Kind::Identity, 7);
        let manifest = Pair::open(&pair.dir).unwrap().manifest;
        let (etcd, http, grpc) = (Etcd::start(), format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let dir = pair.dir.display().to_string();
        let flags = ["--pair", &dir, "--http", &http, "--grpc", &grpc, "--etcd", &etcd.address];
        let router = Process::ours("router", &flags);
        Self { pair, manifest, etcd, grpc: format!("http://{grpc}"), http: format!("http://{http}"), _router: router }
    }

    /// Starts a node: `prefill-node` or `decode-node`.
    pub fn node(&self, role: &str, told: Told<'_>) -> Node {
        let folder = tempfile::tempdir().unwrap();
        let counted: PathBuf = folder.path().join("counts");
        File::create_new(&counted).unwrap().set_len(size_of::<Counts>() as u64).unwrap();
        let counts = MmapRaw::map_raw(&File::options().read(true).write(true).open(&counted).unwrap()).unwrap();
        let (dir, admin) = (self.pair.dir.display().to_string(), format!("127.0.0.1:{}", free_port()));
        let flags = [role, "--pair", &dir, "--listen", "127.0.0.1:0", "--admin", &admin, "--etcd", &self.etcd.address, "--lease-ttl", "2"];
        let gpu = ["--device", "cuda:0", "--nccl", if told.tcp { "off" } else { "on" }, "--drain-delay", "0"];
        let fakes = fakes().display().to_string();
        let environment = [("LD_LIBRARY_PATH", &*fakes), ("FAKE_COUNTS", counted.to_str().unwrap()), ("FAKE_NCCL", told.fault)];
        let process = Process::with("device-node", &[&flags[..], &gpu, told.flags].concat(), &environment);
        Node { process, admin, counts, _folder: folder }
    }

    /// Waits until the router is ready, and these nodes are.
    pub async fn until_ready(&self, nodes: &[&Node]) {
        let ready = async |url: String| reqwest::get(url).await.is_ok_and(|told| told.status().is_success());
        for node in nodes {
            eventually(LIMIT, "a node is ready", || ready(format!("http://{}/ready", node.admin))).await;
        }
        eventually(LIMIT, "the router is ready", || ready(format!("{}/ready", self.http))).await;
    }

    /// Asks for an answer to a prompt of so many tokens, another for each `seed`, and checks it token for token.
    pub async fn answers(&self, prompt_tokens: usize, seed: u32) {
        let prompt = prompt(prompt_tokens, seed);
        let (sampling, stop) =
            (SamplingParams::greedy(), StopConditions { max_tokens: ANSWER, stop_token_ids: Vec::new(), ignore_eos: true });
        let known = undisturbed((0, &self.manifest), Quality::Overfill, &prompt, &sampling, &stop).0;
        let mut asked = request(&prompt, &sampling, ANSWER as u32);
        asked.ignore_eos = true;
        let client = InferenceClient::connect(self.grpc.clone()).await.unwrap();
        let answer = tokio::time::timeout(LIMIT, tokens(client, asked)).await.expect("in time").unwrap();
        assert_eq!(answer, known, "prompt {seed}");
    }

    /// Asks for so many at a time, from `seed` on.
    pub async fn answers_at_once(self: &Arc<Self>, prompt_tokens: usize, seed: u32, many: u32) {
        let asked: Vec<_> = (0..many)
            .map(|n| {
                let cluster = self.clone();
                tokio::spawn(async move { cluster.answers(prompt_tokens, seed + n).await })
            })
            .collect();
        for answer in asked {
            answer.await.unwrap();
        }
    }

    /// Asks for an answer and leaves as soon as the request is sent.
    pub async fn leaves(&self, prompt_tokens: usize, seed: u32, after: Duration) {
        let asked = request(&prompt(prompt_tokens, seed), &SamplingParams::greedy(), ANSWER as u32);
        let client = InferenceClient::connect(self.grpc.clone()).await.unwrap();
        // Whether it was through by then is the point of none of its callers.
        let _ = tokio::time::timeout(after, tokens(client, asked)).await;
    }
}

/// Token ids that begin like no other seed's.
fn prompt(tokens: usize, seed: u32) -> Vec<u32> {
    (0..tokens as u32).map(|i| (seed.wrapping_mul(2_654_435_761).rotate_left(i % 29) >> 7).wrapping_add(i * i) % 250).collect()
}
