//! Between processes of one machine: frames over a Unix socket, their rows as they are, with no HTTP/2 around them
//! (`local.proto`). It takes about half the time of a push by gRPC over loopback (`overfill bench handoff`).
//!
//! The socket's name is the address of the decode node's gRPC listener, in Linux's abstract namespace: it ends with its process, and
//! is seen within its network namespace alone, so that who answers to it is who that address means. A port belongs to who listens on
//! it, while such a name may be taken by anybody: each end makes sure that the other runs as the same user. Where processes know each
//! other by more than that there is no such socket.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use overfill_lifecycle::{Drain, TraceHeaders};
use overfill_proto::v1::{Alive, KvFrame, LocalAnswer, LocalFrame, PushSummary, kv_frame, local_answer};
use overfill_proto::{MAX_FRAME_PAYLOAD, error};
use overfill_types::{Code, ServiceError};
use prost::Message;
use rustix::process::geteuid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::codec::{Decoder, FramedRead};

use super::within::Takes;

/// Bytes of a message at most, without rows.
const HEAD: usize = 64 << 10;
/// How often a decode node says that it lives while it takes a push.
const ALIVE: Duration = Duration::from_secs(1);
/// After how long a node that says nothing is given up: as long as one that is probed over the network.
const SILENCE: Duration = Duration::from_secs(5);
/// Connections that a decode node has at most.
const MOST: usize = 256;
/// Connections that are kept to one node, and nodes that they are kept to.
const KEPT: (usize, usize) = (4, 256);
/// How long a connection may wait for its next push: it takes the place of another one.
const IDLE: Duration = Duration::from_secs(300);
/// How long it is waited after a connection could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// Listens for prefill nodes of this machine beside the node's listener at `address`; `None` where that cannot be, and all come by
/// gRPC.
pub fn listen(address: SocketAddr) -> Option<UnixListener> {
    let listening = UnixListener::bind(name(address));
    listening.inspect_err(|error| tracing::debug!(%address, %error, "prefill nodes of this machine come by gRPC")).ok()
}

/// Takes handoffs of prefill nodes on this machine until the end.
///
/// # Errors
/// None.
pub async fn serve(listener: UnixListener, node: Arc<dyn Takes>, end: Drain) -> io::Result<()> {
    let mut running = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(), if running.len() < MOST => accepted,
            // Those that have ended are forgotten.
            Some(_) = running.join_next() => continue,
            () = end.signaled() => return Ok(()),
        };
        match accepted {
            Ok((stream, _)) if is_ours(&stream) => {
                running.spawn(converse(stream, node.clone()));
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// Takes push after push, until one fails or the prefill node has gone.
async fn converse(stream: UnixStream, node: Arc<dyn Takes>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut incoming = FramedRead::new(read, Incoming::default());
    while let Ok(Some(first)) = timeout(IDLE, incoming.next()).await {
        let (trace, frame) = first?;
        let told = take(frame, trace, &mut incoming, &mut write, node.clone()).await?;
        let over = told.is_err();
        let what = match told {
            Ok(summary) => local_answer::What::Summary(summary),
            Err(error) => local_answer::What::Ended(error::to_ended(error)),
        };
        answer(&mut write, what).await?;
        if over {
            return Ok(());
        }
    }
    Ok(())
}

/// One push, which begins with `first`.
async fn take(
    first: KvFrame,
    trace: TraceHeaders,
    incoming: &mut (impl Stream<Item = io::Result<(TraceHeaders, KvFrame)>> + Unpin),
    write: &mut (impl AsyncWrite + Unpin),
    node: Arc<dyn Takes>,
) -> io::Result<Result<PushSummary, ServiceError>> {
    let (frames, taken) = mpsc::channel(1);
    let mut taking = node.take(Box::pin(ReceiverStream::new(taken)), trace);
    let mut passing = pin!(async move {
        let mut frame = first;
        loop {
            let last = matches!(frame.body, Some(kv_frame::Body::Commit(_)));
            // Nobody takes more once one was refused.
            if frames.send(frame).await.is_err() || last {
                return;
            }
            match incoming.next().await {
                Some(Ok((_, next))) => frame = next,
                // The push ends without its commit, as whoever takes it will say.
                Some(Err(_)) | None => return,
            }
        }
    });
    let (mut passed, mut alive) = (false, interval_at(Instant::now() + ALIVE, ALIVE));
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            summary = &mut taking => return Ok(summary),
            () = &mut passing, if !passed => passed = true,
            _ = alive.tick() => answer(write, local_answer::What::Alive(Alive {})).await?,
        }
    }
}

async fn answer(write: &mut (impl AsyncWrite + Unpin), what: local_answer::What) -> io::Result<()> {
    say(write, &LocalAnswer { what: Some(what) }, [Bytes::new(), Bytes::new()]).await
}

/// Connections to nodes of this machine that wait for their next push. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Streams(Arc<Mutex<HashMap<SocketAddr, Vec<UnixStream>>>>);

impl Streams {
    /// One to the node at `address`, if that is on this machine and listens for it.
    pub(super) async fn to(&self, address: &str) -> Option<(SocketAddr, UnixStream)> {
        // A name would have to be looked up for each push: nodes are known by what they advertise, their addresses.
        let address: SocketAddr = address.parse().ok()?;
        while let Some(stream) = self.lock().get_mut(&address).and_then(Vec::pop) {
            // Its end, or what nobody has asked: it is of no use any more.
            if stream.try_read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                return Some((address, stream));
            }
        }
        // Only an address of this machine can be bound.
        UdpSocket::bind((address.ip(), 0)).ok()?;
        for ip in [address.ip(), IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
            if let Ok(stream) = UnixStream::connect(name(SocketAddr::new(ip, address.port()))).await
                && is_ours(&stream)
            {
                return Some((address, stream));
            }
        }
        None
    }

    fn keep(&self, address: SocketAddr, stream: UnixStream) {
        let mut kept = self.lock();
        if kept.len() >= KEPT.1 && !kept.contains_key(&address) {
            kept.clear();
        }
        let streams = kept.entry(address).or_default();
        if streams.len() < KEPT.0 {
            streams.push(stream);
        }
    }

    /// Pushes `frames` over a connection of [`Streams::to`]; `peer` names its node in errors.
    ///
    /// # Errors
    /// What the node refused, or that it is gone.
    pub(super) async fn push(
        &self,
        (address, mut stream): (SocketAddr, UnixStream),
        frames: impl Stream<Item = KvFrame>,
        trace: TraceHeaders,
        peer: &str,
    ) -> Result<PushSummary, ServiceError> {
        let summary = {
            let (mut read, mut write) = stream.split();
            let mut sending = pin!(send_all(&mut write, frames, trace));
            let mut hearing = pin!(heard(&mut read, peer));
            let mut sent = false;
            loop {
                tokio::select! {
                    told = &mut hearing => break told?,
                    // Where it failed the node has gone, or is about to say why it takes no more.
                    _ = &mut sending, if !sent => sent = true,
                }
            }
        };
        self.keep(address, stream);
        Ok(summary)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Vec<UnixStream>>> {
        // A map of connections is whole whatever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends frames up to the commit; what ends before it is broken off.
async fn send_all(write: &mut (impl AsyncWrite + Unpin), frames: impl Stream<Item = KvFrame>, trace: TraceHeaders) -> io::Result<()> {
    let (mut frames, mut trace) = (pin!(frames), Some(trace));
    while let Some(frame) = frames.next().await {
        let last = matches!(frame.body, Some(kv_frame::Body::Commit(_)));
        send(write, frame, trace.take().unwrap_or_default()).await?;
        if last {
            return Ok(());
        }
    }
    write.shutdown().await
}

async fn send(write: &mut (impl AsyncWrite + Unpin), mut frame: KvFrame, trace: TraceHeaders) -> io::Result<()> {
    let rows = match &mut frame.body {
        Some(kv_frame::Body::Rows(rows)) => [std::mem::take(&mut rows.k), std::mem::take(&mut rows.v)],
        _ => [Bytes::new(), Bytes::new()],
    };
    let [k_bytes, v_bytes] = rows.each_ref().map(|rows| rows.len() as u32);
    let TraceHeaders { traceparent, tracestate } = trace;
    say(write, &LocalFrame { frame: Some(frame), k_bytes, v_bytes, traceparent, tracestate }, rows).await
}

/// A message behind its length, and rows behind it, none of them copied.
async fn say(write: &mut (impl AsyncWrite + Unpin), message: &impl Message, [k, v]: [Bytes; 2]) -> io::Result<()> {
    let length = message.encoded_len();
    let mut head = BytesMut::with_capacity(4 + length);
    head.put_u32_le(length as u32);
    message.encode(&mut head).map_err(io::Error::other)?;
    write.write_all_buf(&mut head.chain(k).chain(v)).await
}

/// What became of a push.
async fn heard(read: &mut (impl AsyncRead + Unpin), peer: &str) -> Result<PushSummary, ServiceError> {
    loop {
        let failed = |why: String| ServiceError::of_way(Code::Unavailable, format!("the connection to {peer} failed: {why}"));
        let told = match timeout(SILENCE, next_answer(read)).await {
            Ok(told) => told.map_err(|error| failed(error.to_string()))?,
            Err(_) => return Err(failed(format!("it said nothing for {} s", SILENCE.as_secs()))),
        };
        match told.what {
            Some(local_answer::What::Summary(summary)) => return Ok(summary),
            Some(local_answer::What::Ended(ended)) => error::from_ended(ended)?,
            Some(local_answer::What::Alive(_)) | None => {}
        }
    }
}

async fn next_answer(read: &mut (impl AsyncRead + Unpin)) -> io::Result<LocalAnswer> {
    let length = read.read_u32_le().await? as usize;
    if length > HEAD {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    read.read_exact(&mut message).await?;
    LocalAnswer::decode(message.as_slice()).map_err(io::Error::other)
}

/// Frames out of bytes; rows are slices of what was read.
#[derive(Default)]
struct Incoming {
    /// What the rows that come next are of.
    head: Option<LocalFrame>,
}

impl Decoder for Incoming {
    type Item = (TraceHeaders, KvFrame);
    type Error = io::Error;

    fn decode(&mut self, bytes: &mut BytesMut) -> io::Result<Option<Self::Item>> {
        let head = match self.head.take() {
            Some(head) => head,
            None => {
                let Some(length) = bytes.first_chunk().map(|length| u32::from_le_bytes(*length) as usize) else { return Ok(None) };
                if length > HEAD {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a head of {length} bytes: at most {HEAD} are taken")));
                }
                if bytes.len() < 4 + length {
                    return Ok(None);
                }
                bytes.advance(4);
                LocalFrame::decode(bytes.split_to(length)).map_err(io::Error::other)?
            }
        };
        let (k, v) = (head.k_bytes as usize, head.v_bytes as usize);
        if k.saturating_add(v) > MAX_FRAME_PAYLOAD {
            let told = format!("a frame of {k} and {v} bytes: at most {MAX_FRAME_PAYLOAD} are taken");
            return Err(io::Error::new(io::ErrorKind::InvalidData, told));
        }
        if bytes.len() < k + v {
            bytes.reserve(k + v - bytes.len());
            self.head = Some(head);
            return Ok(None);
        }
        let LocalFrame { frame, traceparent, tracestate, .. } = head;
        let mut frame = frame.unwrap_or_default();
        if let Some(kv_frame::Body::Rows(rows)) = &mut frame.body {
            (rows.k, rows.v) = (bytes.split_to(k).freeze(), bytes.split_to(v).freeze());
        }
        Ok(Some((TraceHeaders { traceparent, tracestate }, frame)))
    }
}

/// Whether the process at the other end runs as the same user.
fn is_ours(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == geteuid().as_raw())
}

fn name(address: SocketAddr) -> String {
    format!("\0overfill/{address}")
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use overfill_proto::v1::{KvCommit, KvRows};
    use overfill_types::Blame;
    use tokio_stream::iter;

    use super::super::within::{Frames, Taken};
    use super::*;

    /// Remembers what it takes; refuses rows of layer 9.
    #[derive(Default)]
    struct Node {
        taken: Mutex<Vec<(TraceHeaders, Vec<KvFrame>)>>,
    }

    impl Takes for Node {
        fn take(self: Arc<Self>, mut frames: Frames, trace: TraceHeaders) -> Taken {
            Box::pin(async move {
                let mut taken = Vec::new();
                while let Some(frame) = frames.next().await {
                    if matches!(&frame.body, Some(kv_frame::Body::Rows(rows)) if rows.layer == 9) {
                        return Err(ServiceError::of_node(Code::DataLoss, "a checksum is wrong"));
                    }
                    taken.push(frame);
                }
                let whole = matches!(taken.last(), Some(KvFrame { body: Some(kv_frame::Body::Commit(_)), .. }));
                let frames = taken.len() as u32;
                self.taken.lock().unwrap().push((trace, taken));
                whole.then_some(PushSummary { frames, bytes: 0 }).ok_or_else(|| ServiceError::of_way(Code::DataLoss, "no commit"))
            })
        }
    }

    fn rows(index: u32, layer: u32, bytes: usize) -> KvFrame {
        let rows: Vec<u8> = (0..bytes).map(|n| (n % 251) as u8 ^ index as u8).collect();
        let (k, v) = (Bytes::from(rows.clone()), Bytes::from(rows).slice(bytes / 3..));
        let body = kv_frame::Body::Rows(KvRows { layer, k, v, checksum: 7, ..KvRows::default() });
        KvFrame { ticket: "t".into(), epoch: 1, index, body: Some(body), ..KvFrame::default() }
    }

    fn commit(index: u32) -> KvFrame {
        KvFrame { index, body: Some(kv_frame::Body::Commit(KvCommit { first_token: 5, ..KvCommit::default() })), ..KvFrame::default() }
    }

    /// A node that listens, and the address that it does so for.
    async fn node() -> (Arc<Node>, String, Drain) {
        let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, node, end) = (tcp.local_addr().unwrap(), Arc::new(Node::default()), Drain::new());
        tokio::spawn(serve(listen(address).unwrap(), node.clone(), end.clone()));
        (node, address.to_string(), end)
    }

    async fn push(streams: &Streams, address: &str, frames: Vec<KvFrame>) -> Result<PushSummary, ServiceError> {
        let trace = TraceHeaders { traceparent: "00-1-2-01".into(), tracestate: String::new() };
        streams.push(streams.to(address).await.unwrap(), iter(frames), trace, "decode node d").await
    }

    #[tokio::test]
    async fn what_is_pushed_arrives_and_the_connection_is_kept() {
        let (node, address, _end) = node().await;
        let streams = Streams::default();
        let frames = vec![rows(0, 0, 0), rows(1, 1, 1), rows(2, 2, 2 << 20), rows(3, 3, 70_000), commit(4)];
        for pushes in 1..=3 {
            assert_eq!(push(&streams, &address, frames.clone()).await.unwrap().frames, 5);
            let taken = node.taken.lock().unwrap();
            let (trace, last) = taken.last().unwrap();
            assert_eq!((taken.len(), trace.traceparent.as_str(), last), (pushes, "00-1-2-01", &frames));
            assert_eq!(streams.lock().values().map(Vec::len).sum::<usize>(), 1);
        }
    }

    #[tokio::test]
    async fn what_is_refused_or_broken_off_says_so_and_its_connection_ends() {
        let (node, address, _end) = node().await;
        let streams = Streams::default();
        // More than the socket holds lies behind the row that is refused.
        let frames = (0..20).map(|n| rows(n, if n == 3 { 9 } else { 0 }, 1 << 20)).collect();
        let refused = push(&streams, &address, frames).await.unwrap_err();
        assert_eq!((refused.code, refused.blame, refused.message.as_str()), (Code::DataLoss, Blame::Node, "a checksum is wrong"));
        assert_eq!(push(&streams, &address, vec![rows(0, 0, 8)]).await.unwrap_err().message, "no commit");
        let too_long = push(&streams, &address, vec![rows(0, 0, MAX_FRAME_PAYLOAD), commit(1)]).await.unwrap_err();
        assert_eq!(too_long.code, Code::Unavailable, "{too_long}");
        assert!(streams.lock().is_empty());
        assert_eq!(push(&streams, &address, vec![commit(0)]).await.unwrap().frames, 1, "another one is taken");
        // Dropped in the middle: whoever takes it sees its end.
        let (endless, taken) = (iter([rows(0, 0, 8)]).chain(tokio_stream::pending()), node.taken.lock().unwrap().len());
        let stream = streams.to(&address).await.unwrap();
        let pushing = streams.push(stream, endless, TraceHeaders::default(), "d");
        assert!(timeout(Duration::from_millis(50), pushing).await.is_err());
        while node.taken.lock().unwrap().len() == taken {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_hangs_is_given_up() {
        let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        // Connections are made, and nobody takes them.
        let _listener = listen(address).unwrap();
        let silent = push(&Streams::default(), &address.to_string(), vec![rows(0, 0, 1 << 20), commit(1)]).await.unwrap_err();
        assert_eq!((silent.code, silent.blame), (Code::Unavailable, Blame::Way));
        assert!(silent.message.ends_with("it said nothing for 5 s"), "{silent}");
    }

    #[tokio::test]
    async fn only_nodes_of_this_machine_that_listen_are_found_and_a_kept_connection_may_have_ended() {
        let streams = Streams::default();
        let tcp = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let at = format!("127.0.0.1:{}", address.port());
        assert!(streams.to(&at).await.is_none(), "nobody listens");
        let end = Drain::new();
        let serving = tokio::spawn(serve(listen(address).unwrap(), Arc::new(Node::default()), end.clone()));
        assert!(streams.to(&at).await.is_some(), "who listens everywhere does so here");
        assert!(listen(address).is_none(), "the name is taken");
        // Addresses for documents: no machine has them.
        assert!(streams.to(&format!("192.0.2.1:{}", address.port())).await.is_none());
        assert!(streams.to(&format!("localhost:{}", address.port())).await.is_none());
        push(&streams, &at, vec![commit(0)]).await.unwrap();
        end.start();
        serving.await.unwrap().unwrap();
        assert!(streams.to(&at).await.is_none() && streams.lock().values().all(Vec::is_empty));
    }
}
