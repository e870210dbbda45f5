//! Whose turn it is where nobody has room: clients share by weight, each client's own requests go by priority, then by age.
//!
//! Each client has a count of tokens that it got, divided by its weight; the turn is of the one with the least. Who comes
//! after a pause starts where the others are: what was not used is not saved up.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// A client's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Which client.
    pub client: usize,
    /// Its part among those of its class, at least 1.
    pub weight: u32,
    /// Clients of a lower class wait for all of a higher one.
    pub class: i32,
}

/// What bounds the waiting.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
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

/// A request's place: its own priority (less is earlier), then its number.
type Place = (i32, u64);

/// Requests that wait for the same nodes.
#[derive(Debug, Default)]
pub(crate) struct Line {
    clients: HashMap<usize, Client>,
    /// Those with requests that wait: highest class first, then the least served.
    active: BTreeSet<(i32, u128, usize)>,
    places: HashMap<u64, (usize, Place)>,
    /// How far each class is served.
    served: HashMap<i32, u128>,
    /// Mean time between two turns while requests wait, in seconds.
    interval: Option<f64>,
    last: Option<Instant>,
}

#[derive(Debug)]
struct Client {
    share: Share,
    /// Tokens that it got for each unit of weight, and 2^16 times that.
    served: u128,
    /// What each costs.
    waiting: BTreeMap<Place, u64>,
}

impl Line {
    pub(crate) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// A request of `cost` tokens begins to wait.
    pub(crate) fn push(&mut self, number: u64, share: Share, priority: i32, cost: u64) {
        let served = self.served.get(&share.class).copied().unwrap_or(0);
        let client = self.clients.entry(share.client).or_insert(Client { share, served, waiting: BTreeMap::new() });
        if client.waiting.is_empty() {
            client.share = share;
            client.served = client.served.max(served);
            self.active.insert((-share.class, client.served, share.client));
        }
        client.waiting.insert((priority, number), cost);
        self.places.insert(number, (share.client, (priority, number)));
    }

    /// Whose turn it is.
    pub(crate) fn first(&self) -> Option<u64> {
        let (_, _, client) = self.active.first()?;
        self.clients.get(client)?.waiting.first_key_value().map(|((_, number), _)| *number)
    }

    /// It had its turn: its client pays.
    pub(crate) fn served(&mut self, number: u64, now: Instant) {
        let Some((client, cost)) = self.take(number) else { return };
        if let Some(last) = self.last {
            let passed = now.saturating_duration_since(last).as_secs_f64();
            // A mean over the last ten or so.
            self.interval = Some(self.interval.map_or(passed, |mean| mean + (passed - mean) / 10.0));
        }
        self.last = (!self.is_empty()).then_some(now);
        let Some(client) = self.clients.get_mut(&client) else { return };
        let (share, before) = (client.share, client.served);
        client.served += (u128::from(cost) << 16) / u128::from(share.weight.max(1));
        let reached = self.served.entry(share.class).or_default();
        *reached = (*reached).max(before);
        if self.active.remove(&(-share.class, before, share.client)) {
            self.active.insert((-share.class, client.served, share.client));
        }
    }

    /// It does not wait any more, and got nothing.
    pub(crate) fn remove(&mut self, number: u64) {
        self.take(number);
        if self.is_empty() {
            self.last = None;
        }
    }

    fn take(&mut self, number: u64) -> Option<(usize, u64)> {
        let (client, place) = self.places.remove(&number)?;
        let entry = self.clients.get_mut(&client)?;
        let cost = entry.waiting.remove(&place)?;
        if entry.waiting.is_empty() {
            self.active.remove(&(-entry.share.class, entry.served, client));
        }
        Some((client, cost))
    }

    /// When the turn of a request that comes now will be; `None` where that is not known.
    pub(crate) fn expected(&self, share: Share, priority: i32) -> Option<Duration> {
        let (mut better, mut alike, mut weights) = (0, 0, 0);
        for (class, _, client) in &self.active {
            let Some(entry) = self.clients.get(client) else { continue };
            if -class > share.class {
                better += entry.waiting.len();
            } else if -class == share.class && *client != share.client {
                alike += entry.waiting.len();
                weights += entry.share.weight as usize;
            }
        }
        let own = self.clients.get(&share.client).map_or(0, |c| c.waiting.range(..=(priority, u64::MAX)).count());
        let others = ((own + 1) * weights / share.weight.max(1) as usize).min(alike);
        let ahead = better + own + others;
        self.interval.map(|interval| Duration::from_secs_f64((ahead as f64 * interval).min(86_400.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(client: usize, weight: u32) -> Share {
        Share { client, weight, class: 0 }
    }

    /// Serves `turns` requests; gives how many of each of three clients.
    fn serve(line: &mut Line, turns: usize) -> [usize; 3] {
        let mut of = [0; 3];
        for _ in 0..turns {
            let number = line.first().unwrap();
            of[line.places[&number].0] += 1;
            line.served(number, Instant::now());
        }
        of
    }

    #[test]
    fn clients_share_by_weight_however_many_they_send() {
        let mut line = Line::default();
        for i in 0..900 {
            line.push(i, share(0, 1), 0, 100);
        }
        for i in 900..1000 {
            line.push(i, share(1, 2), 0, 100);
        }
        let served = serve(&mut line, 90);
        assert!((29..=31).contains(&served[0]) && (59..=61).contains(&served[1]), "{served:?}");
        // It comes late and does not get what it did not ask for.
        for i in 1000..1100 {
            line.push(i, share(2, 1), 0, 100);
        }
        let served = serve(&mut line, 40);
        assert!((9..=11).contains(&served[0]) && (9..=11).contains(&served[2]), "{served:?}");
    }

    #[test]
    fn long_requests_count_for_more() {
        let mut line = Line::default();
        for i in 0..100 {
            line.push(i, share(0, 1), 0, 1000);
            line.push(1000 + i, share(1, 1), 0, 100);
        }
        let served = serve(&mut line, 55);
        assert!((4..=6).contains(&served[0]), "{served:?}");
    }

    #[test]
    fn priority_orders_a_clients_own_and_class_all() {
        let mut line = Line::default();
        line.push(1, share(0, 1), 5, 1);
        line.push(2, share(0, 1), 0, 1);
        line.push(3, share(0, 1), -1, 1);
        line.push(4, share(1, 1), -100, 1);
        line.push(5, Share { client: 2, weight: 1, class: 1 }, 9, 1_000_000);
        let mut order = Vec::new();
        while let Some(number) = line.first() {
            order.push(number);
            line.served(number, Instant::now());
        }
        assert_eq!(order[0], 5);
        assert_eq!(order.iter().filter(|n| **n < 4).copied().collect::<Vec<_>>(), [3, 2, 1]);
        assert!(order.iter().position(|n| *n == 4).unwrap() <= 2, "another client's priority does not push it back: {order:?}");
    }

    #[test]
    fn who_leaves_leaves_nothing() {
        let mut line = Line::default();
        for i in 0..10 {
            line.push(i, share(i as usize % 3, 1), 0, 1);
        }
        (0..10).rev().for_each(|i| line.remove(i));
        line.remove(3);
        assert!(line.is_empty() && line.active.is_empty() && line.first().is_none());
    }

    #[test]
    fn the_wait_is_foretold() {
        let (mut line, begun) = (Line::default(), Instant::now());
        assert_eq!(line.expected(share(0, 1), 0), None);
        for i in 0..40 {
            line.push(i, share(0, 1), 0, 10);
        }
        for turn in 0..20 {
            let number = line.first().unwrap();
            line.served(number, begun + Duration::from_millis(100 * turn));
        }
        let of_first = line.expected(share(0, 1), 0).unwrap().as_secs_f64();
        assert!((1.9..2.1).contains(&of_first), "{of_first}: twenty wait, a tenth of a second each");
        let of_other = line.expected(share(1, 1), 0).unwrap().as_secs_f64();
        assert!((0.09..0.11).contains(&of_other), "{of_other}: another client waits for one");
        let urgent = line.expected(share(0, 1), -1).unwrap();
        assert_eq!(urgent, Duration::ZERO);
    }
}
