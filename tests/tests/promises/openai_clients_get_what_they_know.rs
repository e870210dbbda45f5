//! The OpenAI API's finer points: log-probabilities of prompt and answer, several prompts, answers of a given form, tools,
//! tokens without an answer, errors.

use overfill_tests::cluster::{Builder, Cluster};
use overfill_tests::tiny::{self, Kind};
use serde_json::{Value, json};

async fn ask(cluster: &Cluster, path: &str, body: &Value) -> (u16, Value) {
    let sent = reqwest::Client::new().post(format!("{}{path}", cluster.http)).json(body).send().await.unwrap();
    (sent.status().as_u16(), sent.json().await.unwrap())
}

async fn post(cluster: &Cluster, path: &str, body: &Value) -> Value {
    let (status, answer) = ask(cluster, path, body).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

async fn stream(cluster: &Cluster, path: &str, body: &Value) -> Vec<Value> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    let text = reqwest::Client::new().post(format!("{}{path}", cluster.http)).json(&body).send().await.unwrap().text().await.unwrap();
    let mut data: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{text}");
    data.into_iter().map(|d| serde_json::from_str(d).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_of_a_prompt_are_the_full_models() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).prefill_flags(&["--block-tokens", "16", "--chunk-tokens", "40"]).start().await;
    let prompt = tiny::prompt(90, 3);
    let echo = json!({ "prompt": prompt, "max_tokens": 1, "echo": true, "logprobs": 4, "temperature": 0 });
    let answer = post(&cluster, "/v1/completions", &echo).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), 91, "{list}");
    }
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    // The full model's first token after the first `i` tokens has the same candidates.
    for i in [1, 2, 31, 32, 33, 64, 89] {
        let first = json!({ "prompt": prompt[..i], "max_tokens": 1, "logprobs": 4, "temperature": 0 });
        let own = &post(&cluster, "/v1/completions", &first).await["choices"][0]["logprobs"];
        let mut known = logprobs["top_logprobs"][i].as_object().unwrap().clone();
        if known.len() == 5 {
            let said = logprobs["tokens"][i].as_str().unwrap();
            assert_eq!(known.remove(said), Some(logprobs["token_logprobs"][i].clone()));
        }
        assert_eq!(Value::from(known), own["top_logprobs"][0], "after {i} tokens");
    }
    // Streamed, and without an answer, the same.
    let chunks = stream(&cluster, "/v1/completions", &echo).await;
    let all: Vec<Value> =
        chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["token_logprobs"].as_array()).flatten().cloned().collect();
    assert_eq!(Value::from(all), logprobs["token_logprobs"]);
    let mut alone = echo.clone();
    alone["max_tokens"] = json!(0);
    let alone = post(&cluster, "/v1/completions", &alone).await;
    assert_eq!(
        alone["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap()[..],
        logprobs["token_logprobs"].as_array().unwrap()[..90]
    );
    assert_eq!(alone["usage"]["completion_tokens"], 0);
    cluster.nothing_is_held(std::time::Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_prompts_and_what_was_cached() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).prefill_flags(&["--block-tokens", "16"]).start().await;
    let one = |prompt: Value| json!({ "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": true, "echo": true });
    let mut alone = Vec::new();
    for prompt in ["first", "the second"] {
        alone.push(post(&cluster, "/v1/completions", &one(json!(prompt))).await["choices"][0]["text"].clone());
    }
    assert!(alone[1].as_str().unwrap().starts_with("the second"));
    let mut both = one(json!(["first", "the second"]));
    both["n"] = json!(2);
    let answer = post(&cluster, "/v1/completions", &both).await;
    let texts: Vec<Value> = answer["choices"].as_array().unwrap().iter().map(|c| c["text"].clone()).collect();
    assert_eq!(texts, [&alone[0], &alone[0], &alone[1], &alone[1]].map(Clone::clone));
    assert_eq!(answer["usage"]["prompt_tokens"], 15);
    let ids = one(json!([[1, 2, 3], [4, 5]]));
    assert_eq!(post(&cluster, "/v1/completions", &ids).await["choices"].as_array().unwrap().len(), 2);

    let long = one(json!(tiny::prompt(100, 8)));
    for cached in [0, 96] {
        let usage = &post(&cluster, "/v1/completions", &long).await["usage"];
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], cached, "{usage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bias_and_a_form_are_kept() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).nodes(1, 2).start().await;
    let completion = |more: Value| {
        let mut body = json!({ "prompt": "x", "max_tokens": 60, "temperature": 1.3 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let biased = completion(json!({ "logit_bias": { "97": 100 }, "max_tokens": 5 }));
    assert_eq!(post(&cluster, "/v1/completions", &biased).await["choices"][0]["text"], "aaaaa");

    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["ok", "n"],
        "properties": { "ok": { "type": "boolean" }, "n": { "type": "integer", "minimum": 0, "maximum": 99 } },
        "x-guidance": { "whitespace_flexible": false },
    });
    for seed in 0..8 {
        let form = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
        let chat = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 60, "seed": seed, "response_format": form });
        let answer = post(&cluster, "/v1/chat/completions", &chat).await;
        let choice = &answer["choices"][0];
        let json: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
        assert!(json["ok"].is_boolean() && json["n"].as_u64().unwrap() < 100, "{json}");
        assert_eq!(choice["finish_reason"], "stop");
        let regex = completion(json!({ "guided_regex": "[0-9]{3}-[a-f]+z", "seed": seed, "logit_bias": { "122": 8 } }));
        let text = post(&cluster, "/v1/completions", &regex).await["choices"][0]["text"].as_str().unwrap().to_owned();
        assert!(text.len() > 5 && text.as_bytes()[3] == b'-' && text.ends_with('z'), "{text}");
        let choice = completion(json!({ "structured_outputs": { "choice": ["yes", "no", "né"] }, "seed": seed }));
        let text = post(&cluster, "/v1/completions", &choice).await["choices"][0]["text"].clone();
        assert!(["yes", "no", "né"].contains(&text.as_str().unwrap()), "{text}");
    }
    cluster.nothing_is_held(std::time::Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_are_called() {
    let pair = tiny::pair_with_tools(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    let parameters = json!({ "type": "object", "properties": { "x": { "enum": [1, 2] } }, "required": ["x"], "additionalProperties": false, "x-guidance": { "whitespace_flexible": false } });
    let tools = json!([
        { "type": "function", "function": { "name": "first", "description": "One.", "parameters": parameters } },
        { "type": "function", "function": { "name": "second", "parameters": parameters, "strict": true } },
    ]);
    let chat = |choice: Value| {
        json!({
            "messages": [
                { "role": "user", "content": [{ "type": "text", "text": "call" }] },
                { "role": "assistant", "content": null, "tool_calls": [{ "id": "1", "type": "function", "function": { "name": "first", "arguments": "{\"x\": 1}" } }] },
                { "role": "tool", "tool_call_id": "1", "content": "done" },
            ],
            "tools": tools, "tool_choice": choice, "max_tokens": 400, "temperature": 0, "parallel_tool_calls": false,
        })
    };
    let named = chat(json!({ "type": "function", "function": { "name": "second" } }));
    for (body, reason, names) in [(chat(json!("required")), "tool_calls", &["first", "second"][..]), (named, "stop", &["second"])] {
        let answer = post(&cluster, "/v1/chat/completions", &body).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], reason, "{answer}");
        assert!(choice["message"]["content"].is_null());
        let call = &choice["message"]["tool_calls"][0];
        assert!(names.contains(&call["function"]["name"].as_str().unwrap()) && call["id"].as_str().unwrap().starts_with("call_"), "{call}");
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        assert!([json!(1), json!(2)].contains(&arguments["x"]), "{arguments}");

        let chunks = stream(&cluster, "/v1/chat/completions", &body).await;
        let calls: Vec<&Value> = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["tool_calls"].as_array()).flatten().collect();
        assert_eq!((calls.len(), &calls[0]["index"], &calls[0]["function"]), (1, &json!(0), &call["function"]));
        assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], reason);
    }
    // The template sees tools, results and arguments; with `none` it sees no tools.
    let tokenize = async |mut body: Value| {
        body["add_generation_prompt"] = json!(false);
        let tokens = post(&cluster, "/tokenize", &body).await;
        post(&cluster, "/detokenize", &json!({ "tokens": tokens["tokens"] })).await["prompt"].as_str().unwrap().to_owned()
    };
    assert_eq!(tokenize(json!({ "messages": [{ "role": "user", "content": "é" }] })).await, "<|a|>user:é");
    let told = post(&cluster, "/v1/chat/completions", &chat(json!("auto"))).await["usage"]["prompt_tokens"].as_u64().unwrap();
    let untold = post(&cluster, "/v1/chat/completions", &chat(json!("none"))).await["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(untold, "0user:call0assistant:{\"x\": 1}0tool:done0".len() as u64);
    assert!(told > untold + 100);
    let (status, error) = ask(&cluster, "/v1/chat/completions", &chat(json!("third"))).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("tool_choice")));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_models_and_errors() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    let tokens = post(&cluster, "/tokenize", &json!({ "prompt": "né<|a|>", "return_token_strs": true })).await;
    assert_eq!((&tokens["count"], tokens["tokens"].as_array().unwrap().len()), (&json!(4), 4));
    assert_eq!((&tokens["token_strs"][0], &tokens["token_strs"][3]), (&json!("n"), &json!("<|a|>")));
    assert_eq!(post(&cluster, "/detokenize", &json!({ "tokens": tokens["tokens"] })).await["prompt"], "né<|a|>");

    let get = async |path: &str| {
        let sent = reqwest::get(format!("{}{path}", cluster.http)).await.unwrap();
        (sent.status().as_u16(), sent.json::<Value>().await.unwrap())
    };
    let (status, model) = get("/v1/models/tiny").await;
    assert_eq!((status, &model["id"], &model["root"], &model["object"]), (200, &json!("tiny"), &json!("tiny"), &json!("model")));
    for (path, status) in [("/v1/models/other", 404), ("/nowhere", 404), ("/v1/completions", 405)] {
        let (got, error) = get(path).await;
        assert_eq!(got, status);
        assert!(error["error"]["message"].is_string() && error["error"]["type"] == "invalid_request_error", "{error}");
    }
    let (status, error) = ask(&cluster, "/v1/completions", &json!({ "model": "gpt-9", "prompt": "x" })).await;
    assert_eq!((status, &error["error"]["code"], &error["error"]["param"]), (404, &json!("model_not_found"), &json!("model")));
    let (status, error) = ask(&cluster, "/v1/completions", &json!({ "prompt": "x", "top_p": 2, "unknown": [1] })).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("top_p")));
    let no_tools =
        json!({ "messages": [{ "role": "user", "content": "x" }], "tools": [{ "type": "function", "function": { "name": "f" } }] });
    let (status, error) = ask(&cluster, "/v1/chat/completions", &no_tools).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("tools")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_responses_text_has_its_log_probabilities_where_tools_are_given() {
    let pair = tiny::pair_with_tools(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    let tools = json!([{ "type": "function", "name": "f", "parameters": { "type": "object", "additionalProperties": false } }]);
    let ask = |more: Value| {
        let mut body = json!({
            "input": "call", "tools": tools, "max_output_tokens": 60, "include": ["message.output_text.logprobs"], "top_logprobs": 2,
            "temperature": 1, "ignore_eos": true,
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for seed in 0..4 {
        // None is called: all tokens are text's, however much of it looks like the beginning of a call.
        let body = ask(json!({ "seed": seed }));
        let answer = post(&cluster, "/v1/responses", &body).await;
        let part = &answer["output"][0]["content"][0];
        let logprobs = part["logprobs"].as_array().unwrap();
        assert_eq!((answer["output"].as_array().unwrap().len(), logprobs.len()), (1, 60), "{answer}");
        let bytes = |entry: &Value| entry["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8).collect::<Vec<_>>();
        // Special tokens have log-probabilities too, and are no text.
        let written: Vec<u8> =
            logprobs.iter().filter(|entry| !entry["token"].as_str().unwrap().starts_with("<|")).flat_map(bytes).collect();
        assert_eq!(part["text"], json!(String::from_utf8_lossy(&written)));

        let streamed = ask(json!({ "seed": seed, "stream": true }));
        let sent = reqwest::Client::new().post(format!("{}/v1/responses", cluster.http)).json(&streamed).send().await.unwrap();
        let text = sent.text().await.unwrap();
        let data = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
        let events: Vec<Value> = data.map(|data| serde_json::from_str(data).unwrap()).collect();
        let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
        let of_deltas: Vec<Value> = deltas.flat_map(|event| event["logprobs"].as_array().unwrap().clone()).collect();
        assert_eq!(of_deltas, *logprobs, "streamed as whole");
        let done = events.iter().find(|event| event["type"] == "response.output_text.done").unwrap();
        assert_eq!(done["logprobs"], part["logprobs"]);
    }
    // A call has no text, and so none of them.
    let called =
        post(&cluster, "/v1/responses", &ask(json!({ "tool_choice": "required", "temperature": 0, "max_output_tokens": 400 }))).await;
    let items = called["output"].as_array().unwrap();
    assert!(items.iter().all(|item| item["type"] == "function_call") && !items.is_empty(), "{called}");
}
