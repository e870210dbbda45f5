//! A node's side of the stream on which a router asks it (`calls.proto`): each call runs as a task of its own.

use std::sync::Arc;

use axum::http::HeaderMap;
use overfill_proto::v1::calls_server::Calls;
use overfill_proto::v1::{Accepted, Call, Ended, Reply, Said, call, said};
use overfill_proto::{check_length, status};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::task::JoinMap;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::drain::Drain;
use crate::trace::TraceHeaders;

/// Replies that wait for a slow router; then calls wait, each with what its own channel holds.
const REPLIES: usize = 256;
/// Bytes of events that go out in one reply, unless one alone has more.
const REPLY_BYTES: usize = 64 << 10;

/// What carries out a node's calls.
pub trait Answering: Send + Sync + 'static {
    /// What a call tells of.
    type Event: Into<Said> + Send + 'static;

    /// Begins a call. It ends when its receiver is dropped, and all that it holds is free then.
    ///
    /// # Errors
    /// Where the node does not take it on.
    fn begin(&self, what: call::What, headers: MetadataMap) -> impl Future<Output = Result<Events<Self::Event>, Status>> + Send;
}

/// What a call tells of, and perhaps the error that ends it.
pub type Events<E> = mpsc::Receiver<Result<E, Status>>;

/// The headers that a call would have had as a request of its own.
fn headers(call: &mut Call) -> MetadataMap {
    let [traceparent, tracestate] = [&mut call.traceparent, &mut call.tracestate].map(std::mem::take);
    let mut headers = HeaderMap::new();
    TraceHeaders { traceparent, tracestate }.add_to(&mut headers);
    MetadataMap::from_headers(headers)
}

/// The service of a node: its calls are over when `end` is given and the last has ended.
pub struct CallsService<A> {
    answering: Arc<A>,
    end: Drain,
}

impl<A: Answering> CallsService<A> {
    /// Of calls that `answering` carries out.
    pub fn new(answering: Arc<A>, end: Drain) -> Self {
        Self { answering, end }
    }
}

#[tonic::async_trait]
impl<A: Answering> Calls for CallsService<A> {
    type OpenStream = ReceiverStream<Result<Reply, Status>>;

    async fn open(&self, calls: Request<Streaming<Call>>) -> Result<Response<Self::OpenStream>, Status> {
        let (replies, stream) = mpsc::channel(REPLIES);
        // Owned by the stream: it ends when the router has gone.
        tokio::spawn(carry_out(self.answering.clone(), calls.into_inner(), replies, self.end.clone()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Takes calls until there will be no more, and sees them to their end. Calls are broken off when nobody reads replies.
async fn carry_out<A: Answering>(
    answering: Arc<A>,
    mut calls: impl Stream<Item = Result<Call, Status>> + Unpin,
    replies: mpsc::Sender<Result<Reply, Status>>,
    end: Drain,
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
                Some(Ok(call)) => running.spawn(call.id, carry_out_one(answering.clone(), call, replies.clone())),
                // The router wants no more calls, or has gone; the replies tell which.
                Some(Err(_)) | None => open = false,
            },
            ended = running.join_next(), if !running.is_empty() => if let Some((id, Err(error))) = ended && error.is_panic() {
                let ended = Ended { code: "internal".into(), message: "the node failed at this call".into(), retry_after_ms: None };
                tell(&replies, id, vec![said::What::Ended(ended).into()]).await;
            },
            () = end.signaled(), if open => open = false,
            () = replies.closed() => return,
        }
    }
}

async fn carry_out_one<A: Answering>(answering: Arc<A>, mut call: Call, replies: mpsc::Sender<Result<Reply, Status>>) {
    let (id, headers) = (call.id, headers(&mut call));
    let begun = match call.what.take() {
        Some(what) => answering.begin(what, headers).await,
        None => Err(Status::unimplemented("the call is of a kind that this node does not know: is it of another version?")),
    };
    let mut said = Vec::new();
    let ended = match begun {
        Ok(events) => {
            said.push(said::What::Accepted(Accepted {}).into());
            tell_events(events, id, &mut said, &replies).await
        }
        Err(status) => status::to_ended(&status),
    };
    said.push(said::What::Ended(ended).into());
    tell(&replies, id, said).await;
}

/// Tells what is ready together, and the rest as it comes. Leaves in `said` what the end should go with.
async fn tell_events<E: Into<Said>>(
    mut events: Events<E>,
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
                    Err(error) => return status::to_ended(&status::to_status(&error)),
                };
                if bytes + length > REPLY_BYTES && !said.is_empty() {
                    tell(replies, id, std::mem::take(said)).await;
                    bytes = 0;
                }
                bytes += length;
                said.push(event);
            }
            Some(Err(status)) => return status::to_ended(&status),
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
    struct Node(Arc<()>);

    impl Answering for Node {
        type Event = DecodeEvent;

        async fn begin(&self, what: call::What, headers: MetadataMap) -> Result<Events<DecodeEvent>, Status> {
            let call::What::Decode(request) = what else { return Err(Status::unimplemented("a decode node")) };
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
                    "fail" => drop(sender.send(Err(Status::data_loss("why"))).await),
                    _ => {}
                }
                drop(held);
            });
            Ok(events)
        }
    }

    fn decode(id: u64, request_id: &str, events: u64) -> Call {
        let request = DecodeRequest { request_id: request_id.into(), epoch: events, ..DecodeRequest::default() };
        Call { id, what: Some(call::What::Decode(request)), traceparent: "00-a-b-01".into(), tracestate: String::new() }
    }

    type Replies = mpsc::Receiver<Result<Reply, Status>>;

    fn open() -> (mpsc::Sender<Result<Call, Status>>, Replies, Arc<()>, Drain) {
        let ((calls, asked), (told, replies), held, end) = (mpsc::channel(64), mpsc::channel(2), Arc::new(()), Drain::new());
        tokio::spawn(carry_out(Arc::new(Node(held.clone())), ReceiverStream::new(asked), told, end.clone()));
        (calls, replies, held, end)
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
    async fn at_the_end_calls_are_finished_and_none_is_taken() {
        let (calls, mut replies, held, end) = open();
        calls.try_send(Ok(decode(1, "write", 9))).unwrap();
        assert!(matches!(replies.recv().await.unwrap().unwrap().said[0].what, Some(said::What::Accepted(_))));
        end.start();
        while let Some(reply) = replies.recv().await {
            assert_eq!(reply.unwrap().id, 1);
        }
        freed(&held, 1).await;
        assert!(calls.try_send(Ok(decode(2, "write", 1))).is_err());
    }
}
