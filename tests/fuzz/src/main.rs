//! `overfill-fuzz`: inputs that are nearly right, for as long as one likes.

use std::time::Duration;

use clap::Parser;
use overfill_fuzz::{run, targets};

/// Changes right inputs at random and has them read; tells the first that is not read as it should.
#[derive(Parser)]
#[command(name = "overfill-fuzz", version)]
struct Cli {
    /// Which [default: all, one after the other]
    targets: Vec<String>,
    /// Seconds for each
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// The first seed
    #[arg(long, default_value_t = 1_000_000)]
    from: u64,
    /// One seed alone
    #[arg(long, conflicts_with_all = ["seconds", "from"])]
    seed: Option<u64>,
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    let mut failed = false;
    for mut target in targets::all() {
        let name = target.name();
        if !cli.targets.is_empty() && !cli.targets.iter().any(|wanted| wanted == name) {
            continue;
        }
        let limit = Duration::from_secs(cli.seconds);
        let ended = match cli.seed {
            Some(seed) => run(&mut *target, seed..=seed, limit),
            None => run(&mut *target, cli.from.., limit),
        };
        match ended {
            Ok(read) => println!("{name}: {read} inputs"),
            Err(why) => {
                failed = true;
                println!("{why}");
            }
        }
    }
    if failed { std::process::ExitCode::FAILURE } else { std::process::ExitCode::SUCCESS }
}
