//! Whatever a seed lets go wrong, the invariants hold. `OVERFILL_SEEDS=A..B` names other seeds than those of every run.

use std::collections::BTreeMap;

use clap::Parser;
use overfill_simulation::{Cli, command, run};

#[test]
fn invariants_hold_whatever_goes_wrong() {
    let ran = run(Cli::parse_from(["seeds"]).seeds());
    let failed: Vec<String> = ran
        .iter()
        .filter_map(|ran| Some(format!("seed {}: {}\nrepeat it: {}", ran.seed, ran.result.as_ref().err()?, command(ran.seed))))
        .collect();
    assert!(failed.is_empty(), "{} seeds failed, among them\n{}", failed.len(), failed[..failed.len().min(3)].join("\n\n"));
}

#[test]
fn a_seed_says_all_that_happens() {
    let seeds = 0..100;
    let mut came: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for ran in run(seeds.clone().chain(seeds)) {
        came.entry(ran.seed).or_default().push(ran.result.expect("it holds"));
    }
    for (seed, digests) in &came {
        assert_eq!(digests[0], digests[1], "seed {seed} came out in two ways");
    }
    let differ: std::collections::BTreeSet<&String> = came.values().flatten().collect();
    assert_eq!(differ.len(), came.len(), "seeds that came out alike say nothing");
}
