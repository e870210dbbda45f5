//! The loss of given answers, token by token, is the same through a running cluster (forced tokens, log-probabilities) as by the
//! scoring that evaluates pairs, which a test of training compares with what training reports.

use overfill_compress::{Arm, Example, score};
use overfill_model::{Device, ThreadPool, Workspace};
use overfill_proto::v1::{ForcedTokens, GenerateRequest, Guide, Quality, Sampling, generate_event, guide};
use overfill_tests::cluster::{Builder, Cluster, request};
use overfill_tests::tiny::{self, Kind};
use overfill_types::SamplingParams;
use serde_json::{Value, json};
use tonic::{Code, Status};

/// Answers of random tokens, ends of an answer among them.
fn examples() -> Vec<Example> {
    let lengths = [(1, 1), (5, 2), (16, 16), (17, 40), (90, 33), (300, 70)];
    lengths.into_iter().enumerate().map(|(i, (p, r))| Example { prompt: tiny::prompt(p, i as u64), response: answer(r, i) }).collect()
}

fn answer(tokens: usize, seed: usize) -> Vec<u32> {
    let mut answer = tiny::prompt(tokens, 100 + seed as u64);
    answer[tokens / 2] = tiny::EOS;
    answer
}

fn forced(prompt: &[u32], response: &[u32], quality: Quality) -> GenerateRequest {
    let guide = Guide { kind: Some(guide::Kind::Tokens(ForcedTokens { ids: response.to_vec() })) };
    let asked = request(prompt, &SamplingParams::greedy(), response.len() as u32);
    let sampling = Sampling { logprobs: Some(0), guide: Some(guide), ..asked.sampling.clone().unwrap() };
    GenerateRequest { quality: quality.into(), sampling: Some(sampling), ignore_eos: true, ..asked }
}

/// What the cluster says of each token.
async fn served(cluster: &Cluster, asked: GenerateRequest) -> Result<(Vec<u32>, Vec<f32>), Status> {
    let mut events = cluster.client().await.generate(asked).await?.into_inner();
    let (mut ids, mut log_probs) = (Vec::new(), Vec::new());
    while let Some(event) = events.message().await? {
        if let Some(generate_event::Event::Delta(delta)) = event.event {
            for token in delta.tokens {
                ids.push(token.id);
                log_probs.push(token.logprob.unwrap().logprob);
            }
        }
    }
    Ok((ids, log_probs))
}

async fn check(kind: Kind) {
    let pair = tiny::pair(kind, 61);
    let (opened, mut workspace) = (pair.open(), Workspace::new(ThreadPool::new(2, &[]).unwrap()));
    let full = opened.load_full(&Device::Cpu, workspace.pool()).unwrap();
    let decode = opened.load_decode(&Device::Cpu, workspace.pool()).unwrap();
    let transform = opened.load_transform(workspace.pool()).unwrap();
    let arms = [Arm::Overfill { decode: &decode, transform: &transform }, Arm::Full, Arm::Alone(&decode)];
    let examples = examples();
    let scored = score(&full, &arms, opened.manifest.kv_formats, &mut workspace, &examples, |_| {}).unwrap();
    let cluster = Builder::new(&pair.dir).start().await;
    for (quality, scored) in [Quality::Overfill, Quality::Full, Quality::Decode].into_iter().zip(&scored) {
        for (example, scored) in examples.iter().zip(scored) {
            let (ids, log_probs) = served(&cluster, forced(&example.prompt, &example.response, quality)).await.unwrap();
            assert_eq!(ids, example.response, "{quality:?}: the tokens are the ones that were forced");
            for (served, scored) in log_probs.iter().zip(&scored.log_probs) {
                assert!((served - scored).abs() < 1e-4, "{kind:?}, {quality:?}: served {served}, scored {scored}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_single_precision() {
    check(Kind::Identity).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_half_precision_and_fewer_layers() {
    check(Kind::Prune("last")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http_too_and_what_follows_is_free() {
    let pair = tiny::pair(Kind::Identity, 62);
    let cluster = Builder::new(&pair.dir).start().await;
    let post = async |body: Value| -> (u16, Value) {
        let sent = reqwest::Client::new().post(format!("{}/v1/completions", cluster.http)).json(&body).send().await.unwrap();
        (sent.status().as_u16(), sent.json().await.unwrap())
    };
    let body = |more: Value| {
        let mut body =
            json!({ "prompt": [1, 2, 3], "temperature": 0.8, "seed": 5, "ignore_eos": true, "logprobs": 0, "return_token_ids": true });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let (code, forced) = post(body(json!({ "max_tokens": 8, "forced_token_ids": [50, 60, 70] }))).await;
    assert_eq!(code, 200, "{forced}");
    let ids = forced["choices"][0]["token_ids"].as_array().unwrap();
    assert!(ids[..3] == [json!(50), json!(60), json!(70)] && ids.len() == 8, "{ids:?}");
    assert_eq!(forced["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), 8);
    let (code, refused) = post(body(json!({ "max_tokens": 8, "forced_token_ids": [50, 260] }))).await;
    assert!(code == 400 && refused["error"]["message"].as_str().unwrap().contains("token id 260"), "{refused}");
    let (code, refused) = post(body(json!({ "max_tokens": 8, "forced_token_ids": [50], "guided_regex": "a" }))).await;
    assert!(code == 400 && refused["error"]["message"].as_str().unwrap().contains("forced_token_ids"), "{refused}");
    let error = served(&cluster, self::forced(&[1], &[9999], Quality::Decode)).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}
