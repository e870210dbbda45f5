//! `prefill-node`: settings, logs, listen, run until drained.

use std::process::ExitCode;

use overfill_lifecycle::{Drain, flags};
use overfill_prefill_node::config::Cli;
use tokio::runtime::Runtime;

fn main() -> anyhow::Result<ExitCode> {
    if let Some(worker) = overfill_guide::worker::run_if_asked() {
        return Ok(worker);
    }
    let cli: Cli = flags::parse();
    Runtime::new()?.block_on(serve(cli))?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(cli: Cli) -> anyhow::Result<()> {
    let telemetry = cli.log.init("prefill-node")?;
    let listeners = cli.config.node.listen(cli.listen).await?;
    let drain = Drain::on_signal()?;
    let discovery = cli.discovery.connect()?;
    let ran = overfill_prefill_node::run(cli.config, listeners, discovery, drain).await;
    telemetry.finish().await;
    Ok(ran?)
}
