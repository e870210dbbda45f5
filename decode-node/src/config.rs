//! The decode node's flags.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser};
use overfill_cluster::DiscoveryArgs;
use overfill_lifecycle::telemetry::LogArgs;
use overfill_model::Placement;
use overfill_node::NodeArgs;

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
    /// The pair's folder (made by `overfill pair` or `overfill fetch`)
    #[arg(long, env = "OVERFILL_PAIR")]
    pub pair: PathBuf,
    /// What both kinds of node have.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Most sequences held at a time, waiting and running
    #[arg(long, env = "OVERFILL_MAX_SEQUENCES", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_sequences: u32,
    /// Most sequences in one decode step
    #[arg(long, env = "OVERFILL_MAX_BATCH", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_batch: u32,
    /// How many times over the KV cache's blocks are promised, 1 or more: 1 means that no running sequence is ever preempted
    // Most answers end long before max_tokens; those that then find no block are preempted, and go on later or elsewhere.
    #[arg(long, env = "OVERFILL_KV_OVERCOMMIT", default_value_t = 2.0, value_parser = parse_overcommit)]
    pub kv_overcommit: f64,
    /// Nice value of the compute threads: above 0, threads that pass on tokens or frames do not wait for their time slices (Linux)
    #[arg(long, env = "OVERFILL_NICE", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=19))]
    pub nice: u8,
    /// Seconds that a reservation is held without a frame of its KV cache
    #[arg(long, env = "OVERFILL_RESERVATION_TIMEOUT", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub reservation_timeout: u64,
}

impl DecodeConfig {
    /// Where its compute threads run.
    pub(crate) fn placement(&self) -> Placement {
        Placement { cpus: self.node.cpus.clone(), nice: self.nice }
    }

    /// How long a reservation is held without a frame.
    pub fn reservation_timeout(&self) -> Duration {
        Duration::from_secs(self.reservation_timeout)
    }
}

fn parse_overcommit(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(ratio) if (1.0..=1e6).contains(&ratio) => Ok(ratio),
        _ => Err(format!("'{text}' is no overcommit: write a ratio from 1 on")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overcommit_is_one_or_more() {
        assert_eq!(parse_overcommit("1"), Ok(1.0));
        assert_eq!(parse_overcommit("2.5"), Ok(2.5));
        for text in ["", "x", "0.9", "-2", "NaN", "inf"] {
            assert!(parse_overcommit(text).is_err(), "{text}");
        }
    }
}
