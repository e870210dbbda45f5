//! The decode node's gRPC service.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use overfill_guide::Guides;
use overfill_lifecycle::calls::{Answering, Events};
use overfill_lifecycle::status::watched;
use overfill_lifecycle::{Drain, Trace};
use overfill_proto::v1::decode_server::Decode;
use overfill_proto::v1::{
    DecodeEvent, DecodeRequest, KvFrame, NodeStatus, Phase, PushSummary, Reserved, StatusRequest, call, decode_event,
};
use overfill_proto::{convert, status};
use overfill_types::{Code, Epoch, Fingerprint, NodeId, RequestId, ServedPair, ServiceError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};
use tracing::field::Empty;
use tracing::{Instrument, info_span};

use crate::admission::{Admission, Asked};
use crate::engine::Commands;
use crate::metrics::Metrics;
use crate::receiver;
use crate::sequence::Sequence;

pub(crate) struct DecodeService {
    id: NodeId,
    pair: ServedPair,
    admission: Arc<Admission>,
    commands: Commands,
    guides: Arc<Guides>,
    metrics: Arc<Metrics>,
    drain: Drain,
}

impl DecodeService {
    /// `node` is its id and its pair.
    pub(crate) fn new(
        (id, pair): (NodeId, ServedPair),
        admission: Arc<Admission>,
        commands: Commands,
        guides: Arc<Guides>,
        metrics: Arc<Metrics>,
        drain: Drain,
    ) -> Self {
        Self { id, pair, admission, commands, guides, metrics, drain }
    }

    async fn reserve(&self, request: DecodeRequest, trace: Trace) -> Result<Events<DecodeEvent>, ServiceError> {
        if self.drain.draining() {
            return Err(ServiceError::new(Code::Unavailable, "this decode node is draining: try another"));
        }
        let asked = Asked {
            fingerprint: Fingerprint::new(request.fingerprint),
            request: RequestId::new(request.request_id),
            epoch: Epoch(request.epoch),
            arrived: arrived(request.age_us, Instant::now()),
            prompt: request.prompt,
            written: request.written,
            alone: request.alone,
            sampling: convert::sampling(request.sampling.as_ref(), 0)?,
            stop: convert::stop(request.stop)?,
        };
        if asked.alone && asked.sampling.prompt_logprobs.is_some() {
            let message = "log-probabilities of a prompt are the full model's: leave them out where the decode model reads it";
            return Err(ServiceError::new(Code::InvalidArgument, message));
        }
        let guide = match &asked.sampling.guide {
            Some(guide) => Some(self.guides.compile_beside(guide).await?),
            None => None,
        };
        let place = self.admission.admit(&asked)?;
        let patience = self.admission.reservation_timeout();
        // Room for the reservation, every token and the end.
        let (events, answer) = mpsc::channel(asked.stop.max_tokens + 2);
        let reserved = Reserved {
            ticket: place.ticket.to_string(),
            epoch: asked.epoch.0,
            held_tokens: place.reservation.shared_tokens() as u32,
            expires_in_ms: u32::try_from(patience.as_millis()).unwrap_or(u32::MAX),
        };
        // The channel is empty and its reader is here: it has room.
        let _ = events.try_send(Ok(DecodeEvent { event: Some(decode_event::Event::Reserved(reserved)) }));
        self.metrics.reservations.inc();
        self.commands.admit(Sequence::new(asked, guide, place, events, patience, (self.metrics.clone(), trace))).await?;
        Ok(answer)
    }

    async fn write(&self, request: DecodeRequest, headers: &MetadataMap) -> Result<Events<DecodeEvent>, Status> {
        let span = info_span!("decode", otel.kind = "server", request_id = request.request_id, epoch = request.epoch, trace_id = Empty);
        let trace = Trace::begin(span.clone(), headers.as_ref());
        self.reserve(request, trace).instrument(span).await.map_err(|error| {
            self.metrics.refused(&error);
            status::to_status(&error)
        })
    }
}

impl Answering for DecodeService {
    type Event = DecodeEvent;

    async fn begin(&self, what: call::What, headers: MetadataMap) -> Result<Events<DecodeEvent>, Status> {
        match what {
            call::What::Decode(request) => self.write(request, &headers).await,
            _ => Err(status::to_status(&ServiceError::new(Code::Unimplemented, "this is a decode node: it takes calls to decode"))),
        }
    }
}

#[tonic::async_trait]
impl Decode for DecodeService {
    type GenerateStream = ReceiverStream<Result<DecodeEvent, Status>>;

    async fn generate(&self, request: Request<DecodeRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let (headers, _, request) = request.into_parts();
        Ok(Response::new(ReceiverStream::new(self.write(request, &headers).await?)))
    }

    async fn push_kv(&self, request: Request<Streaming<KvFrame>>) -> Result<Response<PushSummary>, Status> {
        let (headers, _, mut frames) = request.into_parts();
        let span = info_span!("receive", otel.kind = "server", trace_id = Empty);
        let _trace = Trace::begin(span.clone(), headers.as_ref());
        let receiving = receiver::receive(&self.admission, &self.commands, &self.metrics, &mut frames);
        let summary = receiving.instrument(span.clone()).await;
        self.metrics.pushed(&summary);
        let _in = span.enter();
        summary.map(Response::new).map_err(|error| {
            tracing::info!(code = %error.code, %error, "push refused");
            status::to_status(&error)
        })
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<NodeStatus>, Status> {
        Ok(Response::new(status_of(&self.id, &self.pair, &self.admission, self.drain.draining())))
    }

    type WatchStatusStream = ReceiverStream<Result<NodeStatus, Status>>;

    async fn watch_status(&self, _: Request<StatusRequest>) -> Result<Response<Self::WatchStatusStream>, Status> {
        let (id, pair, admission) = (self.id.clone(), self.pair.clone(), self.admission.clone());
        Ok(Response::new(watched(self.drain.clone(), move |draining| status_of(&id, &pair, &admission, draining))))
    }
}

/// When a request came that is so old, in microseconds. Clocks of two machines differ, so it is told as an age.
fn arrived(age_us: u64, now: Instant) -> Instant {
    // Older than this machine's clock reaches back is as old as can be told.
    const OLDEST: Duration = Duration::from_secs(24 * 3600);
    let age = Duration::from_micros(age_us).min(OLDEST);
    now.checked_sub(age).unwrap_or(now)
}

fn status_of(id: &NodeId, pair: &ServedPair, admission: &Admission, draining: bool) -> NodeStatus {
    let (pool, prefixes, held) = (admission.pool(), admission.prefixes(), admission.held());
    NodeStatus {
        node_id: id.to_string(),
        phase: if draining { Phase::Draining } else { Phase::Ready }.into(),
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
    }
}
