//! Whatever guide a client sends, through any door and in any of the ways that there are: it gets its answer or a sentence, and the
//! servers live, answer others meanwhile, and hold nothing afterwards.

use std::fmt::Write;
use std::time::{Duration, Instant};

use overfill_proto::kserve::grpc_inference_service_client::GrpcInferenceServiceClient;
use overfill_proto::kserve::model_infer_request::InferInputTensor;
use overfill_proto::kserve::{InferTensorContents, ModelInferRequest};
use overfill_proto::v1::{Guide, Sampling, guide};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::tiny::{self, Kind};
use overfill_types::SamplingParams;
use serde_json::{Value, json};
use tonic::Code;

/// `start: r0`, and each rule leads to the next: a compiler that follows them by recursion needs a stack of any depth.
fn rules(count: usize) -> String {
    let mut grammar = String::from("start: r0\n");
    (0..count).for_each(|i| writeln!(grammar, "r{i}: \"a\" r{}", i + 1).unwrap());
    grammar + &format!("r{count}: \"b\"\n")
}

/// Definitions that each refer to the next.
fn definitions(count: usize) -> Value {
    let mut all = serde_json::Map::new();
    for i in 0..count {
        all.insert(format!("d{i}"), json!({ "$ref": format!("#/$defs/d{}", i + 1) }));
    }
    all.insert(format!("d{count}"), json!({ "type": "null" }));
    json!({ "$ref": "#/$defs/d0", "$defs": all })
}

/// Optional properties, whose order is free in no grammar: all that may be left out.
fn properties(count: usize) -> Value {
    let each = (0..count).map(|i| (format!("p{i}"), json!({ "enum": (0..20).map(|j| format!("v{i}_{j}")).collect::<Vec<_>>() })));
    json!({ "type": "object", "properties": each.collect::<serde_json::Map<_, _>>() })
}

/// What is sent, by the field that it is sent in.
fn hostile() -> Vec<(&'static str, Value)> {
    let nested = |open: &str, close: &str, depth: usize| open.repeat(depth) + "a" + &close.repeat(depth);
    let tools = |schema: Value| json!([{ "type": "function", "function": { "name": "f", "parameters": schema } }]);
    vec![
        ("guided_grammar", json!(rules(12_000))),
        (
            "guided_grammar",
            json!(format!("start: {}\n", nested("(", ")", 0).replace('a', &nested("(", ")", 100_000).replace('a', "\"a\"")))),
        ),
        ("guided_grammar", json!(format!("start: {}\n", "\"a\"? ".repeat(40_000)))),
        ("guided_grammar", json!(format!("start: T\nT: /{}/\n", "(a|b)*a(a|b){14}".repeat(30)))),
        ("guided_json", definitions(6_900)),
        ("guided_json", properties(4_000)),
        ("guided_json", json!({ "type": "string", "pattern": "(a|b)*a(a|b){18}", "minLength": 100, "maxLength": 100_000 })),
        ("guided_json", json!({ "type": "array", "items": { "type": "string", "maxLength": 60_000 }, "minItems": 50_000 })),
        ("guided_regex", json!(nested("(", ")", 100_000))),
        ("guided_regex", json!("((((a{1,200}){1,200}){1,200}){1,200}){1,200}")),
        ("guided_regex", json!("(?i)".to_owned() + &r"[\p{L}--\p{Lu}]\w{1,500}".repeat(5_000))),
        ("guided_choice", json!((0..128).map(|i| format!("{i}{}", "x\u{e9}".repeat(600))).collect::<Vec<_>>())),
        ("structured_outputs", json!({ "json": definitions(6_900) })),
        ("tools", tools(definitions(6_900))),
    ]
}

fn body(field: &str, value: &Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 2, "temperature": 0 });
    body[field] = value.clone();
    if field == "tools" {
        body["tool_choice"] = json!("required");
    }
    body
}

async fn post(cluster: &Cluster, body: &Value) -> (u16, Value) {
    let sent = reqwest::Client::new().post(format!("{}/v1/chat/completions", cluster.http)).json(body).send().await.unwrap();
    (sent.status().as_u16(), sent.json().await.unwrap())
}

/// Others are served, in a time in which nobody waits.
async fn others_are_served(cluster: &Cluster) {
    let body = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 2, "guided_regex": "[a-c]{1,4}" });
    let asked = Instant::now();
    let (status, answer) = post(cluster, &body).await;
    assert_eq!(status, 200, "{answer}");
    assert!(asked.elapsed() < Duration::from_secs(20), "it took {:?}", asked.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn through_http() {
    let pair = tiny::pair_with_tools(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).start().await;
    others_are_served(&cluster).await;
    for (field, value) in hostile() {
        let begun = Instant::now();
        let ((status, answer), ()) = tokio::join!(async { post(&cluster, &body(field, &value)).await }, others_are_served(&cluster));
        let what: String = value.to_string().chars().take(60).collect();
        println!("{field} {what}: {status} after {:?} {}", begun.elapsed(), answer["error"]["message"]);
        assert!(matches!(status, 200 | 400), "{field} {what}: {status} {answer}");
        if status == 400 {
            let message = answer["error"]["message"].as_str().unwrap();
            assert!(message.len() < 700 && !message.contains("backtrace") && !message.contains(".rs"), "{message}");
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{field} {what} took {:?}", begun.elapsed());
    }
    cluster.nothing_is_held(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn through_grpc_and_kserve() {
    let pair = tiny::pair(Kind::Identity, 32);
    let cluster = Builder::new(&pair.dir).start().await;
    let asked = |kind| {
        let sampling = Sampling { guide: Some(Guide { kind: Some(kind) }), ..Sampling::default() };
        let mut asked = request(&[1, 2, 3], &SamplingParams::greedy(), 2);
        asked.sampling = Some(sampling);
        asked
    };
    let mut kserve = GrpcInferenceServiceClient::connect(cluster.grpc.clone()).await.unwrap();
    for (name, grammar, schema) in
        [("guided_grammar", Some(rules(12_000)), None), ("guided_json", None, Some(definitions(6_900).to_string()))]
    {
        let text = grammar.clone().or(schema.clone()).unwrap();
        let kind = grammar.map(guide::Kind::Grammar).or(schema.map(guide::Kind::JsonSchema)).unwrap();
        let refused = tokens(cluster.client().await, asked(kind)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains("nested") || refused.message().contains("s of a core"), "{refused}");
        let input = |name: &str, text: String| InferInputTensor {
            name: name.into(),
            datatype: "BYTES".into(),
            shape: vec![1],
            contents: Some(InferTensorContents { bytes_contents: vec![text.into()], ..Default::default() }),
            ..Default::default()
        };
        let inputs = vec![input("text_input", "x".into()), input("sampling_parameters", json!({ name: text }).to_string())];
        let infer = ModelInferRequest { model_name: "tiny".into(), inputs, ..Default::default() };
        let refused = kserve.model_infer(infer).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    others_are_served(&cluster).await;
    cluster.nothing_is_held(Duration::from_secs(5)).await;
}

/// What each process that was started by this one to compile guides has used of a core, in hundredths of a second.
fn workers() -> Vec<u64> {
    let own = std::process::id().to_string();
    let child = |entry: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let lives = fields.get(1) == Some(&own.as_str()) && fields.first() != Some(&"Z");
        lives.then(|| fields[11].parse().unwrap())
    };
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(child).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_goes_away_leaves_no_compiler_at_work() {
    let pair = tiny::pair(Kind::Identity, 33);
    let cluster = Builder::new(&pair.dir).router_flags(&["--guide-seconds", "600", "--guide-memory", "4G"]).start().await;
    assert!(workers().is_empty());
    // It takes 8 s of a core, and 80 in a debug build.
    let slow = body("guided_regex", &json!("(?i)".to_owned() + &r"\pL".repeat(60_000)));
    let asking = tokio::spawn({
        let (http, slow) = (cluster.http.clone(), slow.clone());
        async move { reqwest::Client::new().post(format!("{http}/v1/chat/completions")).json(&slow).send().await }
    });
    let until = Instant::now() + Duration::from_secs(20);
    while workers().iter().all(|used| *used < 20) {
        assert!(Instant::now() < until && !asking.is_finished(), "no process compiles for long");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    asking.abort();
    while !workers().is_empty() {
        assert!(Instant::now() < until && workers().iter().all(|used| *used < 300), "a process still compiles for nobody");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    others_are_served(&cluster).await;
}
