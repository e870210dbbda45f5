//! Whatever nodes say, in whatever order, an answer is right or ends with an error that says why: stub nodes say it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use overfill_lifecycle::Drain;
use overfill_proto::v1::decode_server::{Decode, DecodeServer};
use overfill_proto::v1::node_server::NodeServer;
use overfill_proto::v1::{
    DecodeEvent, DecodeFinished, DecodeRequest, FinishReason, FirstToken, HandoffDone, KvFrame, NcclJoined, NcclSend, NodeStatus, Phase,
    PrefillEvent, PushSummary, Reserved, Said, Token, call, decode_event, prefill_event,
};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::processes::eventually;
use overfill_tests::tiny::{self, Kind};
use overfill_transport::calls::{EventReceiver, NodeService, Serving, Signals};
use overfill_types::{Blame, Code, Fingerprint, NodeId, NodeInfo, Role, SamplingParams, ServedPair, ServiceError};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::codegen::http::HeaderMap;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

/// What a stub says to its `n`th call, from 0; between two of them some time passes.
type Script = fn(n: usize, asked: &call::What) -> Vec<Result<Said, ServiceError>>;

#[derive(Clone)]
struct Stub {
    script: Script,
    calls: Arc<AtomicUsize>,
}

impl Serving for Stub {
    type Event = Said;

    async fn begin(&self, what: call::What, _: HeaderMap) -> Result<EventReceiver<Said>, ServiceError> {
        let said = (self.script)(self.calls.fetch_add(1, Ordering::SeqCst), &what);
        let (events, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            for said in said {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let _ = events.send(said).await;
            }
        });
        Ok(receiver)
    }

    fn status(&self) -> NodeStatus {
        NodeStatus { phase: Phase::Ready.into(), sequences_most: 64, block_tokens: 16, blocks_total: 1 << 16, ..NodeStatus::default() }
    }
}

#[tonic::async_trait]
impl Decode for Stub {
    async fn push_kv(&self, _: Request<Streaming<KvFrame>>) -> Result<Response<PushSummary>, Status> {
        Ok(Response::new(PushSummary::default()))
    }

    type JoinNcclStream = tokio_stream::Empty<Result<NcclJoined, Status>>;

    async fn join_nccl(&self, _: Request<Streaming<NcclSend>>) -> Result<Response<Self::JoinNcclStream>, Status> {
        Err(Status::unimplemented("no NCCL here"))
    }
}

/// A router whose nodes are a prefill and a decode stub.
struct Stubs {
    cluster: Cluster,
    calls: [Arc<AtomicUsize>; 2],
    _servers: Vec<AbortOnDropHandle<()>>,
    _registered: Vec<overfill_cluster::Registration>,
}

async fn stubs(prefill: Script, decode: Script) -> Stubs {
    let pair = tiny::pair(Kind::Identity, 5);
    let fingerprint = pair.open().manifest.fingerprint.clone();
    let cluster = Builder::new(&pair.dir).nodes(0, 0).router_flags(&["--request-timeout", "10"]).start().await;
    let (mut servers, mut registered) = (Vec::new(), Vec::new());
    let mut start = async |role, script| {
        let stub = Stub { script, calls: Arc::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string().parse().unwrap();
        let routes = Routes::new(NodeServer::new(NodeService::new(Arc::new(stub.clone()), Signals::default())))
            .add_service(DecodeServer::new(stub.clone()));
        let server = overfill_transport::server::serve_peers(
            listener,
            routes.into_axum_router(),
            Drain::new(),
            cluster.discovery.security().clone(),
        );
        servers.push(AbortOnDropHandle::new(tokio::spawn(async move { server.await.unwrap() })));
        let pairs = vec![ServedPair { model: "tiny".into(), fingerprint: Fingerprint::new(fingerprint.as_str()) }];
        let node = NodeInfo { id: NodeId::new(format!("{role}-stub")), role, address, pairs, max_context: 4096 };
        registered.push(cluster.discovery.register(node));
        stub.calls
    };
    let calls = [start(Role::Prefill, prefill).await, start(Role::Decode, decode).await];
    let mut view = cluster.discovery.watch();
    tokio::time::timeout(Duration::from_secs(5), view.wait_for(|view| view.nodes.len() == 2)).await.unwrap().unwrap();
    Stubs { cluster, calls, _servers: servers, _registered: registered }
}

impl Stubs {
    async fn answer(&self, new: u32) -> Result<Vec<u32>, Status> {
        let mut asked = request(&[1, 2, 3], &SamplingParams::greedy(), new);
        asked.ignore_eos = true;
        tokens(self.cluster.client().await, asked).await
    }

    /// Calls to the prefill and to the decode stub.
    fn calls(&self) -> [usize; 2] {
        [0, 1].map(|i| self.calls[i].load(Ordering::SeqCst))
    }
}

fn token(index: u32) -> Token {
    Token { id: 65 + index, index, logprob: None }
}

fn prefill(event: prefill_event::Event) -> Result<Said, ServiceError> {
    Ok(PrefillEvent { event: Some(event) }.into())
}

fn decode(event: decode_event::Event) -> Result<Said, ServiceError> {
    Ok(DecodeEvent { event: Some(event) }.into())
}

fn first() -> Result<Said, ServiceError> {
    prefill(prefill_event::Event::FirstToken(FirstToken { token: Some(token(0)), ..FirstToken::default() }))
}

fn done() -> Result<Said, ServiceError> {
    prefill(prefill_event::Event::HandoffDone(HandoffDone::default()))
}

fn reserved(asked: &call::What) -> Result<Said, ServiceError> {
    let call::What::Decode(DecodeRequest { epoch, .. }) = asked else { panic!("a decode stub") };
    decode(decode_event::Event::Reserved(Reserved { ticket: "t".into(), epoch: *epoch, expires_in_ms: 1000, held_tokens: 0, nccl: false }))
}

fn finished() -> Result<Said, ServiceError> {
    decode(decode_event::Event::Finished(DecodeFinished { reason: FinishReason::Length.into() }))
}

/// What means nothing in the middle of an answer: time passes, so that the other node has said what it has to say before.
fn later(asked: &call::What) -> impl Iterator<Item = Result<Said, ServiceError>> {
    std::iter::repeat_with(|| reserved(asked)).take(5)
}

/// As it should be: of the tokens that are asked for, those that were not written yet.
fn written(_: usize, asked: &call::What) -> Vec<Result<Said, ServiceError>> {
    let call::What::Decode(DecodeRequest { written, stop: Some(stop), .. }) = asked else { panic!("a decode stub") };
    let tokens = (written.len().max(1) as u32..stop.max_tokens).map(|i| decode(decode_event::Event::Token(token(i))));
    [reserved(asked)].into_iter().chain(tokens).chain([finished()]).collect()
}

fn ids(new: u32) -> Vec<u32> {
    (0..new).map(|i| 65 + i).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handoff_that_is_done_before_the_first_token_came() {
    // Both say all that they ever will, and nobody says the first token: nothing is left to wait for.
    let stubs = stubs(|_, _| vec![done()], |_, asked| vec![reserved(asked), finished()]).await;
    let error = stubs.answer(5).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Unavailable, "{error}");
    assert!(error.message().contains("broke off"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_decode_model_proves_the_handoff() {
    // The first decode call ends after two tokens. In the second attempt the prefill node fails before it says a first token,
    // which is known, while the decode model writes on.
    let stubs = stubs(
        |n, _| match n {
            0 => vec![first(), done()],
            _ => {
                let others = std::iter::repeat_with(|| prefill(prefill_event::Event::Token(token(99)))).take(6);
                others.chain([Err(ServiceError::of_node(Code::EngineLost, "it hangs"))]).collect()
            }
        },
        |n, asked| match n {
            0 => {
                let lost = Err(ServiceError::of_node(Code::EngineLost, "it hangs"));
                written(n, asked).into_iter().take(3).chain(later(asked)).chain([lost]).collect()
            }
            _ => written(n, asked),
        },
    )
    .await;
    assert_eq!(stubs.answer(9).await.unwrap(), ids(9));
    assert_eq!(stubs.calls(), [2, 2], "the attempt that went on was not given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handoff_is_told_of_also_where_the_whole_answer_came_before_its_first_token() {
    let stubs = stubs(
        |_, _| {
            let others = std::iter::repeat_with(|| prefill(prefill_event::Event::Token(token(99)))).take(8);
            others.chain([first(), done()]).collect()
        },
        written,
    )
    .await;
    assert_eq!(stubs.answer(4).await.unwrap(), ids(4));
    eventually(Duration::from_secs(5), "the handoff is told of", || async {
        let told = reqwest::get(format!("{}/cluster", stubs.cluster.http)).await.unwrap();
        told.json::<serde_json::Value>().await.unwrap()["handoffs"].as_array().unwrap().len() == 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_attempt_may_mend_is_tried_again_and_nothing_else() {
    // A frame that was changed on the way, a reservation that ran out, an engine that died: whatever its code.
    let stubs = stubs(
        |_, _| vec![first(), done()],
        |n, asked| match n {
            0 => vec![reserved(asked), Err(ServiceError::of_way(Code::DataLoss, "a frame's checksum"))],
            1 => vec![reserved(asked), Err(ServiceError::of_way(Code::Unavailable, "no KV cache came"))],
            _ => written(n, asked),
        },
    )
    .await;
    assert_eq!(stubs.answer(4).await.unwrap(), ids(4));
    assert_eq!(stubs.calls()[1], 3);

    let stubs = self::stubs(
        |_, _| vec![first(), done()],
        |_, asked| {
            vec![reserved(asked), Err(ServiceError { blame: Blame::Request, ..ServiceError::new(Code::InvalidArgument, "the guide") })]
        },
    )
    .await;
    assert_eq!(stubs.answer(4).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    assert_eq!(stubs.calls()[1], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_ends_each_node_after_a_token_does_not_meet_them_for_ever() {
    let stubs = stubs(
        |_, _| vec![first(), done()],
        |n, asked| {
            let lost = Err(ServiceError::of_node(Code::Unavailable, "gone"));
            written(n, asked).into_iter().take(2).chain([lost]).collect()
        },
    )
    .await;
    let error = stubs.answer(100).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Unavailable, "{error}");
    assert_eq!(stubs.calls()[1], 8, "attempts of one request are bounded, tokens or not");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_under_which_engines_died_is_refused_by_all() {
    let stubs = stubs(
        |_, _| vec![first(), done()],
        |_, asked| {
            let call::What::Decode(DecodeRequest { suspicion, .. }) = asked else { panic!("a decode stub") };
            match suspicion {
                // As a node does that is told of two deaths.
                6.. => vec![Err(ServiceError::new(Code::Quarantined, "engines died"))],
                _ => [reserved(asked)]
                    .into_iter()
                    .chain(later(asked))
                    .chain([Err(ServiceError::of_node(Code::EngineLost, "it died"))])
                    .collect(),
            }
        },
    )
    .await;
    let error = stubs.answer(10).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
    assert_eq!(stubs.calls()[1], 3, "two engines, and a node that refuses it and tells of it");
    let again = stubs.answer(10).await.unwrap_err();
    assert!(again.code() == tonic::Code::InvalidArgument && again.message().contains("refused"), "{again}");
    assert_eq!(stubs.calls()[1], 3, "no node is asked any more");
    let scrape = overfill_tests::scrape::Scrape::of(&stubs.cluster.metrics[0]).await;
    assert_eq!(scrape.sum("overfill_quarantined_prompts", &[]), 1.0);
    assert_eq!(scrape.sum("overfill_quarantined_requests_total", &[]), 2.0);
}
