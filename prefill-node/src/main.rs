//! `prefill-node`: settings, logs, listen, run until drained.

use anyhow::Context;
use clap::Parser;
use overfill_lifecycle::Drain;
use overfill_prefill_node::config::Cli;
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    cli.log.init().context("--log cannot be read")?;
    let listener = TcpListener::bind(cli.listen).await.with_context(|| format!("cannot listen on {}", cli.listen))?;
    let drain = Drain::on_signal()?;
    let discovery = cli.discovery.connect();
    overfill_prefill_node::run(cli.config, listener, discovery, drain).await?;
    Ok(())
}
