//! `overfill-chaos`: what a cluster survives, tried.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use overfill_chaos::balancer::Balancer;
use overfill_chaos::cluster::{Cluster, Kind, PATIENCE, Shape};
use overfill_chaos::fault::Fault;
use overfill_chaos::load::{Ended, Load, undisturbed};
use overfill_chaos::report::HEADER;
use overfill_chaos::run::{Times, scenario};
use overfill_chaos::storm::{Has, has, storm};
use overfill_tests::processes::eventually;
use overfill_tests::tiny;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Does things to a cluster of real processes under load, and tells what came of it. Needs root, Linux, etcd and iproute2.
#[derive(Parser)]
#[command(name = "overfill-chaos", version)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Each single fault, and pairs of them: how many answers were right, failed, wrong
    Faults(FaultArgs),
    /// Requests that are aborted at random moments; then nothing is held
    Storm(StormArgs),
    /// Mixed load with aborts and restarts; then memory, tasks and descriptors are as before
    Soak(SoakArgs),
    /// Every process is restarted, one after the other, behind a balancer that is slow to notice
    Roll(ClusterArgs),
}

#[derive(Args, Clone)]
struct ClusterArgs {
    /// The pair's folder [default: a tiny one with random weights, made anew]
    #[arg(long)]
    pair: Option<PathBuf>,
    #[arg(long, default_value_t = 2)]
    routers: usize,
    #[arg(long, default_value_t = 3)]
    prefill: usize,
    #[arg(long, default_value_t = 3)]
    decode: usize,
    /// Members of etcd
    #[arg(long, default_value_t = 3)]
    etcd: usize,
    /// Answers at a time
    #[arg(long, default_value_t = 64)]
    streams: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 400)]
    tokens: usize,
    /// Memory of each node's KV cache
    #[arg(long, default_value = "64M")]
    kv_memory: String,
    /// Folder for the processes' logs [default: they are not kept]
    #[arg(long)]
    logs: Option<PathBuf>,
    /// What is drawn is drawn by it
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Args)]
struct FaultArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Only scenarios whose name contains one of these
    #[arg(long)]
    only: Vec<String>,
    /// Go on with drawn single faults until so many minutes are over
    #[arg(long)]
    minutes: Option<u64>,
    /// How many pairs of faults are drawn beside
    #[arg(long, default_value_t = 0)]
    pairs: usize,
    /// Also what leaves no way to answer: all links between two kinds
    #[arg(long)]
    too_much: bool,
    /// Seconds that a fault lasts
    #[arg(long, default_value_t = 8)]
    lasting: u64,
    /// Names all scenarios, and does nothing
    #[arg(long)]
    list: bool,
}

#[derive(Args)]
struct StormArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    #[arg(long, default_value_t = 10_000)]
    requests: usize,
}

#[derive(Args)]
struct SoakArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    #[arg(long, default_value_t = 30)]
    minutes: u64,
}

/// A running cluster, and what it answers undisturbed.
struct Ready {
    cluster: Cluster,
    undisturbed: Vec<Ended>,
    _tiny: Option<tiny::TinyPair>,
}

async fn start(args: &ClusterArgs) -> Ready {
    let tiny = args.pair.is_none().then(|| tiny::pair(tiny::Kind::Projection, 7));
    let pair = args.pair.clone().or_else(|| tiny.as_ref().map(|tiny| tiny.dir.clone())).unwrap_or_default();
    if let Some(logs) = &args.logs {
        std::fs::create_dir_all(logs).expect("a folder for logs");
    }
    let ClusterArgs { routers, prefill, decode, etcd, ref kv_memory, ref logs, .. } = *args;
    let shape = Shape { routers, prefill, decode, etcd, pair, kv_memory: kv_memory.clone(), logs: logs.clone() };
    let cluster = Cluster::start(shape).await;
    let undisturbed = undisturbed(&cluster.doors(), args.streams, args.tokens).await;
    Ready { cluster, undisturbed, _tiny: tiny }
}

#[tokio::main]
async fn main() -> std::process::ExitCode {
    let kept = match Cli::parse().what {
        What::Faults(args) => faults(args).await,
        What::Storm(args) => storms(args).await,
        What::Soak(args) => soak(args).await,
        What::Roll(args) => roll(args).await,
    };
    if kept { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}

async fn faults(args: FaultArgs) -> bool {
    let mut draws = StdRng::seed_from_u64(args.cluster.seed);
    let survived = Fault::survived();
    let mut scenarios: Vec<Vec<Fault>> = survived.iter().map(|fault| vec![*fault]).collect();
    if args.too_much {
        scenarios.extend(Fault::too_much().into_iter().map(|fault| vec![fault]));
    }
    for _ in 0..args.pairs {
        scenarios.push(survived[1..].choose_multiple(&mut draws, 2).copied().collect());
    }
    let name = |faults: &[Fault]| faults.iter().map(|fault| fault.name()).collect::<Vec<_>>().join(" + ");
    scenarios.retain(|faults| args.only.is_empty() || args.only.iter().any(|only| name(faults).contains(only)));
    if args.list {
        scenarios.iter().for_each(|faults| println!("{}", name(faults)));
        return true;
    }
    let until = args.minutes.map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let Ready { mut cluster, undisturbed, _tiny } = start(&args.cluster).await;
    let seconds = Duration::from_secs;
    let times = Times { before: seconds(4), lasting: seconds(args.lasting), after: seconds(6) };
    println!("{HEADER}");
    let (mut kept, mut left) = (true, scenarios.into_iter());
    loop {
        let faults = match left.next() {
            Some(faults) if until.is_none_or(|until| Instant::now() < until) => faults,
            None if until.is_some_and(|until| Instant::now() < until) => vec![survived[draws.random_range(0..survived.len())]],
            _ => break,
        };
        let row = scenario(&mut cluster, &faults, (&undisturbed, args.cluster.tokens), times, &mut draws).await;
        println!("{}", row.line());
        eprint!("{}", row.reasons());
        kept &= row.kept();
    }
    kept
}

/// Aborted requests after which allocators hold what they hold at most: after 5,000 a router still grew from 43 to 45 MB.
const WARM_UP: usize = 40_000;

async fn storms(args: StormArgs) -> bool {
    let Ready { cluster, _tiny, .. } = start(&ClusterArgs { streams: 4, ..args.cluster.clone() }).await;
    let ClusterArgs { tokens, seed, .. } = args.cluster;
    // What is made once, and kept, is there before it is measured.
    storm(&cluster, WARM_UP, tokens, seed).await;
    quiet(&cluster).await;
    let before = has(&cluster).await;
    let ends = storm(&cluster, args.requests, tokens, seed + 1000).await;
    println!("{} aborted, {} whole, {} failed", ends.aborted, ends.whole, ends.failed.len());
    ends.failed.iter().take(5).for_each(|why| eprintln!("  {why}"));
    let held = quiet(&cluster).await;
    held.iter().for_each(|held| println!("held: {held}"));
    left(before, has(&cluster).await) & held.is_empty() & ends.failed.is_empty()
}

/// Waits until nothing is held and connections that were left have gone; what still is.
async fn quiet(cluster: &Cluster) -> Vec<String> {
    let held = cluster.nothing_is_held(PATIENCE).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    held
}

/// Tells what is left, and whether it is as it was.
fn left(before: Vec<Has>, after: Vec<Has>) -> bool {
    println!("| process | memory, MB | tasks | descriptors |\n|---|---|---|---|");
    let mut as_before = true;
    for (before, after) in before.into_iter().zip(after) {
        let [memory, memory_after] = [before.memory, after.memory].map(|bytes| bytes as f64 / 1e6);
        let (tasks, tasks_after, open, open_after) = (before.tasks, after.tasks, before.descriptors, after.descriptors);
        println!("| {} | {memory:.1} → {memory_after:.1} | {tasks} → {tasks_after} | {open} → {open_after} |", before.process);
        as_before &= memory_after < memory * 1.05 && tasks_after <= tasks + 4.0 && open_after <= open + 8;
    }
    as_before
}

async fn soak(args: SoakArgs) -> bool {
    let Ready { mut cluster, undisturbed, _tiny } = start(&args.cluster).await;
    let ClusterArgs { tokens, seed, .. } = args.cluster;
    let mut draws = StdRng::seed_from_u64(seed);
    let until = Instant::now() + Duration::from_secs(60 * args.minutes);
    storm(&cluster, 2000, tokens, seed).await;
    quiet(&cluster).await;
    let mut before = has(&cluster).await;
    let (mut kept, mut round) = (true, 0);
    while Instant::now() < until {
        round += 1;
        let load = Load::begin(&cluster.doors(), &undisturbed, tokens);
        let ends = storm(&cluster, 500, tokens, seed + round).await;
        // One of the nodes is another one then: what it has is told from then on.
        let kind = if draws.random() { Kind::Prefill } else { Kind::Decode };
        let one = cluster.of(kind)[draws.random_range(0..cluster.of(kind).len())];
        cluster.process(one).signal("TERM");
        let code = cluster.ended(one, Duration::from_secs(90)).await;
        cluster.restart(one);
        cluster.whole().await;
        let outcome = load.end(Duration::from_secs(180)).await;
        let held = quiet(&cluster).await;
        let (ok, failed) = (outcome.ok, outcome.failed.len() + outcome.broken_off.len() + ends.failed.len());
        println!("round {round}: {ok} ok, {failed} failed, {} wrong, {} aborted, {} held", outcome.wrong, ends.aborted, held.len());
        outcome.failed.iter().chain(&outcome.broken_off).chain(&ends.failed).take(3).for_each(|why| eprintln!("  {why}"));
        kept &= failed == 0 && outcome.wrong == 0 && held.is_empty() && code == Some(0);
        let now = has(&cluster).await;
        let place = cluster.of(Kind::Router).len() + one - cluster.of(Kind::Prefill)[0];
        before[place] = now[place].clone();
    }
    kept & left(before, has(&cluster).await)
}

async fn roll(args: ClusterArgs) -> bool {
    let Ready { mut cluster, undisturbed, _tiny } = start(&args).await;
    let routers = cluster.of(Kind::Router);
    let balancer = Balancer::start(routers.iter().map(|router| cluster.door(*router)).collect()).await;
    let load = Load::begin(std::slice::from_ref(&balancer.door), &undisturbed, args.tokens);
    tokio::time::sleep(Duration::from_secs(3)).await;
    for kind in [Kind::Router, Kind::Prefill, Kind::Decode] {
        for member in cluster.of(kind) {
            cluster.process(member).signal("TERM");
            let code = cluster.ended(member, Duration::from_secs(90)).await;
            println!("{} {member} ended with {code:?}", kind.name());
            cluster.restart(member);
            if kind == Kind::Router {
                eventually(PATIENCE, "the router is ready", || cluster.ready(member)).await;
                // The next one leaves when the balancer knows of this one again.
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
            cluster.whole().await;
        }
    }
    let outcome = load.end(Duration::from_secs(180)).await;
    let held = cluster.nothing_is_held(Duration::from_secs(30)).await;
    let (failed, broken_off) = (outcome.failed.len(), outcome.broken_off.len());
    println!(
        "rolling restart: {} ok, {failed} failed, {} wrong, {broken_off} broken off, longest silence {:.1} s, {} held",
        outcome.ok,
        outcome.wrong,
        outcome.longest_silence.as_secs_f64(),
        held.len()
    );
    outcome.failed.iter().chain(&outcome.broken_off).take(5).for_each(|why| eprintln!("  {why}"));
    failed == 0 && broken_off == 0 && outcome.wrong == 0 && held.is_empty()
}
