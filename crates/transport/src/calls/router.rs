//! The router's half of the stream of calls (`node.proto`): one stream carries all requests to a node.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use overfill_lifecycle::TraceHeaders;
use overfill_proto::v1::node_client::NodeClient;
use overfill_proto::v1::{Call, Cancel, Reply, Said, call, said};
use overfill_proto::{MAX_MESSAGE, check_length, error};
use overfill_types::{Blame, Code, ServiceError};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

use crate::connection::Channel;

/// Calls on their way to a node that does not take them as fast; then those that begin wait.
const ASKED: usize = 256;
/// What is told of a call beside its tokens: that it was accepted, its reservation or handoff, its end.
const SPARE: usize = 8;

/// A stream to one node. Clones share it; it is closed when the last of them and of its calls has gone.
#[derive(Clone)]
pub struct Calls {
    asked: mpsc::Sender<Call>,
    open: Arc<Open>,
}

struct Open {
    ids: AtomicU64,
    /// Where replies go, by the call's id; `None` once the stream has ended.
    calls: Mutex<Option<HashMap<u64, Replies>>>,
}

/// Where replies to a call go. It has room for all that a node may say of it, so that a slow client holds up no other.
struct Replies {
    to: mpsc::Sender<Result<Vec<Said>, ServiceError>>,
    /// How much more the node may say.
    left: usize,
}

impl Replies {
    /// Whether it was passed on: not where the reader has gone, or where a node says more than it was asked, which is not believed.
    fn pass_on(&mut self, said: Vec<Said>) -> bool {
        let Some(left) = self.left.checked_sub(said.len()) else { return false };
        self.left = left;
        self.to.try_send(Ok(said)).is_ok()
    }
}

impl Calls {
    /// Over `channel`, which may still have to connect: calls that are begun before wait for it.
    pub fn open(channel: Channel) -> Self {
        let (asked, asks) = mpsc::channel(ASKED);
        let open = Arc::new(Open { ids: AtomicU64::new(1), calls: Mutex::new(Some(HashMap::new())) });
        let shared = open.clone();
        // Ends with the stream: when the node ends it or is lost, or when nobody is left to ask.
        tokio::spawn(async move {
            let Err(error) = shared.run(channel, asks).await;
            shared.over(&error);
        });
        Self { asked, open }
    }

    /// Whether the stream has ended: calls take a new one.
    pub fn are_over(&self) -> bool {
        self.open.with(|_| ()).is_none()
    }

    /// Calls that have not ended.
    pub fn under_way(&self) -> usize {
        self.open.with(|calls| calls.len()).unwrap_or(0)
    }

    /// Begins a call that writes `tokens` tokens at most. `trace` places it in one.
    pub async fn begin<E>(&self, what: call::What, tokens: usize, trace: TraceHeaders) -> CallEvents<E> {
        let left = tokens + SPARE;
        let (to, replies) = mpsc::channel(left);
        let id = self.open.ids.fetch_add(1, Ordering::Relaxed);
        let events =
            CallEvents { id, calls: self.clone(), replies, said: Vec::new().into_iter(), accepted: false, ended: false, of: PhantomData };
        let TraceHeaders { traceparent, tracestate } = trace;
        let call = Call { id, what: Some(what), traceparent, tracestate };
        if let Err(error) = check_length(&call) {
            let _ = to.try_send(Err(error));
            return events;
        }
        // Where the stream has ended the sender goes, which tells the call.
        self.open.with(|calls| calls.insert(id, Replies { to, left }));
        // Closed: the stream has ended meanwhile, of which the call is told.
        let _ = self.asked.send(call).await;
        events
    }
}

impl Open {
    /// `None` where the stream has ended.
    fn with<T>(&self, act: impl FnOnce(&mut HashMap<u64, Replies>) -> T) -> Option<T> {
        // A map of senders is whole whatever panicked beside it.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(act)
    }

    /// Passes on calls and replies until one side is gone.
    async fn run(&self, channel: Channel, asks: mpsc::Receiver<Call>) -> Result<std::convert::Infallible, ServiceError> {
        let mut client = NodeClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        // From here a connection that breaks cannot be told from a node that does.
        let broken = |status| ServiceError { blame: Blame::Node, ..error::from_status(&status, "it") };
        let mut replies = client.calls(Request::new(ReceiverStream::new(asks))).await.map_err(broken)?.into_inner();
        while let Some(Reply { id, said }) = replies.message().await.map_err(broken)? {
            let last = said.iter().any(|said| matches!(said.what, Some(said::What::Ended(_))));
            self.with(|calls| {
                // Not there: its reader has gone, and the node is told.
                let passed_on = calls.get_mut(&id).is_some_and(|replies| replies.pass_on(said));
                if last || !passed_on {
                    calls.remove(&id);
                }
            });
        }
        Err(over())
    }

    fn over(&self, error: &ServiceError) {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner).take();
        for replies in calls.into_iter().flat_map(HashMap::into_values) {
            let _ = replies.to.try_send(Err(error.clone()));
        }
    }
}

/// What a call is told that the node has ended with all others.
fn over() -> ServiceError {
    ServiceError::of_node(Code::Unavailable, "it has ended all calls")
}

/// A node that does not keep to the protocol.
fn foreign(what: &str) -> ServiceError {
    ServiceError::of_node(Code::Internal, format!("the node {what}: is it of another version?"))
}

/// What a node says of one call, as it comes. Dropping it cancels the call.
pub struct CallEvents<E> {
    id: u64,
    calls: Calls,
    replies: mpsc::Receiver<Result<Vec<Said>, ServiceError>>,
    /// What is left of the reply that came last.
    said: std::vec::IntoIter<Said>,
    /// The node has taken it on.
    accepted: bool,
    ended: bool,
    of: PhantomData<fn() -> E>,
}

impl<E: TryFrom<said::What>> CallEvents<E> {
    /// Waits until the node has taken on the call.
    ///
    /// # Errors
    /// Why it has not.
    pub async fn accepted(mut self) -> Result<Self, ServiceError> {
        match self.next().await? {
            Some(said::What::Accepted(_)) => {
                self.accepted = true;
                Ok(self)
            }
            _ => Err(foreign("began with something else than that it accepts the call")),
        }
    }

    /// The next event; `None` at the end.
    ///
    /// # Errors
    /// What ended the call.
    pub async fn message(&mut self) -> Result<Option<E>, ServiceError> {
        let Some(what) = self.next().await? else { return Ok(None) };
        E::try_from(what).map(Some).map_err(|_| foreign("answered something else than what it was asked"))
    }

    async fn next(&mut self) -> Result<Option<said::What>, ServiceError> {
        while !self.ended {
            match self.said.next() {
                Some(Said { what: Some(said::What::Ended(ended)) }) => {
                    self.ended = true;
                    error::from_ended(ended)?;
                }
                Some(Said { what: Some(what) }) => return Ok(Some(what)),
                // Of a later version.
                Some(Said { what: None }) => {}
                None => match self.replies.recv().await {
                    Some(Ok(said)) => self.said = said.into_iter(),
                    Some(Err(error)) => return Err(self.broken(error)),
                    None => return Err(self.broken(over())),
                },
            }
        }
        Ok(None)
    }

    /// The end of a call whose stream broke: of one that was taken on something is known, that it was lost at work.
    fn broken(&mut self, error: ServiceError) -> ServiceError {
        self.ended = true;
        if self.accepted { ServiceError { code: Code::NodeLost, ..error } } else { error }
    }
}

impl<E> Drop for CallEvents<E> {
    fn drop(&mut self) {
        // Not there: its end is known, if not here.
        if self.ended || self.calls.open.with(|calls| calls.remove(&self.id)).flatten().is_none() {
            return;
        }
        let cancel = Call { id: self.id, what: Some(call::What::Cancel(Cancel {})), ..Call::default() };
        if let Err(TrySendError::Full(cancel)) = self.calls.asked.try_send(cancel) {
            let asked = self.calls.asked.clone();
            // Ends with the stream, or when it moves on.
            tokio::spawn(async move { asked.send(cancel).await });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::http::HeaderMap;
    use overfill_lifecycle::Drain;
    use overfill_proto::v1::node_server::NodeServer;
    use overfill_proto::v1::{DecodeEvent, DecodeRequest, NodeStatus, Reserved, decode_event};
    use overfill_types::Retry;
    use tokio::net::TcpListener;
    use tokio::runtime::{Builder, Runtime};
    use tonic::service::Routes;

    use super::*;
    use crate::PeerSecurity;
    use crate::calls::{EventReceiver, NodeService, Serving, Signals};
    use crate::peers::Peers;
    use crate::server::serve_peers;

    /// The epoch at which a node's events are longer than a message may be.
    const LONG: u64 = 1000;

    fn long() -> DecodeEvent {
        let reserved = Reserved { ticket: "x".repeat(overfill_proto::MAX_MESSAGE), ..Reserved::default() };
        DecodeEvent { event: Some(decode_event::Event::Reserved(reserved)) }
    }

    /// Writes as many events as the epoch says, then waits or ends; holds a clone as long as the call lives.
    struct Node(Arc<()>);

    impl Serving for Node {
        type Event = DecodeEvent;

        async fn begin(&self, what: call::What, _: HeaderMap) -> Result<EventReceiver<DecodeEvent>, ServiceError> {
            let call::What::Decode(request) = what else { return Err(ServiceError::of_node(Code::Unimplemented, "a decode node")) };
            let (sender, events) = mpsc::channel(1);
            let held = self.0.clone();
            tokio::spawn(async move {
                for _ in 0..request.epoch {
                    let _ = sender.send(Ok(if request.epoch == LONG { long() } else { DecodeEvent::default() })).await;
                }
                if request.alone {
                    sender.closed().await;
                }
                drop(held);
            });
            Ok(events)
        }

        fn status(&self) -> NodeStatus {
            NodeStatus::default()
        }
    }

    /// A node with a runtime of its own, whose end is as a process's.
    struct Server {
        held: Arc<()>,
        runtime: Option<Runtime>,
    }

    impl Server {
        fn start(listener: std::net::TcpListener) -> Self {
            listener.set_nonblocking(true).unwrap();
            let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let (held, end) = (Arc::new(()), Drain::new());
            let routes = Routes::new(NodeServer::new(NodeService::new(
                Arc::new(Node(held.clone())),
                Signals { end: end.clone(), ..Signals::default() },
            )));
            runtime.spawn(async move {
                serve_peers(TcpListener::from_std(listener).unwrap(), routes.into_axum_router(), end, PeerSecurity::default()).await
            });
            Self { held, runtime: Some(runtime) }
        }

        /// Nothing runs here but `left` calls.
        async fn freed(&self, left: usize) {
            let freed = async {
                while Arc::strong_count(&self.held) > 2 + left {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), freed).await.unwrap();
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            if let Some(runtime) = self.runtime.take() {
                runtime.shutdown_background();
            }
        }
    }

    fn started() -> (Server, String) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (Server::start(listener), address)
    }

    async fn begin(calls: &Calls, events: u64, held: bool) -> CallEvents<DecodeEvent> {
        let request = DecodeRequest { epoch: events, alone: held, ..DecodeRequest::default() };
        calls.begin(call::What::Decode(request), 100, TraceHeaders::default()).await
    }

    async fn count(mut events: CallEvents<DecodeEvent>) -> Result<u64, ServiceError> {
        let mut count = 0;
        while events.message().await?.is_some() {
            count += 1;
        }
        assert!(events.message().await.unwrap().is_none(), "the end stays the end");
        Ok(count)
    }

    async fn begin_many(calls: &Calls, n: usize) -> Vec<CallEvents<DecodeEvent>> {
        let mut begun = Vec::new();
        for _ in 0..n {
            begun.push(begin(calls, 0, true).await);
        }
        begun
    }

    fn under_way(calls: &Calls) -> Option<usize> {
        calls.open.with(|calls| calls.len())
    }

    #[tokio::test]
    async fn calls_on_one_stream_do_not_wait_for_each_other() {
        let (server, address) = started();
        let calls = Peers::default().calls(&address).unwrap();
        let unread = begin(&calls, 100, true).await.accepted().await.unwrap();
        let others = (0..100).map(|n| {
            let calls = calls.clone();
            tokio::spawn(async move { count(begin(&calls, n, false).await.accepted().await.unwrap()).await.unwrap() })
        });
        for (n, other) in others.collect::<Vec<_>>().into_iter().enumerate() {
            assert_eq!(other.await.unwrap(), n as u64);
        }
        server.freed(1).await;
        drop(unread);
        server.freed(0).await;
        assert_eq!(under_way(&calls), Some(0));
    }

    #[tokio::test]
    async fn dropped_calls_hold_nothing_however_far_they_came() {
        let (server, address) = started();
        let calls = Peers::default().calls(&address).unwrap();
        for _ in 0..20 {
            drop(begin(&calls, 3, true).await);
            drop(begin(&calls, 3, true).await.accepted().await.unwrap());
            let mut events = begin(&calls, 3, true).await.accepted().await.unwrap();
            events.message().await.unwrap().unwrap();
        }
        // More at once than can be on their way.
        drop(begin_many(&calls, 2 * ASKED).await);
        server.freed(0).await;
        assert_eq!(under_way(&calls), Some(0));
    }

    #[tokio::test]
    async fn a_lost_node_fails_its_calls_and_is_asked_again_when_it_is_back() {
        let (server, address) = started();
        let peers = Peers::default();
        let calls = peers.calls(&address).unwrap();
        let mut begun = Vec::new();
        for call in begin_many(&calls, 10).await {
            begun.push(call.accepted().await.unwrap());
        }
        drop(server);
        let lost = |error: &ServiceError| assert_eq!((error.retry, error.blame), (Retry::Elsewhere, Blame::Node), "{error}");
        for call in begun {
            lost(&count(call).await.unwrap_err());
        }
        lost(&count(begin(&calls, 1, false).await).await.unwrap_err());
        // Nobody listens, and then somebody does.
        lost(&count(begin(&peers.calls(&address).unwrap(), 1, false).await).await.unwrap_err());
        let server = Server::start(std::net::TcpListener::bind(&address).unwrap());
        assert_eq!(count(begin(&peers.calls(&address).unwrap(), 7, false).await.accepted().await.unwrap()).await.unwrap(), 7);
        server.freed(0).await;
    }

    #[tokio::test]
    async fn what_is_too_long_for_a_message_fails_alone() {
        let (server, address) = started();
        let calls = Peers::default().calls(&address).unwrap();
        let other = begin(&calls, 1, true).await.accepted().await.unwrap();
        let long = "x".repeat(overfill_proto::MAX_MESSAGE);
        let asked = DecodeRequest { request_id: long, ..DecodeRequest::default() };
        let asked: CallEvents<DecodeEvent> = calls.begin(call::What::Decode(asked), 1, TraceHeaders::default()).await;
        let told = begin(&calls, LONG, false).await.accepted().await.unwrap();
        for (failed, kind) in [(asked.accepted().await.err(), "router"), (count(told).await.err(), "node")] {
            let error = failed.unwrap();
            assert_eq!((error.code, error.retry), (Code::InvalidArgument, Retry::Never), "by the {kind}");
        }
        server.freed(1).await;
        drop(other);
        server.freed(0).await;
    }

    #[tokio::test]
    async fn a_node_that_says_more_than_it_was_asked_is_not_believed() {
        let (server, address) = started();
        let calls = Peers::default().calls(&address).unwrap();
        let events = begin(&calls, 200, false).await.accepted().await.unwrap();
        server.freed(0).await;
        while under_way(&calls) != Some(0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(count(events).await.is_err());
    }
}
