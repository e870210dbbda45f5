//! Whatever a decode node does with its handoff, the prefill node reads other prompts, keeps what is owed in its cache
//! rather than in frames, and lets go of it in the end.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use overfill_cluster::Registration;
use overfill_kv::{Assembler, Commit, Expected, Payload, RowsHeader};
use overfill_proto::v1::decode_server::{Decode, DecodeServer};
use overfill_proto::v1::node_server::NodeServer;
use overfill_proto::v1::{
    DecodeEvent, FirstToken, Handoff, HandoffDone, KvFrame, NcclJoined, NcclSend, NodeStatus, PrefillEvent, PrefillRequest, PushSummary,
    Reserved, Sampling, StopTokens, call, decode_event, kv_frame, prefill_event,
};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::nodes::{self, status};
use overfill_tests::processes::eventually;
use overfill_tests::tiny::{self, Kind};
use overfill_transport::calls::{CallEvents, EventReceiver, NodeService, Serving, Signals};
use overfill_types::prompt_digest;
use overfill_types::{Epoch, Fingerprint, KvGeometry, NodeId, NodeInfo, Role, SamplingParams, ServiceError, Ticket, WireFormat};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::Empty;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::codegen::http::HeaderMap;
use tonic::{Code, Request, Response, Status, Streaming};

const SECOND: Duration = Duration::from_secs(1);
const GEOMETRY: KvGeometry = KvGeometry { layers: tiny::FULL.layers, kv_heads: tiny::FULL.kv_heads, head_dim: 8 };
/// Bytes of one token: f32 keys and values of all layers.
const TOKEN_BYTES: usize = GEOMETRY.layers * GEOMETRY.kv_heads * 8 * 2 * 4;
/// Tokens in a block.
const BLOCK: usize = 16;

/// A decode node that takes frames as it is allowed to, and keeps them.
#[derive(Clone)]
struct Stub {
    /// Frames that it may take.
    allowed: Arc<Semaphore>,
    /// It refuses the handoff after so many.
    refuses_after: Option<usize>,
    taken: Arc<Mutex<Vec<KvFrame>>>,
}

struct Served {
    stub: Stub,
    address: String,
    _server: AbortOnDropHandle<()>,
    _registered: Registration,
}

impl Stub {
    /// A decode node beside those of the cluster.
    async fn serve(cluster: &Cluster, allowed: usize, refuses_after: Option<usize>) -> Served {
        let stub = Stub { allowed: Arc::new(Semaphore::new(allowed)), refuses_after, taken: Arc::default() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        // Small windows, so that little is on its way while it does not read.
        let server = tonic::transport::Server::builder()
            .initial_stream_window_size(65_535)
            .initial_connection_window_size(65_535)
            .add_service(DecodeServer::new(stub.clone()).max_decoding_message_size(overfill_proto::MAX_MESSAGE))
            .add_service(NodeServer::new(NodeService::new(Arc::new(stub.clone()), Signals::default())))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let _server = AbortOnDropHandle::new(tokio::spawn(async move { server.await.unwrap() }));
        let prefill = cluster.nodes(Role::Prefill).remove(0);
        let id = NodeId::new(format!("stub at {address}"));
        let _registered = cluster.discovery.register(NodeInfo { id, role: Role::Decode, address: address.parse().unwrap(), ..prefill });
        Served { stub, address, _server, _registered }
    }
}

/// A reservation, and then silence until the router goes.
fn reserved(epoch: u64) -> EventReceiver<DecodeEvent> {
    let (events, answer) = mpsc::channel(1);
    let reserved = Reserved { ticket: "ticket".into(), epoch, expires_in_ms: 60_000, held_tokens: 0, nccl: false };
    events.try_send(Ok(DecodeEvent { event: Some(decode_event::Event::Reserved(reserved)) })).unwrap();
    tokio::spawn(async move { events.closed().await });
    answer
}

impl Serving for Stub {
    type Event = DecodeEvent;

    async fn begin(&self, what: call::What, _: HeaderMap) -> Result<EventReceiver<DecodeEvent>, ServiceError> {
        let call::What::Decode(request) = what else { return Err(ServiceError::of_node(overfill_types::Code::Unimplemented, "a stub")) };
        Ok(reserved(request.epoch))
    }

    fn status(&self) -> NodeStatus {
        NodeStatus::default()
    }
}

#[tonic::async_trait]
impl Decode for Stub {
    async fn push_kv(&self, request: Request<Streaming<KvFrame>>) -> Result<Response<PushSummary>, Status> {
        let mut frames = request.into_inner();
        let mut summary = PushSummary::default();
        loop {
            self.allowed.acquire().await.unwrap().forget();
            if self.refuses_after == Some(summary.frames as usize) {
                return Err(Status::resource_exhausted("no more of this"));
            }
            let Some(frame) = frames.message().await? else { return Ok(Response::new(summary)) };
            if let Some(kv_frame::Body::Rows(rows)) = &frame.body {
                summary.frames += 1;
                summary.bytes += (rows.k.len() + rows.v.len()) as u64;
            }
            self.taken.lock().unwrap().push(frame);
        }
    }

    type JoinNcclStream = Empty<Result<NcclJoined, Status>>;

    async fn join_nccl(&self, _: Request<Streaming<NcclSend>>) -> Result<Response<Self::JoinNcclStream>, Status> {
        Err(Status::unimplemented("no NCCL here"))
    }
}

/// Asks the prefill node itself, as a router would, for a handoff to `address`.
async fn prefill(cluster: &Cluster, address: &str, prompt: &[u32], held_tokens: usize) -> Result<CallEvents<PrefillEvent>, ServiceError> {
    let node = cluster.nodes(Role::Prefill).remove(0);
    let request = PrefillRequest {
        fingerprint: node.pairs[0].fingerprint.to_string(),
        request_id: "r".into(),
        prompt: prompt.to_vec(),
        sampling: Some(Sampling { temperature: Some(0.0), ..Default::default() }),
        stop: Some(StopTokens { max_tokens: 10, ignore_eos: true, ..Default::default() }),
        handoff: Some(Handoff {
            address: address.to_owned(),
            ticket: "ticket".into(),
            epoch: 1,
            held_tokens: held_tokens as u32,
            nccl: false,
        }),
        ..PrefillRequest::default()
    };
    nodes::prefill(&node, request).await
}

async fn first_token(events: &mut CallEvents<PrefillEvent>) -> u32 {
    match events.message().await.unwrap().unwrap().event {
        Some(prefill_event::Event::FirstToken(FirstToken { token: Some(token), finish: 0, .. })) => token.id,
        other => panic!("{other:?}"),
    }
}

async fn done(events: &mut CallEvents<PrefillEvent>) -> HandoffDone {
    match events.message().await.unwrap().unwrap().event {
        Some(prefill_event::Event::HandoffDone(done)) => done,
        other => panic!("{other:?}"),
    }
}

/// Checks a handoff as a decode node does; gives each layer's rows, `[tokens, k and v]`.
fn assembled(frames: &[KvFrame], prompt: &[u32], held_tokens: usize, first: u32) -> Vec<Vec<[Vec<u8>; 2]>> {
    let (fingerprint, ticket, epoch) = (Fingerprint::new(frames[0].fingerprint.as_str()), Ticket::new("ticket"), Epoch(1));
    let (wire, prompt_tokens, prompt_digest) = (WireFormat::F32, prompt.len(), prompt_digest(prompt));
    let (pair, ours) = (fingerprint.clone(), ticket.clone());
    let expected = Expected { fingerprint: pair, ticket: ours, epoch, geometry: GEOMETRY, wire, prompt_tokens, held_tokens, prompt_digest };
    let mut assembler = Assembler::new(expected);
    let mut layers = vec![Vec::new(); GEOMETRY.layers];
    for frame in frames {
        match frame.body.as_ref().unwrap() {
            kv_frame::Body::Rows(rows) => {
                let (index, layer, start, tokens) = (frame.index, rows.layer, rows.start, rows.tokens);
                let header = RowsHeader { fingerprint: fingerprint.clone(), ticket: ticket.clone(), epoch, index, layer, start, tokens };
                assembler.rows(&header, Payload::Seen { k: &rows.k, v: &rows.v }, rows.checksum).unwrap();
                let row = GEOMETRY.row() * 4;
                let rows = rows.k.chunks(row).zip(rows.v.chunks(row)).map(|(k, v)| [k.to_vec(), v.to_vec()]);
                layers[layer as usize].extend(rows);
            }
            kv_frame::Body::Commit(commit) => {
                assert_eq!(commit.first_token, first);
                assembler
                    .commit(
                        &fingerprint,
                        &ticket,
                        epoch,
                        frame.index,
                        Commit { digest: &commit.digest, prompt_digest: &commit.prompt_digest, first_token: commit.first_token },
                    )
                    .unwrap();
            }
        }
    }
    assert!(matches!(frames.last().unwrap().body, Some(kv_frame::Body::Commit(_))));
    layers
}

#[tokio::test(flavor = "multi_thread")]
async fn others_go_on_while_rows_wait_in_the_cache() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).prefill_flags(&["--chunk-tokens", "16"]).start().await;
    let other = async |i| tokens(cluster.client().await, request(&tiny::prompt(300, i), &SamplingParams::greedy(), 20)).await.unwrap();
    let expected = [other(1).await, other(2).await];

    let slow = Stub::serve(&cluster, 0, None).await;
    let prompt = tiny::prompt(3000, 9);
    let begun = Instant::now();
    let mut events = prefill(&cluster, &slow.address, &prompt, 0).await.unwrap();
    let first = first_token(&mut events).await;
    let stalled = Instant::now();
    for _ in 0..5 {
        assert_eq!([other(1).await, other(2).await], expected);
    }
    let node = cluster.nodes(Role::Prefill).remove(0);
    let left = async || {
        let status = status(&node).await;
        (status.sequences, status.running, status.blocks_held)
    };
    let blocks = prompt.len().div_ceil(BLOCK) as u64;
    eventually(SECOND, "the slow one is left, with its blocks", || async { left().await == (1, 0, blocks) }).await;
    let stalled = stalled.elapsed();

    // Frame by frame at first, then all that is left.
    for _ in 0..20 {
        slow.stub.allowed.add_permits(1);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    slow.stub.allowed.add_permits(Semaphore::MAX_PERMITS / 2);
    let done = done(&mut events).await;
    assert!(events.message().await.unwrap().is_none());
    let taken = slow.stub.taken.lock().unwrap().clone();
    assembled(&taken, &prompt, 0, first);
    assert_eq!((done.frames as usize, done.bytes as usize), (taken.len() - 1, prompt.len() * TOKEN_BYTES));
    let (tail, transfer) = (Duration::from_micros(done.tail_us), Duration::from_micros(done.transfer_us));
    assert!(stalled < tail && tail < transfer && transfer < begun.elapsed(), "{stalled:?}, {tail:?}, {transfer:?}");
    // Rows that were cut into a frame as each chunk's layer was computed would be 752. What two windows and eight frames
    // hold was; the rest waited, and left in large ones.
    assert!(done.frames < 200, "{} frames", done.frames);
    cluster.nothing_is_held(SECOND).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_goes_away_while_rows_wait_leaves_nothing() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).prefill_flags(&["--chunk-tokens", "16"]).start().await;
    let slow = Stub::serve(&cluster, 0, None).await;
    for i in 0..3 {
        let mut events = prefill(&cluster, &slow.address, &tiny::prompt(3000, i), 0).await.unwrap();
        first_token(&mut events).await;
        assert!(status(&cluster.nodes(Role::Prefill)[0]).await.blocks_held > 0);
        drop(events);
        cluster.nothing_is_held(SECOND).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_what_waits() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).nodes(1, 0).router_flags(&["--request-timeout", "1"]).start().await;
    let prefill = cluster.nodes(Role::Prefill).remove(0);
    let _slow = Stub::serve(&cluster, 3, None).await;
    let mut view = cluster.discovery.watch();
    tokio::time::timeout(SECOND, view.wait_for(|v| v.nodes.len() == 2)).await.unwrap().unwrap();
    let error = tokens(cluster.client().await, request(&tiny::prompt(3000, 1), &SamplingParams::greedy(), 20)).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    eventually(SECOND, "nothing is held", || async {
        let status = status(&prefill).await;
        status.sequences == 0 && status.blocks_held == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_told_as_it_was_said() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).prefill_flags(&["--chunk-tokens", "16"]).start().await;
    for (i, after) in [0, 1, 3, 10].into_iter().cycle().take(24).enumerate() {
        let refusing = Stub::serve(&cluster, Semaphore::MAX_PERMITS / 2, Some(after)).await;
        let mut events = prefill(&cluster, &refusing.address, &tiny::prompt(1500, i as u64), 0).await.unwrap();
        let error = loop {
            match events.message().await {
                Ok(Some(PrefillEvent { event: Some(prefill_event::Event::FirstToken(_)) })) => {}
                Ok(other) => panic!("{other:?}"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.code, overfill_types::Code::ResourceExhausted, "{error}");
        assert!(error.message.contains("no more of this"), "{error}");
        cluster.nothing_is_held(SECOND).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_decode_node_holds_is_not_sent() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).prefill_flags(&["--chunk-tokens", "64"]).start().await;
    let prompt = tiny::prompt(1000, 1);
    let mut whole = None;
    // The first time all is computed, later nearly all is in the cache.
    for held in [0, 0, 17, 160, 992, 999, 1000] {
        let node = Stub::serve(&cluster, Semaphore::MAX_PERMITS / 2, None).await;
        let mut events = prefill(&cluster, node.address.as_str(), &prompt, held).await.unwrap();
        let first = first_token(&mut events).await;
        assert_eq!(done(&mut events).await.bytes as usize, (prompt.len() - held) * TOKEN_BYTES);
        let rows = assembled(&node.stub.taken.lock().unwrap(), &prompt, held, first);
        let (whole_first, whole) = whole.get_or_insert_with(|| (first, rows.clone()));
        assert_eq!(first, *whole_first);
        assert!(rows.iter().zip(whole.iter()).all(|(rows, whole)| rows[..] == whole[held..]), "{held} held");
    }
    let error = prefill(&cluster, "127.0.0.1:1", &prompt, 1001).await.err().unwrap();
    assert_eq!(error.code, overfill_types::Code::InvalidArgument);
    assert!(error.message.contains("1001"), "{error}");
    cluster.nothing_is_held(SECOND).await;
}
