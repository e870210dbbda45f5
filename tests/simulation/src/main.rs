//! `simulate --seed N` repeats one simulation, `simulate --seeds A..B` runs many.

use std::process::ExitCode;

use clap::Parser;
use overfill_simulation::process::Ran;
use overfill_simulation::{Cli, command, run};

fn main() -> ExitCode {
    let ran = run(Cli::parse().seeds());
    if let [Ran { seed, result: Ok(digest) }] = &ran[..] {
        println!("seed {seed} holds; digest of what came of it: {digest}");
    }
    let failed: Vec<_> = ran.iter().filter_map(|ran| Some((ran.seed, ran.result.as_ref().err()?))).collect();
    for (seed, why) in &failed {
        println!("seed {seed} failed:\n{why}\nrepeat it: {}\n", command(*seed));
    }
    println!("{} of {} seeds failed", failed.len(), ran.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
