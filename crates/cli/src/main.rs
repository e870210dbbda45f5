//! `overfill`: one command for everything that is not a server of its own.

mod answer;
mod bench;
mod eval;
mod export;
mod fetch;
mod generate;
mod inspect;
mod key;
mod pair;
mod plan;
mod progress;
mod prune;
mod pull;
mod seal;
mod self_prompt;
mod serve;
mod threads;
mod top;
mod train;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use overfill_lifecycle::flags;
use overfill_lifecycle::telemetry::LogArgs;

/// Two-stage language models: a full model reads the prompt, a smaller decode model writes the answer
#[derive(Parser)]
#[command(
    name = "overfill",
    version,
    after_help = "Examples:\n  overfill generate \"Why is the sky blue?\"\n  overfill serve\n  overfill pair --full big/ --decode small/ --kv identity --out my-pair"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    home: Home,
    #[command(flatten)]
    log: LogArgs,
}

/// Where pairs are kept.
#[derive(Args)]
struct Home {
    /// Where the default pair is kept [default: ~/.cache/overfill]
    #[arg(long = "home", env = "OVERFILL_HOME", global = true)]
    dir: Option<PathBuf>,
    /// Only to find the default of --home
    #[arg(long, env = "HOME", hide = true, hide_env_values = true, global = true)]
    user_home: Option<PathBuf>,
}

impl Home {
    fn dir(&self) -> anyhow::Result<PathBuf> {
        match (&self.dir, &self.user_home) {
            (Some(dir), _) => Ok(dir.clone()),
            (None, Some(user)) => Ok(user.join(".cache/overfill")),
            (None, None) => anyhow::bail!("there is no home folder: name one with --home or OVERFILL_HOME"),
        }
    }
}

/// Which pair: a folder, an installed one, or the default one.
#[derive(Args, Clone)]
struct PairArgs {
    /// The pair's folder, or the name of one in the pairs folder of --home [default: smollm2-135m, fetched when it is not there]
    #[arg(long, env = "OVERFILL_PAIR")]
    pair: Option<PathBuf>,
}

impl PairArgs {
    fn dir(&self, home: &Home) -> anyhow::Result<PathBuf> {
        match &self.pair {
            Some(pair) => fetch::find(home, pair),
            None => fetch::install(&home.dir()?, fetch::Decode::default()),
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Router, one prefill node and one decode node in one process
    Serve(Box<serve::ServeArgs>),
    /// Watch a cluster as its router sees it
    Top(top::TopArgs),
    /// Answer one prompt
    Generate(generate::GenerateArgs),
    /// Make a key for a client
    Key(key::KeyArgs),
    /// Install the default pair
    Fetch(fetch::FetchArgs),
    /// Tell what a pair is made of
    Inspect(inspect::InspectArgs),
    /// Have a pair answer a file of prompts
    Answer(answer::AnswerArgs),
    /// Score a pair on given conversations, next to its halves alone and to baselines
    Eval(eval::EvalArgs),
    /// Write a decode model as other engines load it
    Export(export::ExportArgs),
    /// Make a pair of two models
    Pair(pair::MakePairArgs),
    /// Write into pair.json which files a pair has, with their sha256
    Seal(seal::SealArgs),
    /// Fetch a pair, or the half of it that a node needs, and check every byte
    Pull(Box<pull::PullArgs>),
    /// Make a smaller checkpoint of a full model
    Prune(prune::PruneArgs),
    /// Train a decode model to answer from the full model's KV cache
    Train(Box<train::TrainArgs>),
    /// Say how many nodes of each role a load needs
    Plan(plan::PlanArgs),
    /// Measure speed
    Bench {
        #[command(subcommand)]
        what: bench::BenchCommand,
    },
}

/// Exit status of what may go well when it is tried again: `EX_TEMPFAIL` of sysexits(3).
const TRY_LATER: u8 = 75;

fn main() -> ExitCode {
    if let Some(worker) = overfill_guide::worker::run_if_asked() {
        return worker;
    }
    let cli: Cli = flags::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            match error.downcast_ref::<pull::PullError>() {
                Some(error) if error.passes() => ExitCode::from(TRY_LATER),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let mut log = cli.log;
    // A server logs within its runtime, which sends its traces.
    if !matches!(cli.command, Command::Serve(_)) {
        // What a person types at a terminal should answer, not log.
        if log.log == "info" {
            log.log = "warn".into();
        }
        log.otlp_endpoint = None;
        let _nothing_to_send = log.init("overfill")?;
    }
    // Whoever reads no further, as `head` does, ends us quietly; not where connections are written to, which would end us too.
    if !matches!(cli.command, Command::Serve(_) | Command::Top(_) | Command::Generate(_) | Command::Pull(_) | Command::Bench { .. }) {
        sigpipe::reset();
    }
    match cli.command {
        Command::Serve(args) => serve::run(*args, &cli.home, &log),
        Command::Top(args) => top::run(args),
        Command::Generate(args) => generate::run(args, &cli.home),
        Command::Fetch(args) => fetch::run(args, &cli.home),
        Command::Key(args) => key::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Answer(args) => answer::run(args, &cli.home),
        Command::Eval(args) => eval::run(args, &cli.home),
        Command::Export(args) => export::run(args),
        Command::Pair(args) => pair::run(args),
        Command::Seal(args) => seal::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Prune(args) => prune::run(args),
        Command::Train(args) => train::run(*args),
        Command::Plan(args) => plan::run(args),
        Command::Bench { what } => bench::run(what, &cli.home),
    }
}
