//! The choice of nodes and the queue before it, together: who asks gets two nodes, its turn later, or a refusal, at once.
//!
//! Those who wait are looked at in the order of [`FairQueue`]. Who finds no room has the node pools in which it lacks room held
//! back: nobody behind it gets their nodes, so it is not starved by smaller ones, while requests that need only other nodes go
//! on. It keeps that claim until its turn, even to a pool that has room by then while another has not: two pools that have room
//! by turns would never serve it else.
//!
//! A request that comes is held to the same: it is served at once where it needs no pool that is held back, and no node of one.
//! So nobody overtakes who waits for the same nodes, whatever pair and quality it asks for.
//!
//! **Cost:** a look at the queue tries each request that gets its turn, and at most one more for each pool that is full: neither
//! grows with the number of requests that wait. A request that comes is tried once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_types::{Fingerprint, NodeId, Quality, Role};

use crate::choice::{Absent, Ask, Choice, NodePair, One, TooLarge};
use crate::cluster::Cluster;
use crate::fair_queue::{FairQueue, Share};
use crate::needs::{HeldBack, Lacks, Needs};

/// What is said of the wait where nothing is known of it.
const UNKNOWN_WAIT: Duration = Duration::from_secs(1);

/// What bounds the waiting.
#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    /// Most requests that wait, over all clients and models.
    pub waiting: usize,
}

/// Why a request may not even wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// As many wait as may.
    Crowded {
        /// How many wait.
        waiting: usize,
        /// When there may be room.
        retry: Duration,
    },
    /// Its turn would come too late.
    Late {
        /// When it would come.
        expected: Duration,
    },
}

/// A request that wants two nodes.
#[derive(Clone, Debug)]
pub struct Order {
    /// Whose nodes may serve it.
    pub pair: Fingerprint,
    /// Which models write.
    pub quality: Quality,
    /// Whether the decode node gets work.
    pub decodes: bool,
    /// Names of the prompt's blocks: [`crate::keys`].
    pub keys: Arc<[u64]>,
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// Most tokens of the answer.
    pub answer_tokens: usize,
    /// Whose it is.
    pub share: Share,
    /// Among the client's own: less is earlier.
    pub priority: i32,
    /// When it gives up waiting.
    pub until: Instant,
    /// Nodes that are chosen only where there are no others.
    pub shunned: Vec<NodeId>,
}

impl Order {
    fn needs(&self) -> Needs {
        Needs::new(&self.pair, self.quality, self.decodes)
    }

    /// What its client pays, in tokens.
    fn cost(&self) -> u64 {
        (self.prompt_tokens + self.answer_tokens) as u64
    }

    fn ask(&self, with_room: bool) -> Ask<'_> {
        Ask {
            pair: &self.pair,
            quality: self.quality,
            decodes: self.decodes,
            keys: &self.keys,
            prompt_tokens: self.prompt_tokens,
            answer_tokens: self.answer_tokens,
            shunned: &self.shunned,
            with_room,
        }
    }
}

/// A request's number in the order in which requests came: its age, over all of its attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueNumber(pub u64);

/// What a turn brings.
#[derive(Debug)]
pub enum Turn {
    /// Two nodes.
    Two(NodePair),
    /// One, where one model writes alone.
    One(One),
    /// There are no nodes.
    Absent(Absent),
    /// No node will ever have room for it.
    TooLarge(TooLarge),
}

/// What comes of an order.
#[derive(Debug)]
pub enum Submitted {
    /// Its turn is now.
    Now(Turn),
    /// It waits; [`Scheduler::turns`] gives its turn.
    Waits,
    /// It may not wait.
    Refused(Refusal),
}

/// A request that waits.
#[derive(Debug)]
struct Waiting {
    order: Order,
    /// All pools that it ever found without room.
    lacks: Lacks,
}

/// The nodes, and who waits for them.
#[derive(Debug)]
pub struct Scheduler {
    cluster: Cluster,
    queue: FairQueue,
    waiting: HashMap<QueueNumber, Waiting>,
    /// Answers under way that look for nodes, and the pools that are theirs first.
    resuming: HashMap<QueueNumber, (Fingerprint, Lacks)>,
    /// For those who wait, as they were found last, and for those who resume.
    held_back: HeldBack,
    limits: QueueLimits,
}

impl Scheduler {
    /// Nobody waits.
    pub fn new(cluster: Cluster, limits: QueueLimits) -> Self {
        let (queue, waiting, resuming, held_back) = Default::default();
        Self { cluster, queue, waiting, resuming, held_back, limits }
    }

    /// What is known of the nodes.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// See [`Scheduler::cluster`]. After a change that may bring room, [`Scheduler::turns`] is to be asked.
    pub fn cluster_mut(&mut self) -> &mut Cluster {
        &mut self.cluster
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Requests that wait, and answers under way that look for nodes.
    pub fn held(&self) -> usize {
        self.waiting.len() + self.resuming.len()
    }

    /// Requests that wait for room on nodes of this role, as was found when they were last looked at. One that waits for room on
    /// both counts for both.
    pub fn waiting_for(&self, role: Role) -> usize {
        self.queue.count(|needs| self.held_back.role(role, needs))
    }

    /// A request that comes for the first time, or `again` since its turn brought nothing: the nodes that it got had no room
    /// after all, or the attempt failed. Then it has paid, and is first in its class. `number` is its own, over all attempts.
    pub fn submit(&mut self, order: Order, number: QueueNumber, again: bool, now: Instant) -> Submitted {
        let needs = order.needs();
        let mut lacks = Lacks::default();
        if !self.held_back.any_of(&needs) {
            match self.choose(&order, now) {
                Ok(turn) => {
                    if !again {
                        self.queue.served_at_once(order.share, order.cost());
                    }
                    return Submitted::Now(turn);
                }
                Err(found) => lacks = found,
            }
        }
        let rivals = |other: &Needs| self.cluster.rivals(&needs, other);
        if again {
            self.queue.push_again(number.0, needs.clone(), order.share, rivals);
        } else {
            let expected = self.queue.expected(order.share, order.priority, rivals);
            if self.waiting() >= self.limits.waiting {
                return Submitted::Refused(Refusal::Crowded { waiting: self.waiting(), retry: expected.unwrap_or(UNKNOWN_WAIT) });
            }
            if let Some(expected) = expected.filter(|expected| now + *expected >= order.until) {
                return Submitted::Refused(Refusal::Late { expected });
            }
            self.queue.push(number.0, needs.clone(), (order.share, order.priority, order.cost()), rivals);
        }
        self.held_back.add(&order.pair, lacks);
        self.waiting.insert(number, Waiting { order, lacks });
        Submitted::Waits
    }

    /// Two nodes at once, whether or not they have room: for an answer that is under way.
    pub fn at_once(&mut self, order: &Order, now: Instant) -> Turn {
        match self.cluster.choose(&order.ask(false), now) {
            Choice::Two(nodes) => Turn::Two(nodes),
            Choice::One(one) => Turn::One(one),
            Choice::Absent(absent) => Turn::Absent(absent),
            Choice::TooLarge(too_large) => Turn::TooLarge(too_large),
            // Not where no room is asked for.
            Choice::Full(_) => Turn::Absent(Absent { prefill: false, decode: false }),
        }
    }

    /// An answer under way begins to look for nodes anew: until [`Scheduler::resumed`], the pool of those that write it is held
    /// back for it. It is older than all who wait, and was taken on.
    pub fn resumes(&mut self, order: &Order, number: QueueNumber) {
        let needs = order.needs();
        let lacks = Lacks { prefill: needs.prefill && !needs.decode, decode: needs.decode };
        self.held_back.add(&order.pair, lacks);
        self.resuming.insert(number, (order.pair.clone(), lacks));
    }

    /// It has nodes, or is over. [`Scheduler::turns`] is to be asked.
    pub fn resumed(&mut self, number: QueueNumber) {
        self.resuming.remove(&number);
    }

    /// It waits no longer. [`Scheduler::turns`] is to be asked: who stands behind it may fit where it did not.
    pub fn cancel(&mut self, number: QueueNumber) {
        self.waiting.remove(&number);
        self.queue.remove(number.0);
    }

    /// Those whose turn has come, for as long as there is room.
    pub fn turns(&mut self, now: Instant) -> Vec<(QueueNumber, Turn)> {
        self.held_back.clear();
        for (pair, lacks) in self.resuming.values() {
            self.held_back.add(pair, *lacks);
        }
        let mut turns = Vec::new();
        while let Some(number) = self.queue.first(|needs| self.held_back.any_of(needs)).map(QueueNumber) {
            let Some(Waiting { order, lacks }) = self.waiting.remove(&number) else {
                self.queue.remove(number.0);
                continue;
            };
            match self.choose(&order, now) {
                Ok(turn) => {
                    self.queue.served(number.0, now);
                    turns.push((number, turn));
                }
                Err(found) => {
                    let lacks = lacks.and(found);
                    self.held_back.add(&order.pair, lacks);
                    self.waiting.insert(number, Waiting { order, lacks });
                }
            }
        }
        turns
    }

    /// Nodes with room that is left over, or where there is none.
    fn choose(&mut self, order: &Order, now: Instant) -> Result<Turn, Lacks> {
        match self.cluster.choose_beside(&order.ask(true), &self.held_back, now) {
            Choice::Full(lacks) => Err(lacks),
            Choice::Two(nodes) => Ok(Turn::Two(nodes)),
            Choice::One(one) => Ok(Turn::One(one)),
            Choice::Absent(absent) => Ok(Turn::Absent(absent)),
            Choice::TooLarge(too_large) => Ok(Turn::TooLarge(too_large)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use overfill_types::{Endpoint, ServedPair};

    use super::*;
    use crate::{Report, Taken};

    fn pair() -> Fingerprint {
        Fingerprint::new("ours")
    }

    fn order(client: usize, now: Instant) -> Order {
        Order {
            pair: pair(),
            quality: Quality::Overfill,
            decodes: true,
            keys: Arc::new([]),
            prompt_tokens: 10,
            answer_tokens: 10,
            share: Share { client, weight: 1, class: 0 },
            priority: 0,
            until: now + Duration::from_secs(10),
            shunned: vec![],
        }
    }

    fn number() -> QueueNumber {
        static LAST: AtomicU64 = AtomicU64::new(0);
        QueueNumber(LAST.fetch_add(1, Ordering::Relaxed))
    }

    /// One node of each kind; the decode node holds four sequences.
    fn scheduler(waiting: usize, now: Instant) -> Scheduler {
        let node = |id: &str, role| Endpoint {
            id: NodeId::new(id),
            role,
            address: "127.0.0.1:1".parse().unwrap(),
            pairs: vec![ServedPair { model: "m".into(), fingerprint: pair() }],
            max_context: 100,
        };
        let mut cluster = Cluster::new(3);
        cluster.update(&[node("p", Role::Prefill), node("d", Role::Decode)], now);
        cluster.told(&NodeId::new("d"), Report { sequences_most: 4, ..Report::default() }, now);
        Scheduler::new(cluster, QueueLimits { waiting })
    }

    fn now_or_panic(submitted: Submitted) -> NodePair {
        match submitted {
            Submitted::Now(Turn::Two(nodes)) => nodes,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nobody_overtakes_and_nobody_is_forgotten() {
        let now = Instant::now();
        let mut scheduler = scheduler(100, now);
        let mut running: Vec<NodePair> = (0..4).map(|_| now_or_panic(scheduler.submit(order(0, now), number(), false, now))).collect();
        let waiting: Vec<QueueNumber> = (0..6)
            .map(|_| {
                let number = number();
                assert!(matches!(scheduler.submit(order(0, now), number, false, now), Submitted::Waits));
                number
            })
            .collect();
        assert!(scheduler.turns(now).is_empty());
        assert_eq!([Role::Prefill, Role::Decode].map(|role| scheduler.waiting_for(role)), [0, 6], "prefill nodes have room");
        scheduler.cancel(waiting[1]);
        let mut served = Vec::new();
        while let Some(pair) = running.pop() {
            scheduler.cluster_mut().release(pair.taken);
            for (number, turn) in scheduler.turns(now) {
                served.push(number);
                match turn {
                    Turn::Two(nodes) => running.push(nodes),
                    other => panic!("{other:?}"),
                }
            }
            assert!(running.len() <= 4);
        }
        assert_eq!(served, [waiting[0], waiting[2], waiting[3], waiting[4], waiting[5]]);
        assert!(scheduler.waiting() == 0 && scheduler.cluster.idle());
        assert_eq!([Role::Prefill, Role::Decode].map(|role| scheduler.waiting_for(role)), [0, 0]);
    }

    #[test]
    fn who_cannot_be_served_in_time_is_refused_at_once() {
        let begun = Instant::now();
        let mut scheduler = scheduler(30, begun);
        let mut running: Vec<NodePair> = (0..4).map(|_| now_or_panic(scheduler.submit(order(0, begun), number(), false, begun))).collect();
        for _ in 0..20 {
            assert!(matches!(scheduler.submit(order(0, begun), number(), false, begun), Submitted::Waits));
        }
        // One ends each second.
        let mut now = begun;
        for _ in 0..8 {
            now += Duration::from_secs(1);
            scheduler.cluster_mut().release(running.remove(0).taken);
            running.extend(scheduler.turns(now).into_iter().map(|(_, turn)| match turn {
                Turn::Two(nodes) => nodes,
                other => panic!("{other:?}"),
            }));
            assert_eq!(running.len(), 4);
        }
        match scheduler.submit(order(0, now), number(), false, now) {
            Submitted::Refused(Refusal::Late { expected }) => assert!((11..=13).contains(&expected.as_secs()), "{expected:?}"),
            other => panic!("{other:?}"),
        }
        // Another client's turn comes sooner, and so does that of one with more patience.
        assert!(matches!(scheduler.submit(order(1, now), number(), false, now), Submitted::Waits));
        let patient = Order { until: now + Duration::from_secs(60), ..order(0, now) };
        while scheduler.waiting() < 30 {
            assert!(matches!(scheduler.submit(patient.clone(), number(), false, now), Submitted::Waits));
        }
        assert!(matches!(scheduler.submit(patient, number(), false, now), Submitted::Refused(Refusal::Crowded { waiting: 30, .. })));
    }

    /// Nodes of these names: those that begin with `p` read, of at most `sequences` each; the letters that follow are their pairs.
    fn nodes(names: &[(&str, u64)], now: Instant) -> Scheduler {
        let endpoint = |(name, _): &(&str, u64)| {
            let served = |pair: char| ServedPair { model: pair.into(), fingerprint: Fingerprint::new(pair) };
            let role = if name.starts_with('p') { Role::Prefill } else { Role::Decode };
            let pairs = name.chars().skip(1).map(served).collect();
            Endpoint { id: NodeId::new(*name), role, address: "127.0.0.1:1".parse().unwrap(), pairs, max_context: 1000 }
        };
        let mut cluster = Cluster::new(3);
        cluster.update(&names.iter().map(endpoint).collect::<Vec<_>>(), now);
        for (name, sequences) in names {
            let report = Report {
                sequences_most: *sequences,
                block_tokens: 10,
                blocks: 100,
                promised_most: 100,
                prefix_blocks_most: 100,
                ..Report::default()
            };
            cluster.told(&NodeId::new(*name), report, now);
        }
        Scheduler::new(cluster, QueueLimits { waiting: 1000 })
    }

    fn wants(pair: &str, quality: Quality, client: usize, now: Instant) -> Order {
        Order { pair: Fingerprint::new(pair), quality, ..order(client, now) }
    }

    fn taken(turn: Turn) -> Taken {
        match turn {
            Turn::Two(NodePair { taken, .. }) | Turn::One(One { taken, .. }) => taken,
            other => panic!("{other:?}"),
        }
    }

    /// What it got at once, if it did.
    fn submit(scheduler: &mut Scheduler, order: Order, number: QueueNumber, now: Instant) -> Option<Taken> {
        match scheduler.submit(order, number, false, now) {
            Submitted::Now(turn) => Some(taken(turn)),
            Submitted::Waits => None,
            Submitted::Refused(refusal) => panic!("{refusal:?}"),
        }
    }

    fn served(scheduler: &mut Scheduler, now: Instant) -> Vec<(QueueNumber, Taken)> {
        scheduler.turns(now).into_iter().map(|(number, turn)| (number, taken(turn))).collect()
    }

    #[test]
    fn no_pair_starves_another_that_shares_its_nodes() {
        let now = Instant::now();
        let mut scheduler = nodes(&[("pab", 1), ("da", 99), ("db", 99)], now);
        let mut running = submit(&mut scheduler, wants("a", Quality::Overfill, 0, now), number(), now).unwrap();
        let mut of = HashMap::new();
        for _ in 0..50 {
            for (client, pair) in ["a", "b"].into_iter().enumerate() {
                let number = number();
                of.insert(number, pair);
                assert!(submit(&mut scheduler, wants(pair, Quality::Overfill, client, now), number, now).is_none());
            }
        }
        let mut turns = HashMap::from([("a", 0), ("b", 0)]);
        for _ in 0..50 {
            scheduler.cluster_mut().release(running);
            let mut now_served = served(&mut scheduler, now);
            assert_eq!(now_served.len(), 1);
            let (number, taken) = now_served.remove(0);
            *turns.get_mut(of[&number]).unwrap() += 1;
            running = taken;
        }
        assert_eq!(turns["a"], turns["b"]);
        scheduler.cluster_mut().release(running);
    }

    #[test]
    fn no_quality_and_no_other_pair_is_a_way_past_the_queue() {
        let now = Instant::now();
        for (pair, quality) in [("a", Quality::Full), ("b", Quality::Full), ("b", Quality::Overfill)] {
            let mut scheduler = nodes(&[("pab", 1), ("da", 99), ("db", 99)], now);
            let first = submit(&mut scheduler, wants("a", Quality::Overfill, 0, now), number(), now).unwrap();
            let waits = number();
            assert!(submit(&mut scheduler, wants("a", Quality::Overfill, 0, now), waits, now).is_none());
            scheduler.cluster_mut().release(first);
            // There is room, and it is not for who comes now.
            assert!(submit(&mut scheduler, wants(pair, quality, 1, now), number(), now).is_none(), "{pair} {quality}");
            assert_eq!(served(&mut scheduler, now).into_iter().map(|(number, _)| number).collect::<Vec<_>>(), [waits]);
        }
    }

    #[test]
    fn nodes_that_are_full_block_no_others() {
        let now = Instant::now();
        let mut scheduler = nodes(&[("pa", 2), ("pab", 2), ("pb", 4), ("da", 1), ("db", 9)], now);
        let first = submit(&mut scheduler, wants("a", Quality::Overfill, 0, now), number(), now).unwrap();
        let waits = number();
        assert!(submit(&mut scheduler, wants("a", Quality::Overfill, 0, now), waits, now).is_none(), "its decode node is full");
        let mut running = Vec::new();
        for _ in 0..2 {
            running.extend(submit(&mut scheduler, wants("a", Quality::Full, 1, now), number(), now));
            running.extend(submit(&mut scheduler, wants("b", Quality::Overfill, 1, now), number(), now));
        }
        assert_eq!(running.len(), 4, "they need other nodes");
        assert!(served(&mut scheduler, now).is_empty());
        running.extend(submit(&mut scheduler, wants("a", Quality::Full, 1, now), number(), now));
        // All nodes that read for `a` are waited for from now on; one that reads for `b` alone is free.
        while let Some(taken) = submit(&mut scheduler, wants("a", Quality::Full, 1, now), number(), now) {
            running.push(taken);
        }
        assert!(submit(&mut scheduler, wants("b", Quality::Full, 1, now), number(), now).is_some());
        scheduler.cluster_mut().release(first);
        running.into_iter().for_each(|taken| scheduler.cluster_mut().release(taken));
        assert!(served(&mut scheduler, now).iter().any(|(number, _)| *number == waits));
    }

    #[test]
    fn a_large_request_is_not_starved_by_small_ones_of_another_quality() {
        let now = Instant::now();
        let mut scheduler = nodes(&[("pa", 99), ("da", 99)], now);
        let small = |now| Order { prompt_tokens: 90, answer_tokens: 10, ..wants("a", Quality::Decode, 1, now) };
        let mut running: Vec<Taken> = (0..10).map(|_| submit(&mut scheduler, small(now), number(), now).unwrap()).collect();
        let large = number();
        let order = Order { prompt_tokens: 800, ..wants("a", Quality::Overfill, 0, now) };
        assert!(submit(&mut scheduler, order, large, now).is_none());
        for _ in 0..10 {
            assert!(submit(&mut scheduler, small(now), number(), now).is_none());
            scheduler.cluster_mut().release(running.remove(0));
            running.extend(served(&mut scheduler, now).into_iter().map(|(number, taken)| {
                assert_eq!(number, large);
                taken
            }));
            if !scheduler.waiting.contains_key(&large) {
                return;
            }
        }
        panic!("ten small ones ended and the large one was not served");
    }

    /// The two pools of a request have room by turns: it gets both all the same.
    #[test]
    fn a_request_that_needs_two_pools_is_not_starved_by_those_that_need_one() {
        let now = Instant::now();
        let mut scheduler = nodes(&[("pa", 1), ("da", 1)], now);
        let read = |now| wants("a", Quality::Full, 1, now);
        let write = |now| wants("a", Quality::Decode, 2, now);
        let mut reader = submit(&mut scheduler, read(now), number(), now);
        let mut writer = submit(&mut scheduler, write(now), number(), now);
        let both = number();
        assert!(submit(&mut scheduler, wants("a", Quality::Overfill, 0, now), both, now).is_none());
        let mut of = HashMap::new();
        for step in 0..6 {
            for (order, reads) in [(read(now), true), (write(now), false)] {
                let number = number();
                of.insert(number, reads);
                assert!(submit(&mut scheduler, order, number, now).is_none());
            }
            let ended = if step % 2 == 0 { reader.take() } else { writer.take() };
            ended.into_iter().for_each(|taken| scheduler.cluster_mut().release(taken));
            for (number, taken) in served(&mut scheduler, now) {
                match of.get(&number) {
                    Some(true) => reader = Some(taken),
                    Some(false) => writer = Some(taken),
                    None => {
                        assert_eq!(number, both);
                        return;
                    }
                }
            }
        }
        panic!("it never had its turn");
    }

    #[test]
    fn an_answer_under_way_has_the_right_of_way() {
        let now = Instant::now();
        let mut scheduler = nodes(&[("pab", 9), ("da", 1), ("db", 9)], now);
        let under_way = wants("a", Quality::Overfill, 0, now);
        let (resumes, waits) = (number(), number());
        let first = submit(&mut scheduler, under_way.clone(), resumes, now).unwrap();
        assert!(submit(&mut scheduler, wants("a", Quality::Overfill, 1, now), waits, now).is_none());
        // Its attempt failed, and the next has no nodes yet.
        scheduler.resumes(&under_way, resumes);
        scheduler.cluster_mut().release(first);
        assert!(served(&mut scheduler, now).is_empty());
        assert!(submit(&mut scheduler, wants("a", Quality::Decode, 1, now), number(), now).is_none());
        assert!(submit(&mut scheduler, wants("b", Quality::Overfill, 1, now), number(), now).is_some(), "it needs other nodes");
        let again = taken(scheduler.at_once(&under_way, now));
        scheduler.resumed(resumes);
        assert!(served(&mut scheduler, now).is_empty(), "it has taken the room");
        scheduler.cluster_mut().release(again);
        assert_eq!(served(&mut scheduler, now).into_iter().map(|(number, _)| number).collect::<Vec<_>>(), [waits]);
    }

    #[test]
    fn a_request_that_comes_again_goes_before_younger_ones() {
        let now = Instant::now();
        let mut scheduler = nodes(&[("pa", 9), ("da", 1)], now);
        let (first, second, third) = (number(), number(), number());
        let order = |client| wants("a", Quality::Overfill, client, now);
        let attempt = submit(&mut scheduler, order(0), first, now).unwrap();
        assert!(submit(&mut scheduler, order(0), second, now).is_none() && submit(&mut scheduler, order(1), third, now).is_none());
        // The node had no room after all: somebody else's work is there.
        let full = Report { sequences: 1, sequences_most: 1, block_tokens: 10, blocks: 100, ..Report::default() };
        scheduler.cluster_mut().release(attempt);
        scheduler.cluster_mut().told(&NodeId::new("da"), full, now);
        assert!(served(&mut scheduler, now).is_empty());
        assert!(matches!(scheduler.submit(order(0), first, true, now), Submitted::Waits));
        let mut turns = Vec::new();
        for _ in 0..3 {
            scheduler.cluster_mut().told(&NodeId::new("da"), Report { sequences: 0, ..full }, now);
            let mut all = served(&mut scheduler, now);
            let (number, taken) = all.remove(0);
            scheduler.cluster_mut().release(taken);
            turns.push(number);
        }
        assert_eq!(turns[0], first);
        assert!(turns.contains(&second) && turns.contains(&third));
    }
}
