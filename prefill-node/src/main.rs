//! `prefill-node`: settings, logs, listen, run until drained.

use clap::Parser;
use overfill_lifecycle::Drain;
use overfill_prefill_node::config::Cli;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let telemetry = cli.log.init("prefill-node")?;
    let listeners = cli.config.node.listen(cli.listen).await?;
    let drain = Drain::on_signal()?;
    let discovery = cli.discovery.connect();
    let ran = overfill_prefill_node::run(cli.config, listeners, discovery, drain).await;
    telemetry.finish().await;
    Ok(ran?)
}
