//! The clients of a simulated cluster: each asks what the plan says, through the router's door, and notes what came of it.

use std::time::Duration;

use overfill_proto::v1::inference_client::InferenceClient;
use overfill_proto::v1::{Finished, GenerateEvent, GenerateRequest, TokenIds, generate_event, generate_request};
use overfill_proto::{convert, error};
use overfill_types::{Quality, SamplingParams, ServiceError};
use serde_json::json;
use tokio::time::{Instant, sleep_until, timeout};
use tonic::Request;

use crate::plan::{CLIENTS, Leaves, RequestPlan};

/// How long after its deadline a client still waits, to see how late the end comes.
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of a request.
#[derive(Debug)]
pub struct Answer {
    /// Its number in the plan.
    pub number: usize,
    /// Since it was asked.
    pub took: Duration,
    /// Token ids, in the order in which they came.
    pub tokens: Vec<u32>,
    /// How it ended.
    pub ended: Ended,
}

/// How a request ended for its client.
#[derive(Debug)]
pub enum Ended {
    /// With its last token.
    Finished(Box<Finished>),
    /// With an error.
    Failed(ServiceError),
    /// Its client went away.
    Left,
    /// Not at all.
    Never,
}

/// The router's file of keys.
pub(crate) fn keys() -> String {
    let clients = CLIENTS.iter().enumerate().map(
        |(client, (weight, class))| json!({ "name": format!("client {client}"), "keys": [key(client)], "weight": weight, "class": class }),
    );
    json!({ "clients": clients.collect::<Vec<_>>() }).to_string()
}

/// The name of a pair.
pub(crate) fn pair(number: usize) -> String {
    format!("pair-{number}")
}

fn key(client: usize) -> String {
    format!("key-{client}")
}

/// How a request's tokens are chosen.
pub fn sampling(number: usize) -> SamplingParams {
    let greedy = SamplingParams::greedy();
    if number.is_multiple_of(3) { SamplingParams { temperature: 1.0, seed: number as u64, ..greedy } } else { greedy }
}

/// Asks what `plan` says, when it says so.
pub(crate) async fn ask(door: axum::Router, number: usize, plan: &RequestPlan, begun: Instant) -> Answer {
    sleep_until(begun + plan.at).await;
    let (asked, mut tokens) = (Instant::now(), Vec::new());
    let leaves = match plan.leaves {
        Some(Leaves::After(time)) => time,
        _ => plan.timeout + PATIENCE,
    };
    let ended = timeout(leaves, answered(door, number, plan, &mut tokens)).await;
    let ended = match (ended, plan.leaves) {
        (Ok(ended), _) => ended,
        (Err(_), Some(Leaves::After(_))) => Ended::Left,
        (Err(_), _) => Ended::Never,
    };
    Answer { number, took: asked.elapsed(), tokens, ended }
}

async fn answered(door: axum::Router, number: usize, plan: &RequestPlan, tokens: &mut Vec<u32>) -> Ended {
    let quality = match plan.quality {
        Quality::Overfill => overfill_proto::v1::Quality::Overfill,
        Quality::Full => overfill_proto::v1::Quality::Full,
        Quality::Decode => overfill_proto::v1::Quality::Decode,
    };
    let mut request = Request::new(GenerateRequest {
        model: pair(plan.pair),
        input: Some(generate_request::Input::TokenIds(TokenIds { ids: plan.prompt.clone() })),
        sampling: Some(convert::sampling_to_wire(&sampling(number))),
        max_tokens: Some(plan.max_tokens as u32),
        quality: quality.into(),
        ..GenerateRequest::default()
    });
    request.set_timeout(plan.timeout);
    let bearer = format!("Bearer {}", key(plan.client)).parse().expect("a key is a header's value");
    request.metadata_mut().insert("authorization", bearer);
    let failed = |status| Ended::Failed(error::from_status(&status, "the router"));
    let mut events = match InferenceClient::new(door).generate(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return failed(status),
    };
    loop {
        match events.message().await {
            Ok(Some(GenerateEvent { event: Some(generate_event::Event::Delta(delta)) })) => {
                tokens.extend(delta.tokens.iter().map(|token| token.id));
                if matches!(plan.leaves, Some(Leaves::At(most)) if tokens.len() >= most) {
                    return Ended::Left;
                }
            }
            Ok(Some(GenerateEvent { event: Some(generate_event::Event::Finished(finished)) })) => {
                return Ended::Finished(Box::new(finished));
            }
            Ok(Some(_)) => {}
            Ok(None) => return Ended::Never,
            Err(status) => return failed(status),
        }
    }
}
