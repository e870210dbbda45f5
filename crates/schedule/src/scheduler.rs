//! The choice of nodes and the line before it, together: who asks gets two nodes, a place in the line, or a refusal, at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_types::{Fingerprint, NodeId, Quality};

use crate::choice::{Absent, Ask, Choice, One, Pair, TooLarge};
use crate::cluster::Cluster;
use crate::line::{Bounds, Line, Refusal, Share};

/// What is said of the wait where nothing is known of it.
const UNKNOWN_WAIT: Duration = Duration::from_secs(1);

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
    /// Where it waits.
    fn line(&self) -> (Fingerprint, Quality) {
        (self.pair.clone(), self.quality)
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

/// A place in the line: its number, which grows with time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// What a turn brings.
#[derive(Debug)]
pub enum Turn {
    /// Two nodes.
    Pair(Pair),
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

/// The nodes, and who waits for them.
#[derive(Debug)]
pub struct Scheduler {
    cluster: Cluster,
    /// Who wants other nodes waits in another line.
    lines: HashMap<(Fingerprint, Quality), Line>,
    orders: HashMap<u64, Order>,
    bounds: Bounds,
}

impl Scheduler {
    /// Nobody waits.
    pub fn new(cluster: Cluster, bounds: Bounds) -> Self {
        Self { cluster, lines: HashMap::new(), orders: HashMap::new(), bounds }
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
        self.orders.len()
    }

    /// A request that comes for the first time, or `again` since the node that it got had no room after all: then it has its
    /// place in the line as before. `ticket` is its own.
    pub fn submit(&mut self, order: Order, ticket: Ticket, again: bool, now: Instant) -> Submitted {
        let line = self.lines.get(&order.line());
        if again || line.is_none_or(Line::is_empty) {
            match self.cluster.choose(&order.ask(true), now) {
                Choice::Pair(pair) => return Submitted::Now(Turn::Pair(pair)),
                Choice::One(one) => return Submitted::Now(Turn::One(one)),
                Choice::Absent(absent) => return Submitted::Now(Turn::Absent(absent)),
                Choice::TooLarge(too_large) => return Submitted::Now(Turn::TooLarge(too_large)),
                Choice::Full => {}
            }
        }
        if !again {
            let expected = line.and_then(|line| line.expected(order.share, order.priority));
            if self.orders.len() >= self.bounds.waiting {
                return Submitted::Refused(Refusal::Crowded { waiting: self.orders.len(), retry: expected.unwrap_or(UNKNOWN_WAIT) });
            }
            if let Some(expected) = expected.filter(|expected| now + *expected >= order.until) {
                return Submitted::Refused(Refusal::Late { expected });
            }
        }
        // Paid for once.
        let cost = if again { 0 } else { (order.prompt_tokens + order.answer_tokens) as u64 };
        self.lines.entry(order.line()).or_default().push(ticket.0, order.share, order.priority, cost);
        self.orders.insert(ticket.0, order);
        Submitted::Waits
    }

    /// Two nodes at once, whether or not they have room: for an answer that is under way.
    pub fn at_once(&mut self, order: &Order, now: Instant) -> Turn {
        match self.cluster.choose(&order.ask(false), now) {
            Choice::Pair(pair) => Turn::Pair(pair),
            Choice::One(one) => Turn::One(one),
            Choice::Absent(absent) => Turn::Absent(absent),
            Choice::TooLarge(too_large) => Turn::TooLarge(too_large),
            // Not where no room is asked for.
            Choice::Full => Turn::Absent(Absent { prefill: false, decode: false }),
        }
    }

    /// It waits no longer.
    pub fn cancel(&mut self, ticket: Ticket) {
        let Some(order) = self.orders.remove(&ticket.0) else { return };
        let Some(line) = self.lines.get_mut(&order.line()) else { return };
        line.remove(ticket.0);
    }

    /// Those whose turn has come, for as long as there is room.
    pub fn turns(&mut self, now: Instant) -> Vec<(Ticket, Turn)> {
        let mut turns = Vec::new();
        for line in self.lines.values_mut() {
            while let Some(number) = line.first() {
                let Some(order) = self.orders.get(&number) else {
                    line.remove(number);
                    continue;
                };
                let turn = match self.cluster.choose(&order.ask(true), now) {
                    // It is not overtaken by smaller ones, so it gets its turn.
                    Choice::Full => break,
                    Choice::Pair(pair) => Turn::Pair(pair),
                    Choice::One(one) => Turn::One(one),
                    Choice::Absent(absent) => Turn::Absent(absent),
                    Choice::TooLarge(too_large) => Turn::TooLarge(too_large),
                };
                self.orders.remove(&number);
                line.served(number, now);
                turns.push((Ticket(number), turn));
            }
        }
        turns
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use overfill_types::{Endpoint, Role, ServedPair};

    use super::*;
    use crate::Report;

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

    fn ticket() -> Ticket {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Ticket(LAST.fetch_add(1, Ordering::Relaxed))
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
        Scheduler::new(cluster, Bounds { waiting })
    }

    fn now_or_panic(submitted: Submitted) -> Pair {
        match submitted {
            Submitted::Now(Turn::Pair(pair)) => pair,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nobody_overtakes_and_nobody_is_forgotten() {
        let now = Instant::now();
        let mut scheduler = scheduler(100, now);
        let mut running: Vec<Pair> = (0..4).map(|_| now_or_panic(scheduler.submit(order(0, now), ticket(), false, now))).collect();
        let waiting: Vec<Ticket> = (0..6)
            .map(|_| {
                let ticket = ticket();
                assert!(matches!(scheduler.submit(order(0, now), ticket, false, now), Submitted::Waits));
                ticket
            })
            .collect();
        assert!(scheduler.turns(now).is_empty());
        scheduler.cancel(waiting[1]);
        let mut served = Vec::new();
        while let Some(pair) = running.pop() {
            scheduler.cluster_mut().release(pair.taken);
            for (ticket, turn) in scheduler.turns(now) {
                served.push(ticket);
                match turn {
                    Turn::Pair(pair) => running.push(pair),
                    other => panic!("{other:?}"),
                }
            }
            assert!(running.len() <= 4);
        }
        assert_eq!(served, [waiting[0], waiting[2], waiting[3], waiting[4], waiting[5]]);
        assert!(scheduler.waiting() == 0 && scheduler.cluster.idle());
    }

    #[test]
    fn who_cannot_be_served_in_time_is_refused_at_once() {
        let begun = Instant::now();
        let mut scheduler = scheduler(30, begun);
        let mut running: Vec<Pair> = (0..4).map(|_| now_or_panic(scheduler.submit(order(0, begun), ticket(), false, begun))).collect();
        for _ in 0..20 {
            assert!(matches!(scheduler.submit(order(0, begun), ticket(), false, begun), Submitted::Waits));
        }
        // One ends each second.
        let mut now = begun;
        for _ in 0..8 {
            now += Duration::from_secs(1);
            scheduler.cluster_mut().release(running.remove(0).taken);
            running.extend(scheduler.turns(now).into_iter().map(|(_, turn)| match turn {
                Turn::Pair(pair) => pair,
                other => panic!("{other:?}"),
            }));
            assert_eq!(running.len(), 4);
        }
        match scheduler.submit(order(0, now), ticket(), false, now) {
            Submitted::Refused(Refusal::Late { expected }) => assert!((11..=13).contains(&expected.as_secs()), "{expected:?}"),
            other => panic!("{other:?}"),
        }
        // Another client's turn comes sooner, and so does that of one with more patience.
        assert!(matches!(scheduler.submit(order(1, now), ticket(), false, now), Submitted::Waits));
        let patient = Order { until: now + Duration::from_secs(60), ..order(0, now) };
        while scheduler.waiting() < 30 {
            assert!(matches!(scheduler.submit(patient.clone(), ticket(), false, now), Submitted::Waits));
        }
        assert!(matches!(scheduler.submit(patient, ticket(), false, now), Submitted::Refused(Refusal::Crowded { waiting: 30, .. })));
    }
}
