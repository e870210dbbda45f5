//! One request gives the same words by whatever door it comes: completions whole and streamed, several answers, gRPC, KServe
//! with either kind of contents; under a guide that does not bind; and its first token's log-probabilities are the full model's.

use overfill_proto::kserve::grpc_inference_service_client::GrpcInferenceServiceClient;
use overfill_proto::kserve::infer_parameter::ParameterChoice;
use overfill_proto::kserve::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use overfill_proto::kserve::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelReadyRequest, ServerLiveRequest,
    ServerReadyRequest,
};
use overfill_proto::v1::{Guide, Sampling, generate_event, generate_request, guide};
use overfill_tests::cluster::{Builder, Cluster, request};
use overfill_tests::tiny::{self, Kind};
use overfill_types::{GenerationConfig, SamplingParams};
use serde_json::{Value, json};
use tonic::Code;
use tonic::codec::CompressionEncoding;
use tonic::transport::Channel;

const PROMPT: &str = "hello, world";
const NEW: u64 = 24;
/// A guide that all text fits.
const ANYTHING: &str = r"(?s:.*)";

/// All but ASCII is kept out, so that the answer is text for any guide.
fn ascii() -> Value {
    (128..260).map(|id: u32| (id.to_string(), json!(-100))).collect::<serde_json::Map<_, _>>().into()
}

fn asked(sampling: &Value, more: Value) -> Value {
    let mut body = json!({ "prompt": PROMPT, "max_tokens": NEW, "ignore_eos": true, "logit_bias": ascii() });
    for part in [sampling, &more] {
        body.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
    }
    body
}

async fn post(cluster: &Cluster, body: &Value) -> Value {
    let sent = reqwest::Client::new().post(format!("{}/v1/completions", cluster.http)).json(body).send().await.unwrap();
    let (status, by) = (sent.status(), sent.headers().contains_key("x-overfill-served-by"));
    let answer: Value = sent.json().await.unwrap();
    assert!(status == 200 && by, "{answer}");
    answer
}

async fn streamed(cluster: &Cluster, body: &Value, answers: usize) -> Vec<String> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    let sent = reqwest::Client::new().post(format!("{}/v1/completions", cluster.http)).json(&body).send().await.unwrap();
    assert!(sent.headers().contains_key("x-overfill-served-by"));
    let text = sent.text().await.unwrap();
    let mut texts = vec![String::new(); answers];
    for data in text.lines().filter_map(|l| l.strip_prefix("data: ")).filter(|d| *d != "[DONE]") {
        let chunk: Value = serde_json::from_str(data).unwrap();
        for choice in chunk["choices"].as_array().unwrap() {
            texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
        }
    }
    texts
}

async fn over_grpc(cluster: &Cluster, sampling: &Value, guide: Option<Guide>) -> String {
    let mut client = cluster.client().await.send_compressed(CompressionEncoding::Gzip);
    let mut ask = request(&[], &SamplingParams::greedy(), NEW as u32);
    ask.input = Some(generate_request::Input::Text(PROMPT.into()));
    ask.ignore_eos = true;
    ask.sampling = Some(Sampling {
        temperature: sampling["temperature"].as_f64().map(|t| t as f32),
        top_p: sampling["top_p"].as_f64().map(|p| p as f32),
        seed: sampling["seed"].as_u64(),
        logit_bias: (128..260).map(|id| (id, -100.0)).collect(),
        guide,
        ..Default::default()
    });
    let mut events = client.generate(ask).await.unwrap().into_inner();
    let mut text = String::new();
    while let Some(event) = events.message().await.unwrap() {
        if let Some(generate_event::Event::Delta(delta)) = event.event {
            text += &delta.text;
        }
    }
    text
}

fn infer(parameters: &Value, stream: Option<bool>, raw: bool) -> ModelInferRequest {
    let mut inputs = Vec::new();
    let mut contents = Vec::new();
    let mut input = |name: &str, datatype: &str, bytes: Vec<u8>| {
        let mut tensor = InferInputTensor { name: name.into(), datatype: datatype.into(), shape: vec![1], ..Default::default() };
        if raw {
            let length = (bytes.len() as u32).to_le_bytes();
            contents.push(if datatype == "BYTES" { [&length[..], &bytes].concat().into() } else { bytes.into() });
        } else {
            let mut own = InferTensorContents::default();
            match datatype {
                "BYTES" => own.bytes_contents = vec![bytes.into()],
                _ => own.bool_contents = vec![bytes[0] != 0],
            }
            tensor.contents = Some(own);
        }
        inputs.push(tensor);
    };
    input("text_input", "BYTES", PROMPT.into());
    input("sampling_parameters", "BYTES", parameters.to_string().into_bytes());
    if let Some(stream) = stream {
        input("stream", "BOOL", vec![u8::from(stream)]);
    }
    ModelInferRequest { model_name: "tiny".into(), id: "7".into(), inputs, raw_input_contents: contents, ..Default::default() }
}

fn text(response: &ModelInferResponse) -> String {
    let output = &response.outputs[0];
    assert_eq!((output.name.as_str(), output.datatype.as_str(), response.id.as_str()), ("text_output", "BYTES", "7"));
    match (&output.contents, response.raw_output_contents.as_slice()) {
        (Some(contents), []) => String::from_utf8(contents.bytes_contents[0].to_vec()).unwrap(),
        (None, [raw]) => {
            assert_eq!(u32::from_le_bytes(raw[..4].try_into().unwrap()) as usize, raw.len() - 4);
            String::from_utf8(raw[4..].to_vec()).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

async fn over_kserve(client: &mut GrpcInferenceServiceClient<Channel>, parameters: &Value) -> Vec<String> {
    let mut texts = Vec::new();
    for raw in [false, true] {
        let whole = client.model_infer(infer(parameters, None, raw)).await.unwrap().into_inner();
        assert!(
            matches!(&whole.parameters["served_by"].parameter_choice, Some(ParameterChoice::StringParam(by)) if by.starts_with("overfill "))
        );
        texts.push(text(&whole));
        // Three answers one after another, the second of which fails.
        let mut wrong = infer(parameters, Some(true), raw);
        wrong.model_name = "other".into();
        let asked = [infer(parameters, Some(true), raw), wrong, infer(parameters, Some(false), raw)];
        let mut answers = client.model_stream_infer(tokio_stream::iter(asked)).await.unwrap().into_inner();
        let (mut all, mut ended, mut failed) = (vec![String::new()], 0, 0);
        while let Some(answer) = answers.message().await.unwrap() {
            let Some(response) = answer.infer_response else {
                assert!(answer.error_message.contains("other"), "{}", answer.error_message);
                failed += 1;
                continue;
            };
            *all.last_mut().unwrap() += &text(&response);
            if response.parameters["triton_final_response"].parameter_choice == Some(ParameterChoice::BoolParam(true)) {
                ended += 1;
                all.push(String::new());
            }
        }
        assert_eq!((ended, failed), (2, 1));
        all.pop();
        texts.extend(all);
    }
    texts
}

#[tokio::test(flavor = "multi_thread")]
async fn by_every_door() {
    let pair = tiny::pair(Kind::Identity, 33);
    let cluster = Builder::new(&pair.dir).start().await;
    let mut kserve = GrpcInferenceServiceClient::connect(cluster.grpc.clone()).await.unwrap().send_compressed(CompressionEncoding::Zstd);
    for sampling in [json!({ "temperature": 0 }), json!({ "temperature": 0.9, "top_p": 0.9, "seed": 5 })] {
        let plain = asked(&sampling, json!({}));
        let expected = post(&cluster, &plain).await["choices"][0]["text"].as_str().unwrap().to_owned();
        assert!(expected.is_ascii() && expected.len() > 5, "{expected:?}");
        assert_eq!(streamed(&cluster, &plain, 1).await, std::slice::from_ref(&expected));
        assert_eq!(over_grpc(&cluster, &sampling, None).await, expected);
        let parameters = asked(&sampling, json!({}));
        assert_eq!(over_kserve(&mut kserve, &parameters).await, vec![expected.clone(); 6], "{sampling}");

        // Several answers: the first is the one; under greedy choice all are.
        let four = asked(&sampling, json!({ "n": 4 }));
        let answer = post(&cluster, &four).await;
        let texts: Vec<&str> = answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!((texts.len(), texts[0]), (4, expected.as_str()));
        if sampling["temperature"] == 0 {
            assert_eq!(texts, [expected.as_str(); 4]);
        } else {
            assert!(texts[1..].iter().all(|t| *t != expected), "{texts:?}");
        }
        assert_eq!(streamed(&cluster, &four, 4).await, texts, "{sampling}");
        assert_eq!(answer["usage"]["completion_tokens"], json!(4 * NEW));
        assert_eq!(answer["usage"]["prompt_tokens"], json!(PROMPT.len()), "it was read once");

        // A guide that all of it fits.
        let guided = asked(&sampling, json!({ "guided_regex": ANYTHING }));
        assert_eq!(post(&cluster, &guided).await["choices"][0]["text"], json!(expected), "{sampling}");
        let guide = Guide { kind: Some(guide::Kind::Regex(ANYTHING.into())) };
        assert_eq!(over_grpc(&cluster, &sampling, Some(guide)).await, expected);
        assert_eq!(over_kserve(&mut kserve, &guided).await, vec![expected.clone(); 6]);
    }
    cluster.nothing_is_held(std::time::Duration::from_secs(1)).await;
}

/// What chooses tokens may stand among the request's own parameters, as Triton's clients send it.
#[tokio::test(flavor = "multi_thread")]
async fn a_kserve_request_is_read_whole() {
    let pair = tiny::pair(Kind::Identity, 33);
    let cluster = Builder::new(&pair.dir).start().await;
    let mut client = GrpcInferenceServiceClient::connect(cluster.grpc.clone()).await.unwrap();
    let greedy = asked(&json!({ "temperature": 0 }), json!({}));
    let expected = post(&cluster, &greedy).await["choices"][0]["text"].as_str().unwrap().to_owned();
    let parameter = |choice| InferParameter { parameter_choice: Some(choice) };
    let mut beside = infer(&json!({ "logit_bias": ascii(), "ignore_eos": true, "max_tokens": NEW }), None, false);
    beside.parameters.insert("temperature".into(), parameter(ParameterChoice::DoubleParam(0.0)));
    // An input counts before it.
    beside.parameters.insert("max_tokens".into(), parameter(ParameterChoice::Int64Param(3)));
    beside.parameters.insert("sequence_id".into(), parameter(ParameterChoice::StringParam("of others".into())));
    assert_eq!(text(&client.model_infer(beside.clone()).await.unwrap().into_inner()), expected);
    beside.parameters.insert("top_p".into(), parameter(ParameterChoice::StringParam("2".into())));
    assert_eq!(client.model_infer(beside).await.unwrap_err().code(), Code::InvalidArgument);

    let mut empty = infer(&json!({}), None, false);
    empty.inputs[1].contents = Some(InferTensorContents { bytes_contents: vec!["".into()], ..Default::default() });
    empty.parameters.insert("max_tokens".into(), parameter(ParameterChoice::Int64Param(3)));
    assert_eq!(client.model_infer(empty.clone()).await.unwrap().into_inner().outputs.len(), 1);
    for (name, right) in [("text_output", true), ("logits", false)] {
        empty.outputs = vec![InferRequestedOutputTensor { name: name.into(), ..Default::default() }];
        let answered = client.model_infer(empty.clone()).await;
        assert_eq!(answered.err().map(|e| e.code()), Some(Code::InvalidArgument).filter(|_| !right), "{name}");
    }
}

/// The pair says it, or the router's flag; the request goes before both.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_request_does_not_say_is_the_models() {
    let says_nothing = tiny::pair(Kind::Identity, 33);
    let greedy = GenerationConfig { temperature: Some(0.0), ..GenerationConfig::default() };
    let says_greedy = tiny::pair(Kind::Identity, 33).choosing(greedy);
    let file = says_nothing.dir.join("generation_config.json");
    std::fs::write(&file, r#"{"eos_token_id": 2, "temperature": 0, "top_p": 0.5}"#).unwrap();
    let file = file.display().to_string();
    let seeded = json!({ "seed": 5 });
    let drawn = json!({ "seed": 5, "temperature": 1, "top_p": 1 });
    let mut told = Vec::new();
    for (pair, flags, like) in [
        (&says_nothing, &[][..], &drawn),
        (&says_greedy, &[][..], &json!({ "temperature": 0 })),
        (&says_greedy, &["--generation-config", "none"][..], &drawn),
        (&says_nothing, &["--generation-config", &file][..], &json!({ "temperature": 0 })),
    ] {
        let cluster = Builder::new(&pair.dir).router_flags(flags).start().await;
        let mut kserve = GrpcInferenceServiceClient::connect(cluster.grpc.clone()).await.unwrap();
        let expected = post(&cluster, &asked(like, json!({}))).await["choices"][0]["text"].as_str().unwrap().to_owned();
        let unsaid = post(&cluster, &asked(&seeded, json!({}))).await["choices"][0]["text"].as_str().unwrap().to_owned();
        assert_eq!(unsaid, expected, "{flags:?}");
        assert_eq!(over_grpc(&cluster, &seeded, None).await, expected, "{flags:?}");
        assert_eq!(over_kserve(&mut kserve, &asked(&seeded, json!({}))).await, vec![expected.clone(); 6], "{flags:?}");
        // What it says itself is as it says.
        let said = post(&cluster, &asked(&drawn, json!({}))).await["choices"][0]["text"].as_str().unwrap().to_owned();
        told.push((expected, said));
    }
    let (drawn, greedy) = (&told[0].0, &told[1].0);
    assert!(drawn != greedy && &told[2].0 == drawn && &told[3].0 == greedy);
    assert!(told.iter().all(|(_, said)| said == drawn));
}

#[tokio::test(flavor = "multi_thread")]
async fn kserve_tells_what_there_is() {
    let pair = tiny::pair(Kind::Identity, 33);
    let cluster = Builder::new(&pair.dir).start().await;
    let mut client = GrpcInferenceServiceClient::connect(cluster.grpc.clone()).await.unwrap();
    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let named = |name: &str, version: &str| ModelReadyRequest { name: name.into(), version: version.into() };
    assert!(client.model_ready(named("tiny", "1")).await.unwrap().into_inner().ready);
    for (name, version) in [("other", ""), ("tiny", "2")] {
        assert_eq!(client.model_ready(named(name, version)).await.unwrap_err().code(), tonic::Code::NotFound);
    }
    let metadata = client.model_metadata(ModelMetadataRequest { name: "tiny".into(), version: String::new() }).await.unwrap().into_inner();
    assert!(metadata.inputs.iter().any(|i| i.name == "text_input" && i.datatype == "BYTES") && metadata.outputs[0].name == "text_output");

    let parameters = json!({ "max_tokens": "3", "temperature": "0" });
    let mut with_input = infer(&parameters, None, false);
    let contents = Some(InferTensorContents { bool_contents: vec![false], ..Default::default() });
    let exclude = InferInputTensor {
        name: "exclude_input_in_output".into(),
        datatype: "BOOL".into(),
        shape: vec![1],
        contents,
        ..Default::default()
    };
    with_input.inputs.push(exclude);
    assert!(text(&client.model_infer(with_input).await.unwrap().into_inner()).starts_with(PROMPT));

    type Change = fn(&mut ModelInferRequest);
    let cases: [(Change, &str); 6] = [
        (|r| drop(r.inputs.remove(0)), "text_input is missing"),
        (|r| r.inputs[0].name = "text".into(), "'text' is not known"),
        (|r| r.inputs[0].datatype = "INT32".into(), "INT32"),
        (|r| r.inputs[0].contents = None, "one element"),
        (|r| r.raw_input_contents = vec![vec![1].into()], "raw contents"),
        (|r| r.model_version = "3".into(), "version '3'"),
    ];
    for (change, word) in cases {
        let mut wrong = infer(&parameters, None, false);
        change(&mut wrong);
        let error = client.model_infer(wrong).await.unwrap_err();
        assert!(error.message().contains(word), "{error}");
    }
    let error = client.model_infer(infer(&json!({ "temperature": -1 }), None, false)).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    let error = client.model_infer(infer(&parameters, Some(true), false)).await.unwrap_err();
    assert!(error.message().contains("ModelStreamInfer"), "{error}");
}

/// Deadlines that no clock reaches: 580,000 million years, and ten thousand.
#[tokio::test(flavor = "multi_thread")]
async fn with_a_deadline_that_is_too_far_away_to_be_told() {
    let pair = tiny::pair(Kind::Identity, 33);
    let cluster = Builder::new(&pair.dir).start().await;
    let mut kserve = GrpcInferenceServiceClient::connect(cluster.grpc.clone()).await.unwrap();
    let parameters = asked(&json!({ "temperature": 0 }), json!({}));
    for timeout in ["18446744073709551615S", "99999999H"] {
        let mut stream = tonic::Request::new(tokio_stream::iter([infer(&parameters, Some(false), false)]));
        stream.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
        let answer = kserve.model_stream_infer(stream).await.unwrap().into_inner().message().await.unwrap().unwrap();
        assert!(answer.infer_response.is_some(), "{timeout}: {}", answer.error_message);
        let mut one = tonic::Request::new(infer(&parameters, None, false));
        one.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
        kserve.model_infer(one).await.unwrap();
    }
}
