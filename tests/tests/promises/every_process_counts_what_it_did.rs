//! Metrics of router and nodes agree with what was asked, and with each other; names and buckets are vLLM's.

use std::time::Duration;

use overfill_kv::RowsHeader;
use overfill_proto::v1::decode_client::DecodeClient;
use overfill_proto::v1::{DecodeRequest, KvDtype, KvFrame, KvRows, Sampling, StopTokens, decode_event, kv_frame};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::nodes;
use overfill_tests::processes::eventually;
use overfill_tests::scrape::Scrape;
use overfill_tests::tiny::{self, Kind};
use overfill_types::{Epoch, Retry, Role, SamplingParams, Ticket};
use tonic::Code;

const PATIENCE: Duration = Duration::from_secs(10);
const TTFT: [f64; 22] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0];
const ITL: [f64; 19] = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST: [f64; 21] =
    [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0];

/// Of the router, of the prefill nodes, of the decode nodes.
struct Told {
    router: Scrape,
    prefill: Vec<Scrape>,
    decode: Vec<Scrape>,
}

impl Told {
    async fn by(cluster: &Cluster, prefill: usize) -> Self {
        let mut all = Vec::new();
        for url in &cluster.metrics {
            all.push(Scrape::of(url).await);
        }
        let decode = all.split_off(1 + prefill);
        let prefill = all.split_off(1);
        Self { router: all.remove(0), prefill, decode }
    }
}

fn sum(nodes: &[Scrape], name: &str) -> f64 {
    nodes.iter().map(|node| node.sum(name, &[])).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_numbers_add_up() {
    let pair = tiny::pair(Kind::Identity, 3);
    let cluster = Builder::new(&pair.dir).nodes(2, 2).start().await;
    // Lengths of prompt and answer; with one token no decode node is asked.
    let asked = [(50usize, 10u32), (33, 7), (20, 1), (64, 12), (64, 12), (5, 2)];
    for (i, &(prompt, new)) in asked.iter().enumerate() {
        let mut request = request(&tiny::prompt(prompt, i as u64 / 4), &SamplingParams::greedy(), new);
        request.ignore_eos = true;
        assert_eq!(tokens(cluster.client().await, request).await.unwrap().len(), new as usize);
    }
    // One that no node is asked for: it is refused.
    let refused = tokens(cluster.client().await, request(&[], &SamplingParams::greedy(), 5)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    cluster.nothing_is_held(PATIENCE).await;

    let Told { router, prefill, decode } = Told::by(&cluster, 2).await;
    let prompts: f64 = asked.iter().map(|a| a.0 as f64).sum();
    let answers: f64 = asked.iter().map(|a| f64::from(a.1)).sum();
    let n = asked.len() as f64;
    let handoffs = asked.iter().filter(|a| a.1 > 1).count() as f64;

    assert_eq!(router.sum("vllm:prompt_tokens_total", &[]), prompts);
    assert_eq!(sum(&prefill, "vllm:prompt_tokens_total"), prompts);
    assert_eq!(router.sum("vllm:generation_tokens_total", &[]), answers);
    assert_eq!(sum(&prefill, "vllm:generation_tokens_total"), n, "the first token of each");
    assert_eq!(sum(&decode, "vllm:generation_tokens_total"), answers - n, "all others");
    assert_eq!(router.sum("vllm:request_success_total", &[("finished_reason", "length")]), n);
    assert_eq!(router.sum("vllm:request_success_total", &[]), n);
    assert_eq!(sum(&decode, "vllm:request_success_total"), handoffs);
    assert_eq!(router.sum("overfill_requests_refused_total", &[("reason", "invalid_argument")]), 1.0);
    assert_eq!(router.sum("overfill_attempts_total", &[]), n);
    assert_eq!(router.sum("overfill_attempts_failed_total", &[]) + router.sum("overfill_requests_failed_total", &[]), 0.0);
    assert_eq!(router.sum("overfill_requests_cancelled_total", &[]), 0.0);
    for (name, count) in [
        ("vllm:time_to_first_token_seconds", n),
        ("vllm:e2e_request_latency_seconds", n),
        ("vllm:request_queue_time_seconds", n),
        ("vllm:request_prefill_time_seconds", n),
        ("vllm:request_decode_time_seconds", n),
        ("vllm:request_inference_time_seconds", n),
        ("vllm:request_prompt_tokens", n),
        ("vllm:request_generation_tokens", n),
        ("vllm:inter_token_latency_seconds", answers - n),
        ("overfill_reservation_wait_seconds", handoffs),
    ] {
        assert_eq!(router.sum(&format!("{name}_count"), &[]), count, "{name}");
    }
    assert_eq!(router.sum("vllm:request_prompt_tokens_sum", &[]), prompts);
    assert_eq!(router.sum("vllm:request_generation_tokens_sum", &[]), answers);
    // Stages lie within the whole.
    let stages = ["queue", "prefill", "decode"].map(|s| router.sum(&format!("vllm:request_{s}_time_seconds_sum"), &[]));
    let whole = router.sum("vllm:e2e_request_latency_seconds_sum", &[]);
    assert!(stages.iter().sum::<f64>() <= whole && stages.iter().all(|s| *s >= 0.0), "{stages:?} of {whole}");

    let sent = sum(&prefill, "overfill_kv_bytes_sent_total");
    assert!(sent > 0.0);
    assert_eq!(sent, sum(&decode, "overfill_kv_bytes_received_total"));
    assert_eq!(sum(&prefill, "overfill_kv_frames_sent_total"), sum(&decode, "overfill_kv_frames_received_total"));
    for nodes in [&prefill, &decode] {
        let ended = |result| nodes.iter().map(|s| s.sum("overfill_handoffs_total", &[("result", result)])).sum::<f64>();
        // The answer may be over, and the router let go, before the prefill node sees the acknowledgement.
        assert_eq!(ended("complete") + ended("given_up"), handoffs);
        assert_eq!(sum(nodes, "overfill_handoffs_total"), handoffs);
        assert_eq!(sum(nodes, "overfill_handoff_seconds_count"), ended("complete"));
        assert_eq!(sum(nodes, "vllm:kv_cache_usage_perc") + sum(nodes, "overfill_kv_blocks_held"), 0.0, "nothing is held");
        assert!(nodes.iter().all(|s| s.sum("vllm:cache_config_info", &[("block_size", "16")]) == 1.0));
    }
    // One of the prompts came twice, and was perhaps read by two nodes.
    assert_eq!(sum(&prefill, "vllm:prefix_cache_queries_total"), prompts);
    assert_eq!(sum(&prefill, "vllm:prefix_cache_hits_total"), router.sum("overfill_cached_prompt_tokens_total", &[]));
    assert_eq!(sum(&decode, "overfill_reservations_total"), handoffs);
    assert_eq!(sum(&decode, "overfill_handoff_seconds_count"), handoffs);
    assert_eq!(sum(&decode, "overfill_kv_checksum_failures_total"), 0.0);
    assert_eq!((router.sum("overfill_nodes", &[("role", "prefill")]), router.sum("overfill_nodes", &[("role", "decode")])), (2.0, 2.0));
    // An idle engine looks at itself every few milliseconds.
    for url in &cluster.metrics {
        eventually(PATIENCE, "gauges go down", || async {
            let told = Scrape::of(url).await;
            told.sum("vllm:num_requests_running", &[]) + told.sum("vllm:num_requests_waiting", &[]) == 0.0
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_buckets_are_those_of_vllm() {
    let pair = tiny::pair(Kind::Identity, 3);
    let cluster = Builder::new(&pair.dir).start().await;
    tokens(cluster.client().await, request(&tiny::prompt(20, 1), &SamplingParams::greedy(), 4)).await.unwrap();
    let Told { router, prefill, decode } = Told::by(&cluster, 1).await;
    let (prefill, decode) = (&prefill[0], &decode[0]);
    for (engine, told) in [("router", &router), ("prefill", prefill), ("decode", decode)] {
        assert_eq!(told.values("engine"), [engine]);
        assert!(told.help.values().all(|help| help.ends_with('.')), "{:?}", told.help);
        assert!(told.has("vllm:num_requests_running") && told.has("vllm:num_requests_waiting") && told.has("vllm:generation_tokens_total"));
        for (name, kind) in &told.types {
            assert!(name.starts_with("vllm:") || name.starts_with("overfill_"), "{name}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
        }
        // None that tells one request from another.
        let known = [
            "block_size",
            "cache_dtype",
            "enable_prefix_caching",
            "engine",
            "finished_reason",
            "le",
            "migration_type",
            "model_name",
            "num_gpu_blocks",
            "reason",
            "result",
            "role",
            "version",
            "way",
            "what",
        ];
        assert!(told.labels().iter().all(|label| known.contains(label)), "{:?}", told.labels());
    }
    for told in [prefill, decode] {
        for name in
            ["vllm:kv_cache_usage_perc", "vllm:cache_config_info", "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"]
        {
            assert!(told.has(name), "{name}");
        }
        assert_eq!(told.values("model_name"), router.values("model_name"));
    }
    assert!(decode.has("vllm:num_preemptions_total"));
    assert_eq!(router.buckets("vllm:time_to_first_token_seconds"), TTFT);
    assert_eq!(prefill.buckets("vllm:time_to_first_token_seconds"), TTFT);
    assert_eq!(router.buckets("vllm:inter_token_latency_seconds"), ITL);
    assert_eq!(decode.buckets("vllm:inter_token_latency_seconds"), ITL);
    for name in ["e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time"] {
        assert_eq!(router.buckets(&format!("vllm:{name}_seconds")), REQUEST, "{name}");
    }
    assert_eq!(router.buckets("vllm:request_prompt_tokens")[..7], [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);

    // The page names all of them; the dashboard shows none that the page does not name.
    let read = |path: &str| std::fs::read_to_string(format!("{}/../{path}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let (page, dashboard) = (read("docs/observability.md"), read("deploy/grafana.json"));
    let named = |name: &str| page.contains(&format!("`{name}`"));
    for name in [&router, prefill, decode].iter().flat_map(|told| told.types.keys()) {
        assert!(named(name), "{name} is not in docs/observability.md");
    }
    let words = |text: &str| -> Vec<String> {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
        words.filter(|w| w.starts_with("vllm:") || w.starts_with("overfill_")).map(|w| w.trim_end_matches("_bucket").into()).collect()
    };
    let shown = words(&dashboard);
    assert!(shown.len() > 20);
    for name in shown {
        assert!(named(&name), "the dashboard shows {name}, which nobody tells");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_is_counted() {
    let pair = tiny::pair(Kind::Identity, 3);
    let cluster = Builder::new(&pair.dir).decode_flags(&["--reservation-timeout", "1"]).start().await;
    let node = cluster.nodes(Role::Decode).remove(0);
    let prompt = tiny::prompt(4, 1);
    let ask = |fingerprint: &str, request: &str| DecodeRequest {
        fingerprint: fingerprint.into(),
        request_id: request.into(),
        epoch: 1,
        prompt: prompt.clone(),
        sampling: Some(Sampling { temperature: Some(0.0), ..Default::default() }),
        stop: Some(StopTokens { max_tokens: 4, ignore_eos: true, ..Default::default() }),
        ..DecodeRequest::default()
    };
    // Another pair.
    assert!(nodes::decode(&node, ask("another", "a")).await.is_err());
    // A byte that was changed on the way.
    let mut events = nodes::decode(&node, ask(node.pairs[0].fingerprint.as_str(), "b")).await.unwrap();
    let Some(decode_event::Event::Reserved(reserved)) = events.message().await.unwrap().unwrap().event else { panic!() };
    let ticket = Ticket::new(reserved.ticket);
    let mut payload = vec![0u8; prompt.len() * tiny::FULL.kv_heads * 8 * 4];
    let (fingerprint, tokens) = (node.pairs[0].fingerprint.clone(), prompt.len() as u32);
    let header = RowsHeader { fingerprint, ticket: ticket.clone(), epoch: Epoch(1), index: 0, layer: 0, start: 0, tokens };
    let checksum = header.checksum(&payload, &payload);
    payload[17] ^= 1;
    let rows = KvRows {
        layer: 0,
        start: 0,
        tokens,
        dtype: KvDtype::F32.into(),
        k: payload.clone().into(),
        v: payload.into(),
        checksum,
        ..KvRows::default()
    };
    let frame = KvFrame {
        fingerprint: node.pairs[0].fingerprint.to_string(),
        ticket: ticket.to_string(),
        epoch: 1,
        index: 0,
        body: Some(kv_frame::Body::Rows(rows)),
    };
    let mut client = DecodeClient::new(nodes::connector().connect(node.address.as_str()).unwrap());
    assert_eq!(client.push_kv(tokio_stream::iter([frame])).await.unwrap_err().code(), Code::DataLoss);
    events.message().await.unwrap_err();
    // No frame at all.
    let mut events = nodes::decode(&node, ask(node.pairs[0].fingerprint.as_str(), "c")).await.unwrap();
    events.message().await.unwrap();
    let expired = events.message().await.unwrap_err();
    assert_eq!((expired.code, expired.retry), (overfill_types::Code::Unavailable, Retry::Elsewhere), "{expired}");
    // A client that goes away.
    let mut long = request(&tiny::prompt(20, 1), &SamplingParams::greedy(), 4000);
    long.ignore_eos = true;
    let mut answer = cluster.client().await.generate(long).await.unwrap().into_inner();
    for _ in 0..3 {
        answer.message().await.unwrap();
    }
    drop(answer);
    cluster.nothing_is_held(PATIENCE).await;

    let decode = Scrape::of(&cluster.metrics[2]).await;
    assert_eq!(decode.sum("overfill_pair_mismatches_total", &[]), 1.0);
    assert_eq!(decode.sum("overfill_requests_refused_total", &[("reason", "mismatch")]), 1.0);
    assert_eq!(decode.sum("overfill_kv_checksum_failures_total", &[]), 1.0);
    assert_eq!(decode.sum("overfill_handoffs_total", &[("result", "failed")]), 1.0);
    assert_eq!(decode.sum("overfill_sequences_failed_total", &[("reason", "data_loss")]), 1.0);
    assert_eq!(decode.sum("overfill_reservations_expired_total", &[]), 1.0);
    assert_eq!(decode.sum("overfill_sequences_dropped_total", &[]), 1.0);
    assert_eq!(Scrape::of(&cluster.metrics[0]).await.sum("overfill_requests_cancelled_total", &[]), 1.0);
}
