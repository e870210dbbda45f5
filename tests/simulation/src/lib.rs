//! A cluster in one thread, under virtual time, of which a seed says all that happens.
//!
//! Routers and nodes are those of production. What is not is what they would wait for: the models (`model`, over `cache`), whose
//! answers are known beforehand, the threads that nodes compute on (`node`), whose place tasks take, and the network (`network`,
//! `link`, `mangle`), whose connections pass messages within this process.
//!
//! A seed gives a plan (`plan`), which `world` carries out with the `hosts` of the cluster and its clients (`client`). Then every
//! invariant is checked (`invariants`), some by what was heard on the way (`tap`). All randomness follows from the seed
//! (`entropy`), and each seed runs in a process of its own (`process`).

pub mod cache;
pub mod client;
mod entropy;
mod hosts;
pub mod invariants;
mod link;
pub mod mangle;
pub mod model;
pub mod network;
pub mod node;
pub mod plan;
pub mod process;
pub mod tap;
pub mod world;

use std::ops::Range;
use std::thread::available_parallelism;

/// Flags that say which seeds are run.
#[derive(clap::Parser, Debug)]
pub struct Cli {
    /// One seed
    #[arg(long, conflicts_with = "seeds")]
    pub seed: Option<u64>,
    /// All seeds from A on, below B
    #[arg(long, env = "OVERFILL_SEEDS", value_name = "A..B", value_parser = parse_seeds)]
    pub seeds: Option<Range<u64>>,
}

fn parse_seeds(text: &str) -> Result<Range<u64>, String> {
    let bounds = text.split_once("..").and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    bounds.ok_or_else(|| format!("'{text}' is no range of seeds: write A..B"))
}

impl Cli {
    /// The seeds that are named, or those of every run of the tests.
    pub fn seeds(self) -> Range<u64> {
        self.seed.map(|seed| seed..seed + 1).or(self.seeds).unwrap_or(0..10_000)
    }
}

/// The command that repeats a seed.
pub fn command(seed: u64) -> String {
    format!("cargo run --release -p overfill-simulation -- --seed {seed}")
}

/// Runs seeds, on all cores.
pub fn run(seeds: impl IntoIterator<Item = u64>) -> Vec<process::Ran> {
    let shared = world::Shared::open();
    let at_once = available_parallelism().map_or(1, usize::from);
    process::each(seeds, at_once, |seed| world::simulate(&shared, seed))
}
