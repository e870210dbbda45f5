//! `decode-node`: settings, logs, listen, run until drained.

use clap::Parser;
use overfill_decode_node::config::Cli;
use overfill_lifecycle::Drain;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let telemetry = cli.log.init("decode-node")?;
    let listeners = cli.config.node.listen(cli.listen).await?;
    let drain = Drain::on_signal()?;
    let discovery = cli.discovery.connect();
    let ran = overfill_decode_node::run(cli.config, listeners, discovery, drain).await;
    telemetry.finish().await;
    Ok(ran?)
}
