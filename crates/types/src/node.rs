//! Nodes as others see them: what a node says of itself, and the view that the router has.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::address::PeerAddress;
use crate::id::{Fingerprint, NodeId};

/// Which half of the pair a node holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Holds the full model, reads prompts.
    Prefill,
    /// Holds the decode model, writes answers.
    Decode,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
        })
    }
}

/// What a ready node says of itself; the value stored under its key in etcd (JSON).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// This run of this process.
    pub id: NodeId,
    /// Which half of the pair it holds.
    pub role: Role,
    /// Where its peers reach its gRPC service.
    pub address: PeerAddress,
    /// The pairs that it serves: one, or for a prefill node several that have its full model.
    pub pairs: Vec<ServedPair>,
    /// Longest sequence it takes, prompt and answer together, in tokens.
    pub max_context: usize,
}

/// A pair, as nodes name it to each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedPair {
    /// Its name, as clients ask for it.
    pub model: String,
    /// Nodes of different fingerprints never work together.
    pub fingerprint: Fingerprint,
}

impl NodeInfo {
    /// Whether it serves this pair.
    pub fn serves(&self, fingerprint: &Fingerprint) -> bool {
        self.pairs.iter().any(|pair| pair.fingerprint == *fingerprint)
    }
}

/// A ready node that may be sent work.
pub type Endpoint = NodeInfo;
