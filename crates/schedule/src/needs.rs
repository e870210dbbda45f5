//! Which node pools a request needs room in, and which are held back for others.
//!
//! A pool is named by role and pair. Pools of several pairs may have nodes in common: a node of a pool that is held back is
//! held back in all of its pools.

use std::collections::HashSet;

use overfill_types::{Endpoint, Fingerprint, Quality, Role};

/// The node pools that a request needs room in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Needs {
    pub(crate) pair: Fingerprint,
    pub(crate) prefill: bool,
    pub(crate) decode: bool,
}

impl Needs {
    /// Of a request; where it `decodes` not, a decode node is named and gets no work.
    pub(crate) fn new(pair: &Fingerprint, quality: Quality, decodes: bool) -> Self {
        Self { pair: pair.clone(), prefill: quality != Quality::Decode, decode: decodes && quality != Quality::Full }
    }

    /// Their roles.
    pub(crate) fn roles(&self) -> impl Iterator<Item = Role> {
        [(Role::Prefill, self.prefill), (Role::Decode, self.decode)].into_iter().filter_map(|(role, needed)| needed.then_some(role))
    }
}

/// Node pools in which a request found no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lacks {
    pub(crate) prefill: bool,
    pub(crate) decode: bool,
}

impl Lacks {
    /// Adds what was found another time.
    pub(crate) fn and(self, other: Self) -> Self {
        Self { prefill: self.prefill || other.prefill, decode: self.decode || other.decode }
    }
}

/// Node pools that are held back.
#[derive(Debug, Default)]
pub(crate) struct HeldBack {
    prefill: HashSet<Fingerprint>,
    decode: HashSet<Fingerprint>,
}

impl HeldBack {
    /// Holds back those that a request of `pair` lacks.
    pub(crate) fn add(&mut self, pair: &Fingerprint, lacks: Lacks) {
        if lacks.prefill {
            self.prefill.insert(pair.clone());
        }
        if lacks.decode {
            self.decode.insert(pair.clone());
        }
    }

    pub(crate) fn clear(&mut self) {
        self.prefill.clear();
        self.decode.clear();
    }

    /// Whether a request that needs these has to wait.
    pub(crate) fn any_of(&self, needs: &Needs) -> bool {
        needs.roles().any(|role| self.of(role).contains(&needs.pair))
    }

    /// Whether a request that needs these waits for a node of `role`.
    pub(crate) fn role(&self, role: Role, needs: &Needs) -> bool {
        needs.roles().any(|needed| needed == role) && self.of(role).contains(&needs.pair)
    }

    /// Whether a node is in one of them.
    pub(crate) fn node(&self, node: &Endpoint) -> bool {
        let held = self.of(node.role);
        !held.is_empty() && node.pairs.iter().any(|pair| held.contains(&pair.fingerprint))
    }

    fn of(&self, role: Role) -> &HashSet<Fingerprint> {
        match role {
            Role::Prefill => &self.prefill,
            Role::Decode => &self.decode,
        }
    }
}
