//! `device-node`: a prefill node or a decode node whose models' answers are known, and whose rows go from GPU to GPU.
//!
//! All but its model is that of the servers: the flags, the engine, the handoff, the communicators. The driver and NCCL are whatever
//! `libcuda.so.1` and `libnccl.so.2` the loader finds: in tests, stand-ins.

use std::process::ExitCode;

use anyhow::bail;
use clap::Parser;
use overfill_guide::Guides;
use overfill_lifecycle::{Drain, flags};
use overfill_model::Pair;
use overfill_node::NodeArgs;
use overfill_simulation::model::{Half, Model};
use overfill_types::PairManifest;
use tokio::runtime::Runtime;

/// Blocks of each node's cache.
const BLOCKS: u32 = 512;

#[derive(Parser)]
enum Cli {
    PrefillNode(overfill_prefill_node::config::Cli),
    DecodeNode(overfill_decode_node::config::Cli),
}

fn main() -> anyhow::Result<ExitCode> {
    if let Some(worker) = overfill_guide::worker::run_if_asked() {
        return Ok(worker);
    }
    let cli: Cli = flags::parse();
    Runtime::new()?.block_on(serve(cli))?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(cli: Cli) -> anyhow::Result<()> {
    let drain = Drain::on_signal()?;
    match cli {
        Cli::PrefillNode(cli) => {
            let _telemetry = cli.log.init("prefill-node")?;
            let [pair] = cli.config.pair.as_slice() else { bail!("one pair is wanted") };
            let pair = Pair::open(pair)?;
            let compute = model(Half::Full, &pair.manifest, &cli.config.node);
            let guides = Guides::open(&pair.dir, &pair.manifest, &cli.config.node.guides);
            let loaded = overfill_prefill_node::Loaded { manifests: vec![pair.manifest], compute, blocks: BLOCKS, guides };
            let (listeners, discovery) = (cli.config.node.listen(cli.listen).await?, cli.discovery.connect()?);
            overfill_prefill_node::run_over(async { Ok(loaded) }, cli.config, listeners, discovery, drain).await?;
        }
        Cli::DecodeNode(cli) => {
            let _telemetry = cli.log.init("decode-node")?;
            let pair = Pair::open(&cli.config.pair)?;
            let compute = model(Half::Decode(0), &pair.manifest, &cli.config.node);
            let guides = Guides::open(&pair.dir, &pair.manifest, &cli.config.node.guides);
            let loaded = overfill_decode_node::Loaded { manifest: pair.manifest, compute, blocks: BLOCKS, guides };
            let (listeners, discovery) = (cli.config.node.listen(cli.listen).await?, cli.discovery.connect()?);
            overfill_decode_node::run_over(async { Ok(loaded) }, cli.config, listeners, discovery, drain).await?;
        }
    }
    Ok(())
}

fn model(half: Half, manifest: &PairManifest, node: &NodeArgs) -> Model {
    Model::new(half, manifest, BLOCKS, node.block_tokens as usize).on_gpu()
}
