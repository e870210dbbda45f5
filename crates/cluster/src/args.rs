//! Flags that say where nodes are found; every server has them.

use std::time::Duration;

use clap::Args;
use overfill_types::{AddressError, PeerAddress};

use crate::discovery::Discovery;
use crate::etcd::EtcdSettings;

/// Where nodes are found: etcd, or a fixed list of addresses.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Discovery")]
pub struct DiscoveryArgs {
    /// etcd's members, host:port, separated by commas. It may come up later
    #[arg(long, env = "OVERFILL_ETCD", value_delimiter = ',', value_parser = parse_endpoint, conflicts_with_all = ["prefill_nodes", "decode_nodes"])]
    pub etcd: Vec<PeerAddress>,
    /// Name of this cluster in etcd; nodes of other clusters are not seen
    #[arg(long, env = "OVERFILL_CLUSTER", default_value = "default")]
    pub cluster: String,
    /// Seconds after which a node that died is no longer listed in etcd
    #[arg(long, env = "OVERFILL_LEASE_TTL", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub lease_ttl: u64,
    /// Without etcd: the prefill nodes, host:port, separated by commas
    #[arg(long, env = "OVERFILL_PREFILL_NODES", value_delimiter = ',')]
    pub prefill_nodes: Vec<PeerAddress>,
    /// Without etcd: the decode nodes, host:port, separated by commas
    #[arg(long, env = "OVERFILL_DECODE_NODES", value_delimiter = ',')]
    pub decode_nodes: Vec<PeerAddress>,
}

impl DiscoveryArgs {
    /// The source that the flags name: etcd, else the fixed list (which for a node may be empty: it is on the router's).
    /// Nothing needs to be up yet.
    pub fn connect(&self) -> Discovery {
        if self.etcd.is_empty() {
            return Discovery::fixed(self.prefill_nodes.clone(), self.decode_nodes.clone());
        }
        Discovery::etcd(EtcdSettings {
            endpoints: self.etcd.clone(),
            cluster: self.cluster.clone(),
            lease_ttl: Duration::from_secs(self.lease_ttl),
        })
    }
}

/// `host:port` of a member of etcd, or the same as etcd's own tools write it: `http://host:port`.
fn parse_endpoint(text: &str) -> Result<PeerAddress, AddressError> {
    text.strip_prefix("http://").unwrap_or(text).parse()
}
