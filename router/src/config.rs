//! The router's flags.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, ValueEnum};
use overfill_cluster::DiscoveryArgs;
use overfill_lifecycle::flags::{parse_bytes, parse_seconds};
use overfill_lifecycle::telemetry::LogArgs;
use overfill_types::Quality;
use tokio::runtime::{Builder, Runtime};

/// The front door of a cluster: OpenAI-compatible HTTP and gRPC.
#[derive(Parser, Clone, Debug)]
#[command(name = "router", version)]
pub struct Cli {
    /// Where it listens for HTTP
    #[arg(long, env = "OVERFILL_HTTP", default_value = "127.0.0.1:8000")]
    pub http: SocketAddr,
    /// Where it listens for gRPC
    #[arg(long, env = "OVERFILL_GRPC", default_value = "127.0.0.1:8001")]
    pub grpc: SocketAddr,
    /// The pairs that it serves: their folders, separated by commas (pair.json and the tokenizer are read)
    #[arg(long, env = "OVERFILL_PAIR", value_delimiter = ',', required = true)]
    pub pair: Vec<PathBuf>,
    /// Threads that serve requests [default: one for each core]
    #[arg(long, env = "OVERFILL_ROUTER_THREADS", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// RequestBounds.
    #[command(flatten)]
    pub bounds: RequestBounds,
    /// Where nodes are found.
    #[command(flatten)]
    pub discovery: DiscoveryArgs,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

impl Cli {
    /// What it runs on.
    ///
    /// # Errors
    /// Where the system gives no threads.
    pub fn runtime(&self) -> std::io::Result<Runtime> {
        let mut builder = Builder::new_multi_thread();
        if let Some(threads) = self.threads {
            builder.worker_threads(threads as usize);
        }
        builder.enable_all().build()
    }
}

/// What is done where nodes of one half of a pair are missing and a request wants both models.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// The request fails
    #[default]
    Fail,
    /// The full model writes all of it
    Full,
    /// The decode model reads and writes all of it
    Decode,
}

impl Fallback {
    /// The quality that is given instead, if one is.
    pub fn quality(self) -> Option<Quality> {
        match self {
            Fallback::Fail => None,
            Fallback::Full => Some(Quality::Full),
            Fallback::Decode => Some(Quality::Decode),
        }
    }
}

/// What bounds a request, and all of them, and what they may fall back to.
#[derive(Args, Clone, Debug)]
pub struct RequestBounds {
    /// Tokens that a chat or gRPC request gets if it does not say how many it wants
    #[arg(long, env = "OVERFILL_DEFAULT_MAX_TOKENS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub default_max_tokens: u32,
    /// Largest request, in bytes; K, M and G are understood
    #[arg(long, env = "OVERFILL_MAX_BODY", default_value = "8M", value_parser = parse_bytes)]
    pub max_body: u64,
    /// Most requests under way, those that wait for room on the nodes among them
    #[arg(long, env = "OVERFILL_MAX_REQUESTS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_requests: u32,
    /// Most requests that wait for room on the nodes; others are refused
    #[arg(long, env = "OVERFILL_MAX_WAITING", default_value_t = 512, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub max_waiting: u32,
    /// Seconds that a request waits for room on the nodes; one that would wait longer is refused at once
    #[arg(long, env = "OVERFILL_QUEUE_TIMEOUT", default_value_t = 10.0, value_parser = parse_seconds)]
    pub queue_timeout: f64,
    /// File of the keys that clients have to send, with their limits [default: no key is asked for]
    #[arg(long, env = "OVERFILL_KEYS")]
    pub keys: Option<PathBuf>,
    /// Seconds after which a request is given up
    #[arg(long, env = "OVERFILL_REQUEST_TIMEOUT", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub request_timeout: u64,
    /// What answers where a request wants both models and nodes of one are missing: another model writes another answer, so
    /// this is off unless asked for; `served_by` tells the client
    #[arg(long, env = "OVERFILL_FALLBACK", value_enum, default_value_t = Fallback::Fail)]
    pub fallback: Fallback,
    /// Seconds that requests get to finish after SIGTERM
    #[arg(long, env = "OVERFILL_ROUTER_DRAIN_TIMEOUT", default_value_t = 60)]
    pub router_drain_timeout: u64,
}

/// What a router needs to know.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// Folders of the pairs that it serves.
    pub pair: Vec<PathBuf>,
    /// See [`RequestBounds::default_max_tokens`].
    pub default_max_tokens: usize,
    /// Largest request, in bytes.
    pub max_body: usize,
    /// Most requests under way.
    pub max_requests: u32,
    /// Most requests that wait for room.
    pub max_waiting: usize,
    /// How long a request waits for room.
    pub queue_timeout: Duration,
    /// File of the clients' keys; `None` where nobody needs one.
    pub keys: Option<PathBuf>,
    /// Seconds after which a request is given up.
    pub request_timeout: u64,
    /// What answers where nodes are missing.
    pub fallback: Fallback,
    /// Seconds that requests get to finish at a drain.
    pub drain_timeout: u64,
}

impl RouterConfig {
    /// A router for `pair` within `bounds`.
    pub fn new(pair: Vec<PathBuf>, bounds: RequestBounds) -> Self {
        Self {
            pair,
            default_max_tokens: bounds.default_max_tokens as usize,
            max_body: usize::try_from(bounds.max_body).unwrap_or(usize::MAX),
            max_requests: bounds.max_requests,
            max_waiting: bounds.max_waiting as usize,
            queue_timeout: Duration::from_secs_f64(bounds.queue_timeout),
            keys: bounds.keys,
            request_timeout: bounds.request_timeout,
            fallback: bounds.fallback,
            drain_timeout: bounds.router_drain_timeout,
        }
    }
}
