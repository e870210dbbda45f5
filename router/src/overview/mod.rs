//! The cluster as this router sees it at one moment: what `/cluster` answers, for the page and for `overfill top`.
//!
//! It is put together of what the router has anyway when somebody asks: what nodes say of themselves (`nodes`), the handoffs that it
//! saw last (`handoffs`), the scheduler's books and the counters. A request adds one entry to a bounded list, and nothing else.
//!
//! **Invariant:** no prompt, no answer and no client's name stands in it. What is not known is `null`, not a guess.

mod handoffs;
mod nodes;

use std::collections::BTreeMap;

use overfill_types::{NodeId, Role};
use serde::{Deserialize, Serialize};

pub(crate) use crate::overview::handoffs::{Handoffs, Seen};
pub(crate) use crate::overview::nodes::Nodes;

use crate::Router;

/// The cluster as one router sees it. All spans are in seconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Overview {
    /// The router itself.
    pub router: RouterState,
    /// The models that it serves.
    pub models: Vec<ModelState>,
    /// Its nodes, and those that were lost or have left lately; by role and id.
    pub nodes: Vec<NodeState>,
    /// The handoffs that came about last, the latest first.
    pub handoffs: Vec<HandoffState>,
}

/// What a router says of itself. It counts since its start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterState {
    /// Its version.
    pub version: String,
    /// For how long it runs.
    pub uptime: f64,
    /// What keeps it from serving; `None` where it can.
    pub unready: Option<String>,
    /// Whether etcd or the Kubernetes API answers; `None` where nodes are found by neither.
    pub discovery: Option<bool>,
    /// Requests under way, those that wait among them.
    pub requests: usize,
    /// Requests that wait for room on the nodes.
    pub waiting: usize,
    /// Answers that ended with an error, by reason.
    pub failed: BTreeMap<String, u64>,
    /// Requests that were refused before any node was asked, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Attempts that failed, by reason; most answers went on with another.
    pub attempts_failed: BTreeMap<String, u64>,
}

/// What was asked of a model since the router's start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelState {
    /// Its name, as clients ask for it.
    pub name: String,
    /// Of its pair.
    pub fingerprint: String,
    /// Answers that nodes work on.
    pub running: u64,
    /// Answers that came to their end.
    pub finished: u64,
    /// Answers whose client has gone.
    pub cancelled: u64,
    /// Tokens of prompts that were read.
    pub prompt_tokens: u64,
    /// Of these, found in the prefill node's prefix cache.
    pub cached_tokens: u64,
    /// Tokens of answers.
    pub generation_tokens: u64,
}

/// Where a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// It says that it is ready.
    Ready,
    /// It is listed, and has said nothing yet.
    New,
    /// It is starting.
    Starting,
    /// It failed a request lately, and is left alone for a moment where there are others.
    Suspected,
    /// It finishes what it has, and takes nothing new.
    Draining,
    /// It said that it cannot go on.
    Failed,
    /// It is listed, and is not heard any more.
    Silent,
    /// It is not listed any more, and did not take its leave.
    Lost,
    /// It is not listed any more, after a drain.
    Left,
}

impl Condition {
    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::New => "new",
            Self::Starting => "starting",
            Self::Suspected => "suspected",
            Self::Draining => "draining",
            Self::Failed => "failed",
            Self::Silent => "silent",
            Self::Lost => "lost",
            Self::Left => "left",
        }
    }

    /// Whether a person should look: it ought to serve, and does not.
    pub fn is_down(self) -> bool {
        matches!(self, Self::Failed | Self::Silent | Self::Lost)
    }
}

/// One node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeState {
    /// This run of its process.
    pub id: NodeId,
    /// Which half of a pair it holds.
    pub role: Role,
    /// Where its peers reach it.
    pub address: String,
    /// The models that it serves.
    pub models: Vec<String>,
    /// Where it stands.
    pub condition: Condition,
    /// How long ago it was heard last; `None` where it never was.
    pub heard: Option<f64>,
    /// How long ago it left the view; `None` while it is there.
    pub gone: Option<f64>,
    /// What it said last.
    pub load: Option<Load>,
}

/// What a node says of its load. It counts since its start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Sequences that it holds, of all routers.
    pub sequences: u32,
    /// Of these, computing.
    pub running: u32,
    /// Most sequences that it holds.
    pub sequences_most: u32,
    /// Prompt tokens that it holds and has not read yet.
    pub unread_tokens: u64,
    /// Blocks of its KV cache.
    pub blocks: u64,
    /// Of these, held by sequences.
    pub blocks_held: u64,
    /// Blocks that are kept for prompts that begin alike.
    pub prefix_blocks: u64,
    /// Token positions in a block.
    pub block_tokens: u32,
    /// Prompt tokens that were looked up in its prefix cache.
    pub prefix_queries: u64,
    /// Of these, found.
    pub prefix_hits: u64,
    /// Sequences that lost their blocks to older ones.
    pub preempted: u64,
}

impl Load {
    /// Part of the KV cache that sequences hold, from 0 to 1.
    pub fn kv_fullness(&self) -> f64 {
        self.blocks_held as f64 / self.blocks.max(1) as f64
    }
}

/// A KV cache that a decode node has proved to be whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HandoffState {
    /// Its number among all that this router saw, from 1.
    pub number: u64,
    /// How long ago the router learned of it.
    pub ago: f64,
    /// The model's name.
    pub model: String,
    /// The prefill node.
    pub from: NodeId,
    /// The decode node.
    pub to: NodeId,
    /// Which attempt at its request it belongs to, from 1.
    pub attempt: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the prefill node's prefix cache; `None` where it had not said.
    pub cached_tokens: Option<u32>,
    /// Of these, held by the decode node already: they were not sent.
    pub held_tokens: u32,
    /// Bytes of keys and values that were sent.
    pub bytes: u64,
    /// From the first frame to the decode node's acknowledgement.
    pub transfer: f64,
    /// From the full model's last layer to the acknowledgement: what the handoff added.
    pub tail: f64,
}

impl Router {
    /// The cluster as this router sees it now.
    pub(crate) fn overview(&self) -> Overview {
        let models = self.models.iter().map(|model| self.metrics.state(&model.manifest));
        Overview {
            router: RouterState {
                version: env!("CARGO_PKG_VERSION").into(),
                uptime: self.begun.elapsed().as_secs_f64(),
                unready: self.ready().err(),
                discovery: self.discovery.connected(),
                requests: self.under_way(),
                waiting: self.pairing.waiting(),
                failed: self.metrics.failures(),
                refused: self.metrics.refusals(),
                attempts_failed: self.metrics.failed_attempts(),
            },
            models: models.collect(),
            nodes: self.nodes.states(|node| self.pairing.suspects(node)),
            handoffs: self.handoffs.latest(),
        }
    }
}
