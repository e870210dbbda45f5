//! A server's metrics, in Prometheus' text format. The only home of the crate behind it.
//!
//! Each server has a [`Registry`] of its own: several run in one process in tests and in `overfill serve`. Every metric of it
//! has the label `engine`, which says what kind of server tells it (`router`, `prefill`, `decode`), and a node's have
//! `model_name`; the router has `model_name` where a model is meant. So a sum over servers names the kind it means.
//!
//! Names, labels and buckets are vLLM's (`vllm:…`) where the meaning is the same, and `overfill_…` where it is ours. What a
//! server counts is named in its `metrics.rs`.
//!
//! **Invariants:** no label has a value that a client makes up. Counting is an atomic addition, without a lock. Both ends of an
//! interval are taken in one process, by a monotonic clock.

pub mod buckets;
mod read;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus::core::Collector;
use prometheus::{HistogramOpts, Opts, TextEncoder};

use tokio::runtime::Handle;

pub use prometheus::{Error, Histogram, IntCounter, IntCounterVec, IntGauge};

use crate::metrics::read::{Kind, ReadAtScrape};

/// The media type of Prometheus' text format.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics of one server. Clones share it.
#[derive(Clone)]
pub struct Registry {
    inner: prometheus::Registry,
    /// Labels of every metric that is made here.
    labels: Vec<(&'static str, String)>,
}

impl Registry {
    /// An empty one, of an `engine` (`router`, `prefill` or `decode`); a node names its model.
    ///
    /// # Errors
    /// None that a caller could meet: names of labels are fixed here.
    pub fn new(engine: &str, model_name: Option<&str>) -> Result<Self, Error> {
        let labels = HashMap::from([("engine".to_owned(), engine.to_owned())]);
        let of_all = model_name.map(|name| ("model_name", name.to_owned()));
        let registry = Self { inner: prometheus::Registry::new_custom(None, Some(labels))?, labels: of_all.into_iter().collect() };
        // Where servers share a process they share its tasks.
        if let Ok(runtime) = Handle::try_current() {
            let tasks = move || runtime.metrics().num_alive_tasks() as f64;
            registry.read_gauge("overfill_tasks", "Tasks of the process's runtime that have not ended.", &[], tasks)?;
        }
        Ok(registry)
    }

    /// The same registry; what is made here is of this version of this model.
    pub fn of_model(&self, name: &str, version: &str) -> Self {
        Self { inner: self.inner.clone(), labels: vec![("model_name", name.to_owned()), ("version", version.to_owned())] }
    }

    /// A number that only grows.
    ///
    /// # Errors
    /// Where the name is taken or malformed.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, Error> {
        self.register(IntCounter::with_opts(self.opts(name, help, &[]))?)
    }

    /// Such a number for each value of the labels.
    ///
    /// # Errors
    /// As [`Registry::counter`].
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.register(IntCounterVec::new(self.opts(name, help, &[]), labels)?)
    }

    /// A number that goes up and down.
    ///
    /// # Errors
    /// As [`Registry::counter`].
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.register(IntGauge::with_opts(self.opts(name, help, &[]))?)
    }

    /// How often a value was within each of `buckets` (their upper ends).
    ///
    /// # Errors
    /// As [`Registry::counter`].
    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, Error> {
        self.register(Histogram::with_opts(HistogramOpts::from(self.opts(name, help, &[])).buckets(buckets.to_vec()))?)
    }

    /// A number that goes up and down and is kept elsewhere: `read` is asked at each scrape.
    ///
    /// # Errors
    /// As [`Registry::counter`].
    pub fn read_gauge(
        &self,
        name: &str,
        help: &str,
        labels: &[(&str, &str)],
        read: impl Fn() -> f64 + Send + Sync + 'static,
    ) -> Result<(), Error> {
        self.inner.register(Box::new(ReadAtScrape::new(Kind::Gauge, self.opts(name, help, labels), read)?))
    }

    /// As [`Registry::read_gauge`], of a number that only grows.
    ///
    /// # Errors
    /// As [`Registry::counter`].
    pub fn read_counter(&self, name: &str, help: &str, read: impl Fn() -> u64 + Send + Sync + 'static) -> Result<(), Error> {
        // Exact up to 2^53.
        self.inner.register(Box::new(ReadAtScrape::new(Kind::Counter, self.opts(name, help, &[]), move || read() as f64)?))
    }

    /// Whether etcd or the Kubernetes API answers; nothing where `connected` gives nothing, because nodes are found otherwise.
    ///
    /// # Errors
    /// As [`Registry::counter`].
    pub fn discovery(&self, connected: impl Fn() -> Option<bool> + Send + Sync + 'static) -> Result<(), Error> {
        if connected().is_none() {
            return Ok(());
        }
        let help = "1 while etcd or the Kubernetes API answers and the view of nodes is current, 0 while the last view serves.";
        self.read_gauge("overfill_discovery_connected", help, &[], move || f64::from(u8::from(connected() == Some(true))))
    }

    fn opts(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> Opts {
        let of_all = self.labels.iter().map(|(name, value)| (*name, value.as_str()));
        labels.iter().copied().chain(of_all).fold(Opts::new(name, help), |opts, (name, value)| opts.const_label(name, value))
    }

    fn register<C: Collector + Clone + 'static>(&self, metric: C) -> Result<C, Error> {
        self.inner.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    /// All of it, as Prometheus reads it.
    ///
    /// # Errors
    /// Where the text cannot be written.
    pub fn text(&self) -> Result<String, Error> {
        TextEncoder::new().encode_to_string(&self.inner.gather())
    }

    /// The answer to a scrape.
    pub fn respond(&self) -> Response {
        match self.text() {
            Ok(text) => ([(header::CONTENT_TYPE, TEXT)], text).into_response(),
            Err(error) => (axum::http::StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
        }
    }
}

/// What was counted so far, by the values of this label, which is the only one that varies.
pub fn counted_by(label: &str, counters: &IntCounterVec) -> BTreeMap<String, u64> {
    let families = counters.collect();
    let counted = families.iter().flat_map(|family| family.get_metric()).filter_map(|metric| {
        let value = metric.get_label().iter().find(|of| of.name() == label)?.value().to_owned();
        Some((value, metric.get_counter().get_value() as u64))
    });
    counted.collect()
}

/// Counts up, and down again when it is dropped.
pub struct Counting(IntGauge);

impl Counting {
    /// One more of `gauge`.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What vLLM calls the configuration of a KV cache.
pub struct CacheConfig {
    /// Token positions in a block.
    pub block_tokens: usize,
    /// Blocks of the pool.
    pub blocks: usize,
    /// How its numbers are kept.
    pub dtype: String,
    /// Whether prompts that begin alike share blocks.
    pub prefix_caching: bool,
}

impl Registry {
    /// `vllm:cache_config_info` and `vllm:kv_cache_usage_perc`; `held` gives the blocks that sequences hold.
    ///
    /// # Errors
    /// As [`Registry::counter`].
    pub fn cache(&self, config: &CacheConfig, held: impl Fn() -> usize + Send + Sync + 'static) -> Result<(), Error> {
        let (block_tokens, blocks) = (config.block_tokens.to_string(), config.blocks.to_string());
        let labels = [
            ("block_size", block_tokens.as_str()),
            ("num_gpu_blocks", blocks.as_str()),
            ("cache_dtype", config.dtype.as_str()),
            ("enable_prefix_caching", if config.prefix_caching { "True" } else { "False" }),
        ];
        self.read_gauge("vllm:cache_config_info", "How the KV cache is made, as labels; always 1.", &labels, || 1.0)?;
        let blocks = config.blocks.max(1) as f64;
        let held = Arc::new(held);
        let usage = held.clone();
        let help =
            "Part of the KV cache's blocks that sequences hold, from 0 to 1; blocks that are only kept for prompts to come are free.";
        self.read_gauge("vllm:kv_cache_usage_perc", help, &[], move || usage() as f64 / blocks)?;
        self.read_gauge("overfill_kv_blocks_held", "Blocks of the KV cache that sequences hold, in blocks.", &[], move || held() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_told() {
        let registry = Registry::new("prefill", Some("m\"1")).unwrap();
        registry.counter("overfill_a_total", "Things.").unwrap().inc_by(3);
        registry.read_counter("overfill_b_total", "Others.", || 7).unwrap();
        registry.read_gauge("overfill_c", "By kind.", &[("kind", "x")], || 0.5).unwrap();
        registry.read_gauge("overfill_c", "By kind.", &[("kind", "y")], || 2.0).unwrap();
        let seconds = registry.histogram("overfill_d_seconds", "How long.", &[0.1, 1.0]).unwrap();
        [0.05, 0.5, 5.0].into_iter().for_each(|s| seconds.observe(s));
        let text = registry.text().unwrap();
        for line in ["# TYPE overfill_a_total counter", "# TYPE overfill_d_seconds histogram"] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        for (name, label, value) in [
            ("overfill_a_total", "engine=\"prefill\"", "3"),
            ("overfill_b_total", "engine=\"prefill\"", "7"),
            ("overfill_c", "kind=\"x\"", "0.5"),
            ("overfill_c", "kind=\"y\"", "2"),
            ("overfill_d_seconds_bucket", "le=\"1\"", "2"),
            ("overfill_d_seconds_count", "engine=\"prefill\"", "3"),
        ] {
            // Labels come in any order.
            let told = |line: &str| {
                let Some((given, labels)) = line.split_once('{') else { return false };
                given == name
                    && labels.contains(label)
                    && labels.contains(r#"model_name="m\"1""#)
                    && labels.ends_with(&format!("}} {value}"))
            };
            assert!(text.lines().any(told), "{name} with {label}, {value}, is not in\n{text}");
        }
        assert!(registry.counter("overfill_a_total", "Again.").is_err(), "a name is taken once");
    }

    #[test]
    fn models_of_a_server_count_apart() {
        let registry = Registry::new("router", None).unwrap();
        for (model, n) in [("a", 1), ("b", 2)] {
            registry.of_model(model, "v").counter("overfill_a_total", "Things.").unwrap().inc_by(n);
        }
        let text = registry.text().unwrap();
        for (model, n) in [("a", 1), ("b", 2)] {
            // Labels come in any order.
            let told = |line: &str| line.contains(&format!("model_name=\"{model}\"")) && line.ends_with(&format!("}} {n}"));
            assert!(text.lines().any(told), "{n} of {model} is not in\n{text}");
        }
    }

    #[test]
    fn counts_are_read_by_their_label() {
        let counters = Registry::new("router", Some("m")).unwrap().counters("overfill_a_total", "Things.", &["reason"]).unwrap();
        counters.with_label_values(&["late"]).inc_by(2);
        counters.with_label_values(&["lost"]).inc();
        assert_eq!(counted_by("reason", &counters), BTreeMap::from([("late".into(), 2), ("lost".into(), 1)]));
    }

    #[test]
    fn two_servers_of_a_process_count_apart() {
        let (one, two) = (Registry::new("decode", Some("m")).unwrap(), Registry::new("decode", Some("m")).unwrap());
        one.counter("overfill_a_total", "Things.").unwrap().inc();
        two.counter("overfill_a_total", "Things.").unwrap();
        assert!(one.text().unwrap().contains("} 1\n") && two.text().unwrap().contains("} 0\n"));
    }
}
