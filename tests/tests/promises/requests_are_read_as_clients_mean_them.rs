//! What clients send at the edges of the API, and what the reference does with it (OpenAI's API, vLLM, transformers; named at each):
//! nothing is passed over without a word.

use overfill_tests::cluster::{Builder, Cluster};
use overfill_tests::tiny::{self, Kind, TinyPair};
use reqwest::{Method, StatusCode};
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

/// What the template makes of a chat, special tokens and all.
async fn rendered(cluster: &Cluster, chat: &Value) -> Result<String, Value> {
    match ask(cluster, "/tokenize", chat).await {
        (200, tokens) => {
            let text = post(cluster, "/detokenize", &json!({ "tokens": tokens["tokens"] })).await;
            Ok(text["prompt"].as_str().unwrap().to_owned())
        }
        (_, error) => Err(error),
    }
}

/// With this template and more in `tokenizer_config.json`.
fn with_config(pair: TinyPair, template: &str, more: Value) -> TinyPair {
    let mut config = json!({ "chat_template": template, "bos_token": "<|start|>", "eos_token": "<|end|>" });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    std::fs::write(pair.dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    pair
}

/// As Qwen2.5 has it: roles that it does not know leave no trace.
const KNOWS_ITS_ROLES: &str =
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}<|a|>{{ m.role }}:{{ m.content }}{% endif %}{% endfor %}";

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_another_origin_may_ask() {
    let pair = tiny::pair(Kind::Identity, 5);
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.json");
    std::fs::write(&keys, json!({ "clients": [{ "name": "page", "keys": ["secret"] }] }).to_string()).unwrap();
    let flags = ["--cors-origins", "https://a.example,http://localhost:3000", "--keys", keys.to_str().unwrap()];
    let cluster = Builder::new(&pair.dir).router_flags(&flags).start().await;
    let client = reqwest::Client::new();
    let url = format!("{}/v1/chat/completions", cluster.http);
    let preflight = async |origin: &str| {
        let asked = client.request(Method::OPTIONS, &url).header("origin", origin);
        let asked =
            asked.header("access-control-request-method", "POST").header("access-control-request-headers", "authorization,x-stainless-os");
        asked.send().await.unwrap()
    };
    // As the Fetch standard wants it: without a key, with the origin and the headers that the page will send.
    let allowed = preflight("https://a.example").await;
    assert_eq!(allowed.status(), StatusCode::OK);
    assert_eq!(allowed.headers()["access-control-allow-origin"], "https://a.example");
    assert!(allowed.headers()["access-control-allow-headers"].to_str().unwrap().contains("x-stainless-os"));
    assert!(allowed.headers()["access-control-allow-methods"].to_str().unwrap().contains("POST"));
    assert!(!preflight("https://b.example").await.headers().contains_key("access-control-allow-origin"));
    // A page is told of its errors too, be they the key's, the path's or the field's.
    for (path, key, status) in
        [("/v1/chat/completions", "wrong", 401), ("/nowhere", "secret", 404), ("/v1/chat/completions", "secret", 400)]
    {
        let sent = client.post(format!("{}{path}", cluster.http)).header("origin", "http://localhost:3000").bearer_auth(key);
        let refused = sent.body("{}").send().await.unwrap();
        assert_eq!(refused.status(), status, "{path}");
        assert_eq!(refused.headers()["access-control-allow-origin"], "http://localhost:3000", "{path}");
    }
    // Anthropic's clients send the key by another name.
    let models = client.get(format!("{}/v1/models", cluster.http)).header("x-api-key", "secret").send().await.unwrap();
    assert_eq!(models.status(), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_and_methods_of_probes() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    let client = reqwest::Client::new();
    for path in ["//v1/models", "/v1//models", "/v1///models?x=1"] {
        assert_eq!(client.get(format!("{}{path}", cluster.http)).send().await.unwrap().status(), 200, "{path}");
    }
    for path in ["/", "/health", "/v1/models"] {
        assert_eq!(client.head(format!("{}{path}", cluster.http)).send().await.unwrap().status(), 200, "{path}");
        let options = client.request(Method::OPTIONS, format!("{}{path}", cluster.http)).send().await.unwrap();
        assert_eq!(options.status(), StatusCode::NO_CONTENT, "{path}");
        assert!(options.headers()["allow"].to_str().unwrap().contains("GET"), "{path}");
        assert!(!options.headers().contains_key("access-control-allow-origin"), "nobody was allowed to");
    }
    // The field is told as data; a path is none.
    let nowhere: Value = client.get(format!("{}/nowhere", cluster.http)).send().await.unwrap().json().await.unwrap();
    assert_eq!((&nowhere["error"]["param"], &nowhere["error"]["code"]), (&Value::Null, &json!("not_found")));

    let body = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 5, "stream": true, "stream_options": { "include_usage": true } });
    let streamed = client.post(format!("{}/v1/chat/completions", cluster.http)).json(&body).send().await.unwrap();
    // nginx keeps nothing back then.
    assert_eq!(
        (&streamed.headers()["x-accel-buffering"], &streamed.headers()["cache-control"]),
        (&"no".parse().unwrap(), &"no-cache".parse().unwrap())
    );
    let text = streamed.text().await.unwrap();
    let chunks: Vec<Value> = text.lines().filter_map(|l| serde_json::from_str(l.strip_prefix("data: ")?).ok()).collect();
    let (last, before) = chunks.split_last().unwrap();
    assert!(before.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)), "OpenAI's API: null in all but the last");
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(5)));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_in_the_history_have_objects_as_arguments() {
    let pair = tiny::pair_with_tools(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    let chat = |function: Value| {
        let call = json!({ "id": "1", "type": "function", "function": function });
        json!({ "messages": [{ "role": "user", "content": "u" }, { "role": "assistant", "content": null, "tool_calls": [call] }], "add_generation_prompt": false })
    };
    for (arguments, read) in [(json!(""), "{}"), (json!(" "), "{}"), (json!("{\"x\": 1}"), "{\"x\": 1}"), (json!({ "x": 1 }), "{\"x\": 1}")]
    {
        let text = rendered(&cluster, &chat(json!({ "name": "f", "arguments": arguments }))).await.unwrap();
        assert_eq!(text, format!("<|a|>user:u<|a|>assistant:{read}"), "{arguments}");
    }
    assert!(rendered(&cluster, &chat(json!({ "name": "f" }))).await.unwrap().ends_with("assistant:{}"), "none is no argument");
    for arguments in [json!(null), json!([1]), json!(5), json!("{bad"), json!("[1]"), json!("5")] {
        let error = rendered(&cluster, &chat(json!({ "name": "f", "arguments": arguments }))).await.unwrap_err();
        assert_eq!(error["error"]["param"], "messages", "{arguments}");
    }
    for function in [json!(null), json!({}), json!({ "name": "" }), json!("f")] {
        assert!(rendered(&cluster, &chat(function.clone())).await.is_err(), "{function}");
    }
    // An empty list of calls is none (LangChain sends one).
    let silent =
        json!({ "messages": [{ "role": "assistant", "content": "c", "tool_calls": [] }], "tools": [], "add_generation_prompt": false });
    assert_eq!(rendered(&cluster, &silent).await.unwrap(), "<|a|>assistant:c");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_is_heard() {
    let pair = with_config(tiny::pair(Kind::Identity, 5), KNOWS_ITS_ROLES, json!({}));
    let cluster = Builder::new(&pair.dir).start().await;
    let chat = |role: &str| json!({ "messages": [{ "role": role, "content": "be short" }, { "role": "user", "content": "hi" }] });
    // OpenAI's API: what the developer says is what the system says to models that know no developer.
    assert_eq!(rendered(&cluster, &chat("developer")).await.unwrap(), "<|a|>system:be short<|a|>user:hi");
    for role in ["foo", "function", "tool"] {
        let error = rendered(&cluster, &chat(role)).await.unwrap_err();
        assert!(error["error"]["message"].as_str().unwrap().contains(role) && error["error"]["param"] == "messages", "{error}");
        assert_eq!(ask(&cluster, "/v1/chat/completions", &chat(role)).await.0, 400);
    }

    let known =
        "{% for m in messages %}{% if m.role == 'developer' %}<|b|>{{ m.content }}{% else %}<|a|>{{ m.content }}{% endif %}{% endfor %}";
    let pair = with_config(tiny::pair(Kind::Identity, 5), known, json!({}));
    let cluster = Builder::new(&pair.dir).start().await;
    assert_eq!(rendered(&cluster, &chat("developer")).await.unwrap(), "<|b|>be short<|a|>hi", "its template has words for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_counted_is_what_is_read() {
    let pair = tiny::pair_with_tools(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    let user = json!({ "role": "user", "content": [{ "type": "text", "text": "one " }, { "type": "text", "text": "two" }] });
    let call = json!({ "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } });
    let tool = json!({ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } });
    let chats = [
        json!({ "messages": [user] }),
        json!({ "messages": [user, { "role": "assistant", "tool_calls": [call] }, { "role": "tool", "tool_call_id": "1", "content": [] }] }),
        json!({ "messages": [user], "tools": [tool] }),
        json!({ "messages": [user], "tools": [tool], "tool_choice": "none" }),
        json!({ "messages": [user], "tools": [], "add_special_tokens": true }),
        json!({ "messages": [user, { "role": "assistant", "content": "So" }], "continue_final_message": true }),
    ];
    for chat in chats {
        let mut asked = chat.clone();
        asked["max_tokens"] = json!(1);
        let read = post(&cluster, "/v1/chat/completions", &asked).await["usage"]["prompt_tokens"].clone();
        assert_eq!(post(&cluster, "/tokenize", &chat).await["count"], read, "{chat}");
    }
    // transformers' `continue_final_message`: nothing follows what was begun.
    let begun = json!({ "messages": [{ "role": "assistant", "content": "So it " }], "continue_final_message": true });
    assert_eq!(rendered(&cluster, &begun).await.unwrap(), "<|a|>assistant:So it ");
    assert_eq!(
        ask(&cluster, "/tokenize", &json!({ "messages": [{ "role": "user", "content": "" }], "continue_final_message": true })).await.0,
        400
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn special_tokens_stand_where_they_are_asked_for() {
    let begins = json!({ "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": true });
    let pair = with_config(tiny::pair(Kind::Identity, 5), "{% for m in messages %}<|start|>{{ m.content }}{% endfor %}", begins);
    let cluster = Builder::new(&pair.dir).start().await;
    let read = async |path: &str, body: Value| {
        let mut body = body;
        body["max_tokens"] = json!(1);
        post(&cluster, path, &body).await["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(read("/v1/completions", json!({ "prompt": "ab" })).await, 3, "its tokenizer begins every text");
    assert_eq!(read("/v1/completions", json!({ "prompt": "ab", "add_special_tokens": false })).await, 2);
    assert_eq!(read("/v1/completions", json!({ "prompt": "<|start|>ab", "add_special_tokens": false })).await, 3);
    let chat = json!({ "messages": [{ "role": "user", "content": "ab" }] });
    assert_eq!(read("/v1/chat/completions", chat.clone()).await, 3, "its template does");
    let mut twice = chat;
    twice["add_special_tokens"] = json!(true);
    assert_eq!(read("/v1/chat/completions", twice).await, 4);

    // A prompt is given back as it was sent; a stop string that is a special token counts as its id, as in vLLM.
    let echo = json!({ "prompt": "x<|a|>y", "echo": true, "max_tokens": 0, "add_special_tokens": false });
    assert_eq!(post(&cluster, "/v1/completions", &echo).await["choices"][0]["text"], "x<|a|>y");
    let ids = json!({ "prompt": [120, 258, 121], "echo": true, "max_tokens": 0 });
    assert_eq!(post(&cluster, "/v1/completions", &ids).await["choices"][0]["text"], "x<|a|>y");
    let stop = json!({ "prompt": "x", "stop": ["<|b|>"], "ignore_eos": true, "max_tokens": 20, "logit_bias": { "259": 100 } });
    let stopped = post(&cluster, "/v1/completions", &stop).await;
    let choice = &stopped["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"], &choice["stop_reason"]), (&json!(""), &json!("stop"), &json!("<|b|>")));
    assert_eq!(stopped["usage"]["completion_tokens"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_are_places_in_the_text() {
    let begins = json!({ "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": true });
    let pair = with_config(tiny::pair(Kind::Identity, 5), "", begins);
    let cluster = Builder::new(&pair.dir).start().await;
    // Every byte is a token here: a crab has four of them, and all stand where it does.
    let ask = json!({ "prompt": "é🦀<|a|>z", "echo": true, "max_tokens": 3, "logprobs": 0, "logit_bias": { "97": 100 }, "temperature": 0 });
    let answer = post(&cluster, "/v1/completions", &ask).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "é🦀<|a|>zaaa");
    // The token that the tokenizer puts before the text has no part in it.
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 0, 0, 1, 1, 1, 1, 2, 7, 8, 9, 10]));
    let alone = json!({ "prompt": "é🦀<|a|>z", "max_tokens": 3, "logprobs": 0, "logit_bias": { "97": 100 }, "temperature": 0 });
    assert_eq!(post(&cluster, "/v1/completions", &alone).await["choices"][0]["logprobs"]["text_offset"], json!([0, 1, 2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_of_minus_one_is_drawn() {
    let pair = tiny::pair(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    let ask = async |seed: i64| {
        let body = json!({ "prompt": "x", "max_tokens": 40, "temperature": 2, "ignore_eos": true, "seed": seed, "return_token_ids": true });
        post(&cluster, "/v1/completions", &body).await["choices"][0]["token_ids"].clone()
    };
    assert_eq!(ask(7).await, ask(7).await);
    assert_ne!(ask(-1).await, ask(-1).await, "as vLLM and llama.cpp have it");
    assert_eq!(ask(-2).await, ask(-2).await, "any other is a seed");
}

#[tokio::test(flavor = "multi_thread")]
async fn forms_are_whole_within_the_tokens_that_there_are() {
    let pair = tiny::pair_with_tools(Kind::Identity, 5);
    let cluster = Builder::new(&pair.dir).start().await;
    // Pydantic's discriminated union.
    let pet = |name: &str| {
        json!({
            "type": "object", "required": ["pet", "name"], "additionalProperties": false,
            "properties": { "pet": { "const": name, "type": "string" }, "name": { "type": "string" } },
        })
    };
    let schema = json!({
        "$defs": { "Cat": pet("cat"), "Dog": pet("dog") },
        "oneOf": [{ "$ref": "#/$defs/Cat" }, { "$ref": "#/$defs/Dog" }],
    });
    let form = json!({ "type": "json_schema", "json_schema": { "name": "pet", "schema": schema } });
    let function = |parameters: Value| json!({ "type": "function", "function": { "name": "look_up", "parameters": parameters } });
    let tools = [
        json!({ "type": "object", "properties": { "city": { "type": "string" }, "days": { "type": "integer" } }, "required": ["city", "days"] }),
        json!({}),
    ];
    for seed in 0..20 {
        let chat = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 120, "temperature": 1, "seed": seed });
        let with = |more: Value| {
            let mut body = chat.clone();
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            body
        };
        let answer = post(&cluster, "/v1/chat/completions", &with(json!({ "response_format": form }))).await;
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
        let pet: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert!(["cat", "dog"].contains(&pet["pet"].as_str().unwrap()) && text.starts_with("{\"pet\":\""), "{text}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        for parameters in &tools {
            for choice in [json!("required"), json!({ "type": "function", "function": { "name": "look_up" } })] {
                let ask = with(json!({ "tools": [function(parameters.clone())], "tool_choice": choice }));
                let answer = post(&cluster, "/v1/chat/completions", &ask).await;
                let message = &answer["choices"][0]["message"];
                let calls = message["tool_calls"].as_array().unwrap_or_else(|| panic!("{message}"));
                assert!(message["content"].is_null(), "{message}");
                for call in calls {
                    let arguments = call["function"]["arguments"].as_str().unwrap();
                    // Numbers may be larger than any that is computed with here.
                    serde_json::from_str::<serde::de::IgnoredAny>(arguments).unwrap_or_else(|e| panic!("{arguments}: {e}"));
                    assert!(arguments.starts_with('{'), "{arguments}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_those_of_the_models_family() {
    let pair = tiny::pair_with_tools(Kind::Identity, 5);
    let tool = json!({ "type": "function", "function": { "name": "f", "parameters": { "type": "object", "properties": { "x": { "enum": [1, 2] } }, "required": ["x"] } } });
    let ask = json!({ "messages": [{ "role": "user", "content": "x" }], "tools": [tool], "tool_choice": "required", "max_tokens": 200, "temperature": 0, "parallel_tool_calls": false });
    for family in ["hermes", "llama3_json", "mistral", "granite"] {
        let cluster = Builder::new(&pair.dir).router_flags(&["--tool-call-parser", family]).start().await;
        let answer = post(&cluster, "/v1/chat/completions", &ask).await;
        let message = &answer["choices"][0]["message"];
        assert_eq!((&message["content"], &message["tool_calls"][0]["function"]["name"]), (&Value::Null, &json!("f")), "{family}: {answer}");
        let mut streamed = ask.clone();
        streamed["stream"] = json!(true);
        let text = reqwest::Client::new().post(format!("{}/v1/chat/completions", cluster.http)).json(&streamed).send().await.unwrap();
        let text = text.text().await.unwrap();
        let chunks: Vec<Value> = text.lines().filter_map(|l| serde_json::from_str(l.strip_prefix("data: ")?).ok()).collect();
        let calls: Vec<&Value> = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["tool_calls"].as_array()).flatten().collect();
        assert_eq!(calls[0]["function"], message["tool_calls"][0]["function"], "{family}");
    }
}
