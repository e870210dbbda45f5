//! What a prefill node does for routers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use overfill_guide::Guides;
use overfill_kv::BlockPool;
use overfill_lifecycle::Trace;
use overfill_model::Sampler;
use overfill_node::Refusals;
use overfill_proto::convert;
use overfill_proto::v1::{self, Handoff, HandoffDone, NodeStatus, Phase, PrefillEvent, PrefillRequest, call, prefill_event};
use overfill_transport::calls::{EventReceiver, Serving, Signals};
use overfill_types::{Code, Epoch, Fingerprint, Limits, NodeId, ServiceError, Ticket};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::codegen::http::HeaderMap;
use tracing::{Instrument, debug_span, info_span};

use crate::decode_nodes::DecodeNodes;
use crate::engine::Job;
use crate::handoff::{HandoffTarget, handoff};
use crate::metrics::{HandoffEnd, Metrics};
use crate::pairs::{Offer, Offers};
use crate::way::{RowsWay, WhyTcp};
use crate::{Counted, Counts};

/// A prompt has at most a first token, a handoff's or an answer's end, and an error.
const EVENTS: usize = 3;

/// What this node serves.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) id: NodeId,
    pub(crate) offers: Offers,
    pub(crate) limits: Limits,
    pub(crate) pool: BlockPool,
    pub(crate) max_queue: usize,
    /// Whether blocks of prompts are kept for others that begin alike.
    pub(crate) prefix_cache: bool,
    /// Compiles what answers have to look like.
    pub(crate) guides: Arc<Guides>,
    /// What prompts are handed over to.
    pub(crate) decode_nodes: DecodeNodes,
    /// Of so many frames that go from GPU to GPU one has a checksum of its rows; 0: none has.
    pub(crate) nccl_checksums: u32,
}

pub(crate) struct PrefillService {
    served: Served,
    jobs: flume::Sender<Job>,
    counts: Arc<Counts>,
    metrics: Arc<Metrics>,
    signals: Signals,
    refusals: Refusals,
}

impl PrefillService {
    pub(crate) fn new(served: Served, jobs: flume::Sender<Job>, counts: Arc<Counts>, metrics: Arc<Metrics>, signals: Signals) -> Self {
        Self { served, jobs, counts, metrics, signals, refusals: Refusals::default() }
    }

    async fn admit(&self, request: PrefillRequest, trace: Trace) -> Result<EventReceiver<PrefillEvent>, ServiceError> {
        let arrived = Instant::now();
        if self.signals.refuse.draining() {
            return Err(ServiceError::of_node(Code::Unavailable, "this prefill node is draining: try another"));
        }
        self.refusals.check(&request.prompt, request.suspicion)?;
        let Served { offers, limits, pool, .. } = &self.served;
        let (pair, offer) = offers.find(&Fingerprint::new(request.fingerprint))?;
        let sampling = convert::sampling(request.sampling.as_ref(), 0)?;
        let stop = convert::stop(request.stop)?;
        limits.check(&request.prompt, &stop)?;
        limits.check_sampling(&sampling)?;
        let (prompt_tokens, alone) = (request.prompt.len(), request.alone);
        limits.check_written(&request.written, &stop)?;
        if alone && request.handoff.is_some() || !alone && !request.written.is_empty() {
            let message =
                "a prompt is read for a handoff, or the answer is written here (`alone`), perhaps after what was `written`: not both";
            return Err(ServiceError::new(Code::InvalidArgument, message));
        }
        let needed = (prompt_tokens + if alone { stop.max_tokens } else { 0 }).div_ceil(pool.block_tokens());
        if needed > pool.total() {
            let message =
                format!("the request needs {needed} KV blocks, this prefill node has {} in all: give it more --kv-memory", pool.total());
            // A node with a larger cache may take it.
            return Err(ServiceError::new(Code::ResourceExhausted, message).elsewhere());
        }
        let held = request.handoff.as_ref().map_or(0, |h| h.held_tokens as usize);
        if held > request.prompt.len() {
            let message = format!("{held} tokens are said to be held by the decode node, the prompt has {}", request.prompt.len());
            return Err(ServiceError::new(Code::InvalidArgument, message));
        }
        let full = || {
            let message = format!("this prefill node holds {} prompts, its most: try another node, or later", self.served.max_queue);
            ServiceError::no_room(Code::ResourceExhausted, message)
        };
        let counted = Arc::new(Counted::new(&self.counts));
        if self.counts.held.load(Ordering::Acquire) > self.served.max_queue {
            return Err(full());
        }
        let guide = match &sampling.guide {
            Some(guide) => Some(self.served.guides.matcher(guide).await?),
            None => None,
        };
        let (events, answer) = mpsc::channel(if alone { stop.max_tokens + EVENTS } else { EVENTS });
        let (sender, push) = request
            .handoff
            .map(|h| {
                let way = self.served.way(&h, offer);
                let (fingerprint, ticket, epoch) = (offer.pair.fingerprint.clone(), Ticket::new(h.ticket), Epoch(h.epoch));
                self.metrics.way(&way);
                let way = way.unwrap_or(RowsWay::Tcp { gpu: offer.gpu.clone() });
                let target = HandoffTarget { address: h.address, fingerprint, ticket, epoch, held_tokens: held, way };
                handoff(target, offer.geometry, offer.wire)
            })
            .unzip();
        let names = self.served.prefix_cache.then(|| offers.names(&request.cache_salt, &request.prompt, pool.block_tokens()));
        let prompt_logprobs = sampling.prompt_logprobs.map(|n| n as usize);
        let mut sampler = Sampler::new(sampling, &request.prompt).guided(guide, prompt_tokens + stop.max_tokens);
        request.written.iter().for_each(|token| sampler.observe(*token));
        let job = Job {
            prompt_logprobs,
            sampler,
            prompt: [request.prompt, request.written].concat(),
            prompt_tokens,
            alone,
            pair,
            names,
            stop,
            events: events.clone(),
            handoff: sender,
            arrived,
            stage: debug_span!(parent: trace.span(), "queue"),
            trace: trace.clone(),
            _counted: counted.clone(),
        };
        self.jobs.try_send(job).map_err(|refused| match refused {
            flume::TrySendError::Full(_) => full(),
            flume::TrySendError::Disconnected(_) => ServiceError::of_node(Code::Unavailable, "this prefill node is stopping: try another"),
        })?;
        if let Some(push) = push {
            // Owned by the answer: it ends when the router has gone, when the engine gave up, or when all is pushed.
            let (metrics, decode_nodes) = (self.metrics.clone(), self.served.decode_nodes.clone());
            let span = trace.span().clone();
            let pushing = async move {
                let _counted = counted;
                let ended = tokio::select! {
                    ended = push.run(&decode_nodes, &metrics, &trace).instrument(debug_span!("push", otel.kind = "client")) => ended,
                    () = events.closed() => return metrics.handoff(HandoffEnd::GivenUp),
                };
                let event = match ended {
                    Ok(Some(done)) => {
                        let HandoffDone { frames, bytes, tail_us, transfer_us } = done;
                        metrics.handoff(HandoffEnd::Complete);
                        tracing::info!(frames, bytes, tail_us, transfer_us, "handoff complete");
                        Ok(PrefillEvent { event: Some(prefill_event::Event::HandoffDone(done)) })
                    }
                    Ok(None) => return metrics.handoff(HandoffEnd::GivenUp),
                    Err(error) => {
                        metrics.handoff(HandoffEnd::Failed);
                        tracing::info!(code = %error.code, %error, "handoff failed");
                        Err(error)
                    }
                };
                // Closed: the router has gone.
                let _ = events.try_send(event);
            };
            tokio::spawn(pushing.instrument(span));
        }
        Ok(answer)
    }
}

impl Serving for PrefillService {
    type Event = PrefillEvent;

    async fn begin(&self, what: call::What, headers: HeaderMap) -> Result<EventReceiver<PrefillEvent>, ServiceError> {
        let call::What::Prefill(request) = what else {
            return Err(ServiceError::of_node(Code::Unimplemented, "this is a prefill node: it takes calls to prefill"));
        };
        let span = info_span!("prefill", otel.kind = "server", request_id = request.request_id, trace_id = tracing::field::Empty);
        let trace = Trace::begin(span.clone(), &headers);
        self.admit(request, trace).instrument(span).await.inspect_err(|error| self.metrics.refused(error))
    }

    fn status(&self) -> NodeStatus {
        let refused_prompts = self.refusals.refused().iter().map(|prompt| Bytes::copy_from_slice(prompt)).collect();
        NodeStatus { refused_prompts, ..self.served.status(&self.counts, self.signals.phase()) }
    }
}

impl Served {
    /// How the rows of a handoff go.
    fn way(&self, handoff: &Handoff, offer: &Offer) -> Result<RowsWay, WhyTcp> {
        let Self { decode_nodes, nccl_checksums, .. } = self;
        match () {
            () if !decode_nodes.over_nccl() => Err(WhyTcp::NotHere),
            () if !handoff.nccl => Err(WhyTcp::NotThere),
            () if offer.gpu.is_none() => Err(WhyTcp::Format),
            () => {
                let way = decode_nodes.way(&handoff.address, &offer.pair.fingerprint)?;
                Ok(RowsWay::Nccl { way, checksum_every: *nccl_checksums })
            }
        }
    }

    fn status(&self, counts: &Counts, phase: Phase) -> NodeStatus {
        let Self { id, offers, limits, pool, .. } = self;
        NodeStatus {
            node_id: id.to_string(),
            role: v1::Role::Prefill.into(),
            phase: phase.into(),
            sequences: counts.held.load(Ordering::Acquire) as u32,
            sequences_most: self.max_queue as u32,
            running: counts.running.load(Ordering::Acquire) as u32,
            unread_tokens: counts.unread.load(Ordering::Acquire) as u64,
            unread_tokens_most: counts.unread_most.load(Ordering::Acquire) as u64,
            blocks_total: pool.total() as u64,
            blocks_held: pool.held() as u64,
            blocks_free: pool.free() as u64,
            block_tokens: pool.block_tokens() as u32,
            pairs: offers.served().iter().map(convert::pair_to_wire).collect(),
            prefix_queries: counts.prefix_queries.load(Ordering::Relaxed),
            prefix_hits: counts.prefix_hits.load(Ordering::Relaxed),
            prefix_blocks: pool.named() as u64,
            prefix_blocks_most: if self.prefix_cache { pool.total() as u64 } else { 0 },
            max_context: limits.max_context as u32,
            preempted: 0,
            blocks_promised: 0,
            blocks_promised_most: 0,
            refused_prompts: Vec::new(),
        }
    }
}
