//! What each node said last, and which nodes went lately.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use overfill_proto::v1::{NodeStatus, Phase};
use overfill_transport::node_status::HEARTBEAT;
use overfill_types::{Endpoint, NodeId};
use tokio::time::Instant;

use crate::overview::{Condition, Load, NodeState};

/// How long a node that went is told of.
const REMEMBERED: Duration = Duration::from_secs(60);
/// How many of them at most.
const MOST_REMEMBERED: usize = 32;
/// A node that was not heard for so long is silent: it has missed a heartbeat.
const QUIET: Duration = HEARTBEAT.saturating_mul(2);

/// The nodes that are listed, as far as they were heard, and those that went.
#[derive(Default)]
pub(crate) struct Nodes(Mutex<Books>);

#[derive(Default)]
struct Books {
    /// As many as the view has nodes.
    listed: HashMap<NodeId, Known>,
    /// The latest last: when each went, and what it was then.
    gone: VecDeque<(Instant, NodeState)>,
}

struct Known {
    endpoint: Endpoint,
    since: Instant,
    /// What it said last, and when.
    said: Option<(Instant, Phase, Load)>,
    /// Its stream has ended, or was never opened, since then.
    lost: bool,
}

impl Nodes {
    /// These nodes are listed now, and no others.
    pub(crate) fn listed(&self, view: &[Endpoint]) {
        let (mut books, now) = (self.lock(), Instant::now());
        let Books { listed, gone } = &mut *books;
        let here: HashSet<&NodeId> = view.iter().map(|node| &node.id).collect();
        listed.retain(|id, known| {
            let stays = here.contains(id);
            if !stays {
                let condition = if known.took_its_leave(now) { Condition::Left } else { Condition::Lost };
                gone.push_back((now, NodeState { condition, ..known.state(now) }));
            }
            stays
        });
        let surplus = gone.len().saturating_sub(MOST_REMEMBERED);
        gone.drain(..surplus);
        for node in view {
            gone.retain(|(_, state)| state.id != node.id);
            listed.entry(node.id.clone()).or_insert_with(|| Known { endpoint: node.clone(), since: now, said: None, lost: false });
        }
    }

    /// A node says what it holds.
    pub(crate) fn told(&self, node: &NodeId, status: &NodeStatus) {
        if let Some(known) = self.lock().listed.get_mut(node) {
            known.said = Some((Instant::now(), status.phase(), load(status)));
            known.lost = false;
        }
    }

    /// A node's stream has ended, or cannot be opened.
    pub(crate) fn lost(&self, node: &NodeId) {
        if let Some(known) = self.lock().listed.get_mut(node) {
            known.lost = true;
        }
    }

    /// All of them, by role and id; `suspected` says of which a request has failed lately.
    pub(crate) fn states(&self, suspected: impl Fn(&NodeId) -> bool) -> Vec<NodeState> {
        let (mut books, now) = (self.lock(), Instant::now());
        books.gone.retain(|(at, _)| now - *at < REMEMBERED);
        let listed = books.listed.values().map(|known| {
            let state = known.state(now);
            let condition =
                if state.condition == Condition::Ready && suspected(&state.id) { Condition::Suspected } else { state.condition };
            NodeState { condition, ..state }
        });
        let gone = books.gone.iter().map(|(at, state)| {
            let gone = (now - *at).as_secs_f64();
            NodeState { gone: Some(gone), heard: state.heard.map(|heard| heard + gone), ..state.clone() }
        });
        let mut states: Vec<NodeState> = listed.chain(gone).collect();
        states.sort_by(|a, b| (a.role, &a.id).cmp(&(b.role, &b.id)));
        states
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        // Each change is whole before anything in it can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn silent(&self, now: Instant) -> bool {
        self.lost || now - self.said.as_ref().map_or(self.since, |(at, ..)| *at) > QUIET
    }

    /// Whether it went in order: it drained, or was well when its entry was taken away, as it is where its withdrawal is known before
    /// its last word.
    fn took_its_leave(&self, now: Instant) -> bool {
        match &self.said {
            Some((_, Phase::Draining, _)) => true,
            Some((_, Phase::Failed, _)) | None => false,
            Some(_) => !self.silent(now),
        }
    }

    fn condition(&self, now: Instant) -> Condition {
        match &self.said {
            Some((_, Phase::Failed, _)) => Condition::Failed,
            // Its stream ends with that word.
            Some((_, Phase::Draining, _)) => Condition::Draining,
            _ if self.silent(now) => Condition::Silent,
            Some((_, Phase::Starting, _)) => Condition::Starting,
            Some(_) => Condition::Ready,
            None => Condition::New,
        }
    }

    fn state(&self, now: Instant) -> NodeState {
        let Endpoint { id, role, address, pairs, .. } = &self.endpoint;
        NodeState {
            id: id.clone(),
            role: *role,
            address: address.to_string(),
            models: pairs.iter().map(|pair| pair.model.clone()).collect(),
            condition: self.condition(now),
            heard: self.said.as_ref().map(|(at, ..)| (now - *at).as_secs_f64()),
            gone: None,
            load: self.said.as_ref().map(|(.., load)| load.clone()),
        }
    }
}

fn load(status: &NodeStatus) -> Load {
    Load {
        sequences: status.sequences,
        running: status.running,
        sequences_most: status.sequences_most,
        unread_tokens: status.unread_tokens,
        blocks: status.blocks_total,
        blocks_held: status.blocks_held,
        prefix_blocks: status.prefix_blocks,
        block_tokens: status.block_tokens,
        prefix_queries: status.prefix_queries,
        prefix_hits: status.prefix_hits,
        preempted: status.preempted,
    }
}

#[cfg(test)]
mod tests {
    use overfill_types::Role;
    use tokio::time::advance;

    use super::*;

    fn node(id: &str, role: Role) -> Endpoint {
        Endpoint { id: NodeId::new(id), role, address: "127.0.0.1:1".parse().unwrap(), pairs: vec![], max_context: 10 }
    }

    fn says(nodes: &Nodes, id: &str, phase: Phase) {
        let status = NodeStatus { phase: phase.into(), blocks_total: 8, blocks_held: 2, ..NodeStatus::default() };
        nodes.told(&NodeId::new(id), &status);
    }

    fn conditions(nodes: &Nodes) -> Vec<(String, Condition)> {
        nodes.states(|_| false).into_iter().map(|state| (state.id.to_string(), state.condition)).collect()
    }

    fn only(nodes: &Nodes) -> NodeState {
        let mut states = nodes.states(|_| false);
        assert_eq!(states.len(), 1, "{states:?}");
        states.remove(0)
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_is_what_it_says_until_it_is_not_heard() {
        let nodes = Nodes::default();
        nodes.listed(&[node("d", Role::Decode)]);
        assert_eq!((only(&nodes).condition, only(&nodes).load), (Condition::New, None));
        for (phase, condition) in [
            (Phase::Starting, Condition::Starting),
            (Phase::Ready, Condition::Ready),
            (Phase::Draining, Condition::Draining),
            (Phase::Failed, Condition::Failed),
        ] {
            says(&nodes, "d", phase);
            assert_eq!(only(&nodes).condition, condition);
        }
        says(&nodes, "d", Phase::Ready);
        assert_eq!(nodes.states(|id| id.as_str() == "d")[0].condition, Condition::Suspected);
        assert!((only(&nodes).load.unwrap().kv_fullness() - 0.25).abs() < 1e-9);
        nodes.lost(&NodeId::new("d"));
        assert_eq!(only(&nodes).condition, Condition::Silent, "at once: its connection broke");
        says(&nodes, "d", Phase::Ready);
        advance(HEARTBEAT).await;
        assert_eq!(only(&nodes).condition, Condition::Ready);
        advance(HEARTBEAT + Duration::from_millis(1)).await;
        assert_eq!((only(&nodes).condition, only(&nodes).heard.unwrap().floor()), (Condition::Silent, 2.0));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_went_is_told_of_for_a_while() {
        let nodes = Nodes::default();
        let all = ["killed", "drained", "withdrawn", "unheard"].map(|id| node(id, Role::Decode));
        nodes.listed(&all);
        ["killed", "withdrawn"].into_iter().for_each(|id| says(&nodes, id, Phase::Ready));
        says(&nodes, "drained", Phase::Draining);
        ["killed", "drained"].into_iter().for_each(|id| nodes.lost(&NodeId::new(id)));
        nodes.listed(&[]);
        let mut expected = [("drained", Condition::Left), ("killed", Condition::Lost), ("unheard", Condition::Lost)].to_vec();
        expected.push(("withdrawn", Condition::Left));
        let expected: Vec<_> = expected.into_iter().map(|(id, condition)| (id.to_owned(), condition)).collect();
        assert_eq!(conditions(&nodes), expected);
        advance(Duration::from_secs(12)).await;
        assert_eq!(nodes.states(|_| true).into_iter().map(|state| state.gone.unwrap()).collect::<Vec<_>>(), [12.0; 4]);
        // One comes back: a cut in the network is over.
        nodes.listed(&all[..1]);
        assert_eq!(conditions(&nodes)[1], ("killed".to_owned(), Condition::New));
        advance(REMEMBERED).await;
        assert_eq!(conditions(&nodes).len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_went_are_bounded_and_all_have_their_order() {
        let nodes = Nodes::default();
        let of = |role, range: std::ops::Range<usize>| range.map(move |i| node(&format!("{role}{i:04}"), role));
        for i in 0..100 {
            nodes.listed(&of(Role::Decode, i * 10..i * 10 + 10).collect::<Vec<_>>());
        }
        nodes.listed(&of(Role::Decode, 0..2).chain(of(Role::Prefill, 0..2)).collect::<Vec<_>>());
        let states = nodes.states(|_| false);
        assert_eq!(states.iter().filter(|state| state.gone.is_some()).count(), MOST_REMEMBERED);
        assert!(states.is_sorted_by_key(|state| (state.role, state.id.clone())));
        assert_eq!(states[0].role, Role::Prefill);
    }
}
