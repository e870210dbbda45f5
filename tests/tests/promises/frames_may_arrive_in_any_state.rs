//! Between a prefill node and a decode node stands something that flips bits, cuts, reorders, doubles, replays and delays: an answer is
//! the undisturbed one, token for token, or it is told that it failed. It is never another one.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request as Asked;
use axum::response::Response as Answered;
use clap::Parser;
use overfill_cluster::Discovery;
use overfill_lifecycle::Drain;
use overfill_model::solo::Solo;
use overfill_model::{Device, ThreadPool};
use overfill_proto::MAX_MESSAGE;
use overfill_proto::v1::decode_client::DecodeClient;
use overfill_proto::v1::decode_server::{Decode, DecodeServer};
use overfill_proto::v1::{KvFrame, NcclJoined, NcclSend, PushSummary, kv_frame};
use overfill_tests::cluster::{Builder, request, tokens};
use overfill_tests::processes::{binary, eventually};
use overfill_tests::tiny::{self, Kind, TinyPair};
use overfill_transport::Connector;
use overfill_transport::server::serve_peers;
use overfill_types::{Role, SamplingParams, StopConditions};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::Empty;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use tower::ServiceExt;

const NEW: usize = 12;
const PROMPTS: usize = 40;

/// What is done to the frames of a push.
#[derive(Clone, Copy, Debug)]
enum Tampering {
    /// A bit of a row is another one.
    FlipRow,
    /// Rows say that they are others than they are.
    Misplace,
    /// A checksum is another one.
    FlipChecksum,
    /// The commit names another first token.
    FirstToken,
    /// Rows are shorter than they say.
    Shorten,
    /// A frame does not come.
    Lose,
    /// The stream ends before its commit.
    Cut,
    /// Two frames change places.
    Swap,
    /// A frame comes twice.
    Double,
    /// A frame of an earlier push comes in between.
    Replay,
    /// A frame of an earlier push comes, as if it were of this one.
    ReplayRenamed,
    /// A frame comes later, and all after it.
    Delay,
}

const ALL: [Tampering; 12] = [
    Tampering::FlipRow,
    Tampering::Misplace,
    Tampering::FlipChecksum,
    Tampering::FirstToken,
    Tampering::Shorten,
    Tampering::Lose,
    Tampering::Cut,
    Tampering::Swap,
    Tampering::Double,
    Tampering::Replay,
    Tampering::ReplayRenamed,
    Tampering::Delay,
];

/// Stands before a decode node.
#[derive(Clone)]
struct Between {
    connector: Connector,
    /// Of the node.
    address: String,
    tampering: Tampering,
    /// A frame of an earlier push.
    earlier: Arc<Mutex<Option<KvFrame>>>,
    /// Pushes that were tampered with.
    done: Arc<AtomicUsize>,
    seed: Arc<AtomicUsize>,
}

impl Between {
    /// What comes of `frames`, and how many come in time.
    fn tamper(&self, mut frames: Vec<KvFrame>) -> (Vec<KvFrame>, usize) {
        let mut draws = StdRng::seed_from_u64(self.seed.fetch_add(1, Ordering::Relaxed) as u64);
        let earlier = self.earlier.lock().unwrap().replace(frames[0].clone());
        let at = draws.random_range(0..frames.len().max(2) - 1);
        let in_time = frames.len();
        let flip = |bytes: &mut bytes::Bytes, draws: &mut StdRng| {
            let mut changed = bytes.to_vec();
            if let Some(byte) = changed.get_mut(draws.random_range(0..bytes.len().max(1))) {
                *byte ^= 1 << draws.random_range(0..8);
            }
            *bytes = changed.into();
        };
        let commit = frames.len() - 1;
        match (self.tampering, frames[at].body.as_mut().unwrap()) {
            (Tampering::FlipRow, kv_frame::Body::Rows(rows)) => flip(if draws.random() { &mut rows.k } else { &mut rows.v }, &mut draws),
            (Tampering::Misplace, kv_frame::Body::Rows(rows)) => match draws.random_range(0..3) {
                0 => rows.layer ^= 1,
                1 => rows.start += 1,
                _ => rows.tokens += 1,
            },
            (Tampering::FlipChecksum, kv_frame::Body::Rows(rows)) => rows.checksum ^= 1 << draws.random_range(0..64),
            (Tampering::Shorten, kv_frame::Body::Rows(rows)) => rows.v = rows.v.slice(..rows.v.len() - 4),
            (Tampering::FirstToken, _) => match frames[commit].body.as_mut().unwrap() {
                kv_frame::Body::Commit(commit) => commit.first_token = (commit.first_token + 1) % 256,
                other => panic!("a push ends with its commit, not {other:?}"),
            },
            (Tampering::Lose, _) => drop(frames.remove(at)),
            (Tampering::Cut, _) => frames.truncate(at),
            (Tampering::Swap, _) => frames.swap(at, at + 1),
            (Tampering::Double, _) => frames.insert(at, frames[at].clone()),
            (Tampering::Replay, _) => frames.splice(at..at, earlier).for_each(drop),
            (Tampering::ReplayRenamed, _) => {
                if let Some(mut replayed) = earlier {
                    replayed.clone_from(&KvFrame { body: replayed.body.clone(), ..frames[at].clone() });
                    frames[at] = replayed;
                }
            }
            (Tampering::Delay, _) => return (frames, at),
            (_, other) => panic!("rows come before the commit, not {other:?}"),
        }
        (frames, in_time)
    }

    /// Everything but pushes is passed on as it is.
    async fn pass_on(&self, asked: Asked) -> Answered {
        let channel = self.connector.connect(&self.address).unwrap();
        let answer = channel.oneshot(asked.map(tonic::body::Body::new)).await;
        answer.map_or_else(|status| status.into_http(), |answer| answer.map(Body::new))
    }
}

#[tonic::async_trait]
impl Decode for Between {
    async fn push_kv(&self, request: Request<Streaming<KvFrame>>) -> Result<Response<PushSummary>, Status> {
        let mut incoming = request.into_inner();
        let mut frames = Vec::new();
        while let Some(frame) = incoming.message().await? {
            let last = matches!(frame.body, Some(kv_frame::Body::Commit(_)));
            frames.push(frame);
            if last {
                break;
            }
        }
        self.done.fetch_add(1, Ordering::Relaxed);
        let (frames, in_time) = self.tamper(frames);
        let (sender, passed_on) = mpsc::channel(1);
        let sending = tokio::spawn(async move {
            for (index, frame) in frames.into_iter().enumerate() {
                if index == in_time {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                // The node has refused what came before.
                if sender.send(frame).await.is_err() {
                    return;
                }
            }
        });
        let channel = self.connector.connect(&self.address).unwrap();
        let answer = DecodeClient::new(channel).max_encoding_message_size(MAX_MESSAGE).push_kv(ReceiverStream::new(passed_on)).await;
        sending.abort();
        answer
    }

    type JoinNcclStream = Empty<Result<NcclJoined, Status>>;

    async fn join_nccl(&self, _: Request<Streaming<NcclSend>>) -> Result<Response<Self::JoinNcclStream>, Status> {
        Err(Status::unimplemented("no NCCL here"))
    }
}

/// A decode node that is reached through what tampers with its pushes.
async fn node(pair: &TinyPair, discovery: &Discovery, tampering: Tampering) -> (Arc<AtomicUsize>, Vec<AbortOnDropHandle<()>>) {
    let (front, back) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let (advertised, address) = (front.local_addr().unwrap().to_string(), back.local_addr().unwrap().to_string());
    let (dir, compiler) = (pair.dir.display().to_string(), binary("router").display().to_string());
    let flags = ["--pair", &dir, "--threads", "1", "--kv-memory", "32M", "--guide-compiler", &compiler, "--advertise", &advertised];
    let config = overfill_decode_node::config::Cli::parse_from(["node"].into_iter().chain(flags)).config;
    let connector = discovery.connector();
    let between = Between { connector, address, tampering, earlier: Arc::default(), done: Arc::default(), seed: Arc::default() };
    let done = between.done.clone();
    let routes = Routes::new(DecodeServer::new(between.clone()).max_decoding_message_size(MAX_MESSAGE)).into_axum_router();
    let routes = routes.reset_fallback().fallback(move |asked: Asked| {
        let between = between.clone();
        async move { between.pass_on(asked).await }
    });
    let serving = serve_peers(front, routes, Drain::new(), discovery.security().clone());
    let running = overfill_decode_node::run(config, back, discovery.clone(), Drain::new());
    let spawn = |task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| AbortOnDropHandle::new(tokio::spawn(task));
    let tasks = vec![spawn(Box::pin(async move { serving.await.unwrap() })), spawn(Box::pin(async move { running.await.unwrap() }))];
    (done, tasks)
}

fn reference(pair: &TinyPair) -> Vec<Vec<u32>> {
    let mut solo = Solo::load(&pair.open(), &Device::Cpu, ThreadPool::new(2, &[]).unwrap()).unwrap();
    let stop = StopConditions { max_tokens: NEW, stop_token_ids: vec![], ignore_eos: true };
    let mut answer = |prompt: usize| {
        let mut ids = Vec::new();
        solo.generate(&tiny::prompt(60 + 7 * prompt, prompt as u64), &SamplingParams::greedy(), &stop, |step| {
            ids.push(step.token);
            ControlFlow::Continue(())
        })
        .unwrap();
        ids
    };
    (0..PROMPTS).map(&mut answer).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn never_a_wrong_token() {
    let pair = tiny::pair(Kind::Projection, 71);
    let expected = reference(&pair);
    for tampering in ALL {
        let cluster = Builder::new(&pair.dir).nodes(1, 0).prefill_flags(&["--chunk-tokens", "64", "--prefix-cache", "off"]).start().await;
        let (done, _node) = node(&pair, &cluster.discovery, tampering).await;
        eventually(Duration::from_secs(30), "the node is listed", || async { cluster.nodes(Role::Decode).len() == 1 }).await;
        let mut asked = Vec::new();
        for prompt in 0..PROMPTS {
            let mut ask = request(&tiny::prompt(60 + 7 * prompt, prompt as u64), &SamplingParams::greedy(), NEW as u32);
            ask.ignore_eos = true;
            asked.push(tokio::spawn(tokens(cluster.client().await, ask)));
        }
        let mut right = 0;
        for (asked, expected) in asked.into_iter().zip(&expected) {
            // Told to have failed: it was tampered with each time.
            if let Ok(answer) = asked.await.unwrap() {
                assert_eq!(&answer, expected, "{tampering:?}");
                right += 1;
            }
        }
        assert!(done.load(Ordering::Relaxed) >= PROMPTS, "{tampering:?}: it was done");
        let harmless = matches!(tampering, Tampering::Delay);
        assert!(
            right == if harmless { PROMPTS } else { right } && (harmless || right < PROMPTS),
            "{tampering:?}: {right} of {PROMPTS} came through"
        );
        cluster.nothing_is_held(Duration::from_secs(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_another_node_every_answer_comes() {
    let pair = tiny::pair(Kind::Projection, 71);
    let expected = reference(&pair);
    let cluster = Builder::new(&pair.dir).prefill_flags(&["--chunk-tokens", "64"]).start().await;
    let (done, _node) = node(&pair, &cluster.discovery, Tampering::FlipRow).await;
    eventually(Duration::from_secs(30), "both nodes are listed", || async { cluster.nodes(Role::Decode).len() == 2 }).await;
    for (prompt, expected) in expected.iter().enumerate() {
        let mut ask = request(&tiny::prompt(60 + 7 * prompt, prompt as u64), &SamplingParams::greedy(), NEW as u32);
        ask.ignore_eos = true;
        assert_eq!(&tokens(cluster.client().await, ask).await.unwrap(), expected);
    }
    assert!(done.load(Ordering::Relaxed) > 0, "some were tampered with");
    cluster.nothing_is_held(Duration::from_secs(10)).await;
}
