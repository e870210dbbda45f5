//! Whatever is wrong gets its code and a sentence that says what; the next request is served as before.

use overfill_kv::{HandoffDigest, RowsHeader};
use overfill_proto::error::grpc_code;
use overfill_proto::v1::decode_client::DecodeClient;
use overfill_proto::v1::{
    DecodeEvent, DecodeRequest, KvCommit, KvDtype, KvFrame, KvRows, PrefillRequest, PushSummary, Sampling, StopTokens, decode_event,
    kv_frame,
};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::nodes;
use overfill_tests::tiny::{self, Kind};
use overfill_transport::calls::CallEvents;
use overfill_types::prompt_digest;
use overfill_types::{Endpoint, Epoch, Fingerprint, Retry, Role, SamplingParams, ServiceError, Ticket};
use serde_json::{Value, json};
use tonic::{Code, Status};

async fn post(cluster: &Cluster, path: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
    let sent = reqwest::Client::new().post(format!("{}{path}", cluster.http)).body(body).send().await.unwrap();
    (sent.status().as_u16(), sent.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn http() {
    let pair = tiny::pair(Kind::Identity, 7);
    let cluster = Builder::new(&pair.dir).prefill_flags(&["--max-context", "1000"]).start().await;
    let good = json!({ "prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0, "return_token_ids": true, "ignore_eos": true });
    let (status, expected) = post(&cluster, "/v1/completions", good.to_string()).await;
    assert_eq!(status, 200);
    assert_eq!(expected["choices"][0]["token_ids"].as_array().unwrap().len(), 5);

    let with = |key: &str, value: Value| {
        let mut body = good.clone();
        body[key] = value;
        body.to_string().into_bytes()
    };
    let chat = |messages: Value| json!({ "messages": messages }).to_string().into_bytes();
    let completions = "/v1/completions";
    let cases: Vec<(&str, Vec<u8>, u16, &str)> = vec![
        (completions, with("prompt", json!("")), 400, "empty"),
        (completions, with("prompt", json!([])), 400, "empty"),
        (completions, with("prompt", json!(vec![1; 1000])), 400, "context of 1000"),
        (completions, with("prompt", json!([1, 260])), 400, "token id 260"),
        (completions, with("prompt", json!([1, -1])), 400, "prompt"),
        (completions, with("prompt", json!(["a", 7])), 400, "prompt"),
        (completions, with("prompt", json!(vec!["a"; 257])), 400, "at most 256"),
        (completions, with("max_tokens", json!(0)), 400, "max_tokens is 0"),
        (completions, with("max_tokens", json!(-5)), 400, "max_tokens is -5"),
        (completions, with("max_tokens", json!(1_000_000_000_000u64)), 400, "context of 1000"),
        (completions, with("model", json!("gpt-9")), 404, "gpt-9"),
        (completions, with("temperature", json!(-1)), 400, "temperature"),
        (completions, with("temperature", json!("hot")), 400, "temperature"),
        (completions, good.to_string().replace("\"temperature\":0", "\"temperature\":NaN").into_bytes(), 400, "temperature"),
        (completions, with("top_p", json!(1.5)), 400, "top_p"),
        (completions, with("stop", json!([""])), 400, "stop string"),
        (completions, with("stop_token_ids", json!([9999])), 400, "stop_token_ids"),
        (completions, with("logprobs", json!(21)), 400, "at most 20"),
        (completions, with("n", json!(0)), 400, "n is 0"),
        (completions, with("n", json!(129)), 400, "n is 129"),
        (completions, with("suffix", json!("x")), 400, "suffix"),
        (completions, with("best_of", json!(3)), 400, "best_of"),
        (completions, with("logit_bias", json!({ "1": 101 })), 400, "logit_bias is 101"),
        (completions, with("logit_bias", json!({ "999": 1 })), 400, "token id 999"),
        (completions, with("logit_bias", json!({ "x": 1 })), 400, "no token id"),
        (completions, with("guided_json", json!("{")), 400, "JSON schema"),
        (completions, with("guided_json", json!({ "type": "thing" })), 400, "JSON schema"),
        (completions, with("guided_regex", json!("(")), 400, "regular expression"),
        (completions, with("guided_regex", json!("a".repeat(300_000))), 400, "262144"),
        (completions, with("guided_grammar", json!("start: nothing")), 400, "grammar"),
        (completions, with("guided_choice", json!([])), 400, "guided_choice"),
        (completions, with("response_format", json!({ "type": "xml" })), 400, "response_format"),
        (completions, b"{".to_vec(), 400, "EOF"),
        (completions, b"{\"prompt\": \"\xff\xfe\"}".to_vec(), 400, ""),
        (completions, b"[]".to_vec(), 400, ""),
        ("/v1/chat/completions", chat(json!([])), 400, "messages"),
        ("/v1/chat/completions", chat(json!([{ "role": "user" }])), 400, "content"),
        ("/v1/chat/completions", chat(json!([{ "role": "tool", "content": "x" }])), 400, "no tools here"),
        ("/tokenize", b"{}".to_vec(), 400, "prompt"),
        ("/detokenize", b"{\"tokens\": [260]}".to_vec(), 400, "260"),
        ("/v1/nothing", b"{}".to_vec(), 404, "/v1/completions"),
    ];
    for (path, body, code, word) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(120)]).into_owned();
        let (status, answer) = post(&cluster, path, body).await;
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert_eq!(status, code, "{shown}: {answer}");
        assert!(message.contains(word), "{shown}: {message}");
    }
    let client = reqwest::Client::new();
    let huge = client.post(format!("{}{completions}", cluster.http)).body(vec![b'x'; 50 << 20]).send().await;
    // Refused before it is read whole: the client sees the answer, or its connection closed while it still sends.
    assert!(huge.is_err() || huge.is_ok_and(|r| r.status() == 413));
    let (status, again) = post(&cluster, completions, good.to_string()).await;
    assert_eq!((status, &again["choices"]), (200, &expected["choices"]), "served as before");
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc() {
    let pair = tiny::pair(Kind::Identity, 7);
    let cluster = Builder::new(&pair.dir).start().await;
    let greedy = SamplingParams::greedy();
    let ask = async |change: &dyn Fn(&mut overfill_proto::v1::GenerateRequest)| {
        let mut request = request(&[1, 2, 3], &greedy, 5);
        request.ignore_eos = true;
        change(&mut request);
        tokens(cluster.client().await, request).await
    };
    let expected = ask(&|_| {}).await.unwrap();
    assert_eq!(expected.len(), 5);
    type Change = (&'static dyn Fn(&mut overfill_proto::v1::GenerateRequest), Code, &'static str);
    let cases: [Change; 6] = [
        (&|r| r.input = None, Code::InvalidArgument, "input"),
        (&|r| r.max_tokens = Some(0), Code::InvalidArgument, "max_tokens"),
        (&|r| r.max_tokens = Some(u32::MAX), Code::InvalidArgument, "context"),
        (&|r| r.model = "other".into(), Code::NotFound, "other"),
        (&|r| r.sampling = Some(Sampling { temperature: Some(f32::NAN), ..Default::default() }), Code::InvalidArgument, "temperature"),
        (&|r| r.stop = vec![String::new()], Code::InvalidArgument, "stop string"),
    ];
    for (change, code, word) in cases {
        let error = ask(change).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(word), "{error}");
    }
    assert_eq!(ask(&|_| {}).await.unwrap(), expected, "served as before");
}

/// A reservation on a decode node, made as a router would.
struct Reserved {
    node: Endpoint,
    ticket: Ticket,
    events: CallEvents<DecodeEvent>,
}

const PROMPT: [u32; 3] = [1, 2, 3];

async fn reserve(cluster: &Cluster, request_id: &str, epoch: u64) -> Result<Reserved, ServiceError> {
    let node = cluster.nodes(Role::Decode).remove(0);
    let request = DecodeRequest {
        fingerprint: node.pairs[0].fingerprint.to_string(),
        request_id: request_id.into(),
        epoch,
        prompt: PROMPT.to_vec(),
        sampling: Some(Sampling { temperature: Some(0.0), ..Default::default() }),
        stop: Some(StopTokens { max_tokens: 4, ignore_eos: true, ..Default::default() }),
        ..DecodeRequest::default()
    };
    let mut events = nodes::decode(&node, request).await?;
    match events.message().await?.unwrap().event {
        Some(decode_event::Event::Reserved(reserved)) => Ok(Reserved { node, ticket: Ticket::new(reserved.ticket), events }),
        other => panic!("{other:?}"),
    }
}

/// All frames of a good handoff of zeros.
fn frames(reserved: &Reserved, epoch: u64) -> Vec<KvFrame> {
    let (layers, row) = (tiny::FULL.layers, tiny::FULL.kv_heads * 8);
    let payload = vec![0u8; PROMPT.len() * row * 4];
    let mut digest = HandoffDigest::default();
    let mut frames: Vec<KvFrame> = (0..layers as u32)
        .map(|layer| {
            let header = RowsHeader {
                fingerprint: reserved.node.pairs[0].fingerprint.clone(),
                ticket: reserved.ticket.clone(),
                epoch: Epoch(epoch),
                index: layer,
                layer,
                start: 0,
                tokens: PROMPT.len() as u32,
            };
            let checksum = header.checksum(&payload, &payload);
            digest.update(&header, checksum);
            let (k, v) = (payload.clone().into(), payload.clone().into());
            let rows =
                KvRows { layer, start: 0, tokens: PROMPT.len() as u32, dtype: KvDtype::F32.into(), k, v, checksum, ..KvRows::default() };
            frame(reserved, epoch, layer, kv_frame::Body::Rows(rows))
        })
        .collect();
    let commit =
        KvCommit { digest: digest.finish(7).to_vec().into(), prompt_digest: prompt_digest(&PROMPT).to_vec().into(), first_token: 7 };
    frames.push(frame(reserved, epoch, layers as u32, kv_frame::Body::Commit(commit)));
    frames
}

fn frame(reserved: &Reserved, epoch: u64, index: u32, body: kv_frame::Body) -> KvFrame {
    let fingerprint = reserved.node.pairs[0].fingerprint.to_string();
    KvFrame { fingerprint, ticket: reserved.ticket.to_string(), epoch, index, body: Some(body) }
}

async fn push(reserved: &Reserved, frames: Vec<KvFrame>) -> Result<PushSummary, Status> {
    let mut client = DecodeClient::new(nodes::connector().connect(reserved.node.address.as_str()).unwrap());
    Ok(client.push_kv(tokio_stream::iter(frames)).await?.into_inner())
}

fn rows(frame: &mut KvFrame) -> &mut KvRows {
    match &mut frame.body {
        Some(kv_frame::Body::Rows(rows)) => rows,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_frames() {
    let pair = tiny::pair(Kind::Identity, 7);
    let cluster = Builder::new(&pair.dir).start().await;
    type Change = fn(&mut Vec<KvFrame>);
    let cases: [(&str, Change, Code); 12] = [
        (
            "a flipped bit",
            |f| {
                let mut k = rows(&mut f[1]).k.to_vec();
                k[5] ^= 4;
                rows(&mut f[1]).k = k.into();
            },
            Code::DataLoss,
        ),
        ("truncated", |f| rows(&mut f[1]).v.truncate(8), Code::InvalidArgument),
        ("twice", |f| f.insert(1, f[0].clone()), Code::DataLoss),
        ("left out", |f| drop(f.remove(1)), Code::DataLoss),
        ("out of order", |f| f.swap(0, 1), Code::DataLoss),
        ("of another sequence", |f| f[1].ticket = "other".into(), Code::InvalidArgument),
        ("of another pair", |f| f.iter_mut().for_each(|f| f.fingerprint = "other".into()), Code::FailedPrecondition),
        ("of an older epoch", |f| f.iter_mut().for_each(|f| f.epoch -= 1), Code::Aborted),
        ("unknown ticket", |f| f.iter_mut().for_each(|f| f.ticket = "other".into()), Code::NotFound),
        ("no commit", |f| drop(f.pop()), Code::DataLoss),
        (
            "another prompt",
            |f| {
                if let Some(kv_frame::Body::Commit(commit)) = &mut f.last_mut().unwrap().body {
                    commit.prompt_digest = vec![0; 32].into();
                }
            },
            Code::InvalidArgument,
        ),
        ("another type", |f| rows(&mut f[0]).dtype = 0, Code::InvalidArgument),
    ];
    for (i, (name, change, code)) in cases.into_iter().enumerate() {
        let mut reserved = reserve(&cluster, &format!("r{i}"), 2).await.unwrap();
        let mut frames = frames(&reserved, 2);
        change(&mut frames);
        let error = push(&reserved, frames).await.unwrap_err();
        assert_eq!(error.code(), code, "{name}: {error}");
        assert!(!error.message().is_empty());
        // Frames that name no claimable reservation leave it as it is; all others end it, and no token is ever written.
        if !matches!(code, Code::FailedPrecondition | Code::Aborted | Code::NotFound) {
            let told = reserved.events.message().await.unwrap_err();
            assert_eq!((grpc_code(told.code), told.retry), (code, Retry::Elsewhere), "{name}: {told}");
        }
        drop(reserved);
        cluster.nothing_is_held(std::time::Duration::from_secs(1)).await;
    }

    let mut reserved = reserve(&cluster, "good", 1).await.unwrap();
    let good = frames(&reserved, 1);
    assert_eq!(push(&reserved, good.clone()).await.unwrap().frames, tiny::FULL.layers as u32);
    let mut written = 0;
    while let Some(event) = reserved.events.message().await.unwrap() {
        written += usize::from(matches!(event.event, Some(decode_event::Event::Token(_))));
    }
    assert_eq!(written, 3, "the first token was the full model's");
    let error = push(&reserved, good).await.unwrap_err();
    assert_eq!(error.code(), Code::Aborted, "a ticket is used once: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_and_pairs() {
    let pair = tiny::pair(Kind::Identity, 7);
    let cluster = Builder::new(&pair.dir).start().await;
    let mut first = reserve(&cluster, "same", 1).await.unwrap();
    let error = reserve(&cluster, "same", 1).await.err().unwrap();
    assert_eq!(error.code, overfill_types::Code::Stale, "{error}");
    let second = reserve(&cluster, "same", 2).await.unwrap();
    let told = first.events.message().await.unwrap_err();
    assert_eq!(told.code, overfill_types::Code::Stale, "the older attempt is ended: {told}");
    drop(second);

    let other = Fingerprint::new("0".repeat(64)).to_string();
    let stop = Some(StopTokens { max_tokens: 1, ..Default::default() });
    let node = cluster.nodes(Role::Prefill).remove(0);
    let asked = PrefillRequest { fingerprint: other, prompt: PROMPT.to_vec(), stop, ..Default::default() };
    let error = nodes::prefill(&node, asked).await.err().unwrap();
    assert_eq!(error.code, overfill_types::Code::Mismatch);
    assert!(
        error.message.contains("000000000000") && error.message.contains(node.pairs[0].fingerprint.short()),
        "names both sides: {error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_node_refuses_at_once_and_one_token_needs_no_decode_node() {
    let pair = tiny::pair(Kind::Identity, 7);
    // 1 KiB a token, since heads of 8 are kept 16 wide: 32 token positions.
    let cluster = Builder::new(&pair.dir).decode_flags(&["--kv-memory", "32K"]).start().await;
    let greedy = SamplingParams::greedy();
    let error = tokens(cluster.client().await, request(&tiny::prompt(100, 1), &greedy, 10)).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "no node will ever have room: {error}");
    assert!(error.message().contains("KV cache for 110 tokens") && error.message().contains("holds 32"), "{error}");
    let one = tokens(cluster.client().await, request(&tiny::prompt(100, 1), &greedy, 1)).await.unwrap();
    assert_eq!(one.len(), 1);
    cluster.nothing_is_held(std::time::Duration::from_secs(1)).await;
}
