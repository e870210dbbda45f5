//! Logs, and the export of traces.
//!
//! Lines go to standard error. Spans go to a collector by OTLP (gRPC) if one is named, and cost next to nothing if none is: the
//! stages of a request are spans of level debug, which nobody asks for then.
//!
//! **Invariant:** a collector that is slow or gone holds up no request: spans wait in a bounded queue of a thread of their own,
//! and what does not fit is dropped.

use std::io::IsTerminal;
use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::filter::{FilterFn, LevelFilter, ParseError};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, fmt, registry};

/// How long the collector has to take a batch of spans, and to take the last ones at the end.
const EXPORT_LIMIT: Duration = Duration::from_secs(3);

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// A JSON object a line.
    Json,
}

/// What is logged and traced, and how: flags of every binary.
#[derive(Clone, Debug, clap::Args)]
pub struct LogArgs {
    /// What is logged: a level (error, warn, info, debug, trace), or directives such as `info,overfill_router=debug`
    #[arg(long, env = "OVERFILL_LOG", default_value = "info", global = true)]
    pub log: String,
    /// How log lines look
    #[arg(long, env = "OVERFILL_LOG_FORMAT", value_enum, default_value = "text", global = true)]
    pub log_format: LogFormat,
    /// The collector that traces are sent to, by OTLP over gRPC, e.g. http://127.0.0.1:4317 [default: none]
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", global = true)]
    pub otlp_endpoint: Option<String>,
    /// What this process is called in traces [default: its binary's name]
    #[arg(long, env = "OTEL_SERVICE_NAME", global = true)]
    pub service_name: Option<String>,
}

/// Why there are no logs.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The directives of `--log` are malformed.
    #[error("--log cannot be read")]
    Directives(#[from] ParseError),
    /// The endpoint is none.
    #[error("--otlp-endpoint is no address of a collector: http://host:port is")]
    Endpoint(#[from] ExporterBuildError),
    /// It was started before.
    #[error("logging was started twice")]
    Twice(#[from] TryInitError),
}

impl LogArgs {
    /// Starts logging and tracing, once a process; `service` is its binary's name. With a collector it must be called inside a
    /// tokio runtime.
    ///
    /// # Errors
    /// Where a flag is malformed.
    pub fn init(&self, service: &str) -> Result<Telemetry, TelemetryError> {
        let lines = fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
        let lines = match self.log_format {
            LogFormat::Text => lines.boxed(),
            LogFormat::Json => lines.json().boxed(),
        };
        let logged = registry().with(lines.with_filter(EnvFilter::try_new(&self.log)?));
        let Some(endpoint) = self.otlp_endpoint.as_ref().filter(|endpoint| !endpoint.is_empty()) else {
            logged.try_init()?;
            return Ok(Telemetry { provider: None });
        };
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(EXPORT_LIMIT).build()?;
        let name = self.service_name.clone().unwrap_or_else(|| service.to_owned());
        // A thread of its own exports batches; its queue has 2048 spans. OTEL_BSP_… and OTEL_TRACES_SAMPLER say otherwise.
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(Resource::builder().with_service_name(name).build())
            .build();
        // Ours alone: those of the transport would be traced while they carry traces.
        let ours = FilterFn::new(|span| span.is_span() && span.target().starts_with("overfill")).with_max_level_hint(LevelFilter::DEBUG);
        let spans = tracing_opentelemetry::layer().with_tracer(provider.tracer("overfill")).with_filter(ours);
        logged.with(spans).try_init()?;
        Ok(Telemetry { provider: Some(provider) })
    }
}

/// What was started. To be finished at the end of the process, so that the last spans are sent.
#[must_use = "the last spans are lost if it is not finished"]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

impl Telemetry {
    /// Sends what waits to be sent, for some seconds at most.
    pub async fn finish(self) {
        let Some(provider) = self.provider else { return };
        let sent = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(EXPORT_LIMIT)).await;
        if let Ok(Err(error)) = sent {
            tracing::warn!(%error, "the last spans may not have reached the collector");
        }
    }
}
