//! `overfill bench`: speed, measured by programs.

mod engine;
mod handoff;
mod itl;
mod peaks;
mod train;

use clap::Subcommand;
use overfill_load_tester::{LoadTestArgs, spread};

use crate::Home;

#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// Tokens per second of one model, without a server
    Engine(engine::EngineArgs),
    /// What the KV cache's way from a prefill to a decode node costs
    Handoff(handoff::HandoffArgs),
    /// Inter-token latency of a running cluster, alone and while long prompts arrive
    Itl(itl::ItlArgs),
    /// A load on a running server, over HTTP or gRPC, as `vllm bench serve` puts it
    Serve(Box<LoadTestArgs>),
    /// Training tokens per second, on random numbers
    Train(train::TrainArgs),
}

pub(crate) fn run(what: BenchCommand, home: &Home) -> anyhow::Result<()> {
    match what {
        BenchCommand::Engine(args) => engine::run(&args, home),
        BenchCommand::Handoff(args) => handoff::run(&args, home),
        BenchCommand::Itl(args) => itl::run(&args),
        BenchCommand::Serve(args) => overfill_load_tester::run(&args),
        BenchCommand::Train(args) => train::run(&args),
    }
}
