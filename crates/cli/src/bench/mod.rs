//! `overfill bench`: speed, measured by programs.

mod engine;
mod peaks;

use clap::Subcommand;

use crate::Home;

#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// Tokens per second of one model, without a server
    Engine(engine::EngineArgs),
}

pub(crate) fn run(what: BenchCommand, home: &Home) -> anyhow::Result<()> {
    match what {
        BenchCommand::Engine(args) => engine::run(&args, home),
    }
}
