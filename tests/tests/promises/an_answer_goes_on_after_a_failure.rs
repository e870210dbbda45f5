//! An answer that loses its blocks or its node goes on elsewhere or later, and is token for token the one that nothing disturbed.

use std::ops::ControlFlow;
use std::time::Duration;

use clap::Parser;
use overfill_lifecycle::Drain;
use overfill_model::solo::Solo;
use overfill_model::{Device, ThreadPool};
use overfill_proto::convert;
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_proto::v1::{DecodeEvent, DecodeRequest, Handoff, PrefillRequest, decode_event, generate_event};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::nodes::{self, status};
use overfill_tests::processes::eventually;
use overfill_tests::tiny::{self, Kind, TinyPair};
use overfill_transport::calls::CallEvents;
use overfill_types::{Code, Role, SamplingParams, ServiceError, StopConditions};
use tonic::Status;
use tonic::transport::Channel;

const SECOND: Duration = Duration::from_secs(1);

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        top_p: 0.95,
        repetition_penalty: 1.1,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        seed,
        ..SamplingParams::greedy()
    }
}

/// Short prompts, asked greedily and sampled.
fn requests(count: usize) -> Vec<(Vec<u32>, SamplingParams)> {
    (0..count).map(|i| (tiny::prompt(3 + i * 3, i as u64), if i % 2 == 0 { SamplingParams::greedy() } else { sampled(i as u64) })).collect()
}

fn stop(new: usize) -> StopConditions {
    StopConditions { max_tokens: new, stop_token_ids: vec![], ignore_eos: true }
}

/// One process, no network, nothing disturbs it.
fn reference(pair: &TinyPair, requests: &[(Vec<u32>, SamplingParams)], new: usize) -> Vec<Vec<u32>> {
    let mut solo = Solo::load(&pair.open(), &Device::Cpu, ThreadPool::new(2, &[]).unwrap()).unwrap();
    let mut answer = |(prompt, sampling): &(Vec<u32>, SamplingParams)| {
        let mut ids = Vec::new();
        let take = |s: &overfill_model::Sampled| {
            ids.push(s.token);
            ControlFlow::Continue(())
        };
        solo.generate(prompt, sampling, &stop(new), take).unwrap();
        ids
    };
    requests.iter().map(&mut answer).collect()
}

/// Asks for a long answer, again for as long as the cluster has no room for it.
async fn answer(client: InferenceClient<Channel>, prompt: Vec<u32>, sampling: SamplingParams, new: usize) -> Result<Vec<u32>, Status> {
    loop {
        let mut request = request(&prompt, &sampling, new as u32);
        request.ignore_eos = true;
        match tokens(client.clone(), request).await {
            Err(error) if error.code() == tonic::Code::ResourceExhausted => tokio::time::sleep(Duration::from_millis(20)).await,
            answered => return answered,
        }
    }
}

async fn preempted(cluster: &Cluster) -> u64 {
    cluster.statuses().await.iter().map(|s| s.preempted).sum()
}

/// Eight long answers at once, with room for two or three. Gives how many sequences were preempted.
/// They are so long that the first is far from its end when the last prompt has been read, however fast the machine.
async fn eight_at_once(kind: Kind, decode_nodes: usize, kv_memory: &str, overcommit: &str) -> u64 {
    let pair = tiny::pair(kind, 21);
    let requests = requests(8);
    let expected = reference(&pair, &requests, 1000);
    let flags = ["--kv-memory", kv_memory, "--kv-overcommit", overcommit];
    let cluster = Builder::new(&pair.dir).nodes(1, decode_nodes).decode_flags(&flags).start().await;
    let client = cluster.client().await;
    let answers: Vec<_> =
        requests.into_iter().map(|(prompt, sampling)| tokio::spawn(answer(client.clone(), prompt, sampling, 1000))).collect();
    for (answer, expected) in answers.into_iter().zip(expected) {
        assert_eq!(answer.await.unwrap().unwrap(), expected);
    }
    cluster.nothing_is_held(SECOND).await;
    preempted(&cluster).await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_preempted_sequence_on_the_same_node() {
    // 768 bytes a token, so 133 blocks; an answer needs up to 64 in the end.
    assert!(eight_at_once(Kind::Identity, 1, "1600K", "4").await > 0, "they cannot all stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_preempted_sequence_on_another_node() {
    assert!(eight_at_once(Kind::Identity, 2, "960K", "4").await > 0, "they cannot all stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_preempted_sequence_on_a_half_precision_cache() {
    assert!(eight_at_once(Kind::Prune("firstlast"), 1, "960K", "4").await > 0, "they cannot all stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_overcommit_nothing_is_preempted() {
    assert_eq!(eight_at_once(Kind::Identity, 1, "1600K", "1").await, 0);
}

/// The node let it in last, as it does with a sequence that was preempted and comes again.
#[tokio::test(flavor = "multi_thread")]
async fn of_the_request_that_came_first_although_its_sequence_came_last() {
    let pair = tiny::pair(Kind::Identity, 21);
    // 26 blocks: the one grows to 24 while the other holds 3.
    let cluster = Builder::new(&pair.dir).decode_flags(&["--kv-memory", "320K", "--kv-overcommit", "4"]).start().await;
    let attempt = |request_id: &str, age| Attempt {
        request_id: request_id.into(),
        prompt: tiny::prompt(47, 1),
        sampling: SamplingParams::greedy(),
        written: vec![],
        max_tokens: 330,
        age,
    };
    let (_, mut younger) = attempt("younger", Duration::from_secs(1)).reserve(&cluster).await.unwrap();
    let written = attempt("older", Duration::from_secs(60)).write(&cluster).await.unwrap();
    assert_eq!((written.len(), preempted(&cluster).await), (329, 1));
    let error = younger.message().await.unwrap_err();
    assert_eq!(error.code, Code::Preempted, "{error}");
    cluster.nothing_is_held(SECOND).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_node_that_is_drained_and_does_not_wait() {
    let pair = tiny::pair(Kind::Identity, 21);
    let requests = requests(6);
    let expected = reference(&pair, &requests, 1500);
    let cluster = Builder::new(&pair.dir).start().await;
    let dir = pair.dir.display().to_string();
    let flags = ["node", "--pair", &dir, "--threads", "1", "--kv-memory", "32M", "--drain-timeout", "0"];
    let config = overfill_decode_node::config::Cli::parse_from(flags).config;
    let (listener, drain) = (tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap(), Drain::new());
    let second = tokio::spawn(overfill_decode_node::run(config, listener, cluster.discovery.clone(), drain.clone()));
    eventually(SECOND * 30, "the second node is listed", || async { cluster.nodes(Role::Decode).len() == 2 }).await;
    cluster.each_has_answered(Role::Decode, SECOND * 10).await;

    let client = cluster.client().await;
    let answers: Vec<_> =
        requests.into_iter().map(|(prompt, sampling)| tokio::spawn(answer(client.clone(), prompt, sampling, 1500))).collect();
    eventually(SECOND * 10, "both nodes write", || async {
        let nodes = cluster.nodes(Role::Decode);
        status(&nodes[0]).await.running > 0 && status(&nodes[1]).await.running > 0
    })
    .await;
    drain.start();
    for (answer, expected) in answers.into_iter().zip(expected) {
        assert_eq!(answer.await.unwrap().unwrap(), expected);
    }
    second.await.unwrap().unwrap();
    cluster.nothing_is_held(SECOND).await;
}

/// One attempt at the nodes themselves, as a router makes it.
struct Attempt {
    request_id: String,
    prompt: Vec<u32>,
    sampling: SamplingParams,
    written: Vec<u32>,
    max_tokens: usize,
    /// How long ago the request came to the router.
    age: Duration,
}

impl Attempt {
    async fn reserve(&self, cluster: &Cluster) -> Result<(Handoff, CallEvents<DecodeEvent>), ServiceError> {
        let node = cluster.nodes(Role::Decode).remove(0);
        let request = DecodeRequest {
            fingerprint: node.pairs[0].fingerprint.to_string(),
            request_id: self.request_id.clone(),
            epoch: 1,
            prompt: self.prompt.clone(),
            sampling: Some(convert::sampling_to_wire(&self.sampling)),
            stop: Some(convert::stop_to_wire(&stop(self.max_tokens))),
            written: self.written.clone(),
            age_us: self.age.as_micros() as u64,
            ..DecodeRequest::default()
        };
        let mut events = nodes::decode(&node, request).await?;
        match events.message().await?.unwrap().event {
            Some(decode_event::Event::Reserved(r)) => {
                let handoff =
                    Handoff { address: node.address.to_string(), ticket: r.ticket, epoch: 1, held_tokens: r.held_tokens, nccl: r.nccl };
                Ok((handoff, events))
            }
            other => panic!("{other:?}"),
        }
    }

    /// The tokens that the decode node writes.
    async fn write(&self, cluster: &Cluster) -> Result<Vec<u32>, ServiceError> {
        let (handoff, mut events) = self.reserve(cluster).await?;
        let node = cluster.nodes(Role::Prefill).remove(0);
        let request = PrefillRequest {
            fingerprint: node.pairs[0].fingerprint.to_string(),
            request_id: self.request_id.clone(),
            prompt: self.prompt.clone(),
            sampling: Some(convert::sampling_to_wire(&self.sampling)),
            stop: Some(convert::stop_to_wire(&stop(self.max_tokens))),
            handoff: Some(handoff),
            ..PrefillRequest::default()
        };
        let _prefill = nodes::prefill(&node, request).await?;
        let mut ids = Vec::new();
        while let Some(event) = events.message().await? {
            match event.event.unwrap() {
                decode_event::Event::Token(token) => {
                    assert_eq!(token.index as usize, self.written.len().max(1) + ids.len());
                    ids.push(token.id);
                }
                decode_event::Event::Finished(_) => return Ok(ids),
                decode_event::Event::Reserved(_) => panic!("reserved twice"),
            }
        }
        panic!("an answer ends with `finished` or an error");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wherever_it_broke_off_and_in_any_company() {
    for kind in [Kind::Identity, Kind::Projection] {
        let pair = tiny::pair(kind, 21);
        let cluster = Builder::new(&pair.dir).start().await;
        let asked = [(tiny::prompt(70, 1), SamplingParams::greedy()), (tiny::prompt(33, 2), sampled(5))];
        let expected = reference(&pair, &asked, 300);
        // Others that write all the while.
        let company: Vec<_> = (0..3).map(|i| tokio::spawn(answer_of(cluster.grpc.clone(), tiny::prompt(20, 40 + i), 3000))).collect();
        for ((prompt, sampling), expected) in asked.into_iter().zip(&expected) {
            for written in [0, 1, 2, 16, 63, 64, 65, 129, 299] {
                let (prompt, sampling) = (prompt.clone(), sampling.clone());
                let attempt = Attempt {
                    request_id: format!("{sampling:?} {written}"),
                    prompt,
                    sampling,
                    written: expected[..written].to_vec(),
                    max_tokens: 300,
                    age: Duration::ZERO,
                };
                assert_eq!(attempt.write(&cluster).await.unwrap(), expected[written.max(1)..], "{kind:?} after {written} tokens");
            }
        }
        company.iter().for_each(tokio::task::JoinHandle::abort);
        cluster.nothing_is_held(SECOND).await;
    }
}

async fn answer_of(grpc: String, prompt: Vec<u32>, new: usize) {
    let client = InferenceClient::connect(grpc).await.unwrap();
    loop {
        answer(client.clone(), prompt.clone(), SamplingParams::greedy(), new).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn and_not_where_it_would_be_another_one() {
    let pair = tiny::pair(Kind::Identity, 21);
    let cluster = Builder::new(&pair.dir).start().await;
    let asked = (tiny::prompt(20, 1), SamplingParams::greedy());
    let first = reference(&pair, std::slice::from_ref(&asked), 1).remove(0).remove(0);
    let attempt = |written: Vec<u32>| Attempt {
        request_id: format!("{written:?}"),
        prompt: asked.0.clone(),
        sampling: asked.1.clone(),
        written,
        max_tokens: 4,
        age: Duration::ZERO,
    };
    let cases = [
        (vec![first; 4], Code::InvalidArgument, "nothing is left"),
        (vec![first, 260], Code::InvalidArgument, "token id 260"),
        (vec![(first + 1) % 256, 3], Code::DataLoss, "began with token"),
    ];
    for (written, code, word) in cases {
        let error = attempt(written).write(&cluster).await.unwrap_err();
        assert!(error.code == code && error.message.contains(word), "{error:?}");
        cluster.nothing_is_held(SECOND).await;
    }
    assert_eq!(attempt(vec![first, 9, 9]).write(&cluster).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_answer_holds_what_it_has_come_to_need() {
    let pair = tiny::pair(Kind::Identity, 21);
    // 200 blocks, of which an answer of 3,000 tokens may come to need 191.
    let cluster = Builder::new(&pair.dir).decode_flags(&["--kv-memory", "2400K"]).start().await;
    let attempt = |request_id: &str| Attempt {
        request_id: request_id.into(),
        prompt: tiny::prompt(47, 1),
        sampling: SamplingParams::greedy(),
        written: vec![],
        max_tokens: 3000,
        age: Duration::ZERO,
    };
    let held = || async { cluster.statuses().await.iter().map(|s| s.blocks_held).sum::<u64>() };
    let first = attempt("a").reserve(&cluster).await.unwrap();
    assert_eq!(held().await, 3);
    let second = attempt("b").reserve(&cluster).await.unwrap();
    assert_eq!(held().await, 6);
    let error = attempt("c").reserve(&cluster).await.err().unwrap();
    assert!(error.code == Code::ResourceExhausted && error.message.contains("191 KV blocks may be needed"), "{error}");
    drop((first, second));
    cluster.nothing_is_held(SECOND).await;

    // It grows to its end, block by block.
    let mut request = request(&tiny::prompt(47, 1), &SamplingParams::greedy(), 3000);
    request.ignore_eos = true;
    let mut events = cluster.client().await.generate(request).await.unwrap().into_inner();
    let mut written = 0;
    while let Some(event) = events.message().await.unwrap() {
        if let Some(generate_event::Event::Delta(delta)) = event.event {
            written += delta.tokens.len();
        }
    }
    assert_eq!((written, preempted(&cluster).await), (3000, 0));
    cluster.nothing_is_held(SECOND).await;
}
