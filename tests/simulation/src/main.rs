//! `simulate --seed N` repeats one simulation, `simulate --seeds A..B` runs many.

use std::process::ExitCode;

use clap::Parser;
use overfill_simulation::{Cli, command, run};

fn main() -> ExitCode {
    let seeds = Cli::parse().seeds();
    let failed = run(seeds.clone());
    for failed in &failed {
        println!("seed {} failed:\n{}\nrepeat it: {}\n", failed.seed, failed.why, command(failed.seed));
    }
    println!("{} of {} seeds failed", failed.len(), seeds.end - seeds.start);
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
