//! The prefill node's gRPC service.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use overfill_guide::Guides;
use overfill_kv::{BlockPool, block_hashes};
use overfill_lifecycle::Drain;
use overfill_lifecycle::status::watched;
use overfill_model::Sampler;
use overfill_proto::v1::prefill_server::Prefill;
use overfill_proto::v1::{HandoffDone, NodeStatus, Phase, PrefillEvent, PrefillRequest, StatusRequest, prefill_event};
use overfill_proto::{convert, status};
use overfill_types::{Code, Epoch, Fingerprint, KvGeometry, Limits, NodeId, ServiceError, Ticket, WireFormat};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::engine::Job;
use crate::handoff::{Target, handoff};
use crate::{Counted, Counts};

/// A prompt has at most a first token, a handoff's end, and an error.
const EVENTS: usize = 3;

/// What this node serves.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) id: NodeId,
    pub(crate) model: String,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) limits: Limits,
    pub(crate) pool: BlockPool,
    pub(crate) decode_geometry: KvGeometry,
    pub(crate) wire: WireFormat,
    pub(crate) max_queue: usize,
    /// Whether blocks of prompts are kept for others that begin alike.
    pub(crate) prefix_cache: bool,
    /// Compiles what answers have to look like.
    pub(crate) guides: Arc<Guides>,
}

pub(crate) struct PrefillService {
    served: Served,
    jobs: flume::Sender<Job>,
    counts: Arc<Counts>,
    drain: Drain,
}

impl PrefillService {
    pub(crate) fn new(served: Served, jobs: flume::Sender<Job>, counts: Arc<Counts>, drain: Drain) -> Self {
        Self { served, jobs, counts, drain }
    }

    async fn admit(&self, request: PrefillRequest) -> Result<mpsc::Receiver<Result<PrefillEvent, Status>>, ServiceError> {
        if self.drain.draining() {
            return Err(ServiceError::new(Code::Unavailable, "this prefill node is draining: try another"));
        }
        let Served { fingerprint, limits, pool, .. } = &self.served;
        let got = Fingerprint::new(request.fingerprint);
        if got != *fingerprint {
            let message = format!(
                "the router's pair is {}, this prefill node serves {}: every node needs the same pair",
                got.short(),
                fingerprint.short()
            );
            return Err(ServiceError::new(Code::Mismatch, message));
        }
        let sampling = convert::sampling(request.sampling.as_ref(), 0)?;
        let stop = convert::stop(request.stop)?;
        limits.check(&request.prompt, &stop)?;
        limits.check_bias(&sampling)?;
        let needed = request.prompt.len().div_ceil(pool.block_tokens());
        if needed > pool.total() {
            let message =
                format!("the prompt needs {needed} KV blocks, this prefill node has {} in all: give it more --kv-memory", pool.total());
            return Err(ServiceError::new(Code::ResourceExhausted, message));
        }
        let held = request.handoff.as_ref().map_or(0, |h| h.held_tokens as usize);
        if held > request.prompt.len() {
            let message = format!("{held} tokens are said to be held by the decode node, the prompt has {}", request.prompt.len());
            return Err(ServiceError::new(Code::InvalidArgument, message));
        }
        let full = || {
            let message = format!("this prefill node holds {} prompts, its most: try another node, or later", self.served.max_queue);
            ServiceError::new(Code::ResourceExhausted, message)
        };
        let counted = Arc::new(Counted::new(&self.counts));
        if self.counts.held.load(Ordering::Acquire) > self.served.max_queue {
            return Err(full());
        }
        let guide = match &sampling.guide {
            Some(guide) => Some(self.served.guides.compile_beside(guide).await?),
            None => None,
        };
        let (events, answer) = mpsc::channel(EVENTS);
        let (sender, push) = request
            .handoff
            .map(|h| {
                let (fingerprint, ticket, epoch) = (fingerprint.clone(), Ticket::new(h.ticket), Epoch(h.epoch));
                let target = Target { address: h.address, fingerprint, ticket, epoch, held_tokens: held };
                handoff(target, self.served.decode_geometry, self.served.wire)
            })
            .unzip();
        let names = self.served.prefix_cache.then(|| block_hashes(fingerprint, &request.prompt, pool.block_tokens()));
        let job = Job {
            prompt_logprobs: sampling.prompt_logprobs.map(|n| n as usize),
            sampler: Sampler::new(sampling, &request.prompt).guided(guide),
            prompt: request.prompt,
            names,
            stop,
            events: events.clone(),
            handoff: sender,
            _counted: counted.clone(),
        };
        self.jobs.try_send(job).map_err(|_| full())?;
        if let Some(push) = push {
            // Owned by the answer: it ends when the router has gone, when the engine gave up, or when all is pushed.
            tokio::spawn(async move {
                let _counted = counted;
                let ended = tokio::select! {
                    ended = push.run() => ended,
                    () = events.closed() => return,
                };
                let event = match ended {
                    Ok(Some(done)) => {
                        let HandoffDone { frames, bytes, tail_us, transfer_us } = done;
                        tracing::info!(frames, bytes, tail_us, transfer_us, "handoff complete");
                        Ok(PrefillEvent { event: Some(prefill_event::Event::HandoffDone(done)) })
                    }
                    Ok(None) => return,
                    Err(error) => {
                        tracing::info!(code = %error.code, %error, "handoff failed");
                        Err(status::to_status(&error))
                    }
                };
                // Closed: the router has gone.
                let _ = events.try_send(event);
            });
        }
        Ok(answer)
    }
}

#[tonic::async_trait]
impl Prefill for PrefillService {
    type PrefillStream = ReceiverStream<Result<PrefillEvent, Status>>;

    async fn prefill(&self, request: Request<PrefillRequest>) -> Result<Response<Self::PrefillStream>, Status> {
        match self.admit(request.into_inner()).await {
            Ok(answer) => Ok(Response::new(ReceiverStream::new(answer))),
            Err(error) => Err(status::to_status(&error)),
        }
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<NodeStatus>, Status> {
        Ok(Response::new(self.served.status(&self.counts, self.drain.draining())))
    }

    type WatchStatusStream = ReceiverStream<Result<NodeStatus, Status>>;

    async fn watch_status(&self, _: Request<StatusRequest>) -> Result<Response<Self::WatchStatusStream>, Status> {
        let (served, counts) = (self.served.clone(), self.counts.clone());
        Ok(Response::new(watched(self.drain.clone(), move |draining| served.status(&counts, draining))))
    }
}

impl Served {
    fn status(&self, counts: &Counts, draining: bool) -> NodeStatus {
        let Self { id, model, fingerprint, limits, pool, .. } = self;
        NodeStatus {
            node_id: id.to_string(),
            fingerprint: fingerprint.to_string(),
            phase: if draining { Phase::Draining } else { Phase::Ready }.into(),
            sequences: counts.held.load(Ordering::Acquire) as u32,
            sequences_most: self.max_queue as u32,
            running: counts.running.load(Ordering::Acquire) as u32,
            unread_tokens: counts.unread.load(Ordering::Acquire) as u64,
            blocks_total: pool.total() as u64,
            blocks_held: pool.held() as u64,
            blocks_free: pool.free() as u64,
            block_tokens: pool.block_tokens() as u32,
            model: model.clone(),
            prefix_queries: counts.prefix_queries.load(Ordering::Relaxed),
            prefix_hits: counts.prefix_hits.load(Ordering::Relaxed),
            prefix_blocks: pool.named() as u64,
            prefix_blocks_most: if self.prefix_cache { pool.total() as u64 } else { 0 },
            max_context: limits.max_context as u32,
            preempted: 0,
            blocks_promised: 0,
            blocks_promised_most: 0,
        }
    }
}
