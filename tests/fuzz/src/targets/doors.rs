//! Requests of clients, at both doors of a router that has no nodes: what is read is read before nodes are asked for.

use std::sync::Arc;

use axum::Router as Routes;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use clap::Parser;
use http_body_util::BodyExt;
use overfill_cluster::Discovery;
use overfill_lifecycle::Drain;
use overfill_proto::kserve::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use overfill_proto::kserve::{InferTensorContents, ModelInferRequest};
use overfill_proto::v1::{Chat, ChatMessage, GenerateRequest, Sampling, generate_request};
use overfill_router::{Models, Router, RouterConfig};
use overfill_tests::processes::binary;
use overfill_tests::tiny::{self, TinyPair};
use overfill_transport::Connector;
use prost::Message;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt;

use crate::{Target, about_to_read, mutate};

/// A router whose doors are asked directly.
#[derive(Clone)]
struct Asked {
    runtime: Arc<Runtime>,
    router: Arc<Router>,
    _pair: Arc<TinyPair>,
}

impl Asked {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().expect("there is a thread");
        let pair = tiny::pair_with_tools(tiny::Kind::Identity, 1);
        let (dir, compiler) = (pair.dir.display().to_string(), binary("router").display().to_string());
        let flags = ["router", "--pair", &dir, "--guide-compiler", &compiler, "--guide-seconds", "0.2", "--read-timeout", "1"];
        let cli = overfill_router::config::Cli::parse_from(flags);
        let config = RouterConfig::new(cli.pair, cli.bounds);
        let models = Models::open(&config).expect("the pair is whole");
        let router = runtime.block_on(async { Router::new(config, models, &Discovery::memory(), Connector::default(), Drain::new()) });
        Self { runtime: Arc::new(runtime), router: router.expect("a router can be made"), _pair: Arc::new(pair) }
    }

    /// The answer: its status, all of its text, and the trailers.
    fn ask(&self, routes: Routes, request: Request<Body>) -> (StatusCode, Vec<u8>, HeaderMap) {
        self.runtime.block_on(async {
            let answer = routes.oneshot(request).await.unwrap_or_else(|never| match never {});
            let (head, body) = answer.into_parts();
            let body = body.collect().await.expect("an answer is whole");
            let mut trailers = head.headers;
            trailers.extend(body.trailers().cloned().unwrap_or_default());
            (head.status, body.to_bytes().to_vec(), trailers)
        })
    }
}

/// Bodies of HTTP.
struct Http {
    asked: Asked,
    name: &'static str,
    path: &'static str,
    right: Vec<Value>,
}

impl Target for Http {
    fn name(&self) -> &'static str {
        self.name
    }

    fn read(&mut self, draws: &mut StdRng) -> Result<(), String> {
        let right = &self.right[draws.random_range(0..self.right.len())];
        let body = if draws.random_range(0..4) == 0 {
            mutate::bytes(right.to_string().as_bytes(), draws)
        } else {
            mutate::value(right, draws).to_string().into_bytes()
        };
        about_to_read(&body);
        let request = Request::post(self.path).header("content-type", "application/json").body(Body::from(body));
        let (status, body, _) = self.asked.ask(self.asked.router.http(false), request.map_err(|error| error.to_string())?);
        let told = String::from_utf8_lossy(&body).into_owned();
        // There are no nodes: whoever asked for an answer in the right way is told so.
        let known = status.is_success() || status.is_client_error() || status == StatusCode::SERVICE_UNAVAILABLE;
        if !known {
            return Err(format!("it was answered with {status}: {told}"));
        }
        if !status.is_success() {
            let error: Value = serde_json::from_str(&told).map_err(|_| format!("{status} without an error as JSON: {told}"))?;
            let message = error["error"]["message"].as_str().unwrap_or_default();
            if message.is_empty() || message.contains("panicked") || message.contains("/src/") {
                return Err(format!("{status} with a message that says nothing, or too much: {told}"));
            }
        }
        Ok(())
    }
}

/// Messages of gRPC.
struct Grpc {
    asked: Asked,
    name: &'static str,
    path: &'static str,
    right: Vec<Vec<u8>>,
    /// Whether the message is right, and how long the client waits is not.
    timeout: bool,
}

impl Target for Grpc {
    fn name(&self) -> &'static str {
        self.name
    }

    fn read(&mut self, draws: &mut StdRng) -> Result<(), String> {
        let right = &self.right[draws.random_range(0..self.right.len())];
        let mut request = Request::post(self.path).header("content-type", "application/grpc").header("te", "trailers");
        let message = if self.timeout {
            let right = ["10S", "100m", "99999999H", "1n"][draws.random_range(0..4)];
            let timeout: Vec<u8> = mutate::bytes(right.as_bytes(), draws).into_iter().filter(|byte| (32..127).contains(byte)).collect();
            about_to_read(&timeout);
            request = request.header("grpc-timeout", timeout);
            right_framed(&self.right[0])
        } else {
            let message = mutate::bytes(right, draws);
            about_to_read(&message);
            let framed = right_framed(&message);
            if draws.random_range(0..8) == 0 { mutate::bytes(&framed, draws) } else { framed }
        };
        let request = request.body(Body::from(message)).map_err(|error| error.to_string())?;
        let (status, _, trailers) = self.asked.ask(self.asked.router.grpc(), request);
        let told = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        let (code, message) = (told("grpc-status"), told("grpc-message"));
        // What is no message at all gRPC's own code tells as internal.
        let no_message =
            ["decod", "protocol", "Missing%20request"].iter().any(|what| message.to_lowercase().contains(&what.to_lowercase()));
        let internal = code == "13" && !no_message;
        if status != StatusCode::OK || code.is_empty() || internal || code == "2" || message.contains("panicked") {
            return Err(format!("it was answered with {status}, {code}: {message}"));
        }
        Ok(())
    }
}

/// A message as gRPC frames it.
fn right_framed(message: &[u8]) -> Vec<u8> {
    let mut framed = vec![0];
    framed.extend((message.len() as u32).to_be_bytes());
    framed.extend(message);
    framed
}

pub(super) fn all() -> Vec<Box<dyn Target>> {
    let asked = Asked::new();
    let schema = json!({ "type": "object", "properties": { "a": { "type": "integer" }, "b": { "enum": ["x", "y"] } }, "required": ["a"] });
    let tool = json!({ "type": "function", "function": { "name": "weather", "description": "of a city", "parameters": schema } });
    let chat = vec![
        json!({ "model": "tiny", "messages": [{ "role": "system", "content": "be brief" }, { "role": "user", "content": "hello" }],
            "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x", "yz"], "logprobs": true, "top_logprobs": 2 }),
        json!({ "model": "tiny", "messages": [{ "role": "user", "content": [{ "type": "text", "text": "hello" }] }],
            "response_format": { "type": "json_schema", "json_schema": { "name": "n", "schema": schema } }, "stream": true,
            "stream_options": { "include_usage": true } }),
        json!({ "model": "tiny", "messages": [{ "role": "user", "content": "weather?" },
            { "role": "assistant", "content": null, "tool_calls": [{ "id": "c", "type": "function",
                "function": { "name": "weather", "arguments": "{\"a\": 1}" } }] },
            { "role": "tool", "tool_call_id": "c", "content": "warm" }], "tools": [tool], "tool_choice": "required", "n": 2 }),
    ];
    let completion = vec![
        json!({ "model": "tiny", "prompt": "hello", "max_tokens": 8, "logit_bias": { "5": -3.0 }, "echo": true, "logprobs": 1 }),
        json!({ "model": "tiny", "prompt": [1, 2, 3], "guided_regex": "[a-z]{1,5}( [0-9]+)*", "quality": "full", "min_p": 0.1 }),
        json!({ "model": "tiny", "prompt": ["a", "b"], "guided_grammar": "start: r0\nr0: \"a\" r1\nr1: \"b\"+", "priority": 1 }),
        json!({ "model": "tiny", "prompt": "x", "guided_choice": ["yes", "no"], "cache_salt": "s", "repetition_penalty": 1.1 }),
        json!({ "model": "tiny", "prompt": "x", "structured_outputs": { "json": schema, "whitespace_pattern": "[ ]?" } }),
    ];
    let tokenize = vec![
        json!({ "prompt": "hello", "add_special_tokens": true }),
        json!({ "messages": chat[2]["messages"], "tools": chat[2]["tools"] }),
    ];
    let responses = vec![
        json!({ "model": "tiny", "input": "hello", "instructions": "be brief", "max_output_tokens": 8, "temperature": 0.5,
            "text": { "format": { "type": "json_schema", "name": "n", "schema": schema } }, "include": ["message.output_text.logprobs"] }),
        json!({ "model": "tiny", "input": [{ "role": "user", "content": [{ "type": "input_text", "text": "weather?" }] },
            { "type": "function_call", "call_id": "c", "name": "weather", "arguments": "{\"a\": 1}" },
            { "type": "function_call_output", "call_id": "c", "output": "warm" }, { "type": "reasoning", "summary": [] }],
            "tools": [{ "type": "function", "name": "weather", "parameters": schema }],
            "tool_choice": { "type": "function", "name": "weather" }, "stream": true }),
    ];
    let messages = vec![
        json!({ "model": "tiny", "max_tokens": 8, "system": [{ "type": "text", "text": "be brief" }], "top_k": 5,
            "messages": [{ "role": "user", "content": "hello" }, { "role": "assistant", "content": "So" }], "stop_sequences": ["x"] }),
        json!({ "model": "tiny", "max_tokens": 8, "messages": [{ "role": "user", "content": "weather?" },
            { "role": "assistant", "content": [{ "type": "text", "text": "see" }, { "type": "tool_use", "id": "c", "name": "weather", "input": { "a": 1 } }] },
            { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "c", "content": [{ "type": "text", "text": "warm" }] }] }],
            "tools": [{ "name": "weather", "description": "of a city", "input_schema": schema }], "tool_choice": { "type": "any" }, "stream": true }),
    ];
    let detokenize = vec![json!({ "tokens": [1, 2, 3, 250, 259] })];
    let http = [
        ("chat", "/v1/chat/completions", chat),
        ("completions", "/v1/completions", completion),
        ("responses", "/v1/responses", responses),
        ("messages", "/v1/messages", messages.clone()),
        ("count-tokens", "/v1/messages/count_tokens", messages),
        ("tokenize", "/tokenize", tokenize),
        ("detokenize", "/detokenize", detokenize),
    ];
    let mut all: Vec<Box<dyn Target>> = Vec::new();
    for (name, path, right) in http {
        all.push(Box::new(Http { asked: asked.clone(), name, path, right }));
    }
    let message = ChatMessage { role: "user".into(), content: "hello".into() };
    let generate = GenerateRequest {
        model: "tiny".into(),
        input: Some(generate_request::Input::Chat(Chat { messages: vec![message.clone(), message] })),
        sampling: Some(Sampling { temperature: Some(0.7), top_p: Some(0.9), ..Sampling::default() }),
        max_tokens: Some(5),
        stop: vec!["x".into()],
        ..GenerateRequest::default()
    };
    let text = InferTensorContents { bytes_contents: vec![b"hello".to_vec().into()], ..InferTensorContents::default() };
    let input = InferInputTensor {
        name: "text_input".into(),
        datatype: "BYTES".into(),
        shape: vec![1],
        contents: Some(text),
        ..InferInputTensor::default()
    };
    let output = InferRequestedOutputTensor { name: "text_output".into(), ..InferRequestedOutputTensor::default() };
    let infer = ModelInferRequest { model_name: "tiny".into(), inputs: vec![input], outputs: vec![output], ..ModelInferRequest::default() };
    let (generate, infer) = (vec![generate.encode_to_vec()], vec![infer.encode_to_vec()]);
    let grpc = [
        ("generate", "/overfill.v1.Inference/Generate", generate.clone(), false),
        ("kserve", "/inference.GRPCInferenceService/ModelInfer", infer.clone(), false),
        ("timeout", "/overfill.v1.Inference/Generate", generate, true),
        ("kserve-timeout", "/inference.GRPCInferenceService/ModelInfer", infer, true),
    ];
    for (name, path, right, timeout) in grpc {
        all.push(Box::new(Grpc { asked: asked.clone(), name, path, right, timeout }));
    }
    all
}
