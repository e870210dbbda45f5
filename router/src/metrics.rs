//! What a router counts, and under which names.
//!
//! [`Metrics`] is the router's, [`OfModel`] has one model's handles, and [`Observed`] is the clock of one request.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use overfill_lifecycle::metrics::{Counting, Error, Histogram, IntCounter, IntCounterVec, IntGauge, Registry, buckets, counted_by};
use overfill_types::prompt::short;
use overfill_types::{Code, Fingerprint, FinishReason, PairManifest, Role, ServiceError, prompt_digest};
use tokio::time::Instant;

use crate::overview::ModelState;

/// Longest prompt and answer that histograms of tokens tell apart: what is longer is in the last bucket.
const MOST_TOKENS: usize = 1 << 20;

/// What a router holds for requests.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Held {
    /// Permits to be under way.
    Requests,
    /// Turns for nodes that are waited for.
    Turns,
    /// Calls to nodes.
    Calls,
}

/// The router's counters.
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    models: HashMap<Fingerprint, Arc<OfModel>>,
    reservation_wait: Histogram,
    attempts_failed: IntCounterVec,
    migrations: IntCounterVec,
    retries_delayed: IntCounter,
    failed: IntCounterVec,
    refused: IntCounterVec,
    mismatches: IntCounter,
    quarantined: IntCounterVec,
}

impl Metrics {
    /// Of a router that serves these models.
    ///
    /// # Errors
    /// Where two metrics have one name, or two of these are one pair.
    pub(crate) fn new<'a>(models: impl IntoIterator<Item = &'a PairManifest>) -> Result<Self, Error> {
        let registry = Registry::new("router", None)?;
        let models = models.into_iter().map(|PairManifest { name, fingerprint, .. }| {
            let registry = registry.of_model(name, fingerprint.short());
            Ok((fingerprint.clone(), Arc::new(OfModel::new(&registry)?)))
        });
        Ok(Self {
            models: models.collect::<Result<_, Error>>()?,
            reservation_wait: registry.histogram(
                "overfill_reservation_wait_seconds",
                "Seconds until a decode node has answered with a reservation.",
                buckets::SHORT,
            )?,
            attempts_failed: registry.counters("overfill_attempts_failed_total", "Attempts that failed, by reason.", &["reason"])?,
            migrations: registry.counters(
                "overfill_migrations_total",
                "Answers that went on with another attempt: new_request before their first token, ongoing_request after it.",
                &["migration_type"],
            )?,
            retries_delayed: registry
                .counter("overfill_retries_delayed_total", "Further attempts that had to wait since too many were made, in attempts.")?,
            failed: registry.counters("overfill_requests_failed_total", "Answers that ended with an error, by reason.", &["reason"])?,
            refused: registry.counters(
                "overfill_requests_refused_total",
                "Requests that were refused before any node was asked, by reason.",
                &["reason"],
            )?,
            quarantined: registry.counters(
                "overfill_quarantined_requests_total",
                "Requests that were refused since engines died under their prompt, by the prompt's digest.",
                &["prompt"],
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

    /// Prompts that are refused since engines died under them, as `count` finds them at a scrape.
    ///
    /// # Errors
    /// Where it was called before.
    pub(crate) fn quarantine(&self, count: impl Fn() -> usize + Send + Sync + 'static) -> Result<(), Error> {
        let help = "Prompts that are refused since engines died under them.";
        self.registry.read_gauge("overfill_quarantined_prompts", help, &[], move || count() as f64)
    }

    /// What the router holds for requests, as `count` finds it at a scrape: nothing where none is under way.
    ///
    /// # Errors
    /// Where it was called before.
    pub(crate) fn held(&self, count: impl Fn(Held) -> usize + Clone + Send + Sync + 'static) -> Result<(), Error> {
        for (name, what) in [("requests", Held::Requests), ("turns", Held::Turns), ("calls", Held::Calls)] {
            let count = count.clone();
            let help = "What is held for requests: permits of those under way, turns that are waited for, calls to nodes.";
            self.registry.read_gauge("overfill_router_held", help, &[("what", name)], move || count(what) as f64)?;
        }
        Ok(())
    }

    /// Requests that wait for room on nodes of each role, as `count` finds them at a scrape.
    ///
    /// # Errors
    /// Where it was called before.
    pub(crate) fn waiting_for(&self, count: impl Fn(Role) -> usize + Clone + Send + Sync + 'static) -> Result<(), Error> {
        for (name, role) in [("prefill", Role::Prefill), ("decode", Role::Decode)] {
            let count = count.clone();
            let help = "Requests that wait because no node of this role has room for them.";
            self.registry.read_gauge("overfill_waiting_for_nodes", help, &[("role", name)], move || count(role) as f64)?;
        }
        Ok(())
    }

    /// The counters of a model.
    ///
    /// # Errors
    /// [`Code::Internal`] where the router does not serve it.
    pub(crate) fn of(&self, model: &PairManifest) -> Result<Arc<OfModel>, ServiceError> {
        let found = self.models.get(&model.fingerprint).cloned();
        found.ok_or_else(|| ServiceError::new(Code::Internal, format!("model '{}' has no counters", model.name)))
    }

    /// What was asked of a model so far; nothing of one that is not served.
    pub(crate) fn state(&self, model: &PairManifest) -> ModelState {
        let of = |count: fn(&OfModel) -> u64| self.models.get(&model.fingerprint).map_or(0, |model| count(model));
        ModelState {
            name: model.name.clone(),
            fingerprint: model.fingerprint.to_string(),
            running: of(|model| u64::try_from(model.running.get()).unwrap_or(0)),
            finished: of(|model| counted_by("finished_reason", &model.success).values().sum()),
            cancelled: of(|model| model.cancelled.get()),
            prompt_tokens: of(|model| model.prompt_tokens.get()),
            cached_tokens: of(|model| model.cached_tokens.get()),
            generation_tokens: of(|model| model.generation_tokens.get()),
        }
    }

    /// Answers that ended with an error, by reason.
    pub(crate) fn failures(&self) -> BTreeMap<String, u64> {
        counted_by("reason", &self.failed)
    }

    /// Requests that were refused before any node was asked, by reason.
    pub(crate) fn refusals(&self) -> BTreeMap<String, u64> {
        counted_by("reason", &self.refused)
    }

    /// Attempts that failed, by reason.
    pub(crate) fn failed_attempts(&self) -> BTreeMap<String, u64> {
        counted_by("reason", &self.attempts_failed)
    }

    /// A request was refused since engines died under its prompt, which its digest names.
    pub(crate) fn quarantined(&self, prompt: &[u32]) {
        self.quarantined.with_label_values(&[&short(&prompt_digest(prompt))]).inc();
    }

    /// A request was refused.
    pub(crate) fn refused(&self, error: &ServiceError) {
        self.refused.with_label_values(&[error.code.as_str()]).inc();
    }
}

/// What is counted of one model's requests.
pub(crate) struct OfModel {
    running: IntGauge,
    waiting: IntGauge,
    prompt_tokens: IntCounter,
    cached_tokens: IntCounter,
    generation_tokens: IntCounter,
    success: IntCounterVec,
    prompt_length: Histogram,
    generation_length: Histogram,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    time_per_output_token: Histogram,
    e2e_latency: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    inference_time: Histogram,
    attempts: IntCounter,
    cancelled: IntCounter,
}

impl OfModel {
    fn new(registry: &Registry) -> Result<Self, Error> {
        Ok(Self {
            running: registry.gauge("vllm:num_requests_running", "Answers that nodes work on, in requests.")?,
            waiting: registry.gauge("vllm:num_requests_waiting", "Answers that wait for a pair of nodes, in requests.")?,
            prompt_tokens: registry.counter("vllm:prompt_tokens_total", "Tokens of prompts that were read.")?,
            cached_tokens: registry
                .counter("overfill_cached_prompt_tokens_total", "Of these, tokens that the prefill node had in its prefix cache.")?,
            generation_tokens: registry.counter("vllm:generation_tokens_total", "Tokens of answers.")?,
            success: registry.counters(
                "vllm:request_success_total",
                "Answers that came to their end, by the reason of it.",
                &["finished_reason"],
            )?,
            prompt_length: registry.histogram("vllm:request_prompt_tokens", "Tokens of each prompt.", &buckets::tokens(MOST_TOKENS))?,
            generation_length: registry.histogram(
                "vllm:request_generation_tokens",
                "Tokens of each whole answer.",
                &buckets::tokens(MOST_TOKENS),
            )?,
            time_to_first_token: registry.histogram(
                "vllm:time_to_first_token_seconds",
                "Seconds from a request's arrival to its first token.",
                buckets::TIME_TO_FIRST_TOKEN,
            )?,
            inter_token_latency: registry.histogram(
                "vllm:inter_token_latency_seconds",
                "Seconds between two tokens of an answer.",
                buckets::INTER_TOKEN_LATENCY,
            )?,
            time_per_output_token: registry.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Seconds a token of an answer after its first, as its mean.",
                buckets::INTER_TOKEN_LATENCY,
            )?,
            e2e_latency: registry.histogram(
                "vllm:e2e_request_latency_seconds",
                "Seconds from a request's arrival to its answer's end.",
                buckets::REQUEST,
            )?,
            queue_time: registry.histogram(
                "vllm:request_queue_time_seconds",
                "Seconds from a request's arrival until it has a pair of nodes.",
                buckets::REQUEST,
            )?,
            prefill_time: registry.histogram(
                "vllm:request_prefill_time_seconds",
                "Seconds from the choice of nodes to the first token.",
                buckets::REQUEST,
            )?,
            decode_time: registry.histogram(
                "vllm:request_decode_time_seconds",
                "Seconds from the first token to the last.",
                buckets::REQUEST,
            )?,
            inference_time: registry.histogram(
                "vllm:request_inference_time_seconds",
                "Seconds from the choice of nodes to the last token.",
                buckets::REQUEST,
            )?,
            attempts: registry.counter("overfill_attempts_total", "Attempts at answers: pairs of nodes that were asked.")?,
            cancelled: registry.counter("overfill_requests_cancelled_total", "Answers whose client has gone.")?,
        })
    }
}

/// One answer's clock: when it came, got its nodes, and wrote.
pub(crate) struct Observed {
    metrics: Arc<Metrics>,
    model: Arc<OfModel>,
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
    /// Of an answer to a prompt of so many tokens, whose request came at `arrived`.
    pub(crate) fn new(metrics: &Arc<Metrics>, model: Arc<OfModel>, prompt_tokens: usize, arrived: Instant) -> Self {
        Self {
            counted: Some(Counting::new(&model.waiting)),
            metrics: metrics.clone(),
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
        self.model.attempts.inc();
        if self.chosen.is_none() {
            let now = Instant::now();
            self.model.queue_time.observe((now - self.arrived).as_secs_f64());
            self.chosen = Some(now);
        }
    }

    /// A decode node has answered with a reservation, asked at `asked`.
    pub(crate) fn reserved(&self, asked: Instant) {
        self.metrics.reservation_wait.observe(asked.elapsed().as_secs_f64());
    }

    /// The prompt was read; the prefill node had `cached` tokens of it.
    pub(crate) fn read(&self, cached: u32) {
        self.model.prompt_tokens.inc_by(self.prompt_tokens as u64);
        self.model.cached_tokens.inc_by(cached.into());
        self.model.prompt_length.observe(self.prompt_tokens as f64);
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
                self.model.time_to_first_token.observe((now - self.arrived).as_secs_f64());
                if let Some(chosen) = self.chosen {
                    self.model.prefill_time.observe((now - chosen).as_secs_f64());
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

    /// A further attempt had to wait for its turn among those of all requests.
    pub(crate) fn retry_waited(&self) {
        self.metrics.retries_delayed.inc();
    }

    /// The answer came to its end.
    pub(crate) fn finished(&mut self, reason: FinishReason) {
        self.ended = true;
        self.model.success.with_label_values(&[reason.as_str()]).inc();
        self.model.generation_length.observe(self.tokens as f64);
        self.model.e2e_latency.observe(self.arrived.elapsed().as_secs_f64());
        let (Some((first, last)), Some(chosen)) = (self.wrote, self.chosen) else { return };
        let decode = (last - first).as_secs_f64();
        self.model.decode_time.observe(decode);
        self.model.inference_time.observe((last - chosen).as_secs_f64());
        if self.tokens > 1 {
            self.model.time_per_output_token.observe(decode / (self.tokens - 1) as f64);
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
            self.model.cancelled.inc();
        }
    }
}
