//! The queue over several pairs that share nodes, all qualities, and clients that always wait: who gets how much, and how long
//! it takes. Random sizes and ends; the same seed gives the same run.

#![allow(clippy::panic, clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_schedule::{Cluster, NodePair, One, Order, QueueLimits, QueueNumber, Report, Scheduler, Share, Submitted, Taken, Turn};
use overfill_types::{Endpoint, Fingerprint, NodeId, Quality, Role, ServedPair};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const QUALITIES: [Quality; 3] = [Quality::Overfill, Quality::Full, Quality::Decode];
/// Blocks of each decode node, of one token: the largest request fills it.
const BLOCKS: u64 = 400;

/// A client that always has so many requests waiting, each of one of these kinds and sizes.
#[derive(Clone, Debug)]
struct Client {
    share: Share,
    kinds: Vec<(&'static str, Quality)>,
    tokens: Vec<usize>,
    depth: usize,
}

struct Simulation {
    scheduler: Scheduler,
    clients: Vec<Client>,
    rng: StdRng,
    now: Instant,
    running: Vec<Taken>,
    waiting: HashMap<QueueNumber, Waiting>,
    number: u64,
    /// Tokens that each client was given.
    tokens: Vec<usize>,
    /// Tokens that were given of each node.
    given: BTreeMap<&'static str, usize>,
    /// The longest wait of each client: tokens that were given meanwhile of nodes that it waited for, of the kind of which more were.
    longest: Vec<usize>,
}

struct Waiting {
    client: usize,
    tokens: usize,
    pair: &'static str,
    quality: Quality,
    /// What had been given when it came.
    since: BTreeMap<&'static str, usize>,
}

impl Waiting {
    /// What of nodes that it could be served by was given meanwhile.
    fn passed(&self, given: &BTreeMap<&'static str, usize>) -> usize {
        let of = |kind: char, unwanted: Quality| -> usize {
            let its = given.iter().filter(|(name, _)| name.starts_with(kind) && name[1..].contains(self.pair) && self.quality != unwanted);
            its.map(|(name, given)| given - self.since[name]).sum()
        };
        of('p', Quality::Decode).max(of('d', Quality::Full))
    }
}

impl Simulation {
    /// `nodes` are names and the most sequences; the letters that follow the first are the pairs.
    fn new(nodes: &[(&'static str, u64)], clients: Vec<Client>, seed: u64) -> Self {
        let now = Instant::now();
        let endpoint = |(name, _): &(&str, u64)| {
            let served = |pair: char| ServedPair { model: pair.into(), fingerprint: Fingerprint::new(pair) };
            let role = if name.starts_with('p') { Role::Prefill } else { Role::Decode };
            let pairs = name.chars().skip(1).map(served).collect();
            Endpoint { id: NodeId::new(*name), role, address: "127.0.0.1:1".parse().unwrap(), pairs, max_context: 1000 }
        };
        let mut cluster = Cluster::new(seed);
        cluster.update(&nodes.iter().map(endpoint).collect::<Vec<_>>(), now);
        for (name, sequences) in nodes {
            let report = Report { sequences_most: *sequences, block_tokens: 1, blocks: BLOCKS, promised_most: BLOCKS, ..Report::default() };
            cluster.told(&NodeId::new(*name), report, now);
        }
        let mut simulation = Self {
            scheduler: Scheduler::new(cluster, QueueLimits { waiting: 10_000 }),
            tokens: vec![0; clients.len()],
            longest: vec![0; clients.len()],
            clients,
            rng: StdRng::seed_from_u64(seed),
            now,
            running: Vec::new(),
            waiting: HashMap::new(),
            number: 0,
            given: nodes.iter().map(|(name, _)| (*name, 0)).collect(),
        };
        simulation.fill_up();
        simulation
    }

    /// Each client sends until as many of its requests wait as it has at a time.
    fn fill_up(&mut self) {
        for client in 0..self.clients.len() {
            let Client { share, kinds, tokens, depth } = self.clients[client].clone();
            while self.waiting.values().filter(|waiting| waiting.client == client).count() < depth {
                let (pair, quality) = kinds[self.rng.random_range(0..kinds.len())];
                let size = tokens[self.rng.random_range(0..tokens.len())];
                let order = Order {
                    pair: Fingerprint::new(pair),
                    quality,
                    decodes: true,
                    keys: Arc::new([]),
                    prompt_tokens: size - 1,
                    answer_tokens: 1,
                    share,
                    priority: 0,
                    until: self.now + Duration::from_secs(1_000_000),
                    shunned: vec![],
                };
                self.number += 1;
                let number = QueueNumber(self.number);
                self.waiting.insert(number, Waiting { client, tokens: size, pair, quality, since: self.given.clone() });
                match self.scheduler.submit(order, number, false, self.now) {
                    Submitted::Now(turn) => self.has_turn(number, turn),
                    Submitted::Waits => {}
                    Submitted::Refused(refusal) => panic!("{refusal:?}"),
                }
            }
        }
    }

    fn has_turn(&mut self, number: QueueNumber, turn: Turn) {
        let waited = self.waiting.remove(&number).unwrap();
        let Waiting { client, tokens, .. } = waited;
        self.longest[client] = self.longest[client].max(waited.passed(&self.given));
        self.tokens[client] += tokens;
        let (nodes, taken) = match turn {
            Turn::Two(NodePair { prefill, decode, taken }) => (vec![prefill, decode], taken),
            Turn::One(One { node, taken }) => (vec![node], taken),
            other => panic!("{other:?}"),
        };
        for (name, given) in &mut self.given {
            *given += if nodes.iter().any(|node| node.id.as_str() == *name) { tokens } else { 0 };
        }
        self.running.push(taken);
    }

    /// One that runs ends, and those whose turn it is get its room. Gives their clients.
    fn step(&mut self) -> Vec<usize> {
        self.now += Duration::from_millis(1);
        let ended = self.rng.random_range(0..self.running.len());
        let taken = self.running.swap_remove(ended);
        self.scheduler.cluster_mut().release(taken);
        let turns = self.scheduler.turns(self.now);
        let clients = turns.iter().map(|(number, _)| self.waiting[number].client).collect();
        turns.into_iter().for_each(|(number, turn)| self.has_turn(number, turn));
        self.fill_up();
        clients
    }

    fn run(&mut self, steps: usize) {
        (0..steps).for_each(|_| drop(self.step()));
    }

    /// The longest wait of each client, of those that still wait too.
    fn longest(&self) -> Vec<usize> {
        let mut longest = self.longest.clone();
        for waiting in self.waiting.values() {
            longest[waiting.client] = longest[waiting.client].max(waiting.passed(&self.given));
        }
        longest
    }
}

fn client(client: usize, weight: u32, kinds: &[(&'static str, Quality)]) -> Client {
    Client { share: Share { client, weight, class: 0 }, kinds: kinds.to_vec(), tokens: vec![10, 20, 80], depth: 12 }
}

/// All that a prefill pool serves: it is what they share.
fn reading() -> Vec<(&'static str, Quality)> {
    ["a", "b"].into_iter().flat_map(|pair| [Quality::Overfill, Quality::Full].map(|quality| (pair, quality))).collect()
}

/// Two pairs with one prefill pool, which is the bottleneck.
const SHARED: [(&str, u64); 4] = [("pab", 4), ("pba", 4), ("da", 1000), ("db", 1000)];

#[test]
fn shares_by_weight_hold_over_pairs_and_qualities() {
    for seed in 0..10 {
        let kinds = reading();
        // One spreads over all, one stays with a pair and a quality, one has many small ones and one large ones.
        let clients = vec![
            client(0, 1, &kinds),
            client(1, 2, &kinds[..1]),
            Client { tokens: vec![10], depth: 40, ..client(2, 4, &kinds[2..]) },
            Client { tokens: vec![100], depth: 3, ..client(3, 1, &kinds[3..]) },
        ];
        let mut simulation = Simulation::new(&SHARED, clients, seed);
        simulation.run(200);
        simulation.tokens.fill(0);
        simulation.run(6000);
        let all: usize = simulation.tokens.iter().sum();
        for (tokens, weight) in simulation.tokens.iter().zip([1, 2, 4, 1]) {
            let (share, fair) = (*tokens as f64 / all as f64, f64::from(weight) / 8.0);
            assert!((share / fair - 1.0).abs() < 0.1, "seed {seed}: {:?} of {all}", simulation.tokens);
        }
    }
}

#[test]
fn a_higher_class_goes_first_whatever_it_wants() {
    let kinds = reading();
    let high = Client { depth: 3, share: Share { client: 1, weight: 1, class: 1 }, ..client(1, 1, &kinds[1..3]) };
    let mut simulation = Simulation::new(&SHARED, vec![client(0, 9, &kinds), high], 1);
    simulation.run(20);
    for _ in 0..500 {
        assert!(simulation.step().into_iter().all(|client| client == 1));
    }
}

#[test]
fn who_waits_for_other_nodes_is_not_held_up() {
    let mut clients = vec![client(0, 1, &[("a", Quality::Overfill)])];
    let alone = |clients: Vec<Client>| {
        let mut simulation = Simulation::new(&[("pac", 100), ("da", 1), ("dc", 8)], clients, 5);
        // What is full runs for ever.
        let full = simulation.running.remove(0);
        (0..1000).for_each(|_| drop(simulation.step()));
        simulation.scheduler.cluster_mut().release(full);
        simulation.tokens
    };
    clients.push(client(1, 1, &[("c", Quality::Overfill)]));
    let tokens = alone(clients);
    assert!(tokens[0] <= 80 && tokens[1] > 30_000, "{tokens:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever clients want and however large their requests are, each has its turn: by the time that its client's share and what
    /// stands before it come to.
    #[test]
    fn nobody_starves(
        seed in any::<u64>(),
        wanted in proptest::collection::vec((1..5u32, proptest::collection::vec((0..3usize, 0..3usize), 1..4), 0..3usize), 2..6),
    ) {
        // `a` and `b` share a prefill node, `c` stands alone; each has a pool that is scarce.
        let nodes = [("pa", 2), ("pab", 3), ("pc", 2), ("da", 6), ("db", 4), ("dc", 30)];
        let clients = wanted.iter().enumerate().map(|(number, (weight, kinds, size))| {
            let kinds: Vec<_> = kinds.iter().map(|(pair, quality)| (["a", "b", "c"][*pair], QUALITIES[*quality])).collect();
            let tokens = [vec![10], vec![10, 40, 390], vec![390]][*size].clone();
            Client { tokens, depth: 4, ..client(number, *weight, &kinds) }
        });
        let mut simulation = Simulation::new(&nodes, clients.collect(), seed);
        simulation.run(6000);
        let all: usize = wanted.iter().map(|(weight, ..)| *weight as usize).sum();
        for (longest, (weight, ..)) in simulation.longest().into_iter().zip(&wanted) {
            // What it takes until those that it had before are served, all of the largest kind, by its share.
            let fair = 5 * BLOCKS as usize * all / *weight as usize;
            // And what it gets elsewhere puts each off by 32 times its size at most.
            prop_assert!(longest <= 33 * fair, "a client of weight {weight} of {all} waited for {longest} tokens");
        }
    }

    /// A client that asks for all qualities gets what one gets that asks for one.
    #[test]
    fn quality_changes_nothing_of_a_share(seed in any::<u64>(), which in 0..4usize) {
        let kinds = reading();
        let clients = vec![client(0, 1, &kinds), client(1, 1, &kinds[which..=which])];
        let mut simulation = Simulation::new(&SHARED, clients, seed);
        simulation.run(100);
        simulation.tokens.fill(0);
        simulation.run(2000);
        let [spread, one] = simulation.tokens[..] else { panic!() };
        prop_assert!((spread as f64 / one as f64 - 1.0).abs() < 0.1, "{spread} {one}");
    }
}
