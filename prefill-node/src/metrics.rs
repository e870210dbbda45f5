//! What a prefill node counts, and under which names.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use overfill_kv::BlockPool;
use overfill_lifecycle::metrics::{CacheConfig, Error, Histogram, IntCounter, IntCounterVec, Registry, buckets};
use overfill_types::{Code, PairManifest, ServiceError};

use crate::Counts;
use crate::way::{RowsWay, WhyTcp};

/// The node's counters. Clones share them.
#[derive(Clone)]
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    /// Tokens of prompts that were read to their end.
    pub(crate) prompt_tokens: IntCounter,
    /// First tokens.
    pub(crate) generation_tokens: IntCounter,
    pub(crate) prompt_length: Histogram,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) queue_time: Histogram,
    pub(crate) prefill_time: Histogram,
    pub(crate) step_seconds: Histogram,
    pub(crate) step_tokens: IntCounter,
    pub(crate) frames_sent: IntCounter,
    pub(crate) bytes_sent: IntCounter,
    pub(crate) nccl_bytes_sent: IntCounter,
    pub(crate) handoff_seconds: Histogram,
    pub(crate) handoff_tail_seconds: Histogram,
    handoffs: IntCounterVec,
    ways: IntCounterVec,
    refused: IntCounterVec,
    mismatches: IntCounter,
}

/// How a handoff ended.
#[derive(Clone, Copy)]
pub(crate) enum HandoffEnd {
    /// The decode node has acknowledged the whole.
    Complete,
    /// It was refused, or the decode node is gone.
    Failed,
    /// The router let go before the acknowledgement: the client has gone, the answer ended at its first token, or it is over.
    GivenUp,
}

impl Metrics {
    /// # Errors
    /// Where two metrics have one name.
    pub(crate) fn new(
        manifests: &[PairManifest],
        pool: &BlockPool,
        counts: &Arc<Counts>,
        max_context: usize,
        prefix_caching: bool,
    ) -> Result<Self, Error> {
        // One engine reads for all of them.
        let names: Vec<&str> = manifests.iter().map(|m| m.name.as_str()).collect();
        let registry = Registry::new("prefill", Some(&names.join(",")))?;
        let dtype = manifests.first().map(|m| m.kv_formats.cache.to_string()).unwrap_or_default();
        let config = CacheConfig { block_tokens: pool.block_tokens(), blocks: pool.total(), dtype, prefix_caching };
        let of_pool = pool.clone();
        registry.cache(&config, move || of_pool.held())?;
        let gauge = |name, help, read: fn(&Counts) -> usize| {
            let counts = counts.clone();
            registry.read_gauge(name, help, &[], move || read(&counts) as f64)
        };
        gauge("vllm:num_requests_running", "Prompts that are being read, in requests.", |c| c.running.load(Ordering::Relaxed))?;
        gauge("vllm:num_requests_waiting", "Prompts that wait for blocks or for the engine, in requests.", |c| {
            c.waiting.load(Ordering::Relaxed)
        })?;
        gauge("overfill_unread_tokens", "Tokens of the prompts held that are not read yet.", |c| c.unread.load(Ordering::Relaxed))?;
        gauge("overfill_requests_held", "Prompts of which anything is here: waiting, being read or being pushed, in requests.", |c| {
            c.held.load(Ordering::Relaxed)
        })?;
        let counter = |name, help, read: fn(&Counts) -> &AtomicU64| {
            let counts = counts.clone();
            registry.read_counter(name, help, move || read(&counts).load(Ordering::Relaxed))
        };
        counter("vllm:prefix_cache_queries_total", "Tokens of prompts that were looked up in the prefix cache.", |c| &c.prefix_queries)?;
        counter("vllm:prefix_cache_hits_total", "Tokens of prompts that were found in the prefix cache.", |c| &c.prefix_hits)?;
        Ok(Self {
            prompt_tokens: registry.counter("vllm:prompt_tokens_total", "Tokens of prompts that were read, or found in the cache.")?,
            generation_tokens: registry.counter("vllm:generation_tokens_total", "Tokens written here: the first of each answer.")?,
            prompt_length: registry.histogram("vllm:request_prompt_tokens", "Tokens of each prompt.", &buckets::tokens(max_context))?,
            time_to_first_token: registry.histogram(
                "vllm:time_to_first_token_seconds",
                "Seconds from a prompt's arrival at this node to its first token.",
                buckets::TIME_TO_FIRST_TOKEN,
            )?,
            queue_time: registry.histogram(
                "vllm:request_queue_time_seconds",
                "Seconds from a prompt's arrival at this node until it has blocks and is read.",
                buckets::REQUEST,
            )?,
            prefill_time: registry.histogram(
                "vllm:request_prefill_time_seconds",
                "Seconds from the moment that a prompt is read until its first token.",
                buckets::REQUEST,
            )?,
            step_seconds: registry.histogram("overfill_step_seconds", "Seconds of a forward pass of the full model.", buckets::SHORT)?,
            step_tokens: registry.counter("overfill_step_tokens_total", "Tokens that forward passes of the full model computed.")?,
            frames_sent: registry.counter("overfill_kv_frames_sent_total", "Frames of rows that were sent to decode nodes.")?,
            bytes_sent: registry.counter("overfill_kv_bytes_sent_total", "Bytes of keys and values that were sent to decode nodes.")?,
            nccl_bytes_sent: registry
                .counter("overfill_kv_nccl_bytes_sent_total", "Of the bytes that were sent to decode nodes, those that went over NCCL.")?,
            ways: registry.counters(
                "overfill_handoff_ways_total",
                "Handoffs that were begun, by the way of their rows (tcp, nccl), and why it was taken.",
                &["way", "reason"],
            )?,
            handoff_seconds: registry.histogram(
                "overfill_handoff_seconds",
                "Seconds from a handoff's first frame to the decode node's acknowledgement of the whole.",
                buckets::SHORT,
            )?,
            handoff_tail_seconds: registry.histogram(
                "overfill_handoff_tail_seconds",
                "Seconds from the end of a prompt's computation to the acknowledgement: what the handoff adds.",
                buckets::SHORT,
            )?,
            handoffs: registry.counters("overfill_handoffs_total", "Handoffs that ended, by result.", &["result"])?,
            refused: registry.counters("overfill_requests_refused_total", "Prompts that were refused, by reason.", &["reason"])?,
            mismatches: registry.counter("overfill_pair_mismatches_total", "Requests for another pair than this node serves.")?,
            registry,
        })
    }

    pub(crate) fn handoff(&self, end: HandoffEnd) {
        let result = match end {
            HandoffEnd::Complete => "complete",
            HandoffEnd::Failed => "failed",
            HandoffEnd::GivenUp => "given_up",
        };
        self.handoffs.with_label_values(&[result]).inc();
    }

    /// A handoff is to begin.
    pub(crate) fn way(&self, way: &Result<RowsWay, WhyTcp>) {
        let labels = match way {
            Ok(_) => ["nccl", "both_offer_it"],
            Err(why) => ["tcp", why.as_str()],
        };
        self.ways.with_label_values(&labels).inc();
    }

    pub(crate) fn refused(&self, error: &ServiceError) {
        self.refused.with_label_values(&[error.code.as_str()]).inc();
        if error.code == Code::Mismatch {
            self.mismatches.inc();
        }
    }
}
