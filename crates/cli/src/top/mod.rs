//! `overfill top`: the cluster as a router sees it, in a terminal; or as text or JSON, for scripts.
//!
//! It asks `/cluster` again and again. A router that does not answer is asked on: what it said last stays in sight, with how long
//! ago that is.

mod columns;
mod fetch;
mod plain;
mod screen;

use std::io::{ErrorKind, IsTerminal, stdout};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use overfill_lifecycle::Drain;
use overfill_types::flags::parse_seconds;
use tokio::runtime::Builder;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::top::columns::Speed;
use crate::top::fetch::{Door, Look};

#[derive(Args)]
#[command(
    after_help = "In a terminal q ends it.\n\nExamples:\n  overfill top --url http://127.0.0.1:9100\n  overfill top --once --json | jq '.nodes[] | {id, condition}'"
)]
pub(crate) struct TopArgs {
    /// Where the router answers those who run it: its --admin, or its HTTP door where it has none
    #[arg(long, env = "OVERFILL_TOP_URL", default_value = "http://127.0.0.1:8000")]
    url: String,
    /// A client's key, for a router that asks for one there
    #[arg(long, env = "OVERFILL_TOP_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Seconds between two looks
    #[arg(long, env = "OVERFILL_TOP_INTERVAL", default_value_t = 1.0, value_parser = parse_seconds)]
    interval: f64,
    /// Look once
    #[arg(long)]
    once: bool,
    /// What the router says, as it says it: a line of JSON each time
    #[arg(long)]
    json: bool,
}

/// What came of the last look; `None` before the first.
type Looks = watch::Receiver<Option<anyhow::Result<Look>>>;

/// No router is asked more often.
const SHORTEST: Duration = Duration::from_millis(100);

pub(crate) fn run(args: TopArgs) -> anyhow::Result<()> {
    let door = Door::new(&args.url, args.key)?;
    let every = Duration::from_secs_f64(args.interval).max(SHORTEST);
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().context("cannot start threads")?;
    if args.once {
        let look = runtime.block_on(door.look())?;
        return unless_unread(plain::show(&mut stdout(), &look, None, args.json));
    }
    let _within = runtime.enter();
    let ended = Drain::on_signal()?;
    let (sender, looks) = watch::channel(None);
    // Ends with the runtime.
    runtime.spawn(async move {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            sender.send_replace(Some(door.look().await));
        }
    });
    if stdout().is_terminal() && !args.json {
        return screen::run(&args.url, looks, &ended);
    }
    runtime.block_on(async {
        tokio::select! {
            told = tell(looks, args.json) => told,
            () = ended.signaled() => Ok(()),
        }
    })
}

/// Writes down each look, until nobody reads.
async fn tell(mut looks: Looks, json: bool) -> anyhow::Result<()> {
    let (mut speed, mut complained) = (Speed::default(), false);
    while looks.changed().await.is_ok() {
        match &*looks.borrow_and_update() {
            Some(Ok(look)) => {
                complained = false;
                let speed = speed.of(&look.overview);
                if let Err(error) = plain::show(&mut stdout(), look, speed, json) {
                    return unless_unread(Err(error));
                }
            }
            Some(Err(error)) if !complained => {
                complained = true;
                eprintln!("{error:#}; asking on");
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whoever reads no further, as `head` does, ends us quietly.
fn unless_unread(written: std::io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}
