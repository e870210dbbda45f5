//! Chats of many turns over four prefill nodes, in simulated time: what nodes hold is used again, and they share the work.

#![allow(clippy::panic, clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use overfill_schedule::{Ask, BLOCK, Choice, Cluster, Taken, keys};
use overfill_types::{Endpoint, Fingerprint, NodeId, Quality, Role, ServedPair};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const NODES: usize = 4;
/// Tokens that a node reads in a second.
const SPEED: f64 = 2000.0;

struct Outcome {
    /// Prompt tokens found, of those that any node had read before.
    reused: f64,
    /// Tokens read by the busiest node, over those of the idlest.
    tokens: f64,
    /// As many prompts.
    prompts: f64,
}

struct Chat {
    tokens: Vec<u32>,
    turns: usize,
    /// When its next turn comes, in seconds.
    next: f64,
}

/// `chats` chats of `turns` turns each, of which `system` tokens are the same for all.
fn simulate(seed: u64, chats: usize, turns: (usize, usize), system: u32) -> Outcome {
    let pair = Fingerprint::new("pair");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::new(seed);
    let node = |role, i| Endpoint {
        id: NodeId::new(format!("{role}-{i}")),
        role,
        address: "127.0.0.1:1".parse().unwrap(),
        pairs: vec![ServedPair { model: "m".into(), fingerprint: pair.clone() }],
        max_context: 100_000,
    };
    let begun = Instant::now();
    let listed: Vec<Endpoint> = (0..NODES).flat_map(|i| [node(Role::Prefill, i), node(Role::Decode, i)]).collect();
    cluster.update(&listed, begun);
    let mut word = 1000;
    let mut words = |n: usize| {
        word += n as u32;
        word - n as u32..word
    };
    let mut running: Vec<Chat> = (0..chats)
        .map(|_| Chat {
            tokens: (0..system).chain(words(rng.random_range(50..600))).collect(),
            turns: rng.random_range(turns.0..=turns.1),
            next: rng.random_range(0.0..60.0),
        })
        .collect();
    // What the nodes really hold: the simulation's own books.
    let mut held: HashMap<String, HashSet<u64>> = HashMap::new();
    let mut anywhere: HashSet<u64> = HashSet::new();
    let (mut free_at, mut read, mut prompts) =
        (HashMap::<String, f64>::new(), HashMap::<String, f64>::new(), HashMap::<String, f64>::new());
    let mut reading: Vec<(f64, Taken)> = Vec::new();
    let (mut reusable, mut reused) = (0, 0);
    while let Some(chat) = running.iter_mut().filter(|c| c.turns > 0).min_by(|a, b| a.next.total_cmp(&b.next)) {
        let time = chat.next;
        let now = begun + Duration::from_secs_f64(time);
        reading.sort_by(|a, b| a.0.total_cmp(&b.0));
        while reading.first().is_some_and(|(done, _)| *done <= time) {
            let (_, mut taken) = reading.remove(0);
            cluster.read(&mut taken);
            cluster.release(taken);
        }
        let names = keys(0, "", &chat.tokens);
        let prompt_tokens = chat.tokens.len();
        let (pair, quality, shunned) = (&pair, Quality::Overfill, &[][..]);
        let ask = Ask { pair, quality, decodes: true, keys: &names, prompt_tokens, answer_tokens: 100, shunned, with_room: true };
        let Choice::Two(chosen) = cluster.choose(&ask, now) else { panic!("nobody has room") };
        let name = chosen.prefill.id.to_string();
        let on_node = held.entry(name.clone()).or_default();
        let found = names.iter().take_while(|key| on_node.contains(key)).count() * BLOCK;
        reusable += names.iter().take_while(|key| anywhere.contains(key)).count() * BLOCK;
        reused += found;
        on_node.extend(&names);
        anywhere.extend(&names);
        let work = (prompt_tokens - found) as f64;
        *read.entry(name.clone()).or_default() += work;
        *prompts.entry(name.clone()).or_default() += 1.0;
        let done = free_at.get(&name).copied().unwrap_or(0.0).max(time) + work / SPEED;
        free_at.insert(name, done);
        reading.push((done, chosen.taken));
        // The answer and the next question.
        chat.tokens.extend(words(rng.random_range(60..400)));
        chat.turns -= 1;
        chat.next = done + rng.random_range(1.0..20.0);
    }
    let uneven = |of: &HashMap<String, f64>| {
        assert_eq!(of.len(), NODES, "a node got nothing");
        of.values().copied().fold(0.0, f64::max) / of.values().copied().fold(f64::MAX, f64::min)
    };
    Outcome { reused: reused as f64 / reusable as f64, tokens: uneven(&read), prompts: uneven(&prompts) }
}

#[test]
fn over_four_nodes() {
    for (chats, turns, system) in [(40, (8, 8), 0), (40, (2, 16), 0), (100, (2, 12), 256), (24, (6, 12), 512)] {
        for seed in 0..10 {
            let Outcome { reused, tokens, prompts } = simulate(seed, chats, turns, system);
            let case = format!("{chats} chats of {turns:?} turns, {system} tokens alike, seed {seed}");
            println!("{case}: reused {reused:.3}, tokens {tokens:.2}, prompts {prompts:.2}");
            assert!(reused >= 0.85, "{case}: {reused:.3} of what could be reused was");
            assert!(tokens <= 1.5, "{case}: the busiest read {tokens:.2} times what the idlest did");
        }
    }
}
