//! What a router counts, and under which names.
//!
//! [`Metrics`] is the router's, [`OfModel`] has one model's handles, and [`Observed`] is the clock of one request.

use std::sync::Arc;
use std::time::Instant;

use overfill_lifecycle::metrics::{
    Counting, Error, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, buckets,
};
use overfill_types::{Code, FinishReason, Role, ServiceError};

/// Longest prompt and answer that histograms of tokens tell apart: what is longer is in the last bucket.
const MOST_TOKENS: usize = 1 << 20;

/// The router's counters.
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    prompt_tokens: IntCounterVec,
    cached_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    success: IntCounterVec,
    prompt_length: HistogramVec,
    generation_length: HistogramVec,
    time_to_first_token: HistogramVec,
    inter_token_latency: HistogramVec,
    time_per_output_token: HistogramVec,
    e2e_latency: HistogramVec,
    queue_time: HistogramVec,
    prefill_time: HistogramVec,
    decode_time: HistogramVec,
    inference_time: HistogramVec,
    reservation_wait: Histogram,
    attempts: IntCounterVec,
    attempts_failed: IntCounterVec,
    migrations: IntCounterVec,
    failed: IntCounterVec,
    cancelled: IntCounterVec,
    refused: IntCounterVec,
    mismatches: IntCounter,
}

impl Metrics {
    /// # Errors
    /// Where two metrics have one name.
    pub(crate) fn new() -> Result<Self, Error> {
        let registry = Registry::new("router", None)?;
        let model = &["model_name"];
        let seconds = |name, help, buckets| registry.histograms(name, help, buckets, model);
        Ok(Self {
            running: registry.gauges("vllm:num_requests_running", "Answers that nodes work on, in requests.", model)?,
            waiting: registry.gauges("vllm:num_requests_waiting", "Answers that wait for a pair of nodes, in requests.", model)?,
            prompt_tokens: registry.counters("vllm:prompt_tokens_total", "Tokens of prompts that were read.", model)?,
            cached_tokens: registry.counters(
                "overfill_cached_prompt_tokens_total",
                "Of these, tokens that the prefill node had in its prefix cache.",
                model,
            )?,
            generation_tokens: registry.counters("vllm:generation_tokens_total", "Tokens of answers.", model)?,
            success: registry.counters(
                "vllm:request_success_total",
                "Answers that came to their end, by the reason of it.",
                &["model_name", "finished_reason"],
            )?,
            prompt_length: seconds("vllm:request_prompt_tokens", "Tokens of each prompt.", &buckets::tokens(MOST_TOKENS))?,
            generation_length: seconds("vllm:request_generation_tokens", "Tokens of each whole answer.", &buckets::tokens(MOST_TOKENS))?,
            time_to_first_token: seconds(
                "vllm:time_to_first_token_seconds",
                "Seconds from a request's arrival to its first token.",
                buckets::TIME_TO_FIRST_TOKEN,
            )?,
            inter_token_latency: seconds(
                "vllm:inter_token_latency_seconds",
                "Seconds between two tokens of an answer.",
                buckets::INTER_TOKEN_LATENCY,
            )?,
            time_per_output_token: seconds(
                "vllm:request_time_per_output_token_seconds",
                "Seconds a token of an answer after its first, as its mean.",
                buckets::INTER_TOKEN_LATENCY,
            )?,
            e2e_latency: seconds(
                "vllm:e2e_request_latency_seconds",
                "Seconds from a request's arrival to its answer's end.",
                buckets::REQUEST,
            )?,
            queue_time: seconds(
                "vllm:request_queue_time_seconds",
                "Seconds from a request's arrival until it has a pair of nodes.",
                buckets::REQUEST,
            )?,
            prefill_time: seconds(
                "vllm:request_prefill_time_seconds",
                "Seconds from the choice of nodes to the first token.",
                buckets::REQUEST,
            )?,
            decode_time: seconds("vllm:request_decode_time_seconds", "Seconds from the first token to the last.", buckets::REQUEST)?,
            inference_time: seconds(
                "vllm:request_inference_time_seconds",
                "Seconds from the choice of nodes to the last token.",
                buckets::REQUEST,
            )?,
            reservation_wait: registry.histogram(
                "overfill_reservation_wait_seconds",
                "Seconds until a decode node has answered with a reservation.",
                buckets::SHORT,
            )?,
            attempts: registry.counters("overfill_attempts_total", "Attempts at answers: pairs of nodes that were asked.", model)?,
            attempts_failed: registry.counters("overfill_attempts_failed_total", "Attempts that failed, by reason.", &["reason"])?,
            migrations: registry.counters(
                "overfill_migrations_total",
                "Answers that went on with another attempt: new_request before their first token, ongoing_request after it.",
                &["migration_type"],
            )?,
            failed: registry.counters("overfill_requests_failed_total", "Answers that ended with an error, by reason.", &["reason"])?,
            cancelled: registry.counters("overfill_requests_cancelled_total", "Answers whose client has gone.", model)?,
            refused: registry.counters(
                "overfill_requests_refused_total",
                "Requests that were refused before any node was asked, by reason.",
                &["reason"],
            )?,
            mismatches: registry.counter("overfill_pair_mismatches_total", "Attempts that a node refused as of another pair.")?,
            registry,
        })
    }

    /// Nodes of each role, as `count` finds them at a scrape.
    ///
    /// # Errors
    /// Where it was called before.
    pub(crate) fn nodes(&self, count: impl Fn(Role) -> usize + Clone + Send + Sync + 'static) -> Result<(), Error> {
        for (name, role) in [("prefill", Role::Prefill), ("decode", Role::Decode)] {
            let count = count.clone();
            let help = "Nodes that this router sees, of any pair, by role.";
            self.registry.read_gauge("overfill_nodes", help, &[("role", name)], move || count(role) as f64)?;
        }
        Ok(())
    }

    /// A request was refused.
    pub(crate) fn refused(&self, error: &ServiceError) {
        self.refused.with_label_values(&[error.code.as_str()]).inc();
    }

    fn of(&self, model: &str) -> OfModel {
        let model = &[model];
        OfModel {
            running: self.running.with_label_values(model),
            waiting: self.waiting.with_label_values(model),
            generation_tokens: self.generation_tokens.with_label_values(model),
            inter_token_latency: self.inter_token_latency.with_label_values(model),
        }
    }
}

/// What is counted often of a request, found once.
struct OfModel {
    running: IntGauge,
    waiting: IntGauge,
    generation_tokens: IntCounter,
    inter_token_latency: Histogram,
}

/// One answer's clock: when it came, got its nodes, and wrote.
pub(crate) struct Observed {
    metrics: Arc<Metrics>,
    model_name: String,
    model: OfModel,
    prompt_tokens: usize,
    tokens: usize,
    arrived: Instant,
    /// The first choice of nodes.
    chosen: Option<Instant>,
    /// The first token, and the last so far.
    wrote: Option<(Instant, Instant)>,
    /// In which gauge it is counted.
    counted: Option<Counting>,
    ended: bool,
}

impl Observed {
    /// Of an answer to a prompt of so many tokens, whose request came at `arrived`; `model_name` is one that is served.
    pub(crate) fn new(metrics: &Arc<Metrics>, model_name: &str, prompt_tokens: usize, arrived: Instant) -> Self {
        let model = metrics.of(model_name);
        Self {
            counted: Some(Counting::new(&model.waiting)),
            metrics: metrics.clone(),
            model_name: model_name.to_owned(),
            model,
            prompt_tokens,
            tokens: 0,
            arrived,
            chosen: None,
            wrote: None,
            ended: false,
        }
    }

    /// It waits for a pair of nodes.
    pub(crate) fn waits(&mut self) {
        self.counted = None;
        self.counted = Some(Counting::new(&self.model.waiting));
    }

    /// It has one: an attempt begins.
    pub(crate) fn chosen(&mut self) {
        self.counted = None;
        self.counted = Some(Counting::new(&self.model.running));
        let model = &[self.model_name.as_str()];
        self.metrics.attempts.with_label_values(model).inc();
        if self.chosen.is_none() {
            let now = Instant::now();
            self.metrics.queue_time.with_label_values(model).observe((now - self.arrived).as_secs_f64());
            self.chosen = Some(now);
        }
    }

    /// A decode node has answered with a reservation, asked at `asked`.
    pub(crate) fn reserved(&self, asked: Instant) {
        self.metrics.reservation_wait.observe(asked.elapsed().as_secs_f64());
    }

    /// The prompt was read; the prefill node had `cached` tokens of it.
    pub(crate) fn read(&self, cached: u32) {
        let model = &[self.model_name.as_str()];
        self.metrics.prompt_tokens.with_label_values(model).inc_by(self.prompt_tokens as u64);
        self.metrics.cached_tokens.with_label_values(model).inc_by(cached.into());
        self.metrics.prompt_length.with_label_values(model).observe(self.prompt_tokens as f64);
    }

    /// A token goes out.
    pub(crate) fn token(&mut self) {
        let now = Instant::now();
        self.tokens += 1;
        self.model.generation_tokens.inc();
        match &mut self.wrote {
            Some((_, last)) => {
                self.model.inter_token_latency.observe((now - *last).as_secs_f64());
                *last = now;
            }
            None => {
                self.wrote = Some((now, now));
                let model = &[self.model_name.as_str()];
                self.metrics.time_to_first_token.with_label_values(model).observe((now - self.arrived).as_secs_f64());
                if let Some(chosen) = self.chosen {
                    self.metrics.prefill_time.with_label_values(model).observe((now - chosen).as_secs_f64());
                }
            }
        }
    }

    /// An attempt failed; `goes_on` if another follows.
    pub(crate) fn attempt_failed(&self, code: Code, goes_on: bool) {
        self.metrics.attempts_failed.with_label_values(&[code.as_str()]).inc();
        if code == Code::Mismatch {
            self.metrics.mismatches.inc();
        }
        if goes_on {
            let kind = if self.tokens == 0 { "new_request" } else { "ongoing_request" };
            self.metrics.migrations.with_label_values(&[kind]).inc();
        }
    }

    /// The answer came to its end.
    pub(crate) fn finished(&mut self, reason: FinishReason) {
        self.ended = true;
        let model = &[self.model_name.as_str()];
        self.metrics.success.with_label_values(&[self.model_name.as_str(), reason.as_str()]).inc();
        self.metrics.generation_length.with_label_values(model).observe(self.tokens as f64);
        self.metrics.e2e_latency.with_label_values(model).observe(self.arrived.elapsed().as_secs_f64());
        let (Some((first, last)), Some(chosen)) = (self.wrote, self.chosen) else { return };
        let decode = (last - first).as_secs_f64();
        self.metrics.decode_time.with_label_values(model).observe(decode);
        self.metrics.inference_time.with_label_values(model).observe((last - chosen).as_secs_f64());
        if self.tokens > 1 {
            self.metrics.time_per_output_token.with_label_values(model).observe(decode / (self.tokens - 1) as f64);
        }
    }

    /// The answer ended with an error.
    pub(crate) fn failed(&mut self, error: &ServiceError) {
        self.ended = true;
        self.metrics.failed.with_label_values(&[error.code.as_str()]).inc();
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        if !self.ended {
            self.metrics.cancelled.with_label_values(&[self.model_name.as_str()]).inc();
        }
    }
}
