//! The nodes of each attempt at a request, at once or in its turn: the door of the scheduler, which decides.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use overfill_cluster::Snapshot;
use overfill_schedule::{
    Absent, Cluster, NodePair, One, Order, QueueLimits, QueueNumber, Refusal, Report, Scheduler, Submitted, Taken, TooLarge, Turn,
};
use overfill_transport::node_status::SILENCE;
use overfill_types::{Code, Endpoint, Fingerprint, NodeId, PairManifest, Quality, Role, ServiceError};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout};

/// The scheduler, shared by all requests.
#[derive(Clone)]
pub(crate) struct Pairing {
    shared: Arc<Mutex<Shared>>,
    numbers: Arc<AtomicU64>,
    /// For the names of prompts' blocks.
    seed: u64,
}

struct Shared {
    scheduler: Scheduler,
    view: watch::Receiver<Arc<Snapshot>>,
    waiting: HashMap<QueueNumber, oneshot::Sender<Result<Chosen, NoPair>>>,
    /// When any node was heard last.
    heard: Instant,
}

/// The nodes of one attempt. Dropping it tells that the attempt is over.
pub(crate) struct Chosen {
    pub(crate) nodes: Nodes,
    taken: Mutex<Option<Taken>>,
    pairing: Pairing,
}

/// What an attempt asks.
pub(crate) enum Nodes {
    /// One reads, the other writes.
    Both(Both),
    /// One does both.
    One(Arc<Endpoint>),
}

/// A prefill and a decode node of one pair.
pub(crate) struct Both {
    pub(crate) prefill: Arc<Endpoint>,
    pub(crate) decode: Arc<Endpoint>,
}

impl Nodes {
    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        match self {
            Self::Both(Both { prefill, decode }) => [Some(&**prefill), Some(&**decode)],
            Self::One(node) => [Some(&**node), None],
        }
        .into_iter()
        .flatten()
    }
}

/// Why there are no nodes for a request.
#[derive(Debug)]
pub(crate) enum NoPair {
    /// One half of them is missing.
    Absent,
    /// It may not wait, or has waited in vain.
    Refused(ServiceError),
}

impl Pairing {
    /// Of the nodes in `view`; at most `waiting` requests wait for room.
    pub(crate) fn new(view: watch::Receiver<Arc<Snapshot>>, waiting: usize) -> Self {
        let mut scheduler = Scheduler::new(Cluster::new(rand::random()), QueueLimits { waiting });
        scheduler.cluster_mut().update(&view.borrow().nodes, Instant::now().into_std());
        let shared = Shared { scheduler, view, waiting: HashMap::new(), heard: Instant::now() };
        Self { shared: Arc::new(Mutex::new(shared)), numbers: Arc::default(), seed: rand::random() }
    }

    /// Requests that wait for nodes, answers under way that look for others among them.
    pub(crate) fn held(&self) -> usize {
        self.lock().scheduler.held()
    }

    /// Requests that wait for room on nodes of a role.
    pub(crate) fn waiting_for(&self, role: Role) -> usize {
        self.lock().scheduler.waiting_for(role)
    }

    /// Requests that wait for nodes.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().scheduler.waiting()
    }

    /// A request's own number: its age among all, over all of its attempts.
    pub(crate) fn number(&self) -> QueueNumber {
        QueueNumber(self.numbers.fetch_add(1, Ordering::Relaxed))
    }

    /// Names of a prompt's blocks, which are shared with those of the same salt.
    pub(crate) fn keys(&self, salt: &str, prompt: &[u32]) -> Arc<[u64]> {
        overfill_schedule::keys(self.seed, salt, prompt).into()
    }

    /// Two nodes with room, in the request's turn; `again` where its turn brought nothing: then it is before those that have not
    /// had theirs.
    ///
    /// # Errors
    /// See [`NoPair`].
    pub(crate) async fn turn(&self, order: Order, number: QueueNumber, again: bool) -> Result<Chosen, NoPair> {
        let now = Instant::now().into_std();
        let left = order.until.saturating_duration_since(now);
        let turn = {
            let mut shared = self.lock();
            match shared.scheduler.submit(order, number, again, now) {
                Submitted::Now(turn) => Err(turn),
                Submitted::Refused(refusal) => return Err(NoPair::Refused(refused(refusal))),
                Submitted::Waits => {
                    let (sender, turn) = oneshot::channel();
                    shared.waiting.insert(number, sender);
                    Ok(turn)
                }
            }
        };
        let turn = match turn {
            Ok(turn) => turn,
            Err(turn) => return self.given(turn),
        };
        let _waiting = Waiting { pairing: self, number };
        if again {
            // What is held back may be so for those behind it.
            self.serve();
        }
        match timeout(left, turn).await {
            Ok(Ok(given)) => given,
            _ => {
                let message = format!("the cluster is full: no node had room within {:.1} s; try again later", left.as_secs_f64());
                Err(NoPair::Refused(ServiceError::new(Code::Unavailable, message).retry_after(Duration::from_secs(1))))
            }
        }
    }

    /// Two nodes at once, whether or not they have room.
    ///
    /// # Errors
    /// See [`NoPair`].
    pub(crate) fn at_once(&self, order: &Order) -> Result<Chosen, NoPair> {
        let turn = self.lock().scheduler.at_once(order, Instant::now().into_std());
        self.given(turn)
    }

    /// An answer that is under way begins to look for nodes anew. Until what is given is dropped, nobody who waits or comes gets
    /// the nodes that write it: it is older, and was taken on.
    pub(crate) fn right_of_way(&self, order: &Order, number: QueueNumber) -> RightOfWay {
        self.lock().scheduler.resumes(order, number);
        RightOfWay { pairing: self.clone(), number }
    }

    fn given(&self, turn: Turn) -> Result<Chosen, NoPair> {
        match turn {
            Turn::Two(NodePair { prefill, decode, taken }) => Ok(self.chosen(Nodes::Both(Both { prefill, decode }), taken)),
            Turn::One(One { node, taken }) => Ok(self.chosen(Nodes::One(node), taken)),
            Turn::Absent(_) => Err(NoPair::Absent),
            Turn::TooLarge(TooLarge { role, tokens, largest }) => {
                let message = format!(
                    "prompt and max_tokens need a KV cache for {tokens} tokens, and that of the largest {role} node holds {largest}: ask for fewer"
                );
                Err(NoPair::Refused(ServiceError::new(Code::InvalidArgument, message)))
            }
        }
    }

    fn chosen(&self, nodes: Nodes, taken: Taken) -> Chosen {
        Chosen { nodes, taken: Mutex::new(Some(taken)), pairing: self.clone() }
    }

    /// Gives those who wait their turn, as far as there is room.
    pub(crate) fn serve(&self) {
        let turns: Vec<_> = {
            let mut shared = self.lock();
            let turns = shared.scheduler.turns(Instant::now().into_std());
            turns.into_iter().filter_map(|(number, turn)| Some((shared.waiting.remove(&number)?, turn))).collect()
        };
        for (waiting, turn) in turns {
            // One that has gone just now drops what it is given, which gives it back.
            let _ = waiting.send(self.given(turn));
        }
    }

    /// What a node says of itself.
    pub(crate) fn told(&self, node: &NodeId, report: Report) {
        {
            let (mut shared, now) = (self.lock(), Instant::now());
            shared.heard = now;
            shared.scheduler.cluster_mut().told(node, report, now.into_std());
        }
        self.serve();
    }

    /// A node has answered.
    pub(crate) fn hears(&self) {
        self.lock().heard = Instant::now();
    }

    /// Whether no node has been heard for longer than any is silent: then it is this router that is cut off.
    pub(crate) fn hears_nobody(&self) -> bool {
        self.lock().heard.elapsed() > SILENCE
    }

    /// Leaves a node alone for a while.
    pub(crate) fn suspect(&self, node: &NodeId) {
        tracing::warn!(%node, "node failed: left alone for a while");
        self.lock().scheduler.cluster_mut().suspect(node, Instant::now().into_std());
    }

    /// Whether a node is left alone.
    pub(crate) fn suspects(&self, node: &NodeId) -> bool {
        self.lock().scheduler.cluster().suspects(node, Instant::now().into_std())
    }

    /// Which half of a pair's nodes is missing of those that `quality` wants, as a sentence; empty if none is.
    pub(crate) fn missing(&self, pair: &PairManifest, quality: Quality) -> String {
        let what = match self.lock().scheduler.cluster().absent(&pair.fingerprint, quality) {
            None => return String::new(),
            Some(Absent { prefill: true, decode: true }) => "no prefill node and no decode node",
            Some(Absent { prefill: true, .. }) => "no prefill node",
            Some(Absent { .. }) => "no decode node",
        };
        format!("{what} of model {} (pair {}) is ready", pair.name, pair.fingerprint.short())
    }

    /// Whether both halves of a pair have nodes.
    pub(crate) fn has_all(&self, pair: &Fingerprint) -> bool {
        self.lock().scheduler.cluster().absent(pair, Quality::Overfill).is_none()
    }

    /// Longest sequence that a pair's nodes take now, in tokens; `None` where there are none.
    pub(crate) fn max_context(&self, pair: &Fingerprint) -> Option<usize> {
        let shared = self.lock();
        let cluster = shared.scheduler.cluster();
        [Role::Prefill, Role::Decode].into_iter().filter_map(|role| cluster.max_context(role, pair)).min()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // Each change of the scheduler is whole before anything in it can panic.
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.view.has_changed().unwrap_or(false) {
            let Shared { scheduler, view, .. } = &mut *shared;
            scheduler.cluster_mut().update(&view.borrow_and_update().nodes, Instant::now().into_std());
        }
        shared
    }
}

/// A request that waits; dropping it gives up its place.
struct Waiting<'a> {
    pairing: &'a Pairing,
    number: QueueNumber,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut shared = self.pairing.lock();
            shared.scheduler.cancel(self.number);
            shared.waiting.remove(&self.number)
        };
        // The one behind it may fit where it did not.
        if waiting.is_some() {
            self.pairing.serve();
        }
    }
}

/// The right of way of an answer that looks for nodes; dropping it gives it up.
pub(crate) struct RightOfWay {
    pairing: Pairing,
    number: QueueNumber,
}

impl Drop for RightOfWay {
    fn drop(&mut self) {
        self.pairing.lock().scheduler.resumed(self.number);
        self.pairing.serve();
    }
}

impl Chosen {
    /// The prompt was read, so its node has room for another.
    pub(crate) fn read(&self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = &mut *taken {
            self.pairing.lock().scheduler.cluster_mut().read(taken);
            self.pairing.serve();
        }
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        if let Some(taken) = self.taken.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            self.pairing.lock().scheduler.cluster_mut().release(taken);
            self.pairing.serve();
        }
    }
}

/// A full cluster, as it is told.
fn refused(refusal: Refusal) -> ServiceError {
    let (message, retry) = match refusal {
        Refusal::Crowded { waiting, retry } => {
            (format!("the cluster is full and {waiting} requests wait, the most: try again later"), retry)
        }
        Refusal::Late { expected } => {
            let message = format!(
                "the cluster is full: this request's turn would be in {:.1} s, too late for it; try again later",
                expected.as_secs_f64()
            );
            (message, expected)
        }
    };
    ServiceError::new(Code::Unavailable, message).retry_after(retry)
}

#[cfg(test)]
mod tests {
    use overfill_schedule::Share;
    use overfill_types::ServedPair;

    use super::*;

    fn view() -> (watch::Sender<Arc<Snapshot>>, Pairing) {
        let node = |id: &str, role| Endpoint {
            id: NodeId::new(id),
            role,
            address: "127.0.0.1:1".parse().unwrap(),
            pairs: vec![ServedPair { model: "m".into(), fingerprint: Fingerprint::new("ours") }],
            max_context: 10,
        };
        let (sender, view) = watch::channel(Arc::new(Snapshot::new([node("p", Role::Prefill), node("d", Role::Decode)])));
        let pairing = Pairing::new(view, 2);
        pairing.told(&NodeId::new("d"), Report { sequences_most: 1, ..Report::default() });
        (sender, pairing)
    }

    fn order(wait: Duration) -> Order {
        Order {
            pair: Fingerprint::new("ours"),
            quality: Quality::Overfill,
            decodes: true,
            keys: Arc::new([]),
            prompt_tokens: 4,
            answer_tokens: 4,
            share: Share { client: 0, weight: 1, class: 0 },
            priority: 0,
            until: Instant::now().into_std() + wait,
            shunned: vec![],
        }
    }

    async fn turn(pairing: &Pairing, wait: Duration) -> Result<Chosen, NoPair> {
        pairing.turn(order(wait), pairing.number(), false).await
    }

    #[tokio::test]
    async fn who_waits_gets_what_is_given_back() {
        let (_view, pairing) = view();
        let first = turn(&pairing, Duration::ZERO).await.ok().unwrap();
        let second = tokio::spawn({
            let pairing = pairing.clone();
            async move { turn(&pairing, Duration::from_secs(60)).await.is_ok() }
        });
        while pairing.lock().waiting.is_empty() {
            tokio::task::yield_now().await;
        }
        drop(first);
        assert!(second.await.unwrap());
        assert!(turn(&pairing, Duration::ZERO).await.is_ok(), "given back by the second");
    }

    #[tokio::test]
    async fn an_answer_under_way_goes_before_who_waits() {
        let (_view, pairing) = view();
        let attempt = turn(&pairing, Duration::ZERO).await.ok().unwrap();
        let waits = tokio::spawn({
            let pairing = pairing.clone();
            async move { turn(&pairing, Duration::from_secs(60)).await.is_ok() }
        });
        while pairing.lock().waiting.is_empty() {
            tokio::task::yield_now().await;
        }
        let right_of_way = pairing.right_of_way(&order(Duration::ZERO), pairing.number());
        drop(attempt);
        assert_eq!(pairing.lock().waiting.len(), 1, "the room that it left is its own");
        let next = pairing.at_once(&order(Duration::ZERO)).ok().unwrap();
        drop(right_of_way);
        assert_eq!(pairing.lock().waiting.len(), 1, "it has the room");
        drop(next);
        assert!(waits.await.unwrap());
    }

    #[tokio::test]
    async fn who_leaves_or_waits_in_vain_leaves_nothing() {
        let (view, pairing) = view();
        let first = turn(&pairing, Duration::ZERO).await.ok().unwrap();
        for _ in 0..5 {
            assert!(matches!(turn(&pairing, Duration::from_millis(5)).await, Err(NoPair::Refused(e)) if e.code == Code::Unavailable));
            let left = tokio::time::timeout(Duration::from_millis(5), turn(&pairing, Duration::from_secs(60))).await;
            assert!(left.is_err());
        }
        assert!(pairing.lock().waiting.is_empty() && pairing.lock().scheduler.waiting() == 0);
        drop(first);
        view.send_replace(Arc::default());
        assert!(matches!(turn(&pairing, Duration::ZERO).await, Err(NoPair::Absent)));
    }
}
