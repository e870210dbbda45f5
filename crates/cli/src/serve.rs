//! `overfill serve`: a whole cluster in one process.

use std::net::SocketAddr;

use anyhow::Context;
use clap::Args;
use overfill_cluster::Discovery;
use overfill_decode_node::DecodeConfig;
use overfill_lifecycle::Drain;
use overfill_lifecycle::telemetry::LogArgs;
use overfill_node::{Board, CoreArgs, KvMemory, NcclArgs, NodeArgs, Prefer};
use overfill_prefill_node::PrefillConfig;
use overfill_router::config::RequestBounds;
use overfill_router::{Listeners, RouterConfig};
use overfill_transport::PeerSecurity;
use overfill_types::flags::parse_bytes;
use tokio::net::TcpListener;

use crate::{Home, PairArgs};

#[derive(Args)]
#[command(
    after_help = "Then open http://127.0.0.1:8000 in a browser, or for example:\n  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\\n    -d '{\"model\": \"smollm2-135m\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'"
)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pair: PairArgs,
    /// Where it listens for HTTP
    #[arg(long, env = "OVERFILL_HTTP", default_value = "127.0.0.1:8000")]
    http: SocketAddr,
    /// Where it listens for gRPC
    #[arg(long, env = "OVERFILL_GRPC", default_value = "127.0.0.1:8001")]
    grpc: SocketAddr,
    /// Where the router answers those who run it: the page, /cluster, /metrics, /docs, probes, profiles, and gRPC's reflection, which
    /// are not at the doors then [default: at the doors, but for profiles]
    #[arg(long, env = "OVERFILL_ADMIN")]
    admin: Option<SocketAddr>,
    /// Where the prefill node does: /metrics, probes, profiles [default: nowhere]
    #[arg(long, env = "OVERFILL_PREFILL_ADMIN")]
    prefill_admin: Option<SocketAddr>,
    /// Where the decode node does [default: nowhere]
    #[arg(long, env = "OVERFILL_DECODE_ADMIN")]
    decode_admin: Option<SocketAddr>,
    /// Compute threads of each of the two models [default: all cores; they take turns]
    #[arg(long, env = "OVERFILL_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// What matters most: the two models share the cores
    #[arg(long, value_enum, env = "OVERFILL_PREFER", default_value = "balanced")]
    prefer: Prefer,
    /// Where the models compute: cpu or cuda:N
    #[arg(long, env = "OVERFILL_DEVICE", default_value = "cpu")]
    device: String,
    /// Memory of each of the two KV caches; K, M and G are understood
    #[arg(long, env = "OVERFILL_KV_MEMORY", default_value = "1G", value_parser = parse_bytes)]
    kv_memory: u64,
    /// Most prompt tokens in one forward pass of the full model
    #[arg(long, env = "OVERFILL_CHUNK_TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    chunk_tokens: u32,
    #[command(flatten)]
    bounds: RequestBounds,
}

pub(crate) fn run(args: ServeArgs, home: &Home, log: &LogArgs) -> anyhow::Result<()> {
    let pair = args.pair.dir(home)?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let telemetry = log.init("overfill")?;
        let drain = Drain::on_signal()?;
        let http = TcpListener::bind(args.http).await.with_context(|| format!("cannot listen on {}", args.http))?;
        let grpc = TcpListener::bind(args.grpc).await.with_context(|| format!("cannot listen on {}", args.grpc))?;
        let admin = match args.admin {
            Some(admin) => Some(TcpListener::bind(admin).await.with_context(|| format!("cannot listen on {admin}"))?),
            None => None,
        };
        // The nodes are this process's alone, whoever else is on this machine.
        let discovery = Discovery::memory().secured(PeerSecurity::of_one_process()?);
        let node = NodeArgs {
            advertise: None,
            admin: args.prefill_admin,
            threads: args.threads,
            cpus: Vec::new(),
            device: vec![args.device],
            kv_memory: KvMemory::Bytes(args.kv_memory),
            block_tokens: 16,
            max_context: None,
            // The router, before them, has taken its time.
            drain_delay: 0.0,
            drain_timeout: args.bounds.router_drain_timeout,
            step_timeout: 30.0,
            // What passes between its nodes is moved.
            nccl: NcclArgs::default(),
            cores: CoreArgs { share_cores: None, prefer: args.prefer, board: Some(Board::of_this_process()?) },
            guides: args.bounds.guides.clone(),
            fault: Vec::new(),
        };
        let prefill = PrefillConfig {
            pair: vec![pair.clone()],
            node: node.clone(),
            chunk_tokens: args.chunk_tokens,
            nccl_checksums: 0,
            max_queue: 256,
            queue_seconds: 0.25,
            nice: 0,
            prefix_cache: true,
        };
        let node = NodeArgs { admin: args.decode_admin, ..node };
        let decode = DecodeConfig {
            pair: pair.clone(),
            node,
            max_sequences: 64,
            max_batch: 32,
            kv_overcommit: 2.0,
            nice: 0,
            reservation_timeout: 30,
        };
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let (for_prefill, for_decode) = (prefill.node.listen(local).await?, decode.node.listen(local).await?);
        // The router drains first; its requests need the nodes until they are finished.
        let nodes = Drain::new();
        let prefill = overfill_prefill_node::run(prefill, for_prefill, discovery.clone(), nodes.clone());
        let decode = overfill_decode_node::run(decode, for_decode, discovery.clone(), nodes.clone());
        let router = async {
            let served =
                overfill_router::run(RouterConfig::new(vec![pair], args.bounds), Listeners { http, grpc, admin }, discovery, drain).await;
            nodes.start();
            served.context("the router failed")
        };
        let ran = tokio::try_join!(router, async { prefill.await.context("the prefill node failed") }, async {
            decode.await.context("the decode node failed")
        });
        telemetry.finish().await;
        ran.map(|_| ())
    })
}
