//! What a decode node does for routers and prefill nodes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use overfill_guide::Guides;
use overfill_lifecycle::{Trace, TraceHeaders};
use overfill_node::Refusals;
use overfill_proto::v1::decode_server::Decode;
use overfill_proto::v1::{
    self, DecodeEvent, DecodeRequest, KvFrame, NcclJoined, NcclSend, NodeStatus, PushSummary, Reserved, call, decode_event,
};
use overfill_proto::{convert, error};
use overfill_transport::calls::{EventReceiver, Serving, Signals};
use overfill_transport::push::nccl::Joined;
use overfill_transport::push::{Frames, Taken, Takes};
use overfill_types::{Code, Epoch, Fingerprint, NodeId, RequestId, ServedPair, ServiceError};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::codegen::http::HeaderMap;
use tonic::{Request, Response, Status, Streaming};
use tracing::field::Empty;
use tracing::{Instrument, info_span};

use crate::admission::{Admission, SequenceRequest};
use crate::commands::Commands;
use crate::metrics::Metrics;
use crate::receiver;
use crate::sequence::Sequence;

pub(crate) struct DecodeService {
    id: NodeId,
    pair: ServedPair,
    admission: Arc<Admission>,
    /// What takes rows from GPU to GPU.
    joined: Option<Joined>,
    commands: Commands,
    guides: Arc<Guides>,
    metrics: Arc<Metrics>,
    signals: Signals,
    refusals: Refusals,
}

impl DecodeService {
    /// `node` is its id and its pair.
    pub(crate) fn new(
        (id, pair): (NodeId, ServedPair),
        (admission, joined): (Arc<Admission>, Option<Joined>),
        commands: Commands,
        guides: Arc<Guides>,
        metrics: Arc<Metrics>,
        signals: Signals,
    ) -> Self {
        Self { id, pair, admission, joined, commands, guides, metrics, signals, refusals: Refusals::default() }
    }

    async fn reserve(&self, request: DecodeRequest, trace: Trace) -> Result<EventReceiver<DecodeEvent>, ServiceError> {
        if self.signals.refuse.draining() {
            return Err(ServiceError::of_node(Code::Unavailable, "this decode node is draining: try another"));
        }
        self.refusals.check(&request.prompt, request.suspicion)?;
        let asked = SequenceRequest {
            fingerprint: Fingerprint::new(request.fingerprint),
            request: RequestId::new(request.request_id),
            epoch: Epoch(request.epoch),
            arrived: arrived(request.age_us, Instant::now()),
            prompt: request.prompt,
            written: request.written,
            alone: request.alone,
            cache_salt: request.cache_salt,
            sampling: convert::sampling(request.sampling.as_ref(), 0)?,
            stop: convert::stop(request.stop)?,
        };
        if asked.alone && asked.sampling.prompt_logprobs.is_some() {
            let message = "log-probabilities of a prompt are the full model's: leave them out where the decode model reads it";
            return Err(ServiceError::new(Code::InvalidArgument, message));
        }
        let reservation = self.admission.admit(&asked)?;
        // Only where there is room: compiling takes a core, which a node that is full has not.
        let guide = match &asked.sampling.guide {
            Some(guide) => Some(self.guides.matcher(guide).await?),
            None => None,
        };
        let patience = self.admission.reservation_timeout();
        // Room for the reservation, every token and the end.
        let (events, answer) = mpsc::channel(asked.stop.max_tokens + 2);
        let reserved = Reserved {
            ticket: reservation.ticket.to_string(),
            epoch: asked.epoch.0,
            held_tokens: reservation.blocks.shared_tokens() as u32,
            expires_in_ms: u32::try_from(patience.as_millis()).unwrap_or(u32::MAX),
            nccl: self.joined.is_some(),
        };
        // The channel is empty and its reader is here: it has room.
        let _ = events.try_send(Ok(DecodeEvent { event: Some(decode_event::Event::Reserved(reserved)) }));
        self.metrics.reservations.inc();
        self.commands.admit(Sequence::new(asked, guide, reservation, events, patience, (self.metrics.clone(), trace))).await?;
        Ok(answer)
    }

    /// Takes one handoff, over whichever way it comes.
    async fn receive(
        &self,
        mut frames: impl Stream<Item = Result<KvFrame, Status>> + Unpin,
        headers: &HeaderMap,
    ) -> Result<PushSummary, ServiceError> {
        let span = info_span!("receive", otel.kind = "server", trace_id = Empty);
        let _trace = Trace::begin(span.clone(), headers);
        let receiving = receiver::receive(&self.admission, &self.commands, &self.metrics, self.joined.as_ref(), &mut frames);
        let summary = receiving.instrument(span.clone()).await;
        self.metrics.pushed(&summary);
        let _in = span.enter();
        summary.inspect_err(|error| tracing::info!(code = %error.code, %error, "push refused"))
    }
}

impl Serving for DecodeService {
    type Event = DecodeEvent;

    async fn begin(&self, what: call::What, headers: HeaderMap) -> Result<EventReceiver<DecodeEvent>, ServiceError> {
        let call::What::Decode(request) = what else {
            return Err(ServiceError::of_node(Code::Unimplemented, "this is a decode node: it takes calls to decode"));
        };
        let span = info_span!("decode", otel.kind = "server", request_id = request.request_id, epoch = request.epoch, trace_id = Empty);
        let trace = Trace::begin(span.clone(), &headers);
        self.reserve(request, trace).instrument(span).await.inspect_err(|error| self.metrics.refused(error))
    }

    fn status(&self) -> NodeStatus {
        let Self { id, pair, admission, .. } = self;
        let (pool, prefixes, held) = (admission.pool(), admission.prefixes(), admission.held());
        NodeStatus {
            node_id: id.to_string(),
            role: v1::Role::Decode.into(),
            phase: self.signals.phase().into(),
            sequences: held.sequences as u32,
            sequences_most: held.sequences_most as u32,
            running: held.running as u32,
            blocks_total: pool.total() as u64,
            blocks_held: pool.held() as u64,
            blocks_free: pool.free() as u64,
            blocks_promised: held.promised as u64,
            blocks_promised_most: held.promised_most as u64,
            block_tokens: pool.block_tokens() as u32,
            pairs: vec![convert::pair_to_wire(pair)],
            prefix_queries: prefixes.queries.load(Ordering::Relaxed),
            prefix_hits: prefixes.hits.load(Ordering::Relaxed),
            prefix_blocks: pool.named() as u64,
            prefix_blocks_most: pool.total() as u64,
            preempted: admission.preempted(),
            max_context: admission.max_context() as u32,
            unread_tokens: 0,
            unread_tokens_most: 0,
            refused_prompts: self.refusals.refused().iter().map(|prompt| Bytes::copy_from_slice(prompt)).collect(),
        }
    }
}

#[tonic::async_trait]
impl Decode for DecodeService {
    async fn push_kv(&self, request: Request<Streaming<KvFrame>>) -> Result<Response<PushSummary>, Status> {
        let (headers, _, frames) = request.into_parts();
        self.receive(frames, headers.as_ref()).await.map(Response::new).map_err(|error| error::to_peer(&error))
    }

    type JoinNcclStream = ReceiverStream<Result<NcclJoined, Status>>;

    async fn join_nccl(&self, request: Request<Streaming<NcclSend>>) -> Result<Response<Self::JoinNcclStream>, Status> {
        let unasked = || ServiceError::of_node(Code::Unimplemented, "this decode node takes no rows over NCCL: hand over by TCP");
        let joining = async { self.joined.as_ref().ok_or_else(unasked)?.join(request.into_inner()).await };
        joining.await.map(Response::new).map_err(|error| error::to_peer(&error))
    }
}

impl Takes for DecodeService {
    fn take(self: Arc<Self>, frames: Frames, trace: TraceHeaders) -> Taken {
        Box::pin(async move {
            let mut headers = HeaderMap::new();
            trace.add_to(&mut headers);
            self.receive(frames.map(Ok), &headers).await
        })
    }
}

/// When a request came that is so old, in microseconds. Clocks of two machines differ, so it is told as an age.
fn arrived(age_us: u64, now: Instant) -> Instant {
    // Older than this machine's clock reaches back is as old as can be told.
    const OLDEST: Duration = Duration::from_secs(24 * 3600);
    let age = Duration::from_micros(age_us).min(OLDEST);
    now.checked_sub(age).unwrap_or(now)
}
