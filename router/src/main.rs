//! `router`: settings, logs, listen, run until drained.

use std::process::ExitCode;

use anyhow::Context;
use overfill_lifecycle::{Drain, flags};
use overfill_router::config::Cli;
use overfill_router::{Listeners, RouterConfig};
use tokio::net::TcpListener;

/// A request makes and drops hundreds of small things: with the system's allocator they took a tenth more of the router's time
/// (`cargo bench -p overfill-tests --bench router_cost`).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<ExitCode> {
    if let Some(worker) = overfill_guide::worker::run_if_asked() {
        return Ok(worker);
    }
    let cli: Cli = flags::parse();
    cli.runtime().context("cannot start threads")?.block_on(serve(cli))?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(cli: Cli) -> anyhow::Result<()> {
    let telemetry = cli.log.init("router")?;
    let http = TcpListener::bind(cli.http).await.with_context(|| format!("cannot listen on {}", cli.http))?;
    let grpc = TcpListener::bind(cli.grpc).await.with_context(|| format!("cannot listen on {}", cli.grpc))?;
    let admin = match cli.admin {
        Some(admin) => Some(TcpListener::bind(admin).await.with_context(|| format!("cannot listen on {admin}"))?),
        None => None,
    };
    let drain = Drain::on_signal()?;
    let discovery = cli.discovery.connect()?;
    let ran = overfill_router::run(RouterConfig::new(cli.pair, cli.bounds), Listeners { http, grpc, admin }, discovery, drain).await;
    telemetry.finish().await;
    Ok(ran?)
}
