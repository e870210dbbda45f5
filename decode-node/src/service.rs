//! The decode node's gRPC service.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use overfill_guide::Guides;
use overfill_lifecycle::Drain;
use overfill_lifecycle::status::watched;
use overfill_proto::v1::decode_server::Decode;
use overfill_proto::v1::{DecodeEvent, DecodeRequest, KvFrame, NodeStatus, Phase, PushSummary, Reserved, StatusRequest, decode_event};
use overfill_proto::{convert, status};
use overfill_types::{Code, Epoch, Fingerprint, NodeId, RequestId, ServiceError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::admission::{Admission, Asked};
use crate::engine::Commands;
use crate::receiver;
use crate::sequence::Sequence;

pub(crate) struct DecodeService {
    id: NodeId,
    model: String,
    admission: Arc<Admission>,
    commands: Commands,
    guides: Arc<Guides>,
    drain: Drain,
}

impl DecodeService {
    pub(crate) fn new(id: NodeId, model: String, admission: Arc<Admission>, commands: Commands, guides: Arc<Guides>, drain: Drain) -> Self {
        Self { id, model, admission, commands, guides, drain }
    }

    async fn reserve(&self, request: DecodeRequest) -> Result<mpsc::Receiver<Result<DecodeEvent, Status>>, ServiceError> {
        if self.drain.draining() {
            return Err(ServiceError::new(Code::Unavailable, "this decode node is draining: try another"));
        }
        let asked = Asked {
            fingerprint: Fingerprint::new(request.fingerprint),
            request: RequestId::new(request.request_id),
            epoch: Epoch(request.epoch),
            prompt: request.prompt,
            written: request.written,
            sampling: convert::sampling(request.sampling.as_ref(), 0)?,
            stop: convert::stop(request.stop)?,
        };
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
        self.commands.admit(Sequence::new(asked, guide, place, events, patience)).await?;
        Ok(answer)
    }
}

#[tonic::async_trait]
impl Decode for DecodeService {
    type GenerateStream = ReceiverStream<Result<DecodeEvent, Status>>;

    async fn generate(&self, request: Request<DecodeRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        match self.reserve(request.into_inner()).await {
            Ok(answer) => Ok(Response::new(ReceiverStream::new(answer))),
            Err(error) => Err(status::to_status(&error)),
        }
    }

    async fn push_kv(&self, request: Request<Streaming<KvFrame>>) -> Result<Response<PushSummary>, Status> {
        let summary = receiver::receive(&self.admission, &self.commands, &mut request.into_inner()).await;
        summary.map(Response::new).map_err(|error| {
            tracing::info!(code = %error.code, %error, "push refused");
            status::to_status(&error)
        })
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<NodeStatus>, Status> {
        Ok(Response::new(status_of(&self.id, &self.model, &self.admission, self.drain.draining())))
    }

    type WatchStatusStream = ReceiverStream<Result<NodeStatus, Status>>;

    async fn watch_status(&self, _: Request<StatusRequest>) -> Result<Response<Self::WatchStatusStream>, Status> {
        let (id, model, admission) = (self.id.clone(), self.model.clone(), self.admission.clone());
        Ok(Response::new(watched(self.drain.clone(), move |draining| status_of(&id, &model, &admission, draining))))
    }
}

fn status_of(id: &NodeId, model: &str, admission: &Admission, draining: bool) -> NodeStatus {
    let (pool, prefixes, held) = (admission.pool(), admission.prefixes(), admission.held());
    NodeStatus {
        node_id: id.to_string(),
        fingerprint: admission.fingerprint().to_string(),
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
        model: model.to_owned(),
        prefix_queries: prefixes.queries.load(Ordering::Relaxed),
        prefix_hits: prefixes.hits.load(Ordering::Relaxed),
        prefix_blocks: pool.named() as u64,
        prefix_blocks_most: pool.total() as u64,
        preempted: admission.preempted(),
        max_context: admission.max_context() as u32,
        unread_tokens: 0,
    }
}
