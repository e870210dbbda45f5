//! `overfill bench handoff`: what the KV cache's way from a prefill to a decode node costs, and how much of it is hidden.
//!
//! Two real nodes run in this process; the bench is their router. For each way between them and each prompt length it measures
//! the hand-over of a prompt that the full model reads, the push of the same rows when they all are there already (the
//! transfer's own time), and a plain TCP socket that moves as many bytes over loopback.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use overfill_cluster::Discovery;
use overfill_decode_node::DecodeConfig;
use overfill_guide::GuideArgs;
use overfill_kv::{HandoffDigest, RowsHeader, wire};
use overfill_lifecycle::{Drain, TraceHeaders};
use overfill_model::Pair;
use overfill_node::{CoreArgs, KvMemory, NcclArgs, NodeArgs};
use overfill_prefill_node::PrefillConfig;
use overfill_proto::convert;
use overfill_proto::v1::node_client::NodeClient;
use overfill_proto::v1::{
    DecodeEvent, DecodeRequest, Handoff, HandoffDone, KvCommit, KvFrame, KvRows, PrefillEvent, PrefillRequest, Reserved, Sampling,
    StatusRequest, StopTokens, call, decode_event, kv_frame, prefill_event, said,
};
use overfill_transport::calls::CallEvents;
use overfill_transport::push::{Pushes, Within};
use overfill_transport::{PeerSecurity, Peers};
use overfill_types::prompt_digest;
use overfill_types::{Epoch, PairManifest, PeerAddress, Ticket};
use serde_json::json;

use crate::bench::spread::Spread;
use crate::{Home, PairArgs};

/// How long the nodes may take to load the pair.
const LOADING: Duration = Duration::from_secs(120);
/// Events that a call tells of at most.
const EVENTS: usize = 16;

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Machine => "machine",
            Self::Network => "network",
        }
    }
}

/// How far the two nodes are from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    /// One process: rows are handed over as they are
    Process,
    /// One machine: a Unix socket
    Machine,
    /// Two machines: gRPC, here over loopback
    Network,
}

#[derive(Args)]
pub(crate) struct HandoffArgs {
    #[command(flatten)]
    pair: PairArgs,
    /// Tokens of the prompt, separated by commas
    #[arg(long, env = "OVERFILL_PROMPT_TOKENS", value_delimiter = ',', default_value = "512,1500")]
    prompt_tokens: Vec<usize>,
    /// How far the nodes are from each other, separated by commas
    #[arg(long, env = "OVERFILL_WAYS", value_enum, value_delimiter = ',', default_value = "process,machine,network")]
    ways: Vec<Way>,
    /// Compute threads of the prefill node
    #[arg(long, env = "OVERFILL_THREADS", default_value_t = 1)]
    threads: u16,
    /// Prompt tokens in one forward pass
    #[arg(long, env = "OVERFILL_CHUNK_TOKENS", default_value_t = 256)]
    chunk_tokens: u32,
    /// Measured runs; one more comes first and warms up
    #[arg(long, env = "OVERFILL_RUNS", default_value_t = 5)]
    runs: usize,
    /// Print a JSON object a line
    #[arg(long, env = "OVERFILL_JSON")]
    json: bool,
}

pub(crate) fn run(args: &HandoffArgs, home: &Home) -> anyhow::Result<()> {
    let dir = args.pair.dir(home)?;
    let manifest = Pair::open(&dir)?.manifest;
    tokio::runtime::Runtime::new()?.block_on(async {
        for &way in &args.ways {
            let nodes = Drain::new();
            let (mut bench, prefill, decode) = start(args, way, (dir.clone(), manifest.clone()), nodes.clone()).await?;
            let measured = async {
                for &tokens in &args.prompt_tokens {
                    bench.measure(args, tokens).await?;
                }
                nodes.start();
                anyhow::Ok(())
            };
            tokio::try_join!(measured, async { prefill.await.context("the prefill node failed") }, async {
                decode.await.context("the decode node failed")
            })?;
        }
        Ok(())
    })
}

type Running<E> = std::pin::Pin<Box<dyn Future<Output = Result<(), E>>>>;
type Started = (Bench, Running<overfill_prefill_node::RunError>, Running<overfill_decode_node::RunError>);

async fn start(args: &HandoffArgs, way: Way, (dir, manifest): (PathBuf, PairManifest), end: Drain) -> anyhow::Result<Started> {
    let node = NodeArgs {
        advertise: None,
        admin: None,
        threads: Some(args.threads),
        cpus: Vec::new(),
        device: vec!["cpu".into()],
        kv_memory: KvMemory::Bytes(1 << 30),
        block_tokens: 16,
        max_context: None,
        drain_delay: 0.0,
        drain_timeout: 10,
        step_timeout: 30.0,
        nccl: NcclArgs::default(),
        cores: CoreArgs::default(),
        guides: GuideArgs::default(),
        fault: Vec::new(),
    };
    let prefill = PrefillConfig {
        pair: vec![dir.clone()],
        node: node.clone(),
        chunk_tokens: args.chunk_tokens,
        nccl_checksums: 0,
        max_queue: 4,
        queue_seconds: 0.25,
        nice: 10,
        prefix_cache: false,
    };
    let decode = DecodeConfig {
        pair: dir,
        node: NodeArgs { threads: Some(1), ..node },
        max_sequences: 4,
        max_batch: 4,
        kv_overcommit: 1.0,
        nice: 0,
        reservation_timeout: 30,
    };
    let for_prefill = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let for_decode = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address: PeerAddress = for_decode.local_addr()?.to_string().parse()?;
    let addresses = [for_prefill.local_addr()?.to_string(), address.to_string()];
    // Nodes that know each other by a token go the way over the network whatever machine they are on.
    let security = if way == Way::Network { PeerSecurity::of_one_process()? } else { PeerSecurity::default() };
    let discovery = Discovery::memory().secured(security.clone());
    let (found, within) = match way {
        Way::Process => (discovery.clone(), discovery.within().clone()),
        Way::Machine | Way::Network => (Discovery::fixed(Vec::new(), vec![address]).secured(security.clone()), Within::default()),
    };
    let connector = discovery.connector();
    let prefill = overfill_prefill_node::run(prefill, for_prefill, found, end.clone());
    let decode = overfill_decode_node::run(decode, for_decode, discovery, end);
    let pushes = Pushes::new(connector.clone(), within, security.is_open());
    let bench = Bench { way, addresses, peers: Peers::new(connector), pushes, manifest, requests: 0 };
    Ok((bench, Box::pin(prefill), Box::pin(decode)))
}

struct Bench {
    way: Way,
    /// Of the prefill and of the decode node.
    addresses: [String; 2],
    peers: Peers,
    pushes: Pushes,
    manifest: PairManifest,
    /// Requests so far: each has a prompt of its own, so that no prefix is held.
    requests: usize,
}

impl Bench {
    async fn measure(&mut self, args: &HandoffArgs, tokens: usize) -> anyhow::Result<()> {
        self.loaded().await?;
        let (mut tails, mut own, mut plain) = (Vec::new(), Vec::new(), Vec::new());
        let mut bytes = 0;
        for run in 0..=args.runs {
            let done = self.handed_over(tokens).await?;
            let frames = self.frames(tokens, args.chunk_tokens as usize).await?;
            let sizes: Vec<usize> = frames.rows.iter().map(payload).collect();
            let pushed = self.push(frames).await?;
            let moved = tokio::task::spawn_blocking(move || plain_socket(&sizes)).await??;
            if run > 0 {
                bytes = done.bytes;
                tails.push(done.tail_us as f64 / 1e3);
                own.push(pushed.as_secs_f64() * 1e3);
                plain.push(moved.as_secs_f64() * 1e3);
            }
        }
        let [tail, own, plain] = [tails, own, plain].map(|ms| Spread::of(ms).median());
        let rate = |ms: f64| bytes as f64 / ms / 1e3;
        let hidden = 1.0 - tail / own;
        if args.json {
            let line = json!({
                "bench": "handoff", "way": self.way.name(), "prompt_tokens": tokens, "bytes": bytes, "tail_ms": tail, "transfer_ms": own, "hidden": hidden,
                "push_megabytes_per_second": rate(own), "socket_megabytes_per_second": rate(plain),
            });
            println!("{line}");
        } else {
            println!(
                "{:7} {tokens:5} tokens  {:6.1} MB  {tail:6.2} ms from the last layer to the acknowledgement, {own:6.2} ms alone: {:.1} % hidden  push {:6.0} MB/s, plain socket {:6.0} MB/s ({:.0} %)",
                self.way.name(),
                bytes as f64 / 1e6,
                hidden * 100.0,
                rate(own),
                rate(plain),
                plain / own * 100.0
            );
        }
        Ok(())
    }

    /// Waits until both nodes answer.
    async fn loaded(&self) -> anyhow::Result<()> {
        for address in &self.addresses {
            let mut node = NodeClient::new(self.peers.channel(address)?);
            let answers = async {
                while node.status(StatusRequest {}).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            tokio::time::timeout(LOADING, answers).await.context("the nodes did not load the pair in time")?;
        }
        Ok(())
    }

    fn prompt(&mut self, tokens: usize) -> Vec<u32> {
        self.requests += 1;
        (0..tokens).map(|i| ((7919 * (i + 1) + 31 * self.requests) % self.manifest.vocab_size()) as u32).collect()
    }

    async fn call<E: TryFrom<said::What>>(&self, address: &str, what: call::What) -> anyhow::Result<CallEvents<E>> {
        let events = self.peers.calls(address)?.begin(what, EVENTS, TraceHeaders::default()).await;
        Ok(events.accepted().await?)
    }

    async fn reserve(&mut self, prompt: &[u32]) -> anyhow::Result<(Reserved, CallEvents<DecodeEvent>)> {
        let request = DecodeRequest {
            fingerprint: self.manifest.fingerprint.to_string(),
            request_id: format!("bench-{}", self.requests),
            epoch: 1,
            prompt: prompt.to_vec(),
            sampling: Some(greedy()),
            stop: Some(stop()),
            ..DecodeRequest::default()
        };
        let mut events = self.call(&self.addresses[1], call::What::Decode(request)).await?;
        match events.message().await? {
            Some(DecodeEvent { event: Some(decode_event::Event::Reserved(reserved)) }) => Ok((reserved, events)),
            _ => bail!("the decode node broke off before it reserved"),
        }
    }

    /// The hand-over of a prompt while the full model reads it.
    async fn handed_over(&mut self, tokens: usize) -> anyhow::Result<HandoffDone> {
        let prompt = self.prompt(tokens);
        let (reserved, mut written) = self.reserve(&prompt).await?;
        let request = PrefillRequest {
            fingerprint: self.manifest.fingerprint.to_string(),
            request_id: format!("bench-{}", self.requests),
            prompt,
            sampling: Some(greedy()),
            stop: Some(stop()),
            handoff: Some(Handoff {
                address: self.addresses[1].clone(),
                ticket: reserved.ticket,
                epoch: 1,
                held_tokens: reserved.held_tokens,
                nccl: reserved.nccl,
            }),
            ..PrefillRequest::default()
        };
        let mut events: CallEvents<PrefillEvent> = self.call(&self.addresses[0], call::What::Prefill(request)).await?;
        let mut done = None;
        while let Some(event) = events.message().await? {
            if let Some(prefill_event::Event::HandoffDone(it)) = event.event {
                done = Some(it);
            }
        }
        while written.message().await?.is_some() {}
        done.context("the prefill node ended without a hand-over")
    }

    /// A reservation, and the frames of a prompt for it, cut as the prefill node cuts them when it keeps up.
    async fn frames(&mut self, tokens: usize, chunk: usize) -> anyhow::Result<Prepared> {
        let prompt = self.prompt(tokens);
        let (reserved, written) = self.reserve(&prompt).await?;
        let (geometry, format) = (self.manifest.decode.kv, self.manifest.kv_formats.wire);
        let (fingerprint, ticket) = (self.manifest.fingerprint.clone(), Ticket::new(reserved.ticket));
        let frame = |index: u32, body| KvFrame {
            fingerprint: fingerprint.to_string(),
            ticket: ticket.to_string(),
            epoch: 1,
            index,
            body: Some(body),
        };
        let numbers: Vec<f32> = (0..chunk * geometry.row()).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
        let mut digest = HandoffDigest::default();
        let mut rows = Vec::new();
        for start in (0..tokens).step_by(chunk) {
            let count = chunk.min(tokens - start);
            let encoded = wire::encode(format, &geometry, &numbers[..count * geometry.row()]);
            for layer in 0..geometry.layers as u32 {
                let header = RowsHeader {
                    fingerprint: fingerprint.clone(),
                    ticket: ticket.clone(),
                    epoch: Epoch(1),
                    index: rows.len() as u32,
                    layer,
                    start: start as u32,
                    tokens: count as u32,
                };
                let (k, v) = (encoded.clone(), encoded.clone());
                let checksum = header.checksum(&k, &v);
                digest.update(&header, checksum);
                let dtype = convert::wire_format_to_wire(format).into();
                let body = KvRows { layer, start: header.start, tokens: header.tokens, dtype, k, v, checksum, ..KvRows::default() };
                rows.push(frame(header.index, kv_frame::Body::Rows(body)));
            }
        }
        let commit =
            KvCommit { digest: digest.finish(0).to_vec().into(), prompt_digest: prompt_digest(&prompt).to_vec().into(), first_token: 0 };
        let commit = frame(rows.len() as u32, kv_frame::Body::Commit(commit));
        Ok(Prepared { rows, commit, written })
    }

    /// Pushes what is there already; the time to the acknowledgement.
    async fn push(&mut self, prepared: Prepared) -> anyhow::Result<Duration> {
        let Prepared { mut rows, commit, mut written } = prepared;
        rows.push(commit);
        let begun = Instant::now();
        self.pushes.push(&self.addresses[1], tokio_stream::iter(rows), TraceHeaders::default()).await?;
        let took = begun.elapsed();
        while written.message().await?.is_some() {}
        Ok(took)
    }
}

/// A handoff whose rows are all there.
struct Prepared {
    rows: Vec<KvFrame>,
    commit: KvFrame,
    written: CallEvents<DecodeEvent>,
}

fn payload(frame: &KvFrame) -> usize {
    match &frame.body {
        Some(kv_frame::Body::Rows(rows)) => rows.k.len() + rows.v.len(),
        _ => 0,
    }
}

fn greedy() -> Sampling {
    Sampling { temperature: Some(0.0), ..Sampling::default() }
}

fn stop() -> StopTokens {
    StopTokens { max_tokens: 2, ignore_eos: true, ..StopTokens::default() }
}

/// Moves messages of these sizes over a socket to a thread that reads them; the time to its answer.
fn plain_socket(sizes: &[usize]) -> anyhow::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let total: usize = sizes.iter().sum();
    let reader = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut socket, _) = listener.accept()?;
        let mut buffer = vec![0; 1 << 20];
        let mut left = total;
        while left > 0 {
            match socket.read(&mut buffer)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                n => left -= n,
            }
        }
        socket.write_all(&[1])
    });
    let message = vec![7; sizes.iter().copied().max().unwrap_or(0)];
    let mut socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    let begun = Instant::now();
    for &size in sizes {
        socket.write_all(&message[..size])?;
    }
    socket.read_exact(&mut [0])?;
    let took = begun.elapsed();
    match reader.join() {
        Ok(read) => read?,
        Err(_) => bail!("the reading thread panicked"),
    }
    Ok(took)
}
