//! What choosing two nodes costs among few and among many, with their prefixes and loads known: it must not grow with them.
//!
//! `cargo bench -p overfill-schedule`

#![allow(missing_docs, clippy::unwrap_used, reason = "the macros make functions without; a bench may end where its own set-up is wrong")]

use std::hint::black_box;
use std::time::Instant;

use criterion::{Criterion, criterion_group, criterion_main};
use overfill_schedule::{Ask, Choice, Cluster, Report, keys};
use overfill_types::{Endpoint, Fingerprint, NodeId, Quality, Role, ServedPair};

/// Prompts that come again and again, as the turns of chats do.
const CHATS: u32 = 1000;

fn choice(c: &mut Criterion) {
    let pair = Fingerprint::new("pair");
    let chats: Vec<Vec<u64>> = (0..CHATS).map(|chat| keys(1, "", &(0..1024).map(|i| i + chat * 10_000).collect::<Vec<u32>>())).collect();
    let mut group = c.benchmark_group("choice");
    for nodes in [10, 100, 1000, 10_000] {
        let now = Instant::now();
        let mut cluster = Cluster::new(1);
        let node = |role, i| Endpoint {
            id: NodeId::new(format!("{role}-{i}")),
            role,
            address: "127.0.0.1:1".parse().unwrap(),
            pairs: vec![ServedPair { model: "m".into(), fingerprint: pair.clone() }],
            max_context: 8192,
        };
        // So many in all, half of each kind.
        let listed: Vec<Endpoint> = (0..nodes / 2).flat_map(|i| [node(Role::Prefill, i), node(Role::Decode, i)]).collect();
        cluster.update(&listed, now);
        let report = Report { sequences_most: 64, block_tokens: 16, blocks: 10_000, prefix_blocks_most: 10_000, ..Report::default() };
        listed.iter().for_each(|node| cluster.told(&node.id, report, now));
        let mut turn = 0;
        group.bench_function(format!("{nodes} nodes"), |b| {
            b.iter(|| {
                turn = (turn + 1) % chats.len();
                let keys = &chats[turn];
                let (pair, quality, shunned) = (&pair, Quality::Overfill, &[][..]);
                let ask = Ask { pair, quality, decodes: true, keys, prompt_tokens: 1030, answer_tokens: 100, shunned, with_room: true };
                if let Choice::Two(mut pair) = cluster.choose(black_box(&ask), now) {
                    cluster.read(&mut pair.taken);
                    cluster.release(pair.taken);
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, choice);
criterion_main!(benches);
