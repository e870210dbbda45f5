//! The router's flags.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use axum::http::HeaderValue;
use clap::{Args, Parser, ValueEnum};
use overfill_cluster::DiscoveryArgs;
use overfill_guide::GuideArgs;
use overfill_lifecycle::telemetry::LogArgs;
use overfill_text::ToolFormat;
use overfill_transport::connections::ConnectionLimits;
use overfill_transport::security::{Identity, ServerTls, Unusable};
use overfill_types::Quality;
use overfill_types::flags::{parse_bytes, parse_seconds};
use overfill_types::generation::GenerationSource;
use tokio::runtime::{Builder, Runtime};

use crate::clients::Client;

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
    /// Where it answers those who run the cluster: the page, /cluster, /metrics, /docs, probes, profiles, and gRPC's reflection, which
    /// are not at the doors then [default: at the doors, but for profiles]
    #[arg(long, env = "OVERFILL_ADMIN")]
    pub admin: Option<SocketAddr>,
    /// The pairs that it serves: their folders, separated by commas (pair.json and the tokenizer are read)
    #[arg(long, env = "OVERFILL_PAIR", value_delimiter = ',', required = true)]
    pub pair: Vec<PathBuf>,
    /// Threads that serve requests [default: one for each core]
    #[arg(long, env = "OVERFILL_ROUTER_THREADS", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// What bounds requests.
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

/// Whose requests share the KV caches of prompts that begin alike. An answer begins sooner where the cache is there: who shares it
/// with others can tell by that whether one of them has sent the same beginning.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PrefixSharing {
    /// Those of one client of the file of keys
    #[default]
    Client,
    /// All
    All,
}

impl PrefixSharing {
    /// What keeps the caches of a client's request apart, where the request itself says `own`.
    pub(crate) fn salt(self, client: &Client, own: &str) -> String {
        match self {
            Self::Client if client.has_key() => format!("{}\0{own}", client.name),
            Self::Client | Self::All => own.to_owned(),
        }
    }
}

/// What special tokens mean that stand in messages of a chat. Those of the chat template are always special.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpecialInMessages {
    /// Text like any other
    #[default]
    Plain,
    /// What they mean to the model, as Hugging Face's tokenizers have it: whoever writes a message can write turns of others
    Special,
}

/// How calls of tools are written and read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ToolCallParser {
    /// As the chat template of each pair asks for it.
    #[default]
    Auto,
    /// So.
    Format(ToolFormat),
}

impl FromStr for ToolCallParser {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::Format) }
    }
}

/// What bounds the connections of either door. Where a bound is reached, who has waited longest loses: nobody keeps others out by
/// beginning something and then saying nothing, or saying it slowly.
#[derive(Args, Clone, Copy, Debug)]
pub struct ConnectionArgs {
    /// Most connections to each of the two doors; a further one takes the place of that which has waited longest for a request
    #[arg(long, env = "OVERFILL_MAX_CONNECTIONS", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_connections: u32,
    /// Most requests at a time over one connection of HTTP/2
    #[arg(long, env = "OVERFILL_MAX_STREAMS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_streams: u32,
    /// Seconds that a new connection may take to send its first request, and any request for the first bytes of its body
    #[arg(long, env = "OVERFILL_READ_TIMEOUT", default_value_t = 10.0, value_parser = parse_seconds)]
    pub read_timeout: f64,
    /// Seconds that a connection is kept for the next request
    #[arg(long, env = "OVERFILL_IDLE_TIMEOUT", default_value_t = 75.0, value_parser = parse_seconds)]
    pub idle_timeout: f64,
    /// Memory of all requests that are being read, over both doors; K, M and G are understood
    #[arg(long, env = "OVERFILL_READ_MEMORY", default_value = "256M", value_parser = parse_bytes)]
    pub read_memory: u64,
}

impl ConnectionArgs {
    pub(crate) fn limits(&self) -> ConnectionLimits {
        ConnectionLimits {
            most: self.max_connections as usize,
            first: Duration::from_secs_f64(self.read_timeout),
            idle: Duration::from_secs_f64(self.idle_timeout),
            streams: self.max_streams,
        }
    }
}

/// TLS of both doors. Metrics and probes at a listener of their own (`--admin`) are told in plain text.
#[derive(Args, Clone, Debug, Default)]
pub struct TlsArgs {
    /// Certificate (PEM, with its chain) that is shown to clients, who are served by TLS alone then. It is read again when it
    /// changes, as are the two other files
    #[arg(long, env = "OVERFILL_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, env = "OVERFILL_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Certificates of an authority (PEM): only clients whose certificate it leads to are served
    #[arg(long, env = "OVERFILL_TLS_CA", requires_all = ["tls_cert", "tls_key"])]
    pub tls_ca: Option<PathBuf>,
}

impl TlsArgs {
    /// TLS of a door, if it is wanted.
    ///
    /// # Errors
    /// Where a file cannot be used.
    pub(crate) fn open(&self, grpc: bool) -> Result<Option<ServerTls>, Unusable> {
        let (Some(cert), Some(key)) = (self.tls_cert.clone(), self.tls_key.clone()) else { return Ok(None) };
        ServerTls::new(Identity { cert, key }, self.tls_ca.clone(), grpc).map(Some)
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
    /// What guides may cost.
    #[command(flatten)]
    pub guides: GuideArgs,
    /// How tokens are chosen where a request does not say it: auto (as each pair says), none (temperature 1, nothing left out), or a
    /// generation_config.json as Hugging Face has it
    #[arg(long, env = "OVERFILL_GENERATION_CONFIG", default_value = "auto")]
    pub generation_config: GenerationSource,
    /// What special tokens mean that stand in messages of a chat
    #[arg(long, env = "OVERFILL_SPECIAL_TOKENS_IN_MESSAGES", value_enum, default_value_t = SpecialInMessages::Plain)]
    pub special_tokens_in_messages: SpecialInMessages,
    /// How models write calls of tools: auto (as each pair's chat template asks for it), hermes, llama3_json, mistral or granite
    #[arg(long, env = "OVERFILL_TOOL_CALL_PARSER", default_value = "auto")]
    pub tool_call_parser: ToolCallParser,
    /// Origins whose pages may ask at the HTTP door from a browser, separated by commas; * for all [default: none but its own]
    #[arg(long, env = "OVERFILL_CORS_ORIGINS", value_delimiter = ',', value_parser = parse_origin)]
    pub cors_origins: Vec<HeaderValue>,
    /// Whose requests share the KV caches of prompts that begin alike
    #[arg(long, env = "OVERFILL_PREFIX_SHARING", value_enum, default_value_t = PrefixSharing::Client)]
    pub prefix_sharing: PrefixSharing,
    /// What bounds connections.
    #[command(flatten)]
    pub connections: ConnectionArgs,
    /// TLS of both doors.
    #[command(flatten)]
    pub tls: TlsArgs,
    /// Pairs of one name are versions of one model: a file of the part that each gets of its requests, as
    /// {"MODEL": {"VERSION": WEIGHT}}, a version being the name of its folder or how its fingerprint begins. What is changed in it
    /// is taken at once [default: the first pair of a name gets all]
    #[arg(long, env = "OVERFILL_TRAFFIC")]
    pub traffic: Option<PathBuf>,
    /// Seconds after SIGTERM in which all that comes is still served, while whoever sends it learns that this router leaves
    #[arg(long, env = "OVERFILL_DRAIN_DELAY", default_value_t = 5.0, value_parser = parse_seconds)]
    pub drain_delay: f64,
    /// Seconds that requests get to finish after that
    #[arg(long, env = "OVERFILL_ROUTER_DRAIN_TIMEOUT", default_value_t = 60)]
    pub router_drain_timeout: u64,
}

/// `*`, or an origin as browsers send it: `https://chat.example.org:8443`.
fn parse_origin(text: &str) -> Result<HeaderValue, String> {
    let wrong = || format!("'{text}' is no origin: write it as browsers do, as in https://chat.example.org, or * for all");
    let host = text.split_once("://").map(|(_, host)| host);
    if text != "*" && host.is_none_or(|host| host.is_empty() || host.contains('/')) {
        return Err(wrong());
    }
    HeaderValue::from_str(text).map_err(|_| wrong())
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
    /// File of the part that each version of a model gets; `None` where the first gets all.
    pub traffic: Option<PathBuf>,
    /// Seconds after which a request is given up.
    pub request_timeout: u64,
    /// What answers where nodes are missing.
    pub fallback: Fallback,
    /// What guides may cost.
    pub guides: GuideArgs,
    /// How tokens are chosen where a request does not say it.
    pub generation_config: GenerationSource,
    /// What special tokens mean that stand in messages.
    pub special_tokens_in_messages: SpecialInMessages,
    /// How calls of tools are written and read.
    pub tool_call_parser: ToolCallParser,
    /// Origins whose pages may ask at the HTTP door.
    pub cors_origins: Vec<HeaderValue>,
    /// Whose requests share KV caches.
    pub prefix_sharing: PrefixSharing,
    /// What bounds connections.
    pub connections: ConnectionArgs,
    /// TLS of both doors.
    pub tls: TlsArgs,
    /// How long all that comes is still served at a drain.
    pub drain_delay: Duration,
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
            traffic: bounds.traffic,
            request_timeout: bounds.request_timeout,
            fallback: bounds.fallback,
            guides: bounds.guides,
            generation_config: bounds.generation_config,
            special_tokens_in_messages: bounds.special_tokens_in_messages,
            tool_call_parser: bounds.tool_call_parser,
            cors_origins: bounds.cors_origins,
            prefix_sharing: bounds.prefix_sharing,
            connections: bounds.connections,
            tls: bounds.tls,
            drain_delay: Duration::from_secs_f64(bounds.drain_delay),
            drain_timeout: bounds.router_drain_timeout,
        }
    }
}
