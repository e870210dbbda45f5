//! What clients rely on: shapes of answers, streams and their end, stop strings, log-probabilities, health, reflection.

use std::time::Duration;

use overfill_proto::v1::{Chat, ChatMessage, FinishReason, ListModelsRequest, generate_event, generate_request};
use overfill_tests::cluster::{Builder, Cluster, request};
use overfill_tests::processes::{Process, eventually, free_port};
use overfill_tests::scrape::Scrape;
use overfill_tests::tiny::{self, Kind};
use overfill_types::SamplingParams;
use serde_json::{Value, json};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

async fn post(cluster: &Cluster, path: &str, body: &Value) -> Value {
    let sent = reqwest::Client::new().post(format!("{}{path}", cluster.http)).json(body).send().await.unwrap();
    assert_eq!(sent.status(), 200);
    assert!(sent.headers().contains_key("x-request-id"));
    sent.json().await.unwrap()
}

/// The data of a server-sent stream, the closing `[DONE]` checked and left out.
async fn stream(cluster: &Cluster, path: &str, body: &Value) -> Vec<Value> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    let sent = reqwest::Client::new().post(format!("{}{path}", cluster.http)).json(&body).send().await.unwrap();
    assert_eq!(sent.headers()["content-type"], "text/event-stream");
    let text = sent.text().await.unwrap();
    let mut data: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    assert_eq!(data.pop(), Some("[DONE]"));
    data.into_iter().map(|d| serde_json::from_str(d).unwrap()).collect()
}

fn joined(chunks: &[Value], field: impl Fn(&Value) -> Option<&str>) -> String {
    chunks.iter().filter_map(|c| field(&c["choices"][0])).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn http() {
    let pair = tiny::pair(Kind::Identity, 21);
    let cluster = Builder::new(&pair.dir).start().await;
    let models: Value = reqwest::get(format!("{}/v1/models", cluster.http)).await.unwrap().json().await.unwrap();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["root"]), (&json!("tiny"), &json!("tiny")));

    let ask = json!({
        "model": "tiny", "messages": [{ "role": "user", "content": "hello" }], "temperature": 0, "max_tokens": 30, "ignore_eos": true,
        "return_token_ids": true, "logprobs": true, "top_logprobs": 2, "stream_options": { "include_usage": true },
    });
    let whole = post(&cluster, "/v1/chat/completions", &ask).await;
    let choice = &whole["choices"][0];
    assert_eq!((&whole["object"], &choice["finish_reason"]), (&json!("chat.completion"), &json!("length")));
    assert_eq!(
        whole["usage"],
        json!({
            "prompt_tokens": 6, "completion_tokens": 30, "total_tokens": 36, "prompt_tokens_details": { "cached_tokens": 0 },
        })
    );
    assert_eq!(whole["prompt_token_ids"].as_array().unwrap().len(), 6);
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 30);
    assert_eq!(whole["served_by"]["mode"], "overfill");
    let logprobs = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(logprobs.len(), 30);
    for token in logprobs {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(token["top_logprobs"][0]["logprob"], token["logprob"], "greedy takes the most likely");
    }

    let chunks = stream(&cluster, "/v1/chat/completions", &ask).await;
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(joined(&chunks, |c| c["delta"]["content"].as_str()), choice["message"]["content"].as_str().unwrap());
    let ids: Vec<Value> = chunks.iter().filter_map(|c| c["choices"][0]["token_ids"].as_array()).flatten().cloned().collect();
    assert_eq!(Value::from(ids), choice["token_ids"]);
    let usage = chunks.last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &whole["usage"]));
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "length");

    // A stop string that is sure to come: a piece from the middle of the answer itself.
    let plain = json!({ "prompt": [1, 2, 3], "temperature": 0, "max_tokens": 40, "ignore_eos": true });
    let text = post(&cluster, "/v1/completions", &plain).await["choices"][0]["text"].as_str().unwrap().to_owned();
    let stop: String = text.chars().skip(10).take(3).collect();
    let before = &text[..text.find(&stop).unwrap()];
    let mut stopping = plain.clone();
    stopping["stop"] = json!(stop);
    let stopped = post(&cluster, "/v1/completions", &stopping).await;
    assert_eq!(stopped["choices"][0]["text"], before);
    assert_eq!((&stopped["choices"][0]["finish_reason"], &stopped["choices"][0]["stop_reason"]), (&json!("stop"), &json!(stop)));
    assert_eq!(joined(&stream(&cluster, "/v1/completions", &stopping).await, |c| c["text"].as_str()), before);
    cluster.nothing_is_held(Duration::from_secs(1)).await;

    // A stop token ends the answer; it is counted, and has no text.
    let ids = post(&cluster, "/v1/completions", &{
        let mut ids = plain.clone();
        ids["return_token_ids"] = json!(true);
        ids
    })
    .await["choices"][0]["token_ids"]
        .clone();
    let end = &ids[5];
    let first = ids.as_array().unwrap().iter().position(|id| id == end).unwrap();
    let mut ending = plain.clone();
    ending["stop_token_ids"] = json!([end]);
    let ended = post(&cluster, "/v1/completions", &ending).await;
    assert_eq!(ended["usage"]["completion_tokens"], json!(first + 1));
    assert_eq!(ended["choices"][0]["finish_reason"], "stop");
}

/// The prefill node hands nothing over then, which the decode node may tell of before the router has the token.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_its_first_token_ends_is_written_once() {
    let pair = tiny::pair(Kind::Identity, 21);
    let cluster = Builder::new(&pair.dir).start().await;
    let mut ask = json!({ "prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0, "return_token_ids": true });
    let ids = post(&cluster, "/v1/completions", &ask).await["choices"][0]["token_ids"].clone();
    ask["stop_token_ids"] = json!([ids[0]]);
    for _ in 0..100 {
        let ended = post(&cluster, "/v1/completions", &ask).await;
        assert_eq!((&ended["usage"]["completion_tokens"], &ended["choices"][0]["finish_reason"]), (&json!(1), &json!("stop")));
    }
    let counted = Scrape::of(&cluster.metrics[0]).await;
    assert_eq!((counted.sum("overfill_attempts_total", &[]), counted.sum("overfill_attempts_failed_total", &[])), (101.0, 0.0));
    cluster.nothing_is_held(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc() {
    let pair = tiny::pair(Kind::Identity, 21);
    let cluster = Builder::new(&pair.dir).start().await;
    let mut client = cluster.client().await;
    let models = client.list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    assert!(models.len() == 1 && models[0].ready && models[0].name == "tiny");

    let mut ask = request(&[], &SamplingParams { logprobs: Some(3), ..SamplingParams::greedy() }, 8);
    let message = ChatMessage { role: "user".into(), content: "hello".into() };
    ask.input = Some(generate_request::Input::Chat(Chat { messages: vec![message] }));
    (ask.ignore_eos, ask.echo_prompt_token_ids) = (true, true);
    let mut events = client.generate(ask).await.unwrap().into_inner();
    let mut tokens = Vec::new();
    let Some(generate_event::Event::Started(started)) = events.message().await.unwrap().unwrap().event else {
        panic!("started comes first")
    };
    assert_eq!(started.prompt_token_ids.len(), 6);
    let finished = loop {
        match events.message().await.unwrap().unwrap().event.unwrap() {
            generate_event::Event::Delta(delta) => tokens.extend(delta.tokens),
            generate_event::Event::Finished(finished) => break finished,
            generate_event::Event::Started(_) => panic!("started comes once"),
        }
    };
    assert!(events.message().await.unwrap().is_none());
    assert_eq!((finished.reason(), finished.completion_tokens), (FinishReason::Length, 8));
    assert!(finished.served_by.unwrap().decode_node.starts_with("decode-"));
    assert!(tokens.iter().enumerate().all(|(i, t)| t.index as usize == i && t.logprob.as_ref().unwrap().top.len() == 3));

    let mut slow = tonic::Request::new(request(&tiny::prompt(100, 1), &SamplingParams::greedy(), 3000));
    slow.get_mut().ignore_eos = true;
    slow.set_timeout(Duration::from_millis(50));
    let error = async {
        let mut events = client.generate(slow).await?.into_inner();
        while events.message().await?.is_some() {}
        Ok::<_, tonic::Status>(())
    };
    let code = error.await.unwrap_err().code();
    // Whoever notices first: the router says deadline exceeded, the client's own timer cancels.
    assert!(matches!(code, tonic::Code::DeadlineExceeded | tonic::Code::Cancelled), "{code:?}");
    cluster.nothing_is_held(Duration::from_secs(1)).await;

    let channel = tonic::transport::Channel::from_shared(cluster.grpc.clone()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "live"] {
        let answer = health.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "'{service}'");
    }
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_request, server_reflection_response};
    let list = server_reflection_request::MessageRequest::ListServices(String::new());
    let asked = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut answers = ServerReflectionClient::new(channel).server_reflection_info(tokio_stream::iter([asked])).await.unwrap().into_inner();
    match answers.message().await.unwrap().unwrap().message_response {
        Some(server_reflection_response::MessageResponse::ListServicesResponse(services)) => {
            assert!(services.service.iter().any(|s| s.name == "overfill.v1.Inference"), "{services:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_admin_listener_the_doors_are_for_clients_alone() {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;

    let pair = tiny::pair(Kind::Identity, 8);
    let [http, grpc, admin] = [(); 3].map(|()| format!("127.0.0.1:{}", free_port()));
    let flags = ["--pair", pair.dir.to_str().unwrap(), "--http", &http, "--grpc", &grpc, "--admin", &admin, "--etcd", "127.0.0.1:1"];
    let _router = Process::ours("router", &flags);
    let status = async |at: &str, path: &str| Some(reqwest::get(format!("http://{at}{path}")).await.ok()?.status().as_u16());
    eventually(Duration::from_secs(20), "the router listens", || async { status(&admin, "/live").await == Some(200) }).await;
    let everywhere = [("/ready", 503, 503), ("/v1/models", 200, 200), ("/tokenize", 405, 404), ("/v1/completions", 405, 404)];
    let for_admins = ["/metrics", "/docs", "/openapi.json", "/cluster"].map(|path| (path, 404, 200));
    for (path, at_the_door, at_admin) in everywhere.into_iter().chain(for_admins) {
        assert_eq!((status(&http, path).await, status(&admin, path).await), (Some(at_the_door), Some(at_admin)), "{path}");
    }
    for (at, known) in [(&grpc, false), (&admin, true)] {
        let channel = tonic::transport::Channel::from_shared(format!("http://{at}")).unwrap().connect().await.unwrap();
        let mut client = ServerReflectionClient::new(channel);
        let asked = ServerReflectionRequest { message_request: Some(MessageRequest::ListServices(String::new())), ..Default::default() };
        let told = client.server_reflection_info(tokio_stream::iter([asked])).await;
        assert_eq!(told.is_ok(), known, "reflection at {at}: {told:?}");
    }
}
