//! What happens in one simulation, drawn from its seed before anything runs: the cluster's shape, the requests, the faults.

use std::time::Duration;

use overfill_types::{Quality, Role};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::mangle::Mangling;

/// Token positions in a block of every node's KV cache.
pub const BLOCK: usize = 16;
/// What is waited for after the last fault before a cluster counts as whole: connections that broke are noticed, streams of
/// status begin anew, suspicions and what was shunned are forgotten.
pub const RECOVERY: Duration = Duration::from_secs(15);

/// A simulation.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What else is drawn while it runs follows from it too.
    pub seed: u64,
    /// How many pairs are served; they have one full model.
    pub pairs: usize,
    /// How many routers there are.
    pub routers: usize,
    /// The nodes; the order is that of their addresses.
    pub nodes: Vec<NodePlan>,
    /// Answers that wait at most.
    pub queue_timeout: Duration,
    /// By the time at which they come.
    pub requests: Vec<RequestPlan>,
    /// By the time at which they happen.
    pub faults: Vec<FaultPlan>,
    /// What comes from then on is served as if nothing had been.
    pub whole: Duration,
}

/// One node.
#[derive(Clone, Debug)]
pub struct NodePlan {
    /// What it does.
    pub role: Role,
    /// Which pairs it serves: all, or one where it decodes.
    pub pairs: Vec<usize>,
    /// Blocks of its KV cache.
    pub blocks: usize,
    /// How long one of its steps takes.
    pub step: Duration,
    /// How long it holds a reservation without a frame, where it decodes.
    pub reservation: Duration,
    /// Most tokens of one step, where it prefills.
    pub chunk: usize,
    /// How long its engine may take for a step.
    pub step_timeout: Duration,
}

/// One request.
#[derive(Clone, Debug)]
pub struct RequestPlan {
    /// When it comes.
    pub at: Duration,
    /// Which router is asked.
    pub router: usize,
    /// Whose it is.
    pub client: usize,
    /// Which pair is asked for.
    pub pair: usize,
    /// Its token ids, which no other request has.
    pub prompt: Vec<u32>,
    /// Tokens that it asks for.
    pub max_tokens: usize,
    /// Which models write.
    pub quality: Quality,
    /// How long its client gives it.
    pub timeout: Duration,
    /// After how many tokens, or how long, its client goes away; `None` where it stays.
    pub leaves: Option<Leaves>,
}

/// When a client goes away in the middle.
#[derive(Clone, Copy, Debug)]
pub enum Leaves {
    /// So long after it asked.
    After(Duration),
    /// When it has so many tokens.
    At(usize),
}

/// A fault.
#[derive(Clone, Debug)]
pub struct FaultPlan {
    /// When it begins.
    pub at: Duration,
    /// How long it lasts.
    pub lasts: Duration,
    /// What it is.
    pub what: Fault,
}

/// What may go wrong. Nodes go by their number, hosts too; routers are the hosts after the last node.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A node's process dies; another one starts at its address when the fault is over.
    Dies(usize),
    /// A node's machine is gone: nobody is told so by a connection's end. It is back when the fault is over.
    Vanishes(usize),
    /// A node's engine does no step any more. Its watchdog ends the node, and another one starts.
    Hangs(usize),
    /// A node drains, ends, and another one starts.
    Drains(usize),
    /// Nothing passes between two hosts.
    Cut(usize, usize),
    /// Everything between two hosts takes so much longer.
    Slow(usize, usize, Duration),
    /// Frames of KV caches are duplicated, changed, lost.
    Mangles(Mangling),
    /// etcd does not list a node, which lives.
    Forgets(usize),
}

fn millis(random: &mut StdRng, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(random.random_range(range))
}

impl Plan {
    /// What follows from a seed.
    pub fn of(seed: u64) -> Self {
        let random = &mut StdRng::seed_from_u64(seed);
        let (pairs, routers) = (random.random_range(1..3), random.random_range(1..3));
        let (prefill, decode) = (random.random_range(1..4), random.random_range(pairs..4));
        let nodes: Vec<NodePlan> = std::iter::repeat_n((Role::Prefill, (0..pairs).collect()), prefill)
            // Each pair has a decode node.
            .chain((0..decode).map(|number| (Role::Decode, vec![number % pairs])))
            .map(|(role, pairs)| NodePlan::of(role, pairs, random))
            .collect();
        let calm = random.random_ratio(1, 4);
        let faults = if calm { Vec::new() } else { faults(nodes.len(), routers, random) };
        let whole = faults.iter().map(|fault| fault.at + fault.lasts).max().unwrap_or_default() + RECOVERY;
        let requests = Requests::of(pairs, routers, random).drawn(whole, random);
        let queue_timeout = Duration::from_secs(random.random_range(5..60));
        Self { seed, pairs, routers, nodes, queue_timeout, requests, faults, whole }
    }

    /// Whether anything went wrong, or was not yet made good, between two moments.
    pub fn disturbed(&self, from: Duration, to: Duration) -> bool {
        self.faults.iter().any(|fault| fault.at <= to && from <= fault.at + fault.lasts + RECOVERY)
    }
}

impl NodePlan {
    fn of(role: Role, pairs: Vec<usize>, random: &mut StdRng) -> Self {
        Self {
            role,
            pairs,
            blocks: random.random_range(16..64),
            step: millis(random, 1..40),
            reservation: Duration::from_secs(random.random_range(1..8)),
            chunk: *[16, 32, 64].choose(random).expect("there are some"),
            step_timeout: Duration::from_secs(random.random_range(1..4)),
        }
    }
}

/// What the requests of a plan have in common.
struct Requests {
    how_many: usize,
    pairs: usize,
    routers: usize,
    /// Beginnings that several prompts have.
    families: Vec<Vec<u32>>,
    /// Whether all come at once.
    burst: bool,
    /// The pair and the quality of all, where they want the same nodes.
    alike: Option<(usize, Quality)>,
}

impl Requests {
    fn of(pairs: usize, routers: usize, random: &mut StdRng) -> Self {
        let families = (0..3).map(|_| tokens(random.random_range(0..80), random)).collect();
        // Shares show where many wait for the same for long.
        if random.random_ratio(1, 24) {
            let alike = Some((random.random_range(0..pairs), quality(random)));
            return Self { how_many: random.random_range(60..120), pairs, routers, families, burst: true, alike };
        }
        let few = random.random_ratio(1, 2);
        let how_many = random.random_range(if few { 1..6 } else { 6..30 });
        let alike = random.random_ratio(1, 3).then(|| (random.random_range(0..pairs), quality(random)));
        Self { how_many, pairs, routers, families, burst: random.random_ratio(1, 3), alike }
    }

    /// Those that come while things go wrong, and some that come when all is well again.
    fn drawn(&self, whole: Duration, random: &mut StdRng) -> Vec<RequestPlan> {
        let mut requests: Vec<RequestPlan> = (0..self.how_many)
            .map(|number| {
                let at = if self.burst { millis(random, 0..100) } else { millis(random, 0..6_000) };
                self.request(number, at, random)
            })
            .collect();
        for number in 0..random.random_range(1..4) {
            let at = whole + millis(random, 0..1000);
            let late = self.request(self.how_many + number, at, random);
            requests.push(RequestPlan { timeout: Duration::from_secs(60), leaves: None, ..late });
        }
        requests.sort_by_key(|request| request.at);
        requests
    }

    fn request(&self, number: usize, at: Duration, random: &mut StdRng) -> RequestPlan {
        let mut prompt = self.families.choose(random).cloned().unwrap_or_default();
        let own = random.random_range(0..60);
        prompt.extend(tokens(own, random));
        // No other one ends so.
        prompt.push(number as u32);
        let leaves = match random.random_range(0..12) {
            0 => Some(Leaves::After(millis(random, 0..2000))),
            1 => Some(Leaves::At(random.random_range(1..20))),
            _ => None,
        };
        let (pair, quality) = self.alike.unwrap_or_else(|| (random.random_range(0..self.pairs), quality(random)));
        RequestPlan {
            at,
            router: random.random_range(0..self.routers),
            client: random.random_range(0..CLIENTS.len()),
            pair,
            prompt,
            // One token is the prefill node's alone: it does not want the same as others.
            max_tokens: random.random_range(if self.alike.is_some() { 2..40 } else { 1..40 }),
            quality,
            timeout: if random.random_ratio(1, 8) { millis(random, 50..3000) } else { millis(random, 20_000..40_000) },
            leaves,
        }
    }
}

fn quality(random: &mut StdRng) -> Quality {
    match random.random_range(0..6) {
        0 => Quality::Full,
        1 => Quality::Decode,
        _ => Quality::Overfill,
    }
}

/// Clients that have keys: the weight and the class of each.
pub const CLIENTS: [(u32, i32); 4] = [(1, 0), (2, 0), (3, 0), (1, 1)];

fn tokens(count: usize, random: &mut StdRng) -> Vec<u32> {
    (0..count).map(|_| random.random_range(0..256)).collect()
}

fn faults(nodes: usize, routers: usize, random: &mut StdRng) -> Vec<FaultPlan> {
    let mut faults: Vec<FaultPlan> = (0..random.random_range(1..6))
        .map(|_| {
            let at = millis(random, 0..5000);
            let lasts = millis(random, 50..12_000);
            let node = random.random_range(0..nodes);
            let all = nodes + routers;
            let hosts = |random: &mut StdRng| (node, (node + random.random_range(1..all)) % all);
            let what = match random.random_range(0..11) {
                0 | 1 => Fault::Dies(node),
                10 => Fault::Vanishes(node),
                2 => Fault::Hangs(node),
                3 => Fault::Drains(node),
                4 | 5 => {
                    let (a, b) = hosts(random);
                    Fault::Cut(a, b)
                }
                6 => {
                    let (a, b) = hosts(random);
                    Fault::Slow(a, b, millis(random, 1..400))
                }
                7 | 8 => {
                    let mut chance = || if random.random_ratio(1, 2) { random.random_range(0.0..0.1) } else { 0.0 };
                    Fault::Mangles(Mangling { duplicated: chance(), flipped: chance(), lost: chance(), swapped: chance() })
                }
                _ => Fault::Forgets(node),
            };
            FaultPlan { at, lasts, what }
        })
        .collect();
    faults.sort_by_key(|fault| fault.at);
    faults
}
