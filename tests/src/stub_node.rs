//! A node of either kind that computes nothing: it takes on whatever it is asked, and answers at once. What measures a router has many.

use overfill_proto::v1::decode_server::Decode;
use overfill_proto::v1::*;
use overfill_transport::calls::{EventReceiver, Serving};
use overfill_types::ServiceError;
use tokio::sync::mpsc;
use tonic::codegen::http::HeaderMap;
use tonic::{Request, Response, Status, Streaming};

/// The node, and what it says of itself.
#[derive(Clone)]
pub struct StubNode(pub NodeStatus);

impl StubNode {
    /// One with room for everything, of the model `tiny`.
    pub fn new(id: &str, role: Role, fingerprint: &str) -> Self {
        Self(NodeStatus {
            role: role.into(),
            node_id: id.into(),
            phase: Phase::Ready.into(),
            max_context: 4096,
            block_tokens: 16,
            blocks_total: 1 << 20,
            blocks_free: 1 << 20,
            blocks_promised_most: 1 << 20,
            prefix_blocks_most: 1 << 12,
            sequences_most: 1 << 16,
            pairs: vec![ServedPair { model: "tiny".into(), fingerprint: fingerprint.into() }],
            ..Default::default()
        })
    }
}

/// Messages that are all there at once.
pub fn ready<T, E>(messages: impl IntoIterator<Item = T>) -> mpsc::Receiver<Result<T, E>> {
    let messages: Vec<T> = messages.into_iter().collect();
    let (sender, stream) = mpsc::channel(messages.len().max(1));
    for message in messages {
        assert!(sender.try_send(Ok(message)).is_ok(), "there is room for all");
    }
    stream
}

/// The token of that place in an answer.
pub fn token(index: u32) -> Token {
    Token { id: 65 + index % 26, index, logprob: None }
}

/// What a prefill node says of a prompt.
fn read() -> Vec<PrefillEvent> {
    use prefill_event::Event;
    let first = FirstToken { token: Some(token(0)), ..Default::default() };
    let events = [Event::FirstToken(first), Event::HandoffDone(HandoffDone::default())];
    events.map(|event| PrefillEvent { event: Some(event) }).into()
}

/// What a decode node says of a request.
fn written(request: DecodeRequest) -> Vec<DecodeEvent> {
    use decode_event::Event;
    let most = request.stop.map_or(1, |stop| stop.max_tokens);
    let reserved = Reserved { ticket: "ticket".into(), epoch: request.epoch, expires_in_ms: 1000, held_tokens: 0, nccl: false };
    let finished = DecodeFinished { reason: FinishReason::Length.into() };
    let tokens = (1..most).map(|i| Event::Token(token(i)));
    let events = [Event::Reserved(reserved)].into_iter().chain(tokens).chain([Event::Finished(finished)]);
    events.map(|event| DecodeEvent { event: Some(event) }).collect()
}

impl Serving for StubNode {
    type Event = Said;

    async fn begin(&self, what: call::What, _: HeaderMap) -> Result<EventReceiver<Said>, ServiceError> {
        let events = match what {
            call::What::Prefill(_) => read().into_iter().map(Said::from).collect(),
            call::What::Decode(request) => written(request).into_iter().map(Said::from).collect(),
            call::What::Cancel(_) => Vec::new(),
        };
        Ok(ready(events))
    }

    fn status(&self) -> NodeStatus {
        self.0.clone()
    }
}

#[tonic::async_trait]
impl Decode for StubNode {
    async fn push_kv(&self, _: Request<Streaming<KvFrame>>) -> Result<Response<PushSummary>, Status> {
        Ok(Response::new(PushSummary::default()))
    }

    type JoinNcclStream = tokio_stream::Empty<Result<NcclJoined, Status>>;

    async fn join_nccl(&self, _: Request<Streaming<NcclSend>>) -> Result<Response<Self::JoinNcclStream>, Status> {
        Err(Status::unimplemented("no NCCL here"))
    }
}
