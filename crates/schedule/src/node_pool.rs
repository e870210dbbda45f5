//! The nodes that a request for one pair may get for one of its two roles.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use overfill_types::Fingerprint;

use crate::node::{Lately, Node};
use crate::prefix_index::PrefixIndex;

/// Nodes of one role and pair.
#[derive(Debug)]
pub(crate) struct NodePool {
    pub(crate) members: Vec<u32>,
    pub(crate) prefixes: PrefixIndex,
    /// Tokens that all of them were given to read.
    pub(crate) lately: Lately,
    /// The longest sequence that all of them take.
    pub(crate) max_context: usize,
    /// Pairs that they serve: pools of these have nodes in common.
    pub(crate) pairs: HashSet<Fingerprint>,
}

impl NodePool {
    /// Without nodes.
    pub(crate) fn new(now: Instant) -> Self {
        Self { members: Vec::new(), prefixes: PrefixIndex::default(), lately: Lately::new(now), max_context: 0, pairs: HashSet::new() }
    }

    /// Takes from the `nodes` what holds for all members.
    pub(crate) fn members_changed(&mut self, nodes: &HashMap<u32, Node>) {
        let members = || self.members.iter().filter_map(|member| nodes.get(member)).map(|node| &node.endpoint);
        let longest = members().map(|endpoint| endpoint.max_context).min().unwrap_or(0);
        let pairs = members().flat_map(|endpoint| &endpoint.pairs).map(|pair| pair.fingerprint.clone()).collect();
        (self.max_context, self.pairs) = (longest, pairs);
    }
}
