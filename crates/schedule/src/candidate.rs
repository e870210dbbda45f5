//! Which nodes a choice looks at, and which of them is best.

use std::collections::HashMap;
use std::time::Instant;

use overfill_types::Quality;
use rand::Rng;
use rand::rngs::SmallRng;

use crate::choice::Ask;
use crate::needs::HeldBack;
use crate::node::{Node, Room};
use crate::node_pool::NodePool;
use crate::prefix_index::{BLOCK, Matches};

/// Prefill nodes that are looked at beside those that hold most of the prompt; smaller pools are looked at whole.
const LOOKED_AT: usize = 8;
/// Decode nodes that are looked at further where the two that were drawn have no room or have failed.
const FURTHER: usize = 6;
/// What tokens that were given lately count beside tokens that wait: they decide where the rest is nearly equal. What a node was
/// given above the mean counts whole, so that it is relieved even of what it holds; a chat that is alone still stays, since
/// its node was given no more than it holds.
const LATELY: f64 = 0.1;
/// How much fuller a decode node may be that holds a prompt already.
const AFFINITY: f64 = 0.15;
/// Tokens held for which half of [`AFFINITY`] is granted: some milliseconds of a handoff.
const WORTH_IT: f64 = 512.0;

/// What a choice looks at.
pub(crate) struct View<'a> {
    pub(crate) nodes: &'a HashMap<u32, Node>,
    pub(crate) ask: &'a Ask<'a>,
    /// Nodes of these have no room for who asks.
    pub(crate) held_back: &'a HeldBack,
    pub(crate) now: Instant,
}

/// A node that may be chosen: the least is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) node: u32,
    pub(crate) rank: Rank,
    cost: f64,
    /// Tokens of the prompt that it holds.
    pub(crate) held: usize,
}

/// What comes before a node's cost, the weightiest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    /// It failed lately.
    suspect: bool,
    pub(crate) room: Room,
    /// This request has tried it.
    tried: bool,
}

impl Candidate {
    fn better(self, than: Option<Self>) -> bool {
        than.is_none_or(|than| self.rank.cmp(&than.rank).then(self.cost.total_cmp(&than.cost)).is_lt())
    }

    /// Whether nothing speaks against it.
    fn good(&self) -> bool {
        self.rank == Rank { suspect: false, room: Room::Now, tried: false }
    }
}

impl View<'_> {
    /// By what it holds of the prompt against what it has to read before.
    pub(crate) fn prefill(&self, pool: &NodePool, rng: &mut SmallRng) -> Option<Candidate> {
        let matches = pool.prefixes.matches(self.ask.keys);
        let mean = pool.lately.at(self.now) / pool.members.len() as f64;
        let look = |number: u32| {
            let node = self.nodes.get(&number)?;
            // The last token is read anyway.
            let held = (matches.of(number) * BLOCK).min(self.ask.prompt_tokens.saturating_sub(1));
            let unread = self.ask.prompt_tokens - held;
            let (queue, room) = node.reading(self.ask.to_read().unwrap_or(0), unread, self.now);
            let room = self.left_over(node, room);
            let lately = node.lately.at(self.now);
            let cost = queue + unread as f64 + lately * LATELY + (lately - mean).max(0.0);
            Some(Candidate { node: number, rank: self.rank(node, room), cost, held })
        };
        let first = rng.random_range(0..pool.members.len());
        let drawn: Vec<u32> = match pool.members.len() {
            // Another one first each time, so that equals take turns.
            all @ ..=LOOKED_AT => (0..all).map(|i| pool.members[(first + i) % all]).collect(),
            all => (0..LOOKED_AT).map(|_| pool.members[rng.random_range(0..all)]).collect(),
        };
        best(matches.nodes().chain(drawn).filter_map(look))
    }

    /// By its room, of two that are drawn and those that hold the prompt already.
    pub(crate) fn decode(&self, pool: &NodePool, rng: &mut SmallRng) -> Option<Candidate> {
        let takes_over = self.ask.decodes && self.ask.quality == Quality::Overfill;
        let matches = if takes_over { pool.prefixes.matches(self.ask.keys) } else { Matches::default() };
        let look = |number: u32| {
            let node = self.nodes.get(&number)?;
            let held = matches.of(number) * BLOCK;
            let (fullness, room) = match self.ask.to_write() {
                Some(tokens) => {
                    let (fullness, room) = node.writing(tokens, held, self.now);
                    (fullness, self.left_over(node, room))
                }
                None => (0.0, Room::Now),
            };
            let saved = AFFINITY * held as f64 / (held as f64 + WORTH_IT);
            Some(Candidate { node: number, rank: self.rank(node, room), cost: fullness - saved, held })
        };
        let all = pool.members.len();
        let first = rng.random_range(0..all);
        let second = if all > 1 { (first + 1 + rng.random_range(0..all - 1)) % all } else { first };
        let two = [pool.members[first], pool.members[second]];
        let found = best(matches.nodes().chain(two).filter_map(look));
        if all <= 2 || found.is_some_and(|c| c.good()) {
            return found;
        }
        let further = (1..=FURTHER.min(all)).map(|i| match all {
            ..=FURTHER => pool.members[(first + i) % all],
            _ => pool.members[rng.random_range(0..all)],
        });
        best(found.into_iter().chain(further.filter_map(look)))
    }

    /// The room that others leave.
    fn left_over(&self, node: &Node, room: Room) -> Room {
        if self.held_back.node(&node.endpoint) { room.max(Room::Later) } else { room }
    }

    fn rank(&self, node: &Node, room: Room) -> Rank {
        let suspect = node.suspected(self.now);
        let tried = self.ask.shunned.contains(&node.endpoint.id);
        // Who waits for room takes it where it is, and where that refused before asks again: nobody waits behind it meanwhile.
        if self.ask.with_room { Rank { suspect, room, tried } } else { Rank { suspect: suspect || tried, room, tried: false } }
    }
}

/// The first of the best.
fn best(candidates: impl Iterator<Item = Candidate>) -> Option<Candidate> {
    candidates.fold(None, |best, candidate| if candidate.better(best) { Some(candidate) } else { best })
}
