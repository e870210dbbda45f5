//! The doors that a load can be put on: OpenAI's two HTTP endpoints, and our gRPC service.

mod grpc;
mod openai;
mod sse;

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use overfill_proto::v1::GenerateRequest;
use overfill_text::Message;
use serde_json::{Map, Value};

use super::failure::Failure;
use super::sampling::SamplingArgs;

/// Between two attempts to reach a server that does not answer yet.
const RETRY: Duration = Duration::from_millis(200);
/// How long a question for the server's models may take.
const MODELS_LIMIT: Duration = Duration::from_secs(10);

#[derive(Args)]
#[command(next_help_heading = "Server")]
pub(super) struct TargetArgs {
    /// What the server speaks
    #[arg(long, env = "OVERFILL_BENCH_BACKEND", value_enum, default_value = "openai")]
    pub(super) backend: Door,
    /// Where it is, e.g. http://127.0.0.1:8000, or https://…, whose authority the system or the variable SSL_CERT_FILE names; instead of --host
    /// and --port
    #[arg(long, env = "OVERFILL_BENCH_BASE_URL", conflicts_with_all = ["host", "port"])]
    base_url: Option<String>,
    /// [default: 127.0.0.1]
    #[arg(long, env = "OVERFILL_BENCH_HOST")]
    host: Option<String>,
    /// [default: 8000; for grpc: 8001]
    #[arg(long, env = "OVERFILL_BENCH_PORT")]
    port: Option<u16>,
    /// The path that requests go to [default: /v1/completions; for openai-chat: /v1/chat/completions]
    #[arg(long, env = "OVERFILL_BENCH_ENDPOINT")]
    endpoint: Option<String>,
    /// Name of the model [default: the first that the server lists]
    #[arg(long, env = "OVERFILL_BENCH_MODEL")]
    model: Option<String>,
    /// The name that requests carry, if it is not --model
    #[arg(long, env = "OVERFILL_BENCH_SERVED_MODEL_NAME")]
    served_model_name: Option<String>,
    /// Sent as `Authorization: Bearer …`
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// NAME=VALUE, sent as a header (gRPC: metadata) with each request
    #[arg(long, env = "OVERFILL_BENCH_HEADER", num_args = 1.., value_parser = pair)]
    header: Vec<(String, String)>,
    /// A JSON object whose fields are put into each HTTP request
    #[arg(long, env = "OVERFILL_BENCH_EXTRA_BODY", value_parser = object)]
    extra_body: Option<Map<String, Value>>,
    /// Write on past the model's end of sequence [default: only for data sets that are drawn, and traces]
    #[arg(long, env = "OVERFILL_BENCH_IGNORE_EOS")]
    pub(super) ignore_eos: bool,
    /// Seconds after which a request is given up, from when it is sent
    #[arg(long, env = "OVERFILL_BENCH_REQUEST_TIMEOUT", default_value_t = 600.0)]
    request_timeout: f64,
    /// Seconds that the server may take until it lists its models; 0 does not ask
    #[arg(long, env = "OVERFILL_BENCH_READY_CHECK_TIMEOUT_SEC", default_value_t = 60)]
    ready_check_timeout_sec: u64,
}

/// What a server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Door {
    /// POST /v1/completions
    #[value(name = "openai", alias = "vllm")]
    Completions,
    /// POST /v1/chat/completions
    #[value(name = "openai-chat")]
    Chat,
    /// overfill.v1.Inference
    Grpc,
}

impl Door {
    /// As `--backend` spells it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Completions => "openai",
            Self::Chat => "openai-chat",
            Self::Grpc => "grpc",
        }
    }
}

/// `NAME=VALUE`.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => Ok((name.trim().to_owned(), value.trim().to_owned())),
        _ => Err("it must be NAME=VALUE".into()),
    }
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|e| format!("it must be a JSON object: {e}"))
}

/// What a request reads.
pub(super) enum Prompt<'a> {
    /// Continued as it is.
    Ids(&'a [u32]),
    /// Continued as it is.
    Text(&'a str),
    /// A chat so far.
    Chat(&'a [Message]),
}

/// A request that only needs to be sent.
pub(super) struct Prepared<'a>(Through<'a>);

enum Through<'a> {
    Http(&'a openai::OpenAi, Vec<u8>),
    Grpc(&'a grpc::Grpc, Box<GenerateRequest>),
}

/// An answer as it comes; what is there stays when the rest is lost.
#[derive(Default)]
pub(super) struct Answer {
    /// When tokens came, and how many.
    pub(super) arrivals: Vec<(Instant, u32)>,
    /// Tokens of the prompt, if the server told them.
    pub(super) prompt_tokens: Option<usize>,
    /// Tokens of the answer, if the server told them.
    pub(super) output_tokens: Option<usize>,
    pub(super) text: String,
}

/// A server that takes requests.
pub(super) struct Backend {
    wire: Wire,
    /// The name that requests carry.
    pub(super) model: String,
    /// How long a request may take.
    pub(super) request_timeout: Duration,
}

enum Wire {
    OpenAi(openai::OpenAi),
    Grpc(grpc::Grpc),
}

impl Backend {
    /// Reaches the server that `args` name.
    ///
    /// # Errors
    /// Where options do not fit, or the server does not list a model in time.
    pub(super) async fn reach(args: &TargetArgs, sampling: &SamplingArgs, ignore_eos: bool) -> anyhow::Result<Self> {
        let request_timeout =
            Duration::try_from_secs_f64(args.request_timeout).context("--request-timeout must be a number of seconds, at least 0")?;
        let wire = match args.backend {
            Door::Grpc => {
                ensure!(
                    args.endpoint.is_none() && args.extra_body.is_none(),
                    "--endpoint and --extra-body are for HTTP: leave them out with --backend grpc"
                );
                Wire::Grpc(grpc::Grpc::new(&args.url(), args.headers(), sampling.wire(), ignore_eos)?)
            }
            door => Wire::OpenAi(openai::OpenAi::new(args, door, sampling, ignore_eos)?),
        };
        let name = args.served_model_name.as_ref().or(args.model.as_ref());
        let limit = Duration::from_secs(args.ready_check_timeout_sec);
        let model = match name {
            Some(name) if limit.is_zero() => name.clone(),
            _ => {
                let first = wire.ready(limit).await?;
                name.cloned().unwrap_or(first)
            }
        };
        Ok(Self { wire, model, request_timeout })
    }

    /// Makes a request for up to `max_tokens` tokens after `prompt`.
    pub(super) fn prepare(&self, prompt: &Prompt, max_tokens: u32) -> Prepared<'_> {
        match &self.wire {
            Wire::OpenAi(http) => Prepared(Through::Http(http, http.body(&self.model, prompt, max_tokens))),
            Wire::Grpc(grpc) => Prepared(Through::Grpc(grpc, Box::new(grpc.request(&self.model, prompt, max_tokens)))),
        }
    }
}

impl Prepared<'_> {
    /// Sends it and reads the answer to its end.
    ///
    /// # Errors
    /// Why the answer is not whole; what came of it is in `answer`.
    pub(super) async fn ask(self, answer: &mut Answer) -> Result<(), Failure> {
        match self.0 {
            Through::Http(http, body) => http.ask(body, answer).await,
            Through::Grpc(grpc, request) => grpc.ask(*request, answer).await,
        }
    }
}

impl Wire {
    /// Waits until the server lists a model; gives its name.
    async fn ready(&self, limit: Duration) -> anyhow::Result<String> {
        let until = Instant::now() + limit;
        loop {
            let models = async {
                match self {
                    Self::OpenAi(http) => http.first_model().await,
                    Self::Grpc(grpc) => grpc.first_model().await,
                }
            };
            let failed = match tokio::time::timeout(MODELS_LIMIT, models).await {
                Ok(Ok(Some(model))) => return Ok(model),
                Ok(Ok(None)) => bail!("the server lists no model"),
                Ok(Err(failure)) => format!("{}: {}", failure.kind.name(), failure.message),
                Err(_) => "it does not answer".to_owned(),
            };
            if Instant::now() >= until {
                bail!("the server does not list its models ({failed}): is it at the address that --base-url, or --host and --port, name?");
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

impl TargetArgs {
    /// `http://host:port`.
    pub(super) fn url(&self) -> String {
        match &self.base_url {
            // OpenAI's clients are given the address with the version behind it.
            Some(url) => url.trim_end_matches('/').trim_end_matches("/v1").to_owned(),
            None => {
                let host = self.host.as_deref().unwrap_or("127.0.0.1");
                let port = self.port.unwrap_or(if self.backend == Door::Grpc { 8001 } else { 8000 });
                if host.contains(':') { format!("http://[{host}]:{port}") } else { format!("http://{host}:{port}") }
            }
        }
    }

    /// Names and values of all headers.
    fn headers(&self) -> Vec<(String, String)> {
        let mut headers = self.header.clone();
        if let Some(key) = &self.api_key {
            headers.push(("authorization".into(), format!("Bearer {key}")));
        }
        headers
    }
}
