//! Which nodes are there where a source names only places (a role and an address): a state without I/O. What is at a place says
//! so itself, so each is asked for its status.
//!
//! A fixed list names places and vouches for none: each is asked each second. Kubernetes also says of which it believes that
//! something serves there: such a node, once it has answered, is asked now and then only, since a container that is started
//! anew has the address of the one before.
//!
//! **Invariants:**
//! - A place is in the view with what last answered there that it is ready, and leaves it at once when what is there drains, when
//!   nobody listens any more, or when the source says that it leaves.
//! - Silence is believed after [`TRIES`] probes, and not where neither the source nor any node answers: then it is this process
//!   that is cut off.
//! - A source that suddenly names nobody of a role is not believed of those that answer: a list that was emptied by mistake would
//!   end a cluster that works.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use overfill_types::{NodeId, NodeInfo, PeerAddress, Role};

use crate::asking::Members;
use crate::membership::{DEAF, INTERVAL, TRIES};
use crate::probe::{NoStatus, Reply};
use crate::snapshot::Snapshot;

/// Time between two questions to a node that the source vouches for.
const NOW_AND_THEN: Duration = Duration::from_secs(10);

/// Where a node may be.
pub(crate) type Place = (Role, PeerAddress);

/// What the source says of a place; the better is the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Standing {
    /// What is there was told to end.
    Leaving,
    /// Something may serve there.
    Named,
    /// Something does, as far as the source knows.
    Vouched,
}

/// What the source says.
#[derive(Clone, Debug)]
pub(crate) enum Word {
    /// All places.
    Named(BTreeMap<Place, Standing>),
    /// It is away.
    Away,
}

/// All places that are named.
#[derive(Default)]
pub(crate) struct Places {
    known: BTreeMap<Place, Known>,
    /// Whether the source answers, and so can vouch for anybody.
    here: bool,
    /// When a node last answered, or its machine for it.
    heard: Option<Instant>,
    /// Whether the view may differ from when it was last taken.
    changed: bool,
}

struct Known {
    /// What last answered there that it is ready.
    node: Option<NodeInfo>,
    standing: Standing,
    /// Whether the source names it still.
    named: bool,
    /// When it is asked; `None` while it is being asked.
    due: Option<Instant>,
    /// It is to be asked again at once after the question that is under way.
    again: bool,
    /// Probes in a row without an answer.
    silent: u32,
}

impl Places {
    /// The source answers, and these are all places that it names.
    fn named(&mut self, mut places: BTreeMap<Place, Standing>, now: Instant) {
        self.here = true;
        places.retain(|place, standing| {
            let leaves = *standing == Standing::Leaving;
            if leaves {
                self.remove(place);
            }
            !leaves
        });
        for role in [Role::Prefill, Role::Decode] {
            let nobody = !places.keys().any(|(of, _)| *of == role);
            let gone: Vec<Place> = self.known.keys().filter(|place| place.0 == role && !places.contains_key(*place)).cloned().collect();
            if nobody && !gone.is_empty() {
                tracing::warn!(%role, nodes = gone.len(), "the source names none of this role any more: those stay that answer");
            }
            for place in gone {
                match self.known.get_mut(&place) {
                    Some(known) if nobody && known.node.is_some() => known.doubt(now),
                    _ => self.remove(&place),
                }
            }
        }
        for (place, standing) in places {
            let known = self.known.entry(place).or_insert_with(|| Known {
                node: None,
                standing,
                named: true,
                due: Some(now),
                again: false,
                silent: 0,
            });
            known.named = true;
            if known.standing != standing {
                known.standing = standing;
                // Whatever has changed there: what is there says it.
                known.hurry(now);
            }
        }
    }

    /// The source cannot be reached: all are asked themselves, spread over an interval.
    fn away(&mut self, now: Instant) {
        if !std::mem::take(&mut self.here) {
            return;
        }
        let most = u32::try_from(self.known.len()).unwrap_or(u32::MAX).max(1);
        for (number, known) in (1..=most).zip(self.known.values_mut()) {
            let at = now + INTERVAL.mul_f64(f64::from(number) / f64::from(most));
            known.due = known.due.map(|due| due.min(at));
        }
    }

    fn remove(&mut self, place: &Place) {
        if let Some(known) = self.known.remove(place) {
            self.changed |= known.node.is_some();
        }
    }

    /// All nodes that are there, each once: one may have addresses of two families.
    fn view(&self) -> Snapshot {
        let mut nodes: BTreeMap<&NodeId, &NodeInfo> = BTreeMap::new();
        for node in self.known.values().filter_map(|known| known.node.as_ref()) {
            nodes.entry(&node.id).or_insert(node);
        }
        Snapshot::new(nodes.into_values().cloned())
    }
}

impl Known {
    /// To be asked at once.
    fn hurry(&mut self, now: Instant) {
        match &mut self.due {
            Some(due) => *due = now,
            None => self.again = true,
        }
    }

    /// The source does not name it any more.
    fn doubt(&mut self, now: Instant) {
        self.named = false;
        self.standing = Standing::Named;
        self.hurry(now);
    }
}

impl Members for Places {
    type Key = Place;
    type Word = Word;

    fn heard(&mut self, word: Word, now: Instant) {
        match word {
            Word::Named(places) => self.named(places, now),
            Word::Away => self.away(now),
        }
    }

    fn due(&mut self, most: usize, now: Instant) -> Vec<(Place, Role, PeerAddress)> {
        let mut due: Vec<_> = self.known.iter_mut().filter(|(_, known)| known.due.is_some_and(|at| at <= now)).collect();
        // Those first that wait longest.
        due.sort_by_key(|(_, known)| known.due);
        due.truncate(most);
        let asked = due.into_iter().map(|(place, known)| {
            known.due = None;
            (place.clone(), place.0, place.1.clone())
        });
        asked.collect()
    }

    fn next_due(&self) -> Option<Instant> {
        self.known.values().filter_map(|known| known.due).min()
    }

    fn answered(&mut self, place: &Place, reply: Reply, now: Instant) {
        let cut_off = !self.here && self.heard.is_none_or(|heard| now.saturating_duration_since(heard) > DEAF);
        let silence = matches!(reply, Err(NoStatus::Silent));
        if !silence {
            self.heard = Some(now);
            if cut_off {
                // What the others did not answer until now says nothing of them.
                self.known.values_mut().for_each(|known| known.silent = 0);
            }
        }
        let here = self.here;
        // A question that was under way when the place was named no more.
        let Some(known) = self.known.get_mut(place).filter(|known| known.due.is_none()) else { return };
        let before = known.node.clone();
        match reply {
            Ok(node) => (known.node, known.silent) = (node, 0),
            Err(NoStatus::Refused) => known.node = None,
            Err(NoStatus::Silent) if cut_off => {}
            Err(NoStatus::Silent) => {
                known.silent += 1;
                if known.silent >= TRIES {
                    known.node = None;
                }
            }
        }
        let sure = here && known.standing == Standing::Vouched && known.node.is_some() && !silence;
        let again = std::mem::take(&mut known.again) || (silence && !cut_off && known.silent < TRIES);
        known.due = Some(match (again, sure) {
            (true, _) => now,
            (false, true) => now + NOW_AND_THEN,
            (false, false) => now + INTERVAL,
        });
        self.changed |= known.node != before;
        if known.node.is_none() && before.is_some() {
            tracing::info!(role = %place.0, address = %place.1, silence, "no ready node is there any more: left out");
        }
        if known.node.is_none() && !known.named {
            self.known.remove(place);
        }
    }

    fn changed_view(&mut self) -> Option<Snapshot> {
        std::mem::take(&mut self.changed).then(|| self.view())
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    fn place(port: u16) -> Place {
        (Role::Decode, format!("127.0.0.1:{port}").parse().unwrap())
    }

    /// The node that is started at a place for the `run`-th time.
    fn node(port: u16, run: u32) -> NodeInfo {
        let (role, address) = place(port);
        NodeInfo { id: NodeId::new(format!("{port}.{run}")), role, address, pairs: vec![], max_context: 8 }
    }

    fn ready(port: u16) -> Reply {
        Ok(Some(node(port, 0)))
    }

    const SILENT: Reply = Err(NoStatus::Silent);

    fn named(standings: &[(u16, Standing)]) -> Word {
        Word::Named(standings.iter().map(|(port, standing)| (place(*port), *standing)).collect())
    }

    fn names(places: &Places) -> Vec<String> {
        places.view().nodes.iter().map(|node| node.id.to_string()).collect()
    }

    fn ports(asked: &[(Place, Role, PeerAddress)]) -> Vec<u16> {
        asked.iter().map(|(place, ..)| place.1.as_str().rsplit(':').next().unwrap().parse().unwrap()).collect()
    }

    /// These are asked at `now`, and answer so.
    fn round(places: &mut Places, now: Instant, replies: Vec<(u16, Reply)>) {
        let asked = places.due(usize::MAX, now);
        assert_eq!(ports(&asked), replies.iter().map(|(port, _)| *port).collect::<Vec<_>>());
        for (port, reply) in replies {
            places.answered(&place(port), reply, now);
        }
    }

    /// Two nodes that answer, of a source that stands by them so.
    fn two(standing: Standing, now: Instant) -> Places {
        let mut places = Places::default();
        places.heard(named(&[(1, standing), (2, standing)]), now);
        round(&mut places, now, vec![(1, ready(1)), (2, ready(2))]);
        assert_eq!(names(&places), ["1.0", "2.0"]);
        places
    }

    #[test]
    fn silence_is_believed_where_others_answer() {
        let mut now = Instant::now();
        let mut places = two(Standing::Named, now);
        places.heard(Word::Away, now);
        now += INTERVAL;
        round(&mut places, now, vec![(1, SILENT), (2, ready(2))]);
        assert_eq!(names(&places), ["1.0", "2.0"], "one missed answer is forgiven");
        round(&mut places, now, vec![(1, ready(1))]);
        now += INTERVAL;
        round(&mut places, now, vec![(1, SILENT), (2, SILENT)]);
        now += DEAF;
        for _ in 0..5 {
            round(&mut places, now, vec![(1, SILENT), (2, SILENT)]);
            assert_eq!(names(&places), ["1.0", "2.0"], "it is this process that is cut off");
            now += INTERVAL;
        }
        round(&mut places, now, vec![(1, SILENT), (2, ready(2))]);
        assert_eq!(names(&places), ["1.0", "2.0"], "a probe that was lost in the cut says nothing either");
        now += INTERVAL;
        round(&mut places, now, vec![(1, SILENT), (2, ready(2))]);
        round(&mut places, now, vec![(1, SILENT)]);
        assert_eq!(names(&places), ["2.0"]);
        now += INTERVAL;
        round(&mut places, now, vec![(1, ready(1)), (2, Ok(None))]);
        assert_eq!(names(&places), ["1.0"], "one is back, and one drains");
        now += INTERVAL;
        round(&mut places, now, vec![(1, Err(NoStatus::Refused)), (2, ready(2))]);
        assert_eq!(names(&places), ["2.0"]);
    }

    #[test]
    fn one_that_is_vouched_for_is_asked_now_and_then_and_found_out_when_it_was_started_anew() {
        let mut now = Instant::now();
        let mut places = two(Standing::Vouched, now);
        assert_eq!(places.next_due(), Some(now + NOW_AND_THEN));
        now += NOW_AND_THEN;
        round(&mut places, now, vec![(1, Ok(Some(node(1, 1)))), (2, ready(2))]);
        assert_eq!(names(&places), ["1.1", "2.0"]);
        // Kubernetes has seen that its probe fails.
        places.heard(named(&[(1, Standing::Named), (2, Standing::Vouched)]), now);
        round(&mut places, now, vec![(1, Err(NoStatus::Refused))]);
        assert_eq!((names(&places), places.next_due()), (vec!["2.0".into()], Some(now + INTERVAL)));
        places.heard(named(&[(1, Standing::Vouched), (2, Standing::Vouched)]), now);
        round(&mut places, now, vec![(1, Ok(Some(node(1, 2))))]);
        assert_eq!(names(&places), ["1.2", "2.0"]);
    }

    #[test]
    fn who_leaves_or_is_named_no_more_is_out_at_once() {
        let now = Instant::now();
        for word in [named(&[(1, Standing::Vouched)]), named(&[(1, Standing::Vouched), (2, Standing::Leaving)])] {
            let mut places = two(Standing::Vouched, now);
            assert!(places.changed_view().is_some());
            places.heard(word, now);
            assert_eq!(names(&places), ["1.0"]);
            assert!(places.changed_view().is_some());
            places.answered(&place(2), ready(2), now);
            assert_eq!(names(&places), ["1.0"], "an answer that was under way");
        }
    }

    #[test]
    fn an_emptied_list_is_not_believed_of_who_answers() {
        let now = Instant::now();
        let mut places = two(Standing::Vouched, now);
        places.heard(named(&[]), now);
        round(&mut places, now, vec![(1, ready(1)), (2, Err(NoStatus::Refused))]);
        assert_eq!((names(&places), places.known.len()), (vec!["1.0".into()], 1));
        places.heard(named(&[(1, Standing::Vouched), (3, Standing::Vouched)]), now);
        round(&mut places, now, vec![(1, ready(1)), (3, ready(3))]);
        assert_eq!(names(&places), ["1.0", "3.0"]);
        places.heard(named(&[(1, Standing::Leaving), (3, Standing::Leaving)]), now);
        assert_eq!((names(&places), places.known.len()), (vec![], 0), "all were told to end");
    }

    #[test]
    fn while_the_source_is_away_all_are_asked() {
        let mut now = Instant::now();
        let mut places = two(Standing::Vouched, now);
        places.heard(Word::Away, now);
        now += INTERVAL / 2;
        round(&mut places, now, vec![(1, Err(NoStatus::Refused))]);
        assert_eq!(names(&places), ["2.0"]);
        now += INTERVAL / 2;
        round(&mut places, now, vec![(2, ready(2))]);
        assert_eq!(places.next_due(), Some(now + INTERVAL / 2), "as long as it is away");
        places.heard(named(&[(1, Standing::Vouched), (2, Standing::Vouched)]), now);
        now += INTERVAL;
        round(&mut places, now, vec![(1, ready(1)), (2, ready(2))]);
        assert_eq!((names(&places), places.next_due()), (vec!["1.0".into(), "2.0".into()], Some(now + NOW_AND_THEN)));
    }

    #[test]
    fn a_node_at_two_addresses_is_one() {
        let now = Instant::now();
        let mut places = two(Standing::Vouched, now);
        places.heard(named(&[(1, Standing::Named), (2, Standing::Vouched)]), now);
        round(&mut places, now, vec![(1, ready(2))]);
        assert_eq!(names(&places), ["2.0"]);
    }

    #[test]
    fn a_word_that_comes_during_a_question_has_it_asked_again() {
        let now = Instant::now();
        let mut places = Places::default();
        places.heard(named(&[(1, Standing::Named)]), now);
        assert_eq!(ports(&places.due(9, now)), [1]);
        places.heard(named(&[(1, Standing::Vouched)]), now);
        places.answered(&place(1), Ok(None), now);
        round(&mut places, now, vec![(1, ready(1))]);
        assert_eq!(names(&places), ["1.0"]);
    }

    #[test]
    fn every_change_of_the_view_is_told() {
        let mut now = Instant::now();
        let (mut places, mut rng) = (Places::default(), rand::rngs::StdRng::seed_from_u64(1));
        let (mut seen, mut changes) = (Snapshot::default(), 0);
        for step in 0..20_000 {
            now += INTERVAL / 4;
            match rng.random_range(0..6) {
                0 => places.heard(Word::Away, now),
                1 => {
                    let standing =
                        |rng: &mut rand::rngs::StdRng| [Standing::Vouched, Standing::Named, Standing::Leaving][rng.random_range(0..3)];
                    let some = (1..5).filter(|_| rng.random()).collect::<Vec<u16>>();
                    let word = named(&some.into_iter().map(|port| (port, standing(&mut rng))).collect::<Vec<_>>());
                    places.heard(word, now);
                }
                _ => {
                    for (at, ..) in places.due(1, now) {
                        let port = at.1.as_str().rsplit(':').next().unwrap().parse().unwrap();
                        let reply = match rng.random_range(0..6) {
                            0 => Ok(None),
                            1 => SILENT,
                            2 => Err(NoStatus::Refused),
                            run => Ok(Some(node(port, run % 2))),
                        };
                        places.answered(&at, reply, now);
                    }
                }
            }
            if let Some(view) = places.changed_view() {
                changes += usize::from(view != seen);
                seen = view;
            }
            assert_eq!(seen, places.view(), "step {step}");
            assert!(places.known.len() <= 4);
        }
        assert!(changes > 1000, "{changes}");
    }
}
