//! `device-node`: a prefill node or a decode node whose models' answers are known, and whose rows go from GPU to GPU.
//!
//! All but its model is that of the servers: the flags, the engine, the handoff, the communicators. The driver and NCCL are whatever
//! `libcuda.so.1` and `libnccl.so.2` the loader finds: in tests, stand-ins.

use std::process::ExitCode;

use anyhow::bail;
use clap::Parser;
use cudarc::driver::{CudaContext, DevicePtr};
use overfill_guide::Guides;
use overfill_lifecycle::{Drain, flags};
use overfill_model::Pair;
use overfill_nccl::{AllReduce, Gpu, Numbers};
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
    /// Adds numbers that two GPUs have, twice, and prints what each has then.
    Sums,
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
        Cli::Sums => sums()?,
        Cli::PrefillNode(cli) => {
            let _telemetry = cli.log.init("prefill-node")?;
            let [pair] = cli.config.pair.as_slice() else { bail!("one pair is wanted") };
            let pair = Pair::open(pair)?;
            let compute = model(Half::Full, &pair.manifest, &cli.config.node)?;
            let guides = Guides::open(&pair.dir, &pair.manifest, &cli.config.node.guides);
            let loaded = overfill_prefill_node::Loaded { manifests: vec![pair.manifest], compute, blocks: BLOCKS, guides };
            let (listeners, discovery) = (cli.config.node.listen(cli.listen).await?, cli.discovery.connect()?);
            overfill_prefill_node::run_over(async { Ok(loaded) }, cli.config, listeners, discovery, drain).await?;
        }
        Cli::DecodeNode(cli) => {
            let _telemetry = cli.log.init("decode-node")?;
            let pair = Pair::open(&cli.config.pair)?;
            let compute = model(Half::Decode(0), &pair.manifest, &cli.config.node)?;
            let guides = Guides::open(&pair.dir, &pair.manifest, &cli.config.node.guides);
            let loaded = overfill_decode_node::Loaded { manifest: pair.manifest, compute, blocks: BLOCKS, guides };
            let (listeners, discovery) = (cli.config.node.listen(cli.listen).await?, cli.discovery.connect()?);
            overfill_decode_node::run_over(async { Ok(loaded) }, cli.config, listeners, discovery, drain).await?;
        }
    }
    Ok(())
}

fn sums() -> anyhow::Result<()> {
    let gpus = [CudaContext::new(0)?, CudaContext::new(1)?];
    for gpu in &gpus {
        // SAFETY: all that is done to a GPU's numbers is put on one stream.
        unsafe { gpu.disable_event_tracking() };
    }
    let streams = [gpus[0].new_stream()?, gpus[1].new_stream()?];
    let numbers = [streams[0].clone_htod(&[1.0_f32, 2.0, 3.0])?, streams[1].clone_htod(&[10.0_f32, 20.0, 30.0])?];
    let all = AllReduce::over(&[0, 1])?;
    for _ in 0..2 {
        let parts = numbers.iter().zip(&streams).map(|(numbers, stream)| {
            let (at, _recorded) = numbers.device_ptr(stream);
            Numbers { at, count: numbers.len(), stream: stream.clone() }
        });
        // SAFETY: the numbers are read below, after all that was put on their streams.
        unsafe { all.sum(&parts.collect::<Vec<_>>()) }?;
    }
    for (numbers, stream) in numbers.iter().zip(&streams) {
        let sums = stream.clone_dtoh(numbers)?;
        stream.synchronize()?;
        println!("{sums:?}");
    }
    Ok(())
}

fn model(half: Half, manifest: &PairManifest, node: &NodeArgs) -> anyhow::Result<Model> {
    Ok(Model::new(half, manifest, BLOCKS, node.block_tokens as usize).on(Gpu::open(0)?))
}
