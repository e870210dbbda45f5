//! `router`: settings, logs, listen, run until drained.

use anyhow::Context;
use clap::Parser;
use overfill_lifecycle::Drain;
use overfill_router::config::Cli;
use overfill_router::{Listeners, RouterConfig};
use tokio::net::TcpListener;

/// A request makes and drops hundreds of small things: with the system's allocator they took a tenth more of the router's time
/// (`cargo bench -p overfill-tests --bench router_cost`).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    cli.runtime().context("cannot start threads")?.block_on(serve(cli))
}

async fn serve(cli: Cli) -> anyhow::Result<()> {
    let telemetry = cli.log.init("router")?;
    let http = TcpListener::bind(cli.http).await.with_context(|| format!("cannot listen on {}", cli.http))?;
    let grpc = TcpListener::bind(cli.grpc).await.with_context(|| format!("cannot listen on {}", cli.grpc))?;
    let drain = Drain::on_signal()?;
    let discovery = cli.discovery.connect();
    let ran = overfill_router::run(RouterConfig::new(cli.pair, cli.bounds), Listeners { http, grpc }, discovery, drain).await;
    telemetry.finish().await;
    Ok(ran?)
}
