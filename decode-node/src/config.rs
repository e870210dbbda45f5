//! The decode node's flags.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, Parser};
use overfill_cluster::DiscoveryArgs;
use overfill_lifecycle::NodeArgs;
use overfill_lifecycle::telemetry::LogArgs;

/// Holds the decode model of a pair and writes answers.
#[derive(Parser, Clone, Debug)]
#[command(name = "decode-node", version)]
pub struct Cli {
    /// Where it listens (gRPC)
    #[arg(long, env = "OVERFILL_LISTEN", default_value = "127.0.0.1:7002")]
    pub listen: SocketAddr,
    /// The node's own settings.
    #[command(flatten)]
    pub config: DecodeConfig,
    /// Where nodes are found.
    #[command(flatten)]
    pub discovery: DiscoveryArgs,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

/// What a decode node needs to know.
#[derive(Args, Clone, Debug)]
pub struct DecodeConfig {
    /// What both kinds of node have.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Most sequences held at a time, waiting and running
    #[arg(long, env = "OVERFILL_MAX_SEQUENCES", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_sequences: u32,
    /// Most sequences in one decode step
    #[arg(long, env = "OVERFILL_MAX_BATCH", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_batch: u32,
    /// Seconds that a reservation is held without a frame of its KV cache
    #[arg(long, env = "OVERFILL_RESERVATION_TIMEOUT", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub reservation_timeout: u64,
}

impl DecodeConfig {
    /// How long a reservation is held without a frame.
    pub fn reservation_timeout(&self) -> Duration {
        Duration::from_secs(self.reservation_timeout)
    }
}
