//! A node's half of the stream of calls (`node.proto`): each call runs as a task of its own. And its status, with it.

use std::sync::Arc;

use axum::http::HeaderMap;
use overfill_lifecycle::{Drain, TraceHeaders};
use overfill_proto::v1::node_server::Node;
use overfill_proto::v1::{Accepted, Call, Ended, NodeStatus, Phase, Reply, Said, StatusRequest, call, said};
use overfill_proto::{check_length, error};
use overfill_types::{Code, ServiceError};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::task::JoinMap;
use tonic::{Request, Response, Status, Streaming};

use crate::fault::Fault;
use crate::node_status::watched;

/// Replies that wait for a slow router; then calls wait, each with what its own channel holds.
const REPLIES: usize = 256;
/// Bytes of events that go out in one reply, unless one alone has more.
const REPLY_BYTES: usize = 64 << 10;

/// What a node does for a router.
pub trait Serving: Send + Sync + 'static {
    /// What a call tells of.
    type Event: Into<Said> + Send + 'static;

    /// Begins a call, whose trace `headers` name. It ends when its receiver is dropped, and all that it holds is free then.
    ///
    /// # Errors
    /// Where the node does not take it on.
    fn begin(&self, what: call::What, headers: HeaderMap) -> impl Future<Output = Result<EventReceiver<Self::Event>, ServiceError>> + Send;

    /// What the node holds now.
    fn status(&self) -> NodeStatus;
}

/// What a call tells of, and perhaps the error that ends it.
pub type EventReceiver<E> = mpsc::Receiver<Result<E, ServiceError>>;

/// Where a call's events are told.
pub type EventSender<E> = mpsc::Sender<Result<E, ServiceError>>;

/// The headers that a call would have had as a request of its own.
fn headers(call: &mut Call) -> HeaderMap {
    let [traceparent, tracestate] = [&mut call.traceparent, &mut call.tracestate].map(std::mem::take);
    let mut headers = HeaderMap::new();
    TraceHeaders { traceparent, tracestate }.add_to(&mut headers);
    headers
}

/// The service of a node.
pub struct NodeService<S> {
    serving: Arc<S>,
    signals: Signals,
}

/// What a node's service goes by.
#[derive(Clone, Default)]
pub struct Signals {
    /// The node is to be sent nothing new, and says so: the streams of its status end with it.
    pub drain: Drain,
    /// What is new is refused.
    pub refuse: Drain,
    /// The node can go on no more: every call ends with it.
    pub fault: Fault,
    /// Calls are over when it is given and the last has ended.
    pub end: Drain,
}

impl Signals {
    /// Where the node stands in its life.
    pub fn phase(&self) -> Phase {
        match () {
            () if self.fault.told().is_some() => Phase::Failed,
            () if self.drain.draining() => Phase::Draining,
            () => Phase::Ready,
        }
    }
}

impl<S: Serving> NodeService<S> {
    /// Of calls that `serving` carries out.
    pub fn new(serving: Arc<S>, signals: Signals) -> Self {
        Self { serving, signals }
    }
}

#[tonic::async_trait]
impl<S: Serving> Node for NodeService<S> {
    type CallsStream = ReceiverStream<Result<Reply, Status>>;

    async fn calls(&self, calls: Request<Streaming<Call>>) -> Result<Response<Self::CallsStream>, Status> {
        if let Some(error) = self.signals.fault.told() {
            return Err(error::to_peer(&error));
        }
        let (replies, stream) = mpsc::channel(REPLIES);
        // Owned by the stream: it ends when the router has gone.
        tokio::spawn(carry_out(self.serving.clone(), calls.into_inner(), replies, self.signals.clone()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<NodeStatus>, Status> {
        Ok(Response::new(self.serving.status()))
    }

    type WatchStatusStream = ReceiverStream<Result<NodeStatus, Status>>;

    async fn watch_status(&self, _: Request<StatusRequest>) -> Result<Response<Self::WatchStatusStream>, Status> {
        let serving = self.serving.clone();
        Ok(Response::new(watched(self.signals.drain.clone(), move || serving.status())))
    }
}

/// Takes calls until there will be no more, and sees them to their end. Calls are broken off when nobody reads replies.
async fn carry_out<S: Serving>(
    serving: Arc<S>,
    mut calls: impl Stream<Item = Result<Call, Status>> + Unpin,
    replies: mpsc::Sender<Result<Reply, Status>>,
    Signals { fault, end, .. }: Signals,
) {
    // Dropping it aborts what runs.
    let mut running: JoinMap<u64, ()> = JoinMap::new();
    let mut open = true;
    while open || !running.is_empty() {
        tokio::select! {
            call = calls.next(), if open => match call {
                Some(Ok(Call { id, what: Some(call::What::Cancel(_)), .. })) => {
                    running.abort(&id);
                }
                Some(Ok(call)) => running.spawn(call.id, carry_out_one(serving.clone(), call, replies.clone())),
                // The router wants no more calls, or has gone; the replies tell which.
                Some(Err(_)) | None => open = false,
            },
            ended = running.join_next(), if !running.is_empty() => if let Some((id, Err(error))) = ended && error.is_panic() {
                let failed = ServiceError::of_node(Code::Internal, "the node failed at this call; send the request again");
                tell(&replies, id, vec![said::What::Ended(error::to_ended(failed)).into()]).await;
            },
            () = end.signaled(), if open => open = false,
            error = fault.happened() => {
                let calls: Vec<u64> = running.keys().copied().collect();
                drop(running);
                for id in calls {
                    tell(&replies, id, vec![said::What::Ended(error::to_ended(error.clone())).into()]).await;
                }
                return;
            }
            () = replies.closed() => return,
        }
    }
}

async fn carry_out_one<S: Serving>(serving: Arc<S>, mut call: Call, replies: mpsc::Sender<Result<Reply, Status>>) {
    let (id, headers) = (call.id, headers(&mut call));
    let begun = match call.what.take() {
        Some(what) => serving.begin(what, headers).await,
        None => {
            let message = "the call is of a kind that this node does not know: is it of another version?";
            Err(ServiceError::of_node(Code::Unimplemented, message))
        }
    };
    let mut said = Vec::new();
    let ended = match begun {
        Ok(events) => {
            said.push(said::What::Accepted(Accepted {}).into());
            tell_events(events, id, &mut said, &replies).await
        }
        Err(error) => error::to_ended(error),
    };
    said.push(said::What::Ended(ended).into());
    tell(&replies, id, said).await;
}

/// Tells what is ready together, and the rest as it comes. Leaves in `said` what the end should go with.
async fn tell_events<E: Into<Said>>(
    mut events: EventReceiver<E>,
    id: u64,
    said: &mut Vec<Said>,
    replies: &mpsc::Sender<Result<Reply, Status>>,
) -> Ended {
    let mut bytes = 0;
    loop {
        let event = match events.try_recv() {
            Ok(event) => Some(event),
            Err(TryRecvError::Disconnected) => None,
            Err(TryRecvError::Empty) => {
                if !said.is_empty() {
                    tell(replies, id, std::mem::take(said)).await;
                    bytes = 0;
                }
                events.recv().await
            }
        };
        match event {
            Some(Ok(event)) => {
                let event = event.into();
                let length = match check_length(&event) {
                    Ok(length) => length,
                    Err(error) => return error::to_ended(error),
                };
                if bytes + length > REPLY_BYTES && !said.is_empty() {
                    tell(replies, id, std::mem::take(said)).await;
                    bytes = 0;
                }
                bytes += length;
                said.push(event);
            }
            Some(Err(error)) => return error::to_ended(error),
            None => return Ended::default(),
        }
    }
}

async fn tell(replies: &mpsc::Sender<Result<Reply, Status>>, id: u64, said: Vec<Said>) {
    // Closed: the router has gone, which ends the task around.
    let _ = replies.send(Ok(Reply { id, said })).await;
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use overfill_proto::v1::{Cancel, DecodeEvent, DecodeRequest, PrefillRequest};

    use super::*;

    /// Holds a call of the decode model until it is dropped, writes its request's id as many times as its epoch says, then waits or ends.
    struct Held(Arc<()>);

    impl Serving for Held {
        type Event = DecodeEvent;

        async fn begin(&self, what: call::What, headers: HeaderMap) -> Result<EventReceiver<DecodeEvent>, ServiceError> {
            let call::What::Decode(request) = what else { return Err(ServiceError::of_node(Code::Unimplemented, "a decode node")) };
            assert_eq!((headers.len(), headers.get("traceparent").unwrap().as_bytes()), (1, &b"00-a-b-01"[..]));
            assert_ne!(request.request_id, "panic");
            let (sender, events) = mpsc::channel(4);
            let held = self.0.clone();
            tokio::spawn(async move {
                for _ in 0..request.epoch {
                    let _ = sender.send(Ok(DecodeEvent::default())).await;
                }
                match request.request_id.as_str() {
                    "hold" => sender.closed().await,
                    "fail" => drop(sender.send(Err(ServiceError::of_way(Code::DataLoss, "why"))).await),
                    _ => {}
                }
                drop(held);
            });
            Ok(events)
        }

        fn status(&self) -> NodeStatus {
            NodeStatus::default()
        }
    }

    fn decode(id: u64, request_id: &str, events: u64) -> Call {
        let request = DecodeRequest { request_id: request_id.into(), epoch: events, ..DecodeRequest::default() };
        Call { id, what: Some(call::What::Decode(request)), traceparent: "00-a-b-01".into(), tracestate: String::new() }
    }

    type Replies = mpsc::Receiver<Result<Reply, Status>>;

    fn open() -> (mpsc::Sender<Result<Call, Status>>, Replies, Arc<()>, Signals) {
        let ((calls, asked), (told, replies), held, signals) = (mpsc::channel(64), mpsc::channel(2), Arc::new(()), Signals::default());
        tokio::spawn(carry_out(Arc::new(Held(held.clone())), ReceiverStream::new(asked), told, signals.clone()));
        (calls, replies, held, signals)
    }

    /// All that is told of a call up to its end: how many events, and the end.
    async fn answer(replies: &mut Replies, id: u64) -> (usize, Ended) {
        let mut told = Vec::new();
        loop {
            let reply = replies.recv().await.unwrap().unwrap();
            assert_eq!(reply.id, id);
            for said in reply.said {
                match said.what.unwrap() {
                    said::What::Ended(ended) => return (told.len().saturating_sub(1), ended),
                    what => told.push(what),
                }
                assert!(matches!(told[0], said::What::Accepted(_)));
            }
        }
    }

    async fn freed(held: &Arc<()>, left: usize) {
        let freed = async {
            while Arc::strong_count(held) > left {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), freed).await.unwrap();
    }

    #[tokio::test]
    async fn each_call_is_told_to_its_end() {
        let (calls, mut replies, held, _end) = open();
        for (id, what, events, code) in
            [(1, "write", 7, ""), (2, "fail", 0, "data_loss"), (3, "fail", 3, "data_loss"), (4, "panic", 1, "internal")]
        {
            calls.try_send(Ok(decode(id, what, events))).unwrap();
            let (told, ended) = answer(&mut replies, id).await;
            assert_eq!((told as u64, ended.code.as_str()), (if what == "panic" { 0 } else { events }, code));
        }
        for what in [None, Some(call::What::Prefill(PrefillRequest::default()))] {
            calls.try_send(Ok(Call { id: 9, what, ..Call::default() })).unwrap();
            assert_eq!(answer(&mut replies, 9).await.1.code, "unimplemented");
        }
        freed(&held, 2).await;
    }

    #[tokio::test]
    async fn a_cancelled_call_gives_back_what_it_held_and_others_go_on() {
        let (calls, mut replies, held, _end) = open();
        for id in 0..50 {
            calls.try_send(Ok(decode(id, "hold", 0))).unwrap();
            assert!(matches!(replies.recv().await.unwrap().unwrap().said[0].what, Some(said::What::Accepted(_))));
        }
        assert_eq!(Arc::strong_count(&held), 52);
        for id in 1..50 {
            calls.try_send(Ok(Call { id, what: Some(call::What::Cancel(Cancel {})), ..Call::default() })).unwrap();
        }
        freed(&held, 3).await;
        calls.try_send(Ok(decode(100, "write", 1))).unwrap();
        assert_eq!(answer(&mut replies, 100).await, (1, Ended::default()));
        assert_eq!(Arc::strong_count(&held), 3, "the first still runs");
    }

    #[tokio::test]
    async fn when_the_router_has_gone_nothing_is_held() {
        let (calls, replies, held, _end) = open();
        for id in 0..20 {
            calls.try_send(Ok(decode(id, "hold", 3))).unwrap();
        }
        drop(replies);
        freed(&held, 1).await;
    }

    #[tokio::test]
    async fn a_node_that_fails_tells_all_its_calls_and_takes_no_more() {
        let (calls, mut replies, held, signals) = open();
        for id in 0..20 {
            calls.try_send(Ok(decode(id, "hold", 0))).unwrap();
            assert!(matches!(replies.recv().await.unwrap().unwrap().said[0].what, Some(said::What::Accepted(_))));
        }
        let lost = ServiceError::of_node(Code::EngineLost, "the engine hangs");
        signals.fault.tell(lost.clone());
        let mut told = Vec::new();
        while let Some(reply) = replies.recv().await {
            let Reply { id, said } = reply.unwrap();
            assert!(matches!(&said[0].what, Some(said::What::Ended(ended)) if *ended == error::to_ended(lost.clone())));
            told.push(id);
        }
        told.sort_unstable();
        assert_eq!(told, (0..20).collect::<Vec<_>>());
        freed(&held, 1).await;
    }

    #[tokio::test]
    async fn at_the_end_calls_are_finished_and_none_is_taken() {
        let (calls, mut replies, held, signals) = open();
        calls.try_send(Ok(decode(1, "write", 9))).unwrap();
        assert!(matches!(replies.recv().await.unwrap().unwrap().said[0].what, Some(said::What::Accepted(_))));
        signals.end.start();
        while let Some(reply) = replies.recv().await {
            assert_eq!(reply.unwrap().id, 1);
        }
        freed(&held, 1).await;
        assert!(calls.try_send(Ok(decode(2, "write", 1))).is_err());
    }
}
