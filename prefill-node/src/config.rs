//! The prefill node's flags.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, Parser};
use overfill_cluster::DiscoveryArgs;
use overfill_lifecycle::telemetry::LogArgs;
use overfill_model::Placement;
use overfill_node::NodeArgs;
use overfill_types::flags::parse_seconds;

/// Holds the full model of a pair and reads prompts.
#[derive(Parser, Clone, Debug)]
#[command(name = "prefill-node", version)]
pub struct Cli {
    /// Where it listens (gRPC)
    #[arg(long, env = "OVERFILL_LISTEN", default_value = "127.0.0.1:7001")]
    pub listen: SocketAddr,
    /// The node's own settings.
    #[command(flatten)]
    pub config: PrefillConfig,
    /// Where nodes are found.
    #[command(flatten)]
    pub discovery: DiscoveryArgs,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

/// What a prefill node needs to know.
#[derive(Args, Clone, Debug)]
pub struct PrefillConfig {
    /// The pair's folder (made by `overfill pair` or `overfill fetch`), or those of several that have the same full model,
    /// separated by commas
    #[arg(long, env = "OVERFILL_PAIR", value_delimiter = ',', required = true)]
    pub pair: Vec<PathBuf>,
    /// What both kinds of node have.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Most prompt tokens in one forward pass, over all prompts
    #[arg(long, env = "OVERFILL_CHUNK_TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub chunk_tokens: u32,
    /// Of so many frames that go from GPU to GPU (--nccl on) one is read back and has a checksum of its rows; 0: none has
    #[arg(long, env = "OVERFILL_NCCL_CHECKSUMS", default_value_t = 64)]
    pub nccl_checksums: u32,
    /// Most prompts held at a time, waiting and running
    #[arg(long, env = "OVERFILL_MAX_QUEUE", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_queue: u32,
    /// Seconds of reading that routers let lie ready here, so that it is never idle; what comes beyond waits its turn with them.
    /// 0 leaves it at --max-queue
    #[arg(long, env = "OVERFILL_QUEUE_SECONDS", default_value_t = 0.25, value_parser = parse_seconds)]
    pub queue_seconds: f64,
    /// Nice value of the compute threads: above 0, threads that pass on tokens or frames do not wait for their time slices (Linux)
    #[arg(long, env = "OVERFILL_NICE", default_value_t = 10, value_parser = clap::value_parser!(u8).range(0..=19))]
    pub nice: u8,
    /// Whether KV blocks of prompts are kept for others that begin alike, while their memory is not needed: on or off
    #[arg(long, env = "OVERFILL_PREFIX_CACHE", default_value = "on", action = ArgAction::Set, value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub prefix_cache: bool,
}

impl PrefillConfig {
    /// Where its compute threads run.
    pub(crate) fn placement(&self) -> Placement {
        Placement { cpus: self.node.cpus.clone(), nice: self.nice }
    }
}
