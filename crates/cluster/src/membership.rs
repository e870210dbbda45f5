//! Which nodes are there, as far as etcd and the nodes themselves say: a state without I/O.
//!
//! etcd's word is enough for a node to join the view, and not enough for it to leave. A node whose entry is gone (its lease
//! ended while etcd was stopped, etcd was wiped, somebody deleted the key) is *doubted*: it is asked for its status until it
//! registers again, and stays in the view as long as it answers. While etcd is away all nodes are asked like that, so one
//! that dies then is not believed to live until etcd comes back.
//!
//! **Invariants:**
//! - A node that answers, under its own id, that it is ready is in the view, whatever etcd says.
//! - One that etcd does not vouch for leaves the view after [`TRIES`] probes without an answer, or after the first where nobody
//!   listens any more. It is hidden and asked on, rather than forgotten, as long as its entry may be there: after a cut in
//!   the network nothing else could bring it back.
//! - Where neither etcd nor any node answers it is this process that is cut off: then nobody leaves by silence, and answers
//!   that are under way find their nodes when the cut is over.
//! - A value that is no node's never reaches the view.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use overfill_types::{NodeInfo, PeerAddress, Role};

use crate::asking::Members;
use crate::probe::{NoStatus, Reply};
use crate::snapshot::Snapshot;

/// Time between two questions to a node that is doubted.
pub(crate) const INTERVAL: Duration = Duration::from_secs(1);
/// Probes in a row without an answer after which a node is given up.
pub(crate) const TRIES: u32 = 2;
/// After so long without an answer of the source's or of any node's this process is taken to be cut off.
pub(crate) const DEAF: Duration = Duration::from_secs(3);
/// Keys of malformed values that are remembered, so that each is warned of once; beyond it they are left out in silence.
const MOST_REMEMBERED: usize = 1024;

/// A key and its value, as etcd has them.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) value: Vec<u8>,
}

/// What happened to one key.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Put(Entry),
    Deleted(String),
}

/// What etcd says.
#[derive(Debug)]
pub(crate) enum Word {
    /// All entries.
    Listed(Vec<Entry>),
    /// What happened since.
    Changed(Vec<Event>),
    /// It is away.
    Away,
}

/// What came of asking a node for its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It is ready, and the process that had registered.
    Ready,
    /// Nobody listens at its address, or another process, or it drains.
    Gone,
    /// No answer, or none that is understood.
    Silent,
}

/// The nodes that are known.
pub(crate) struct Membership {
    /// Prefix of all nodes' keys: `{prefix}{role}/{id}`.
    prefix: String,
    nodes: BTreeMap<String, Known>,
    /// Keys whose value is no node's.
    malformed: BTreeSet<String>,
    /// Whether etcd is away, so that nobody can register.
    away: bool,
    /// When a node last answered, or its machine for it.
    heard: Option<Instant>,
    /// Whether the view may differ from when it was last taken.
    changed: bool,
}

struct Known {
    node: NodeInfo,
    /// Whether its entry was there when etcd was last heard of.
    listed: bool,
    /// `None` while etcd vouches for it.
    doubt: Option<Doubt>,
}

impl Known {
    fn hidden(&self) -> bool {
        self.doubt.as_ref().is_some_and(|doubt| doubt.hidden)
    }

    fn due(&self) -> Option<Instant> {
        self.doubt.as_ref()?.due
    }
}

/// A node that etcd does not vouch for.
struct Doubt {
    /// When it is asked; `None` while it is being asked.
    due: Option<Instant>,
    /// Probes in a row that found no node there.
    silent: u32,
    /// It is not in the view.
    hidden: bool,
}

impl Doubt {
    fn new(due: Instant) -> Self {
        Self { due: Some(due), silent: 0, hidden: false }
    }
}

impl Membership {
    /// No node, of those whose keys begin with `prefix`; etcd was not reached yet.
    pub(crate) fn new(prefix: String) -> Self {
        Self { prefix, nodes: BTreeMap::new(), malformed: BTreeSet::new(), away: true, heard: None, changed: false }
    }

    /// etcd answers, and these are all entries that it has.
    fn listed(&mut self, entries: Vec<Entry>, now: Instant) {
        self.away = false;
        let gone: BTreeSet<String> = {
            let listed: BTreeSet<&str> = entries.iter().map(|entry| entry.key.as_str()).collect();
            self.malformed.retain(|key| listed.contains(key.as_str()));
            self.nodes.keys().filter(|key| !listed.contains(key.as_str())).cloned().collect()
        };
        if !gone.is_empty() {
            tracing::info!(nodes = gone.len(), "no longer listed in etcd: asking them for their status");
        }
        for key in gone {
            self.doubt(&key, now);
        }
        for entry in entries {
            match self.nodes.get_mut(&entry.key) {
                // Its entry may outlive it by a lease: it is back when it answers, or registers again.
                Some(known) if known.hidden() => known.listed = true,
                _ => self.put(entry, now),
            }
        }
    }

    /// What happened since, in order.
    fn changed(&mut self, events: Vec<Event>, now: Instant) {
        for event in events {
            match event {
                Event::Put(entry) => self.put(entry, now),
                Event::Deleted(key) => {
                    self.malformed.remove(&key);
                    self.doubt(&key, now);
                }
            }
        }
    }

    /// etcd cannot be reached. The nodes are asked themselves, spread over an interval: an absence that is shorter costs
    /// few probes, and a longer one none at the same instant.
    fn away(&mut self, now: Instant) {
        if std::mem::replace(&mut self.away, true) {
            return;
        }
        let most = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX).max(1);
        for (place, known) in (1..=most).zip(self.nodes.values_mut()) {
            known.doubt.get_or_insert_with(|| Doubt::new(now + INTERVAL.mul_f64(f64::from(place) / f64::from(most))));
        }
    }

    /// What came of asking a node. One that has registered again meanwhile needs no answer.
    fn conclude(&mut self, key: &str, answer: Answer, now: Instant) {
        let cut_off = self.away && self.heard.is_none_or(|heard| now.saturating_duration_since(heard) > DEAF);
        if answer != Answer::Silent {
            self.heard = Some(now);
            if cut_off {
                // What the others did not answer until now says nothing of them.
                self.nodes.values_mut().filter_map(|known| known.doubt.as_mut()).for_each(|doubt| doubt.silent = 0);
            }
        }
        let Some(known) = self.nodes.get_mut(key) else { return };
        let Some(doubt) = known.doubt.as_mut().filter(|doubt| doubt.due.is_none()) else { return };
        if answer == Answer::Ready {
            self.changed |= doubt.hidden;
            let vouched_for = known.listed && !self.away;
            known.doubt = (!vouched_for).then(|| Doubt::new(now + INTERVAL));
            return;
        }
        doubt.silent += 1;
        if answer == Answer::Silent && doubt.silent < TRIES {
            doubt.due = Some(now);
            return;
        }
        if answer == Answer::Silent && cut_off && !doubt.hidden {
            doubt.due = Some(now + INTERVAL);
            return;
        }
        if !doubt.hidden {
            tracing::warn!(node = %known.node.id, ?answer, "node is not there: left out");
            self.changed = true;
        }
        if self.away || known.listed {
            *doubt = Doubt { due: Some(now + INTERVAL), silent: doubt.silent, hidden: true };
        } else {
            self.nodes.remove(key);
        }
    }

    /// All nodes that are there.
    fn view(&self) -> Snapshot {
        Snapshot::new(self.nodes.values().filter(|known| !known.hidden()).map(|known| known.node.clone()))
    }

    /// Enters a node. A value that is no node's leaves the key as if it had been deleted.
    fn put(&mut self, Entry { key, value }: Entry, now: Instant) {
        match self.parse(&key, &value) {
            Ok(node) => {
                self.malformed.remove(&key);
                self.changed = true;
                self.nodes.insert(key, Known { node, listed: true, doubt: None });
            }
            Err(why) => {
                self.doubt(&key, now);
                if self.malformed.len() < MOST_REMEMBERED && self.malformed.insert(key.clone()) {
                    tracing::warn!(%key, %why, "a value in etcd that is no node's: left out");
                }
            }
        }
    }

    /// A node's entry is gone.
    fn doubt(&mut self, key: &str, now: Instant) {
        let Some(known) = self.nodes.get_mut(key) else { return };
        known.listed = false;
        if known.hidden() {
            self.nodes.remove(key);
        } else {
            known.doubt.get_or_insert_with(|| Doubt::new(now));
        }
    }

    /// A node, where the value is one and belongs to its key; else why not.
    fn parse(&self, key: &str, value: &[u8]) -> Result<NodeInfo, String> {
        let node: NodeInfo = serde_json::from_slice(value).map_err(|error| error.to_string())?;
        let own = key_of(&self.prefix, &node);
        if own == key { Ok(node) } else { Err(format!("the node in it belongs under {own}")) }
    }
}

impl Members for Membership {
    type Key = String;
    type Word = Word;

    fn heard(&mut self, word: Word, now: Instant) {
        match word {
            Word::Listed(entries) => self.listed(entries, now),
            Word::Changed(events) => self.changed(events, now),
            Word::Away => self.away(now),
        }
    }

    /// Those first that wait longest.
    fn due(&mut self, most: usize, now: Instant) -> Vec<(String, Role, PeerAddress)> {
        let mut due: Vec<_> = self.nodes.iter_mut().filter(|(_, known)| known.due().is_some_and(|at| at <= now)).collect();
        due.sort_by_key(|(_, known)| known.due());
        due.truncate(most);
        let asked = due.into_iter().map(|(key, known)| {
            if let Some(doubt) = &mut known.doubt {
                doubt.due = None;
            }
            (key.clone(), known.node.role, known.node.address.clone())
        });
        asked.collect()
    }

    fn next_due(&self) -> Option<Instant> {
        self.nodes.values().filter_map(Known::due).min()
    }

    fn answered(&mut self, key: &String, reply: Reply, now: Instant) {
        let own = self.nodes.get(key).map(|known| &known.node.id);
        let answer = match reply {
            Ok(Some(node)) if own == Some(&node.id) => Answer::Ready,
            Ok(_) | Err(NoStatus::Refused) => Answer::Gone,
            Err(NoStatus::Silent) => Answer::Silent,
        };
        self.conclude(key, answer, now);
    }

    fn changed_view(&mut self) -> Option<Snapshot> {
        std::mem::take(&mut self.changed).then(|| self.view())
    }
}

/// A node's key.
pub(crate) fn key_of(prefix: &str, node: &NodeInfo) -> String {
    format!("{prefix}{}/{}", node.role, node.id)
}

#[cfg(test)]
mod tests {
    use overfill_types::{Fingerprint, NodeId, Role, ServedPair};
    use rand::{Rng, SeedableRng};
    use serde_json::json;

    use super::*;

    const PREFIX: &str = "/overfill/c/nodes/";

    fn node(id: &str) -> NodeInfo {
        NodeInfo {
            id: NodeId::new(id),
            role: Role::Decode,
            address: "127.0.0.1:1".parse().unwrap(),
            pairs: vec![ServedPair { model: "m".into(), fingerprint: Fingerprint::new("f") }],
            max_context: 8,
        }
    }

    fn key(id: &str) -> String {
        key_of(PREFIX, &node(id))
    }

    fn entry(id: &str) -> Entry {
        Entry { key: key(id), value: serde_json::to_vec(&node(id)).unwrap() }
    }

    fn names(membership: &Membership) -> Vec<String> {
        membership.view().nodes.iter().map(|n| n.id.to_string()).collect()
    }

    fn due(membership: &mut Membership, now: Instant) -> Vec<String> {
        membership.due(usize::MAX, now).into_iter().map(|(key, ..)| key.rsplit('/').next().unwrap_or_default().to_owned()).collect()
    }

    /// Listed by etcd: these nodes.
    fn of(ids: &[&str], now: Instant) -> Membership {
        let mut membership = Membership::new(PREFIX.into());
        membership.listed(ids.iter().map(|id| entry(id)).collect(), now);
        assert_eq!(names(&membership), ids);
        assert_eq!(membership.next_due(), None, "nobody asks a node that etcd lists");
        membership
    }

    fn missing_from_a_list(membership: &mut Membership, now: Instant) {
        membership.listed(vec![entry("b")], now);
    }

    fn deleted(membership: &mut Membership, now: Instant) {
        membership.changed(vec![Event::Deleted(key("a"))], now);
    }

    fn overwritten(membership: &mut Membership, now: Instant) {
        membership.changed(vec![Event::Put(Entry { key: key("a"), value: b"{ no node".to_vec() })], now);
    }

    /// The ways in which the entry of `a` goes.
    const LOSSES: [fn(&mut Membership, Instant); 3] = [missing_from_a_list, deleted, overwritten];

    #[test]
    fn a_node_whose_entry_goes_stays_as_long_as_it_answers() {
        for lose in LOSSES {
            let mut now = Instant::now();
            let mut membership = of(&["a", "b"], now);
            lose(&mut membership, now);
            for _ in 0..10 {
                assert_eq!(names(&membership), ["a", "b"]);
                assert_eq!(due(&mut membership, now), ["a"]);
                assert_eq!((due(&mut membership, now), membership.next_due()), (vec![], None), "asked once at a time");
                membership.conclude(&key("a"), Answer::Ready, now);
                assert_eq!(membership.next_due(), Some(now + INTERVAL));
                now += INTERVAL;
            }
            membership.changed(vec![Event::Put(entry("a"))], now);
            assert_eq!((names(&membership), membership.next_due()), (vec!["a".into(), "b".into()], None), "it has registered again");
        }
    }

    #[test]
    fn it_goes_when_it_does_not_answer_either() {
        for lose in LOSSES {
            for answers in [&[Answer::Gone][..], &[Answer::Silent, Answer::Silent], &[Answer::Silent, Answer::Gone]] {
                let now = Instant::now();
                let mut membership = of(&["a", "b"], now);
                lose(&mut membership, now);
                for answer in answers {
                    assert_eq!(names(&membership), ["a", "b"]);
                    assert_eq!(due(&mut membership, now), ["a"], "without a pause");
                    membership.conclude(&key("a"), *answer, now);
                }
                assert_eq!((names(&membership), membership.next_due()), (vec!["b".into()], None), "{answers:?}");
            }
        }
    }

    #[test]
    fn one_missed_answer_is_forgiven() {
        let now = Instant::now();
        let mut membership = of(&["a"], now);
        membership.listed(vec![], now);
        for i in 0..10 {
            let at = now + INTERVAL * i;
            for answer in [Answer::Silent, Answer::Ready] {
                assert_eq!(due(&mut membership, at), ["a"]);
                membership.conclude(&key("a"), answer, at);
            }
        }
        assert_eq!(names(&membership), ["a"]);
    }

    #[test]
    fn an_answer_that_comes_after_it_has_registered_again_changes_nothing() {
        let now = Instant::now();
        let mut membership = of(&["a"], now);
        membership.listed(vec![], now);
        assert_eq!(due(&mut membership, now), ["a"]);
        membership.changed(vec![Event::Put(entry("a"))], now);
        membership.conclude(&key("a"), Answer::Gone, now);
        assert_eq!(names(&membership), ["a"]);
        membership.changed(vec![Event::Deleted(key("a"))], now);
        membership.conclude(&key("a"), Answer::Gone, now);
        assert_eq!(names(&membership), ["a"], "this doubt was not asked of yet");
    }

    #[test]
    fn while_etcd_is_away_the_nodes_are_asked_themselves() {
        let now = Instant::now();
        let mut membership = of(&["a", "b", "c", "d"], now);
        membership.away(now);
        assert!(due(&mut membership, now).is_empty(), "a short absence costs nothing");
        assert_eq!(due(&mut membership, now + INTERVAL / 2), ["a", "b"], "spread");
        assert_eq!(due(&mut membership, now + INTERVAL), ["c", "d"]);
        let later = now + INTERVAL;
        membership.conclude(&key("a"), Answer::Gone, later);
        membership.conclude(&key("b"), Answer::Gone, later);
        membership.conclude(&key("c"), Answer::Ready, later);
        membership.conclude(&key("d"), Answer::Silent, later);
        assert_eq!((names(&membership), due(&mut membership, later)), (vec!["c".into(), "d".into()], vec!["d".into()]));
        membership.conclude(&key("d"), Answer::Silent, later);
        membership.away(later);
        assert_eq!(names(&membership), ["c"]);

        // A cut in the network is over for one of them.
        let later = later + INTERVAL;
        assert_eq!(due(&mut membership, later), ["a", "b", "c", "d"]);
        for (id, answer) in [("a", Answer::Ready), ("b", Answer::Gone), ("c", Answer::Ready), ("d", Answer::Silent)] {
            membership.conclude(&key(id), answer, later);
        }
        assert_eq!(names(&membership), ["a", "c"]);

        // etcd is back. It knows two of them, and one of these died meanwhile: its entry outlives it.
        membership.listed(vec![entry("b"), entry("c")], later);
        assert_eq!(names(&membership), ["a", "c"]);
        let later = later + INTERVAL;
        assert_eq!(due(&mut membership, later), ["a", "b"], "d is forgotten, and etcd vouches for c");
        membership.conclude(&key("a"), Answer::Gone, later);
        membership.conclude(&key("b"), Answer::Gone, later);
        assert_eq!((names(&membership), membership.nodes.len()), (vec!["c".into()], 2));
        membership.changed(vec![Event::Deleted(key("b"))], later);
        assert_eq!((membership.nodes.len(), membership.next_due()), (1, None), "its lease has ended");
    }

    #[test]
    fn a_node_behind_a_cut_that_etcd_still_lists_comes_back_with_its_answer() {
        let now = Instant::now();
        let mut membership = of(&["a"], now);
        membership.away(now);
        assert_eq!(due(&mut membership, now + INTERVAL), ["a"]);
        membership.conclude(&key("a"), Answer::Gone, now + INTERVAL);
        membership.listed(vec![entry("a")], now + INTERVAL);
        assert_eq!((names(&membership), due(&mut membership, now + INTERVAL * 2)), (vec![], vec!["a".into()]));
        membership.conclude(&key("a"), Answer::Ready, now + INTERVAL * 2);
        assert_eq!((names(&membership), membership.next_due()), (vec!["a".into()], None));
    }

    #[test]
    fn a_lease_storm_asks_no_more_nodes_at_a_time_than_it_may() {
        let now = Instant::now();
        let ids: Vec<String> = (0..100).map(|i| format!("n{i:03}")).collect();
        let mut membership = of(&ids.iter().map(String::as_str).collect::<Vec<_>>(), now);
        membership.changed(ids.iter().map(|id| Event::Deleted(key(id))).collect(), now);
        let mut asked = BTreeSet::new();
        while asked.len() < ids.len() {
            let some = membership.due(7, now);
            assert!((1..=7).contains(&some.len()));
            for (key, ..) in some {
                membership.conclude(&key, Answer::Ready, now);
                assert!(asked.insert(key), "each is asked once");
            }
        }
        assert_eq!(names(&membership), ids);
    }

    #[test]
    fn silent_nodes_keep_no_other_from_being_asked() {
        let mut now = Instant::now();
        let mut membership = of(&["a", "b", "c", "d"], now);
        membership.away(now);
        now += INTERVAL;
        let mut asked = Vec::new();
        for _ in 0..4 * TRIES {
            // One at a time, and silent for a whole interval: the first are due again before the last had their turn.
            let (key, ..) = membership.due(1, now).remove(0);
            now += INTERVAL;
            membership.conclude(&key, Answer::Silent, now);
            asked.push(key.rsplit('/').next().unwrap().to_owned());
        }
        asked.sort();
        assert_eq!(asked, ["a", "a", "b", "b", "c", "c", "d", "d"]);
    }

    #[test]
    fn who_hears_nobody_at_all_gives_nobody_up() {
        let mut now = Instant::now();
        let mut membership = of(&["a", "b"], now);
        membership.away(now);
        let answered = |membership: &mut Membership, now: Instant, answers: [Answer; 2]| {
            assert_eq!(due(membership, now), ["a", "b"]);
            ["a", "b"].iter().zip(answers).for_each(|(id, answer)| membership.conclude(&key(id), answer, now));
        };
        now += INTERVAL;
        answered(&mut membership, now, [Answer::Ready, Answer::Ready]);
        now += INTERVAL;
        answered(&mut membership, now, [Answer::Silent, Answer::Silent]);
        // As long as both probes take.
        now += DEAF;
        for _ in 0..10 {
            answered(&mut membership, now, [Answer::Silent, Answer::Silent]);
            assert_eq!(names(&membership), ["a", "b"]);
            now += INTERVAL;
        }
        // The cut is over. A probe that was lost in it says nothing, and one of them has died meanwhile, with its machine.
        assert_eq!(due(&mut membership, now), ["a", "b"]);
        membership.conclude(&key("b"), Answer::Ready, now);
        membership.conclude(&key("a"), Answer::Silent, now);
        assert_eq!((names(&membership), due(&mut membership, now)), (vec!["a".into(), "b".into()], vec!["a".into()]));
        membership.conclude(&key("a"), Answer::Silent, now);
        assert_eq!(names(&membership), ["b"]);
    }

    #[test]
    fn every_change_of_the_view_is_told() {
        let mut now = Instant::now();
        let mut membership = Membership::new(PREFIX.into());
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let (mut seen, mut changes) = (Snapshot::default(), 0);
        for step in 0..20_000 {
            now += INTERVAL / 4;
            let id = ["a", "b", "c", "d"][rng.random_range(0..4)];
            match rng.random_range(0..5) {
                0 => membership.changed(vec![Event::Put(entry(id))], now),
                1 => membership.changed(vec![Event::Deleted(key(id))], now),
                2 => membership.away(now),
                3 => membership.listed(vec![entry(id)], now),
                _ => {
                    let answer = [Answer::Ready, Answer::Gone, Answer::Silent][rng.random_range(0..3)];
                    for (key, ..) in membership.due(1, now) {
                        membership.conclude(&key, answer, now);
                    }
                }
            }
            if let Some(view) = membership.changed_view() {
                changes += usize::from(view != seen);
                seen = view;
            }
            assert_eq!(seen, membership.view(), "step {step}");
        }
        assert!(changes > 1000, "{changes}");
    }

    #[test]
    fn what_is_no_node_of_its_key_is_left_out() {
        let now = Instant::now();
        let mut membership = of(&["a"], now);
        let good = json!(node("x"));
        for (field, value) in [
            ("address", json!("no address")),
            ("address", json!("0.0.0.0:7001")),
            ("address", json!("http://10.0.0.1:7001")),
            ("id", json!("y")),
            ("role", json!("prefill")),
            ("role", json!("cook")),
        ] {
            let mut bad = good.clone();
            bad[field] = value;
            let bad = Entry { key: key("x"), value: serde_json::to_vec(&bad).unwrap() };
            membership.changed(vec![Event::Put(bad.clone())], now);
            assert_eq!(names(&membership), ["a"], "{field}");
            membership.listed(vec![entry("a"), bad], now);
            assert_eq!(names(&membership), ["a"], "{field}");
            assert_eq!(membership.malformed.len(), 1);
        }
        membership.changed(vec![Event::Put(entry("x"))], now);
        assert_eq!(names(&membership), ["a", "x"]);
        assert!(membership.malformed.is_empty(), "it is warned of again if it comes again");
        let many = (0..2 * MOST_REMEMBERED).map(|i| Event::Put(Entry { key: format!("{PREFIX}{i}"), value: vec![] })).collect();
        membership.changed(many, now);
        assert_eq!(membership.malformed.len(), MOST_REMEMBERED);
    }
}
