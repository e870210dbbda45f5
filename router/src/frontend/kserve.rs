//! The KServe v2 protocol, with a model's inputs and outputs named as Triton's LLM backends name them.
//!
//! `text_input` (BYTES) is continued as it is; `sampling_parameters` (BYTES, a JSON object) has the fields of the completions
//! endpoint that choose tokens, and so have the request's own parameters; with `stream` (BOOL) the answer comes in pieces. The answer is `text_output` (BYTES): how it
//! ended and who served it are parameters of the response.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use overfill_lifecycle::Trace;
use overfill_proto::error;
use overfill_proto::kserve::grpc_inference_service_server::GrpcInferenceService;
use overfill_proto::kserve::infer_parameter::ParameterChoice;
use overfill_proto::kserve::model_infer_request::InferInputTensor;
use overfill_proto::kserve::model_infer_response::InferOutputTensor;
use overfill_proto::kserve::model_metadata_response::TensorMetadata;
use overfill_proto::kserve::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse,
    ModelReadyRequest, ModelReadyResponse, ModelStreamInferResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
    ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
};
use overfill_text::TextModel;
use overfill_transport::connections::Connection;
use overfill_transport::deadline::timeout_of;
use overfill_types::{Code, Quality, ServiceError};
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::Router;
use crate::admission::{ClientRequest, Input};
use crate::clients::Client;
use crate::frontend;
use crate::frontend::grpc::client_of;
use crate::frontend::openai::{GuideFields, SamplingFields, guide_of};
use crate::relay::{self, Answer, End, Event};

/// Responses that wait for a slow client.
const RESPONSES: usize = 16;
/// The version of a model that has one only.
const VERSION: &str = "1";
/// Sampling parameters that are texts; a number or a truth value in quotes is taken for one elsewhere.
const TEXTS: [&str; 7] =
    ["stop", "cache_salt", "guided_json", "guided_regex", "guided_grammar", "guided_choice", "guided_whitespace_pattern"];

pub(crate) struct KserveService {
    router: Arc<Router>,
}

impl KserveService {
    pub(crate) fn new(router: Arc<Router>) -> Self {
        Self { router }
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for KserveService {
    type ModelStreamInferStream = ReceiverStream<Result<ModelStreamInferResponse, Status>>;

    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.router.ready().is_ok() }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let model = model(&self.router, &name, &version).map_err(|e| error::to_status(&e))?;
        let ready = self.router.pairing.missing(&model.manifest, Quality::Overfill).is_empty();
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(&self, _: Request<ServerMetadataRequest>) -> Result<Response<ServerMetadataResponse>, Status> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(ServerMetadataResponse { name: "overfill".into(), version, extensions: Vec::new() }))
    }

    async fn model_metadata(&self, request: Request<ModelMetadataRequest>) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let model = model(&self.router, &name, &version).map_err(|e| error::to_status(&e))?;
        let tensor = |name: &str, datatype: &str| TensorMetadata { name: name.into(), datatype: datatype.into(), shape: vec![1] };
        let versions = self.router.models.versions(&model.manifest.name);
        Ok(Response::new(ModelMetadataResponse {
            name: model.manifest.name.clone(),
            versions: if versions.is_empty() { vec![VERSION.into()] } else { versions },
            platform: "overfill".into(),
            inputs: vec![
                tensor("text_input", "BYTES"),
                tensor("stream", "BOOL"),
                tensor("sampling_parameters", "BYTES"),
                tensor("exclude_input_in_output", "BOOL"),
            ],
            outputs: vec![tensor("text_output", "BYTES")],
        }))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let timeout = timeout_of(request.metadata().as_ref());
        let trace = super::trace(request.metadata().as_ref());
        let client = client_of(&request).map_err(|e| error::to_status(&e))?;
        let answered = async {
            let question = Question::read(request.into_inner())?;
            if question.stream {
                let message = "stream: ModelInfer gives one response; leave the input out, or call ModelStreamInfer";
                return Err(ServiceError::new(Code::InvalidArgument, message));
            }
            question.start(&self.router, &client, timeout, &trace).await?.whole().await
        };
        let mut response = answered.await.map(Response::new).map_err(|e| error::to_status(&e))?;
        trace.tell(response.metadata_mut().as_mut());
        Ok(response)
    }

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        // One that is too far away to be told is none.
        let until = timeout_of(request.metadata().as_ref()).and_then(|timeout| Instant::now().checked_add(timeout));
        let client = client_of(&request).map_err(|e| error::to_status(&e))?;
        let (headers, extensions, mut requests) = request.into_parts();
        let connection = extensions.get::<Connection>().cloned();
        let (sender, responses) = mpsc::channel(RESPONSES);
        let router = self.router.clone();
        // Owned by the responses: it ends when they are dropped, and the answer with it.
        tokio::spawn(async move {
            let serve = async {
                while let Ok(Some(request)) = requests.message().await {
                    // A stream without a request waits, and its connection with it.
                    let _busy = connection.as_ref().map(Connection::busy);
                    let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
                    let trace = super::trace(headers.as_ref());
                    let answered = async {
                        let question = Question::read(request)?;
                        let stream = question.stream;
                        let reply = question.start(&router, &client, timeout, &trace).await?;
                        if stream { reply.pieces(&sender).await } else { send(&sender, reply.whole().await?).await }
                    };
                    if let Err(error) = answered.await {
                        let response = ModelStreamInferResponse { error_message: error.message, infer_response: None };
                        // Closed: the client has gone, which ends this task.
                        let _ = sender.send(Ok(response)).await;
                    }
                }
            };
            tokio::select! {
                () = serve => {}
                () = sender.closed() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

fn refuse<T>(message: impl Into<String>) -> Result<T, ServiceError> {
    Err(ServiceError::new(Code::InvalidArgument, message))
}

fn model(router: &Router, name: &str, version: &str) -> Result<Arc<TextModel>, ServiceError> {
    let versions = router.models.versions(name);
    match version {
        "" => router.model(name),
        VERSION if versions.is_empty() => router.model(name),
        _ if versions.is_empty() => {
            let message = format!("version '{version}' is not served here: there is version {VERSION} of model '{name}'");
            Err(ServiceError::new(Code::NotFound, message))
        }
        _ => router.model(&format!("{name}@{version}")),
    }
}

/// What a request asks.
struct Question {
    id: String,
    /// Of the model, and of its version.
    name: String,
    version: String,
    text: String,
    stream: bool,
    /// The answer begins with `text`.
    with_input: bool,
    /// Contents came raw, and go so.
    raw: bool,
    asked: ClientRequest,
}

impl Question {
    fn read(request: ModelInferRequest) -> Result<Self, ServiceError> {
        let raw = !request.raw_input_contents.is_empty();
        if raw && request.raw_input_contents.len() != request.inputs.len() {
            return refuse(format!("{} raw contents were sent for {} inputs", request.raw_input_contents.len(), request.inputs.len()));
        }
        if let Some(other) = request.outputs.iter().find(|output| output.name != "text_output") {
            return refuse(format!("output '{}' is not offered: text_output is", other.name));
        }
        // What an input says counts, and then what the request says beside its inputs.
        let mut parameters: Map<String, Value> = unquoted(request.parameters.into_iter().filter_map(parameter).collect());
        let (mut text, mut stream, mut with_input) = (None, false, false);
        for (i, input) in request.inputs.iter().enumerate() {
            let tensor = Tensor { input, raw: request.raw_input_contents.get(i).map(|bytes| &bytes[..]) };
            match input.name.as_str() {
                "text_input" => text = Some(tensor.text()?),
                "stream" => stream = tensor.truth()?,
                "exclude_input_in_output" => with_input = !tensor.truth()?,
                "sampling_parameters" => parameters.extend(sampling_parameters(&tensor.text()?)?),
                other => return refuse(format!("input '{other}' is not known: see ModelMetadata")),
            }
        }
        let Some(text) = text else { return refuse("input text_input is missing") };
        let fields = |e: serde_json::Error| ServiceError::new(Code::InvalidArgument, format!("sampling_parameters: {e}"));
        let sampling: SamplingFields = serde_json::from_value(Value::Object(parameters.clone())).map_err(fields)?;
        let guide: GuideFields = serde_json::from_value(Value::Object(parameters)).map_err(fields)?;
        let mut asked = sampling.asked(vec![Input::Text { text: text.clone(), special_tokens: true }], None)?;
        asked.sampling.guide = guide_of(guide)?;
        let (name, version) = (request.model_name, request.model_version);
        Ok(Self { id: request.id, name, version, text, stream, with_input, raw, asked })
    }

    async fn start(
        self,
        router: &Arc<Router>,
        client: &Arc<Client>,
        timeout: Option<Duration>,
        trace: &Trace,
    ) -> Result<Reply, ServiceError> {
        let Self { id, name, version, text, with_input, raw, asked, .. } = self;
        let model = model(router, &name, &version)?;
        let request = router.admit_one(client, &model, ClientRequest { timeout, ..asked }, trace).await?;
        let model = model.manifest.name.clone();
        let before = if with_input { text } else { String::new() };
        let prompt_tokens = request.prompt.len();
        Ok(Reply { id, model, before, raw, prompt_tokens, answer: relay::start(router.clone(), request) })
    }
}

/// A parameter of the request itself, where it has a value.
fn parameter((name, InferParameter { parameter_choice }): (String, InferParameter)) -> Option<(String, Value)> {
    let value = match parameter_choice? {
        ParameterChoice::BoolParam(value) => value.into(),
        ParameterChoice::Int64Param(value) => value.into(),
        ParameterChoice::Uint64Param(value) => value.into(),
        ParameterChoice::DoubleParam(value) => value.into(),
        ParameterChoice::StringParam(value) => value.into(),
    };
    Some((name, value))
}

fn sampling_parameters(text: &str) -> Result<Map<String, Value>, ServiceError> {
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    match serde_json::from_str(text) {
        Ok(parameters) => Ok(unquoted(parameters)),
        Err(e) => refuse(format!("sampling_parameters: a JSON object is wanted: {e}")),
    }
}

/// Without the quotes around numbers and truth values, which some clients send.
fn unquoted(mut parameters: Map<String, Value>) -> Map<String, Value> {
    for (name, value) in &mut parameters {
        let quoted = value.as_str().filter(|_| !TEXTS.contains(&name.as_str())).and_then(|text| serde_json::from_str(text).ok());
        if let Some(plain @ (Value::Number(_) | Value::Bool(_))) = quoted {
            *value = plain;
        }
    }
    parameters
}

/// One input and its contents, of which there is one element.
struct Tensor<'a> {
    input: &'a InferInputTensor,
    raw: Option<&'a [u8]>,
}

impl Tensor<'_> {
    fn text(&self) -> Result<String, ServiceError> {
        let name = &self.input.name;
        let bytes = match (self.raw, self.input.contents.as_ref().map(|c| c.bytes_contents.as_slice())) {
            (Some(raw), _) => match raw.split_first_chunk() {
                Some((length, bytes)) if u32::from_le_bytes(*length) as usize == bytes.len() => bytes,
                _ => return refuse(format!("input {name}: one element is wanted, its length (4 bytes, little endian) before it")),
            },
            (None, Some([one])) => &one[..],
            _ => return refuse(format!("input {name}: one element of type BYTES is wanted")),
        };
        self.is_of("BYTES")?;
        String::from_utf8(bytes.to_vec()).or_else(|_| refuse(format!("input {name}: it is not UTF-8")))
    }

    fn truth(&self) -> Result<bool, ServiceError> {
        self.is_of("BOOL")?;
        match (self.raw, self.input.contents.as_ref().map(|c| c.bool_contents.as_slice())) {
            (Some([byte]), _) => Ok(*byte != 0),
            (None, Some([truth])) => Ok(*truth),
            _ => refuse(format!("input {}: one element of type BOOL is wanted", self.input.name)),
        }
    }

    fn is_of(&self, datatype: &str) -> Result<(), ServiceError> {
        let InferInputTensor { name, datatype: got, .. } = self.input;
        if got == datatype { Ok(()) } else { refuse(format!("input {name}: its type is {got}, {datatype} is wanted")) }
    }
}

/// An answer under way.
struct Reply {
    id: String,
    model: String,
    /// What the answer begins with.
    before: String,
    raw: bool,
    prompt_tokens: usize,
    answer: Answer,
}

impl Reply {
    async fn whole(mut self) -> Result<ModelInferResponse, ServiceError> {
        let mut text = std::mem::take(&mut self.before);
        while let Some(event) = self.answer.recv().await {
            match event? {
                Event::PromptRead(_) => {}
                Event::Delta { text: more, .. } => text += &more,
                Event::Finished(end) => return Ok(self.response(text, Some(&end))),
            }
        }
        Err(ServiceError::new(Code::Internal, "the answer broke off: send the request again"))
    }

    async fn pieces(mut self, to: &mpsc::Sender<Result<ModelStreamInferResponse, Status>>) -> Result<(), ServiceError> {
        while let Some(event) = self.answer.recv().await {
            match event? {
                Event::PromptRead(_) => {}
                Event::Delta { text, .. } => {
                    let text = std::mem::take(&mut self.before) + &text;
                    if !text.is_empty() {
                        send(to, self.response(text, None)).await?;
                    }
                }
                Event::Finished(end) => return send(to, self.response(String::new(), Some(&end))).await,
            }
        }
        Err(ServiceError::new(Code::Internal, "the answer broke off: send the request again"))
    }

    /// With `text`; the last one if an end is given.
    fn response(&self, text: String, end: Option<&End>) -> ModelInferResponse {
        let mut parameters = HashMap::new();
        let mut set = |name: &str, choice| parameters.insert(name.to_owned(), InferParameter { parameter_choice: Some(choice) });
        set("triton_final_response", ParameterChoice::BoolParam(end.is_some()));
        if let Some(end) = end {
            set("finish_reason", ParameterChoice::StringParam(end.reason.as_str().into()));
            set("served_by", ParameterChoice::StringParam(frontend::served_by(&end.served_by)));
            set("prompt_tokens", ParameterChoice::Int64Param(self.prompt_tokens as i64));
            set("completion_tokens", ParameterChoice::Int64Param(end.completion_tokens as i64));
        }
        let (contents, raw) = if self.raw {
            let mut element = (text.len() as u32).to_le_bytes().to_vec();
            element.extend_from_slice(text.as_bytes());
            (None, vec![element.into()])
        } else {
            (Some(InferTensorContents { bytes_contents: vec![text.into_bytes().into()], ..Default::default() }), Vec::new())
        };
        let output = InferOutputTensor {
            name: "text_output".into(),
            datatype: "BYTES".into(),
            shape: vec![1],
            parameters: HashMap::new(),
            contents,
        };
        ModelInferResponse {
            model_name: self.model.clone(),
            model_version: VERSION.into(),
            id: self.id.clone(),
            parameters,
            outputs: vec![output],
            raw_output_contents: raw,
        }
    }
}

async fn send(to: &mpsc::Sender<Result<ModelStreamInferResponse, Status>>, response: ModelInferResponse) -> Result<(), ServiceError> {
    let response = ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) };
    to.send(Ok(response)).await.map_err(|_| ServiceError::new(Code::Cancelled, "the client has gone"))
}
