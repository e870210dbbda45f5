//! What a decode node counts, and under which names.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use overfill_kv::FrameError;
use overfill_lifecycle::metrics::{CacheConfig, Error, Histogram, IntCounter, IntCounterVec, Registry, buckets};
use overfill_types::{Code, FinishReason, PairManifest, ServiceError};
use tokio::time::Instant;

use crate::admission::Admission;

/// The node's counters. Clones share them.
#[derive(Clone)]
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    pub(crate) generation_tokens: IntCounter,
    pub(crate) inter_token_latency: Histogram,
    decode_time: Histogram,
    pub(crate) reservation_wait: Histogram,
    pub(crate) reservations: IntCounter,
    pub(crate) reservations_expired: IntCounter,
    pub(crate) step_seconds: Histogram,
    pub(crate) step_sequences: Histogram,
    pub(crate) frames_received: IntCounter,
    pub(crate) bytes_received: IntCounter,
    pub(crate) nccl_bytes_received: IntCounter,
    checksum_failures: IntCounter,
    pub(crate) handoff_seconds: Histogram,
    pushes: IntCounterVec,
    success: IntCounterVec,
    failed: IntCounterVec,
    /// Sequences whose reader has gone.
    pub(crate) dropped: IntCounter,
    refused: IntCounterVec,
    mismatches: IntCounter,
}

impl Metrics {
    /// # Errors
    /// Where two metrics have one name.
    pub(crate) fn new(manifest: &PairManifest, admission: &Arc<Admission>) -> Result<Self, Error> {
        let registry = Registry::new("decode", Some(&manifest.name))?;
        let pool = admission.pool().clone();
        let dtype = manifest.kv_formats.cache.to_string();
        let config = CacheConfig { block_tokens: pool.block_tokens(), blocks: pool.total(), dtype, prefix_caching: true };
        registry.cache(&config, move || pool.held())?;
        let gauge = |name, help, read: fn(&Admission) -> usize| {
            let admission = admission.clone();
            registry.read_gauge(name, help, &[], move || read(&admission) as f64)
        };
        gauge("vllm:num_requests_running", "Sequences whose handoff has begun, or that write, in requests.", |a| a.held().running)?;
        gauge("vllm:num_requests_waiting", "Reservations of which no frame has come yet, in requests.", |a| {
            let held = a.held();
            held.sequences.saturating_sub(held.running)
        })?;
        let promised = admission.clone();
        let help = "Part of the KV blocks that may be promised which the sequences held may come to need, from 0 to 1.";
        registry.read_gauge("overfill_kv_promised_share", help, &[], move || {
            let held = promised.held();
            held.promised as f64 / held.promised_most.max(1) as f64
        })?;
        let counter = |name, help, read: fn(&Admission) -> u64| {
            let admission = admission.clone();
            registry.read_counter(name, help, move || read(&admission))
        };
        counter("vllm:prefix_cache_queries_total", "Tokens of prompts that were looked for among the blocks that are here.", |a| {
            a.prefixes().queries.load(Ordering::Relaxed)
        })?;
        counter("vllm:prefix_cache_hits_total", "Tokens of prompts that were here already, and need no frames.", |a| {
            a.prefixes().hits.load(Ordering::Relaxed)
        })?;
        counter("vllm:num_preemptions_total", "Sequences that lost their blocks to older ones.", Admission::preempted)?;
        Ok(Self {
            generation_tokens: registry.counter("vllm:generation_tokens_total", "Tokens that the decode model wrote.")?,
            inter_token_latency: registry.histogram(
                "vllm:inter_token_latency_seconds",
                "Seconds between two tokens of a sequence, from the start of its decoding on.",
                buckets::INTER_TOKEN_LATENCY,
            )?,
            decode_time: registry.histogram(
                "vllm:request_decode_time_seconds",
                "Seconds from the moment that a sequence has its KV cache to its last token.",
                buckets::REQUEST,
            )?,
            reservation_wait: registry.histogram(
                "overfill_reservation_wait_seconds",
                "Seconds that a reservation waits until its KV cache is whole.",
                buckets::SHORT,
            )?,
            reservations: registry.counter("overfill_reservations_total", "Reservations that were given.")?,
            reservations_expired: registry
                .counter("overfill_reservations_expired_total", "Reservations that were given up because no frame came in time.")?,
            step_seconds: registry.histogram("overfill_step_seconds", "Seconds of a forward pass of the decode model.", buckets::SHORT)?,
            step_sequences: registry.histogram("overfill_step_sequences", "Sequences of a forward pass.", buckets::SEQUENCES)?,
            frames_received: registry.counter("overfill_kv_frames_received_total", "Frames of rows that came, and were in order.")?,
            bytes_received: registry
                .counter("overfill_kv_bytes_received_total", "Bytes of keys and values that came, and were in order.")?,
            nccl_bytes_received: registry.counter(
                "overfill_kv_nccl_bytes_received_total",
                "Of the bytes of keys and values that came, those that came over NCCL.",
            )?,
            checksum_failures: registry
                .counter("overfill_kv_checksum_failures_total", "Frames and handoffs whose content was changed on the way.")?,
            handoff_seconds: registry.histogram(
                "overfill_handoff_seconds",
                "Seconds from a handoff's first frame to the start of its sequence.",
                buckets::SHORT,
            )?,
            pushes: registry.counters("overfill_handoffs_total", "Handoffs that ended, by result.", &["result"])?,
            success: registry.counters(
                "vllm:request_success_total",
                "Sequences that were written to their end, by the reason of it.",
                &["finished_reason"],
            )?,
            failed: registry.counters("overfill_sequences_failed_total", "Sequences that failed, by reason.", &["reason"])?,
            dropped: registry.counter(
                "overfill_sequences_dropped_total",
                "Sequences whose router let go of them: the client has gone, or a stop string came.",
            )?,
            refused: registry.counters("overfill_requests_refused_total", "Requests that were refused, by reason.", &["reason"])?,
            mismatches: registry.counter("overfill_pair_mismatches_total", "Requests and frames of another pair than this node serves.")?,
            registry,
        })
    }

    /// A sequence was written to its end, having had its KV cache since `begun`.
    pub(crate) fn finished(&self, reason: FinishReason, begun: Option<Instant>) {
        self.success.with_label_values(&[reason.as_str()]).inc();
        if let Some(begun) = begun {
            self.decode_time.observe(begun.elapsed().as_secs_f64());
        }
    }

    /// A sequence failed.
    pub(crate) fn failed(&self, error: &ServiceError) {
        self.failed.with_label_values(&[error.code.as_str()]).inc();
    }

    /// A request was refused.
    pub(crate) fn refused(&self, error: &ServiceError) {
        self.refused.with_label_values(&[error.code.as_str()]).inc();
        self.mismatch(error);
    }

    /// A push ended.
    pub(crate) fn pushed<T>(&self, ended: &Result<T, ServiceError>) {
        self.pushes.with_label_values(&[if ended.is_ok() { "complete" } else { "failed" }]).inc();
        if let Err(error) = ended {
            self.mismatch(error);
        }
    }

    /// A frame was refused.
    pub(crate) fn frame_refused(&self, error: &FrameError) {
        if matches!(error, FrameError::Checksum { .. } | FrameError::Digest { .. }) {
            self.checksum_failures.inc();
        }
    }

    fn mismatch(&self, error: &ServiceError) {
        if error.code == Code::Mismatch {
            self.mismatches.inc();
        }
    }
}
