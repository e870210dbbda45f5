//! What is asked when nodes are chosen, and what comes of it.

use std::sync::Arc;

use overfill_types::{Endpoint, Fingerprint, NodeId, Quality, Role};

use crate::needs::Lacks;
use crate::node::Work;

/// What is asked of the nodes.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Whose nodes may serve it.
    pub pair: &'a Fingerprint,
    /// Which models write: both, so a prefill and a decode node are wanted, or one alone, so one node is.
    pub quality: Quality,
    /// Whether the decode node gets work: not where the first token is all that is wanted.
    pub decodes: bool,
    /// Names of the prompt's blocks.
    pub keys: &'a [u64],
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// Most tokens of the answer.
    pub answer_tokens: usize,
    /// Nodes that are chosen only where there are no others.
    pub shunned: &'a [NodeId],
    /// Whether nodes without room are left out, as far as that is known.
    pub with_room: bool,
}

impl Ask<'_> {
    /// Tokens that a prefill node needs room for, if one is wanted.
    pub(crate) fn to_read(self) -> Option<usize> {
        match self.quality {
            Quality::Overfill => Some(self.prompt_tokens),
            Quality::Full => Some(self.prompt_tokens + self.answer_tokens),
            Quality::Decode => None,
        }
    }

    /// Tokens that a decode node needs room for, if one gets work.
    pub(crate) fn to_write(self) -> Option<usize> {
        (self.decodes && self.quality != Quality::Full).then_some(self.prompt_tokens + self.answer_tokens)
    }
}

/// Which half of the nodes is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absent {
    /// There is no prefill node.
    pub prefill: bool,
    /// There is no decode node.
    pub decode: bool,
}

/// What came of a choice.
#[derive(Debug)]
pub enum Choice {
    /// Two nodes.
    Two(NodePair),
    /// The one that is wanted.
    One(One),
    /// None has room now that is not held back for others.
    Full(Lacks),
    /// None will ever have room for this request.
    TooLarge(TooLarge),
    /// There are none.
    Absent(Absent),
}

/// Why no node will ever have room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// Of the nodes that are too small.
    pub role: Role,
    /// Tokens that the request needs room for there.
    pub tokens: usize,
    /// Tokens that the largest of them holds.
    pub largest: usize,
}

/// A prefill and a decode node for one attempt.
#[derive(Debug)]
pub struct NodePair {
    /// Reads the prompt.
    pub prefill: Arc<Endpoint>,
    /// Writes the answer.
    pub decode: Arc<Endpoint>,
    /// What is counted for it until it is given back.
    pub taken: Taken,
}

/// The node of an attempt at an answer that one model writes alone.
#[derive(Debug)]
pub struct One {
    /// Reads and writes.
    pub node: Arc<Endpoint>,
    /// What is counted for it until it is given back.
    pub taken: Taken,
}

/// What is counted for one attempt.
#[derive(Debug)]
#[must_use = "what is not given back is counted for ever"]
pub struct Taken {
    /// Of the prefill node.
    pub(crate) reading: Option<(u32, Work)>,
    /// Of the decode node.
    pub(crate) writing: Option<(u32, Work)>,
}
