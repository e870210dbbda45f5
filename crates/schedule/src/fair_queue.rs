//! Whose turn it is: one order over all requests that wait, whatever pair and quality they want.
//!
//! A higher class goes first. Within a class clients share by weight, as in start-time fair queueing: a request's tag is what
//! its client was given before, in tokens over weight, and the least tag is next. Whatever a client is given counts in every
//! group in which it waits, so spreading over pairs or qualities brings it nothing. Each client's own go by priority, then by
//! age. Who comes after a pause starts where its rivals are: what was not used is not saved up.
//!
//! Requests of a class that need room in the same node pools are a group. Groups exist so that those whose nodes are full can be
//! passed over at once: [`FairQueue::first`] costs the number of groups (classes × pairs × at most three); all else costs the
//! logarithm of the requests that wait and, where a client pays, the number of groups. Nothing walks over requests. What clients
//! were given is known until nobody waits.
//!
//! **Invariants:** the order within a group is that of the tags. Nobody of the highest class starves: a group whose nodes are
//! slower than others falls behind by [`BEHIND`] at most, so it does not shut out others where it has nodes in common with them,
//! and groups that fell behind alike take turns; what a client gets elsewhere makes a request wait at most as long as if it were
//! [`ELSEWHERE`] times as large. Whoever's turn brought nothing is first in its class when it comes again, the oldest first: it
//! has paid.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::needs::Needs;

/// A part of a token over a weight: so many are a token of a client of weight 1.
const TOKEN: u128 = 1 << 16;
/// How far a group falls behind the others of its class: so many tokens of each client of weight 1 have the right of way once
/// the nodes that held it up do so no longer. Some seconds' work of a node.
const BEHIND: u128 = (1 << 14) * TOKEN;
/// By how many times its own size what a client gets elsewhere puts off its request: more than there are pairs and qualities
/// on most nodes, so that shares hold over all of them.
const ELSEWHERE: u128 = 32;

/// A client's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Which client.
    pub client: usize,
    /// Its part among those of its class, at least 1.
    pub weight: u32,
    /// Clients of a lower class wait for all of a higher one that want the same nodes.
    pub class: i32,
}

impl Share {
    /// What `cost` tokens are to it.
    fn of(self, cost: u64) -> u128 {
        u128::from(cost) * TOKEN / u128::from(self.weight.max(1))
    }
}

/// Requests that wait for nodes.
#[derive(Debug, Default)]
pub(crate) struct FairQueue {
    groups: HashMap<Arc<Name>, Group>,
    /// The groups that know each client.
    clients: HashMap<usize, HashSet<Arc<Name>>>,
    waiting: HashMap<u64, Waiting>,
    /// Turns, ever.
    turns: u64,
    /// How far each class is served: the greatest tag that had its turn.
    reached: HashMap<i32, u128>,
}

/// Of a group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Name {
    class: i32,
    needs: Needs,
}

/// Where a request waits.
#[derive(Debug)]
struct Waiting {
    group: Arc<Name>,
    share: Share,
    priority: i32,
    cost: u64,
    returned: bool,
}

/// Requests of one class that need the same node pools.
#[derive(Debug, Default)]
struct Group {
    /// Those whose turn brought nothing.
    returned: BTreeSet<u64>,
    clients: HashMap<usize, Flow>,
    /// Clients that wait: the least tag first, then the oldest request.
    order: BTreeSet<(u128, u64, usize)>,
    /// Comes to all tags: it grows where the group falls behind too far, which leaves the order as it is.
    lift: u128,
    /// The greatest tag, without the lift, that had its turn.
    clock: u128,
    /// Which turn of all was its last.
    turn: u64,
    /// Requests that wait.
    count: usize,
    /// Mean time between two turns, in seconds.
    interval: Option<f64>,
    last: Option<Instant>,
}

/// What a client has in a group.
#[derive(Debug)]
struct Flow {
    share: Share,
    /// The tag by what it was given here.
    own: u128,
    /// What it was given elsewhere since its last turn here.
    elsewhere: u128,
    /// By priority and age: what each costs.
    waiting: BTreeMap<i32, BTreeMap<u64, u64>>,
}

impl Flow {
    /// The request that is next, and what it costs.
    fn head(&self) -> Option<(u64, u64)> {
        self.waiting.first_key_value()?.1.first_key_value().map(|(number, cost)| (*number, *cost))
    }

    fn tag(&self) -> u128 {
        let most = self.head().map_or(u128::MAX, |(_, cost)| self.share.of(cost).saturating_mul(ELSEWHERE));
        self.own + self.elsewhere.min(most)
    }

    /// Its line in the order of the group.
    fn entry(&self) -> Option<(u128, u64, usize)> {
        self.head().map(|(number, _)| (self.tag(), number, self.share.client))
    }

    /// Requests that go before one of this priority that comes now.
    fn before(&self, priority: i32) -> usize {
        self.waiting.range(..=priority).map(|(_, alike)| alike.len()).sum()
    }
}

impl Group {
    /// Changes a client's flow and keeps the order right.
    fn change<T>(&mut self, client: usize, change: impl FnOnce(&mut Flow) -> T) -> Option<T> {
        let flow = self.clients.get_mut(&client)?;
        let before = flow.entry();
        let changed = change(flow);
        let after = flow.entry();
        if before != after {
            before.map(|entry| self.order.remove(&entry));
            self.order.extend(after);
        }
        Some(changed)
    }

    /// Does not fall behind too far where its class has reached `reached`.
    fn keep_up(&mut self, reached: u128) {
        if let Some((tag, ..)) = self.order.first() {
            self.lift = self.lift.max(reached.saturating_sub(BEHIND).saturating_sub(*tag));
        }
    }

    /// For how long a turn takes.
    fn note_turn(&mut self, now: Instant) {
        if let Some(last) = self.last {
            let passed = now.saturating_duration_since(last).as_secs_f64();
            // A mean over the last ten or so.
            self.interval = Some(self.interval.map_or(passed, |mean| mean + (passed - mean) / 10.0));
        }
        self.last = (self.count > 1).then_some(now);
    }
}

impl FairQueue {
    /// A request of `cost` tokens begins to wait, beside those that want the same nodes (`rivals`).
    pub(crate) fn push(&mut self, number: u64, needs: Needs, (share, priority, cost): (Share, i32, u64), rivals: impl Fn(&Needs) -> bool) {
        let (name, group) = self.group(needs, share.class, rivals);
        let clock = group.clock;
        group.clients.entry(share.client).or_insert_with(|| Flow { share, own: clock, elsewhere: 0, waiting: BTreeMap::new() });
        group.change(share.client, |flow| {
            if flow.waiting.is_empty() {
                flow.share = share;
                flow.elsewhere = flow.elsewhere.saturating_sub(clock.saturating_sub(flow.own));
                flow.own = flow.own.max(clock);
            }
            flow.waiting.entry(priority).or_default().insert(number, cost);
        });
        self.clients.entry(share.client).or_default().insert(name.clone());
        self.waiting.insert(number, Waiting { group: name, share, priority, cost, returned: false });
    }

    /// A request comes again whose turn brought nothing.
    pub(crate) fn push_again(&mut self, number: u64, needs: Needs, share: Share, rivals: impl Fn(&Needs) -> bool) {
        let (name, group) = self.group(needs, share.class, rivals);
        group.returned.insert(number);
        self.waiting.insert(number, Waiting { group: name, share, priority: 0, cost: 0, returned: true });
    }

    /// The group of one that comes now. Where nobody waited in it, it begins where its rivals are.
    fn group(&mut self, needs: Needs, class: i32, rivals: impl Fn(&Needs) -> bool) -> (Arc<Name>, &mut Group) {
        let name = Arc::new(Name { class, needs });
        let rival = |(of, group): (&Arc<Name>, &Group)| {
            let rival = of.class == class && group.count > 0 && rivals(&of.needs);
            rival.then_some(group.clock + group.lift)
        };
        let alone = self.groups.get(&name).is_none_or(|group| group.count == 0);
        let begin = if alone { self.groups.iter().filter_map(rival).max() } else { None };
        let reached = self.reached.get(&class).copied().unwrap_or(0);
        let group = self.groups.entry(name.clone()).or_insert_with(|| Group { clock: begin.unwrap_or(reached), ..Group::default() });
        group.clock = group.clock.max(begin.unwrap_or(0).saturating_sub(group.lift));
        group.count += 1;
        (name, group)
    }

    /// Whose turn it is, of the groups that are not passed over.
    pub(crate) fn first(&mut self, passed_over: impl Fn(&Needs) -> bool) -> Option<u64> {
        let Self { groups, reached, .. } = self;
        let first = |(name, group): (&Arc<Name>, &mut Group)| {
            if passed_over(&name.needs) {
                return None;
            }
            if let Some(number) = group.returned.first() {
                return Some((Reverse(name.class), None, 0, *number));
            }
            group.keep_up(reached.get(&name.class).copied().unwrap_or(0));
            let (tag, number, _) = group.order.first()?;
            Some((Reverse(name.class), Some(tag + group.lift), group.turn, *number))
        };
        groups.iter_mut().filter_map(first).min().map(|(.., number)| number)
    }

    /// It had its turn: its client pays.
    pub(crate) fn served(&mut self, number: u64, now: Instant) {
        let Some(waiting) = self.waiting.get(&number) else { return };
        let Waiting { group, share, cost, returned, .. } = waiting;
        let (group, share, cost, returned) = (group.clone(), *share, *cost, *returned);
        let Some(entry) = self.groups.get_mut(&group) else { return };
        self.turns += 1;
        entry.turn = self.turns;
        entry.note_turn(now);
        if !returned {
            let start = entry.change(share.client, |flow| {
                let start = flow.tag();
                (flow.own, flow.elsewhere) = (start + share.of(cost), 0);
                start
            });
            entry.clock = entry.clock.max(start.unwrap_or(0));
            let reached = self.reached.entry(share.class).or_default();
            *reached = (*reached).max(entry.clock + entry.lift);
            self.pay(share, cost, Some(&group));
        }
        self.remove(number);
    }

    /// A client was given `cost` tokens without waiting, while others wait for other nodes.
    pub(crate) fn served_at_once(&mut self, share: Share, cost: u64) {
        self.pay(share, cost, None);
    }

    /// What was given counts in all groups that know the client, but for the one that has counted it.
    fn pay(&mut self, share: Share, cost: u64, counted: Option<&Arc<Name>>) {
        for name in self.clients.get(&share.client).into_iter().flatten().filter(|name| Some(*name) != counted) {
            if let Some(group) = self.groups.get_mut(name) {
                group.change(share.client, |flow| flow.elsewhere += share.of(cost));
            }
        }
    }

    /// It does not wait any more.
    pub(crate) fn remove(&mut self, number: u64) {
        let Some(Waiting { group: name, share, priority, .. }) = self.waiting.remove(&number) else { return };
        let Some(group) = self.groups.get_mut(&name) else { return };
        group.count -= 1;
        if !group.returned.remove(&number) {
            group.change(share.client, |flow| {
                if let Some(alike) = flow.waiting.get_mut(&priority) {
                    alike.remove(&number);
                    if alike.is_empty() {
                        flow.waiting.remove(&priority);
                    }
                }
            });
        }
        if group.count == 0 {
            group.last = None;
        }
        if self.waiting.is_empty() {
            *self = Self::default();
        }
    }

    /// Requests that wait, of the groups that need this. Costs the number of groups.
    pub(crate) fn count(&self, wanted: impl Fn(&Needs) -> bool) -> usize {
        self.groups.iter().filter(|(name, _)| wanted(&name.needs)).map(|(_, group)| group.count).sum()
    }

    /// When the turn of a request that comes now will be, beside those that want the same nodes (`rivals`); `None` where that
    /// is not known. Costs as much as there are clients that wait for these.
    pub(crate) fn expected(&self, share: Share, priority: i32, rivals: impl Fn(&Needs) -> bool) -> Option<Duration> {
        let (mut better, mut alike, mut own, mut rate) = (0, 0, 0, 0.0);
        let mut weights: HashMap<usize, usize> = HashMap::new();
        for (name, group) in self.groups.iter().filter(|(name, group)| group.count > 0 && rivals(&name.needs)) {
            // Turns that come all at once tell nothing of the next.
            rate += group.interval.map_or(0.0, |interval| 1.0 / interval.max(1e-6));
            if name.class > share.class {
                better += group.count;
            }
            if name.class != share.class {
                continue;
            }
            better += group.returned.len();
            for (_, _, client) in &group.order {
                let Some(flow) = group.clients.get(client) else { continue };
                if *client == share.client {
                    own += flow.before(priority);
                } else {
                    alike += flow.before(i32::MAX);
                    weights.insert(*client, flow.share.weight as usize);
                }
            }
        }
        let others = ((own + 1) * weights.values().sum::<usize>() / share.weight.max(1) as usize).min(alike);
        let ahead = (better + own + others) as f64;
        (rate > 0.0).then(|| Duration::from_secs_f64((ahead / rate).min(86_400.0)))
    }
}

#[cfg(test)]
mod tests {
    use overfill_types::{Fingerprint, Quality};

    use super::*;

    fn share(client: usize, weight: u32) -> Share {
        Share { client, weight, class: 0 }
    }

    fn needs(pair: &str, quality: Quality) -> Needs {
        Needs::new(&Fingerprint::new(pair), quality, true)
    }

    fn ours() -> Needs {
        needs("ours", Quality::Overfill)
    }

    /// All are rivals.
    fn put(queue: &mut FairQueue, number: u64, needs: Needs, share: Share, priority: i32, cost: u64) {
        queue.push(number, needs, (share, priority, cost), |_| true);
    }

    fn push(queue: &mut FairQueue, number: u64, share: Share, cost: u64) {
        put(queue, number, ours(), share, 0, cost);
    }

    fn first(queue: &mut FairQueue) -> Option<u64> {
        queue.first(|_| false)
    }

    /// Serves `turns` requests of groups that are not passed over; gives what each of four clients got.
    fn serve(queue: &mut FairQueue, turns: usize, passed_over: impl Fn(&Needs) -> bool) -> [u64; 4] {
        let mut of = [0; 4];
        for _ in 0..turns {
            let number = queue.first(&passed_over).unwrap();
            let Waiting { share, cost, .. } = &queue.waiting[&number];
            of[share.client] += cost;
            queue.served(number, Instant::now());
        }
        of
    }

    #[test]
    fn clients_share_by_weight_however_many_they_send() {
        let mut queue = FairQueue::default();
        for i in 0..900 {
            push(&mut queue, i, share(0, 1), 100);
        }
        for i in 900..1000 {
            push(&mut queue, i, share(1, 2), 100);
        }
        let served = serve(&mut queue, 90, |_| false);
        assert!((2900..=3100).contains(&served[0]) && (5900..=6100).contains(&served[1]), "{served:?}");
        // It comes late and does not get what it did not ask for.
        for i in 1000..1100 {
            push(&mut queue, i, share(2, 1), 100);
        }
        let served = serve(&mut queue, 40, |_| false);
        assert!((900..=1100).contains(&served[0]) && (900..=1100).contains(&served[2]), "{served:?}");
    }

    #[test]
    fn long_requests_count_for_more() {
        let mut queue = FairQueue::default();
        for i in 0..100 {
            push(&mut queue, i, share(0, 1), 1000);
            push(&mut queue, 1000 + i, share(1, 1), 100);
        }
        let served = serve(&mut queue, 55, |_| false);
        assert!((4000..=6000).contains(&served[0]), "{served:?}");
    }

    #[test]
    fn what_a_client_gets_for_one_pair_and_quality_counts_for_all() {
        let mut queue = FairQueue::default();
        let qualities = [Quality::Overfill, Quality::Full, Quality::Decode];
        for i in 0..2000 {
            let pair = ["ours", "theirs"][i as usize % 2];
            put(&mut queue, i, needs(pair, qualities[i as usize % 3]), share(0, 1), 0, 100);
            put(&mut queue, 10_000 + i, ours(), share(1, 1), 0, 100);
        }
        let served = serve(&mut queue, 200, |_| false);
        assert!((9_800..=10_200).contains(&served[0]), "{served:?}");
    }

    #[test]
    fn a_client_that_comes_each_time_with_another_quality_has_its_debts() {
        let mut queue = FairQueue::default();
        for i in 0..1000 {
            push(&mut queue, i, share(0, 1), 100);
        }
        // One at a time, always the only one of its group.
        let (mut of, mut next) = ([0, 0], 10_000);
        for _ in 0..200 {
            if queue.waiting.len() == 1000 - of[0] {
                let quality = [Quality::Full, Quality::Decode][next as usize % 2];
                put(&mut queue, next, needs("ours", quality), share(1, 1), 0, 100);
                next += 1;
            }
            let number = first(&mut queue).unwrap();
            of[usize::from(number >= 10_000)] += 1;
            queue.served(number, Instant::now());
        }
        assert!((98..=102).contains(&of[0]), "{of:?}");
    }

    #[test]
    fn nodes_that_are_slow_do_not_shut_out_who_comes_to_them_or_to_others() {
        let mut queue = FairQueue::default();
        let slow = |needs: &Needs| needs.pair.as_str() == "slow";
        for i in 0..10_000 {
            put(&mut queue, i, needs("slow", Quality::Overfill), share(0, 1), 0, 1000);
            put(&mut queue, 100_000 + i, ours(), share(1, 1), 0, 1000);
        }
        for _ in 0..100 {
            serve(&mut queue, 50, slow);
            serve(&mut queue, 1, |needs| !slow(needs));
        }
        // A third comes to the slow nodes: half of them are its own, at once.
        for i in 0..1000 {
            put(&mut queue, 200_000 + i, needs("slow", Quality::Overfill), share(2, 1), 0, 1000);
        }
        let served = serve(&mut queue, 20, |needs| !slow(needs));
        assert!((9_000..=11_000).contains(&served[2]), "{served:?}");
        // The slow ones become fast: they have the right of way for so many tokens of each client's, and no more.
        let turns = 2 * (BEHIND / TOKEN) as usize / 1000 + 90;
        let served = serve(&mut queue, turns, |_| false);
        assert!((27_000..=40_000).contains(&served[1]), "{served:?}");
    }

    #[test]
    fn who_gets_much_elsewhere_waits_a_bounded_time() {
        let mut queue = FairQueue::default();
        let scarce = |needs: &Needs| needs.pair.as_str() == "scarce";
        for i in 0..10_000 {
            put(&mut queue, i, needs("scarce", Quality::Overfill), share(0, 1), 0, 100);
            put(&mut queue, 100_000 + i, ours(), share(1, 1), 0, 100);
        }
        put(&mut queue, 200_000, needs("scarce", Quality::Overfill), share(1, 1), 0, 100);
        let mut turns = 0;
        while queue.waiting.contains_key(&200_000) {
            serve(&mut queue, 10, scarce);
            serve(&mut queue, 1, |needs| !scarce(needs));
            turns += 1;
        }
        assert!(turns <= ELSEWHERE + 2, "{turns}");
    }

    #[test]
    fn priority_orders_a_clients_own_and_class_all() {
        let mut queue = FairQueue::default();
        put(&mut queue, 1, ours(), share(0, 1), 5, 1);
        put(&mut queue, 2, ours(), share(0, 1), 0, 1);
        put(&mut queue, 3, ours(), share(0, 1), -1, 1);
        put(&mut queue, 4, ours(), share(1, 1), -100, 1);
        put(&mut queue, 5, needs("other", Quality::Full), Share { client: 2, weight: 1, class: 1 }, 9, 1_000_000);
        let mut order = Vec::new();
        while let Some(number) = first(&mut queue) {
            order.push(number);
            queue.served(number, Instant::now());
        }
        assert_eq!(order[0], 5);
        assert_eq!(order.iter().filter(|n| **n < 4).copied().collect::<Vec<_>>(), [3, 2, 1]);
        assert!(order.iter().position(|n| *n == 4).unwrap() <= 2, "another client's priority does not push it back: {order:?}");
    }

    #[test]
    fn whose_turn_brought_nothing_is_first_of_its_class_and_does_not_pay_again() {
        let mut queue = FairQueue::default();
        for i in 0..6 {
            push(&mut queue, i, share(i as usize % 2, 1), 100);
        }
        let number = first(&mut queue).unwrap();
        queue.served(number, Instant::now());
        let paid = |queue: &FairQueue| queue.groups.values().find_map(|group| group.clients.get(&0)).unwrap().tag();
        let before = paid(&queue);
        put(&mut queue, 50, ours(), Share { class: 1, ..share(2, 1) }, 0, 1);
        queue.push_again(number, ours(), share(0, 1), |_| true);
        let order: Vec<u64> = (0..2)
            .map(|_| {
                let number = first(&mut queue).unwrap();
                queue.served(number, Instant::now());
                number
            })
            .collect();
        assert_eq!((order, paid(&queue)), (vec![50, number], before));
    }

    #[test]
    fn who_leaves_leaves_nothing() {
        let mut queue = FairQueue::default();
        for i in 0..10 {
            push(&mut queue, i, share(i as usize % 3, 1), 1);
        }
        queue.push_again(10, ours(), share(0, 1), |_| true);
        (0..11).rev().for_each(|i| queue.remove(i));
        queue.remove(3);
        assert!(queue.groups.is_empty() && queue.clients.is_empty() && first(&mut queue).is_none());
    }

    #[test]
    fn the_wait_is_foretold() {
        let (mut queue, begun) = (FairQueue::default(), Instant::now());
        let expected = |queue: &FairQueue, share, priority| queue.expected(share, priority, |needs| needs.prefill);
        assert_eq!(expected(&queue, share(0, 1), 0), None);
        for i in 0..40 {
            // Two qualities share the prefill nodes.
            put(&mut queue, i, needs("ours", [Quality::Overfill, Quality::Full][i as usize % 2]), share(0, 1), 0, 10);
            put(&mut queue, 1000 + i, needs("ours", Quality::Decode), share(0, 1), 0, 10);
        }
        for turn in 0..20 {
            let number = queue.first(|needs| !needs.prefill).unwrap();
            queue.served(number, begun + Duration::from_millis(100 * turn));
        }
        let of_first = expected(&queue, share(0, 1), 0).unwrap().as_secs_f64();
        assert!((1.8..2.2).contains(&of_first), "{of_first}: twenty wait, a tenth of a second each");
        let of_other = expected(&queue, share(1, 1), 0).unwrap().as_secs_f64();
        assert!((0.08..0.12).contains(&of_other), "{of_other}: another client waits for one");
        assert_eq!(expected(&queue, share(0, 1), -1).unwrap(), Duration::ZERO);
        let lower = expected(&queue, Share { class: -1, ..share(1, 1) }, 0).unwrap().as_secs_f64();
        assert!((1.8..2.2).contains(&lower), "{lower}: a lower class waits for all");
    }
}
