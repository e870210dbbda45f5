//! Flags that both kinds of node have.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use overfill_guide::GuideArgs;
use overfill_types::PeerAddress;
use overfill_types::flags::parse_seconds;
use tokio::net::TcpListener;

use crate::advertise::{self, AdvertiseError};
use crate::cores::CoreArgs;
use crate::faults::Fault;
use crate::kv_memory::KvMemory;
use crate::nccl::NcclArgs;

/// What a node holds, where it listens, and what it may use.
#[derive(Args, Clone, Debug)]
pub struct NodeArgs {
    /// Where peers reach this node, HOST:PORT [default: the address that it listens on; if that is every address of the
    /// machine, the one that is not loopback]
    #[arg(long, env = "OVERFILL_ADVERTISE", value_name = "HOST:PORT")]
    pub advertise: Option<PeerAddress>,
    /// Where it answers those who run the cluster (HTTP): /metrics, /live, /ready, /profile [default: nowhere]
    #[arg(long, env = "OVERFILL_ADMIN")]
    pub admin: Option<SocketAddr>,
    /// Compute threads [default: one for each of --cpus, or for each core]
    #[arg(long, env = "OVERFILL_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Cores that this process keeps to, separated by commas; each compute thread gets one of its own [default: any]
    #[arg(long, env = "OVERFILL_CPUS", value_delimiter = ',')]
    pub cpus: Vec<usize>,
    /// Where the model computes: cpu or cuda:N. A prefill node's may be split over several GPUs of its machine: cuda:0,cuda:1
    #[arg(long, visible_alias = "devices", env = "OVERFILL_DEVICE", default_value = "cpu", value_delimiter = ',')]
    pub device: Vec<String>,
    /// Memory of the KV cache in bytes (K, M and G are understood), or auto: nine tenths of what is free once the model is loaded, of the
    /// GPU's memory, of the container's limit, or of half of what the machine has left
    #[arg(long, env = "OVERFILL_KV_MEMORY", default_value = "1G")]
    pub kv_memory: KvMemory,
    /// Token positions in a block of the KV cache: a multiple of 16
    #[arg(long, env = "OVERFILL_BLOCK_TOKENS", default_value_t = 16, value_parser = parse_block_tokens)]
    pub block_tokens: u32,
    /// Longest sequence, prompt and answer together, in tokens [default: the pair's, at most 8192]
    #[arg(long, env = "OVERFILL_MAX_CONTEXT")]
    pub max_context: Option<usize>,
    /// Seconds after SIGTERM in which sequences are still taken, while routers learn that this node leaves
    #[arg(long, env = "OVERFILL_DRAIN_DELAY", default_value_t = 5.0, value_parser = parse_seconds)]
    pub drain_delay: f64,
    /// Seconds that running sequences get to finish after that
    #[arg(long, env = "OVERFILL_DRAIN_TIMEOUT", default_value_t = 60)]
    pub drain_timeout: u64,
    /// Seconds without a step of the engine, while there is work, after which the node gives itself up: its sequences go on
    /// elsewhere, and it exits
    #[arg(long, env = "OVERFILL_STEP_TIMEOUT", default_value_t = 30.0, value_parser = parse_step_timeout)]
    pub step_timeout: f64,
    /// Whether KV caches go from GPU to GPU.
    #[command(flatten)]
    pub nccl: NcclArgs,
    /// Whether cores are shared with another node, and how.
    #[command(flatten)]
    pub cores: CoreArgs,
    /// What guides may cost.
    #[command(flatten)]
    pub guides: GuideArgs,
    /// Faults that tests ask for: see [`Fault`].
    #[arg(long, hide = true)]
    pub fault: Vec<Fault>,
}

impl NodeArgs {
    /// Compute threads: the flag's, or one for each core that it may use.
    pub fn threads(&self) -> usize {
        match self.threads {
            Some(threads) => threads.into(),
            None if !self.cpus.is_empty() => self.cpus.len(),
            None => std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// Longest sequence of a pair that was made for `made_for` tokens.
    pub fn max_context(&self, made_for: usize) -> usize {
        self.max_context.unwrap_or(8192).min(made_for)
    }

    /// Blocks of the pool, if a token position takes `bytes_per_token`; at least one. `free` tells the bytes that are free.
    ///
    /// # Errors
    /// Those of `free`, where it is asked.
    pub fn blocks<E>(&self, bytes_per_token: usize, free: impl FnOnce() -> Result<u64, E>) -> Result<u32, E> {
        let bytes = self.kv_memory.bytes(free)?;
        let block = bytes_per_token as u64 * u64::from(self.block_tokens);
        let blocks = u32::try_from(bytes / block.max(1)).unwrap_or(u32::MAX).max(1);
        tracing::info!(blocks, tokens = u64::from(blocks) * u64::from(self.block_tokens), bytes = u64::from(blocks) * block, "KV cache");
        Ok(blocks)
    }

    /// Where peers are told that this node, which listens on `listening`, is reached.
    ///
    /// # Errors
    /// Where the flag does not say it and the machine leaves a choice.
    pub fn advertised(&self, listening: SocketAddr) -> Result<PeerAddress, AdvertiseError> {
        match &self.advertise {
            Some(address) => Ok(address.clone()),
            None => advertise::reached_at(listening),
        }
    }

    /// The node's sockets: `grpc`, and the one for those who run the cluster.
    ///
    /// # Errors
    /// Where it cannot listen there.
    pub async fn listen(&self, grpc: SocketAddr) -> Result<NodeListeners, ListenError> {
        let at = async |address| TcpListener::bind(address).await.map_err(|source| ListenError { address, source });
        let admin = match self.admin {
            Some(address) => Some(at(address).await?),
            None => None,
        };
        Ok(NodeListeners { grpc: at(grpc).await?, admin })
    }

    /// How long the engine may take for a step.
    pub fn step_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.step_timeout)
    }

    /// How long sequences are still taken at a drain.
    pub fn drain_delay(&self) -> Duration {
        Duration::from_secs_f64(self.drain_delay)
    }

    /// How long running sequences get at a drain.
    pub fn drain_timeout(&self) -> Duration {
        Duration::from_secs(self.drain_timeout)
    }
}

/// A socket that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}")]
pub struct ListenError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Token positions in a block.
fn parse_block_tokens(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(tokens) if (16..=256).contains(&tokens) && tokens % 16 == 0 => Ok(tokens),
        _ => Err(format!("'{text}' is no block size: use a multiple of 16 from 16 to 256")),
    }
}

/// Seconds of a step.
fn parse_step_timeout(text: &str) -> Result<f64, String> {
    parse_seconds(text)
        .and_then(|seconds| if seconds >= 0.1 { Ok(seconds) } else { Err(format!("'{text}' is too short for a step: 0.1 s is the least")) })
}

/// The sockets of a node.
pub struct NodeListeners {
    /// gRPC.
    pub grpc: TcpListener,
    /// For those who run the cluster: see [`admin`](crate::admin).
    pub admin: Option<TcpListener>,
}

impl From<TcpListener> for NodeListeners {
    fn from(grpc: TcpListener) -> Self {
        Self { grpc, admin: None }
    }
}
