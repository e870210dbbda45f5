//! Flags that both kinds of node have.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use overfill_types::PeerAddress;
use tokio::net::TcpListener;

use crate::advertise::{self, AdvertiseError};
use crate::metrics::NodeListeners;

/// What a node holds, where it listens, and what it may use.
#[derive(Args, Clone, Debug)]
pub struct NodeArgs {
    /// Where peers reach this node, HOST:PORT [default: the address that it listens on; if that is every address of the
    /// machine, the one that is not loopback]
    #[arg(long, env = "OVERFILL_ADVERTISE", value_name = "HOST:PORT")]
    pub advertise: Option<PeerAddress>,
    /// Where it answers scrapes of Prometheus (HTTP, /metrics) [default: nowhere]
    #[arg(long, env = "OVERFILL_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
    /// Compute threads [default: one for each of --cpus, or for each core]
    #[arg(long, env = "OVERFILL_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Cores that this process keeps to, separated by commas; each compute thread gets one of its own [default: any]
    #[arg(long, env = "OVERFILL_CPUS", value_delimiter = ',')]
    pub cpus: Vec<usize>,
    /// Where the model computes: cpu or cuda:N
    #[arg(long, env = "OVERFILL_DEVICE", default_value = "cpu")]
    pub device: String,
    /// Memory of the KV cache in bytes; K, M and G are understood
    #[arg(long, env = "OVERFILL_KV_MEMORY", default_value = "1G", value_parser = parse_bytes)]
    pub kv_memory: u64,
    /// Token positions in a block of the KV cache: a multiple of 16
    #[arg(long, env = "OVERFILL_BLOCK_TOKENS", default_value_t = 16, value_parser = parse_block_tokens)]
    pub block_tokens: u32,
    /// Longest sequence, prompt and answer together, in tokens [default: the pair's, at most 8192]
    #[arg(long, env = "OVERFILL_MAX_CONTEXT")]
    pub max_context: Option<usize>,
    /// Seconds that running sequences get to finish after SIGTERM
    #[arg(long, env = "OVERFILL_DRAIN_TIMEOUT", default_value_t = 60)]
    pub drain_timeout: u64,
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

    /// Blocks of the pool, if a token position takes `bytes_per_token`; at least one.
    pub fn blocks(&self, bytes_per_token: usize) -> u32 {
        let block = bytes_per_token as u64 * u64::from(self.block_tokens);
        u32::try_from(self.kv_memory / block.max(1)).unwrap_or(u32::MAX).max(1)
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

    /// The node's sockets: `grpc`, and that of its metrics.
    ///
    /// # Errors
    /// Where it cannot listen there.
    pub async fn listen(&self, grpc: SocketAddr) -> Result<NodeListeners, ListenError> {
        let at = async |address| TcpListener::bind(address).await.map_err(|source| ListenError { address, source });
        let metrics = match self.metrics_listen {
            Some(address) => Some(at(address).await?),
            None => None,
        };
        Ok(NodeListeners { grpc: at(grpc).await?, metrics })
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

/// `1500`, `64K`, `512M`, `4G` (powers of 1024) as a number of bytes.
///
/// # Errors
/// A sentence that says what is understood.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.trim_end_matches(['B', 'b', 'i']).char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        Some((at, 'g' | 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("'{text}' is no size: write a number of bytes, or one with K, M or G behind it"))?;
    number.checked_mul(unit).filter(|bytes| *bytes > 0).ok_or_else(|| format!("'{text}' is no size that memory can have"))
}

/// A number of seconds, at most a day.
///
/// # Errors
/// A sentence that says what is understood.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!("'{text}' is no number of seconds from 0 to 86400")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_understood() {
        for (text, bytes) in [("1500", 1500), ("64K", 64 << 10), ("512m", 512 << 20), ("4G", 4 << 30), ("2GiB", 2 << 30)] {
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
        for text in ["", "G", "-1", "1.5G", "0", "99999999999G"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
