//! Handoffs from GPU to GPU: whatever happens to a communicator or to a node, the answers are the same, the others go on, and nothing
//! stays behind.

use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_devices::{Devices, LIMIT, Node, Told};
use overfill_tests::processes::eventually;

const PREFILL: &str = "prefill-node";
const DECODE: &str = "decode-node";
/// Tokens of a prompt: several chunks, so that each of the four layers has several frames.
const PROMPT: usize = 300;
const CHUNKS: &[&str] = &["--chunk-tokens", "64"];
const CHUNKED: Told<'static> = Told { fault: "", tcp: false, flags: CHUNKS };
/// How long the other end's silence is suffered, as the nodes have it, and some time for the rest of an answer.
const DEADLINE: Duration = Duration::from_secs(5 + 4);

async fn fault(fault: &str) -> (Arc<Devices>, Node, Node) {
    // The fault is the prefill node's or the decode node's, by its first letter.
    let (prefill, decode) = match fault.split_once(' ') {
        Some(("prefill", fault)) => (fault, ""),
        Some(("decode", fault)) => ("", fault),
        _ => ("", ""),
    };
    let cluster = Arc::new(Devices::start());
    let prefill = cluster.node(PREFILL, Told { fault: prefill, ..CHUNKED });
    let decode = cluster.node(DECODE, Told { fault: decode, ..Told::default() });
    cluster.until_ready(&[&prefill, &decode]).await;
    (cluster, prefill, decode)
}

/// Asks until a handoff goes over NCCL; gives the next seed.
async fn until_nccl(cluster: &Devices, prefill: &Node) -> u32 {
    let begun = Instant::now();
    for seed in 1_000.. {
        cluster.answers(PROMPT, seed).await;
        if prefill.ways("nccl", "both_offer_it").await > 0.0 {
            return seed + 1;
        }
        assert!(begun.elapsed() < LIMIT, "no handoff goes over NCCL");
    }
    unreachable!("seeds do not end")
}

/// Nothing of a GPU is left, of a node that is asked to leave.
async fn leaves_nothing(mut node: Node) {
    node.process.signal("TERM");
    assert_eq!(node.process.wait(LIMIT), Some(0));
    let counts = node.counts();
    for held in ["bytes", "streams", "events", "communicators", "pinned"] {
        assert_eq!(counts.get(held), 0, "{held} of {counts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_go_from_gpu_to_gpu_and_are_those_that_tcp_carries() {
    let (cluster, prefill, decode) = fault("").await;
    let seed = until_nccl(&cluster, &prefill).await;
    assert!(prefill.ways("tcp", "joining").await >= 1.0, "the first does not wait for the communicator");
    let sent = async |prefill: &Node| {
        let told = prefill.scrape().await;
        ["overfill_kv_bytes_sent_total", "overfill_kv_nccl_bytes_sent_total"].map(|name| told.sum(name, &[]))
    };
    let [all, over_nccl] = sent(&prefill).await;
    cluster.answers_at_once(PROMPT, seed, 12).await;
    let [all, over_nccl] = {
        let [now, now_over_nccl] = sent(&prefill).await;
        [now - all, now_over_nccl - over_nccl]
    };
    assert!(all > 0.0 && all == over_nccl, "{all} bytes, {over_nccl} of them over NCCL");
    let received = decode.scrape().await.sum("overfill_kv_nccl_bytes_received_total", &[]);
    assert_eq!(received, sent(&prefill).await[1]);
    assert_eq!(prefill.counts().get("sent"), decode.counts().get("received"));
    prefill.until_nothing_is_held().await;
    decode.until_nothing_is_held().await;

    // The same prompts to nodes that use TCP alone: as many bytes.
    let tcp = Devices::start();
    let other = tcp.node(PREFILL, Told { tcp: true, ..CHUNKED });
    let other_decode = tcp.node(DECODE, Told { tcp: true, ..Told::default() });
    tcp.until_ready(&[&other, &other_decode]).await;
    let tcp = Arc::new(tcp);
    tcp.answers_at_once(PROMPT, seed, 12).await;
    assert_eq!(sent(&other).await, [all, 0.0]);
    assert_eq!(other.ways("tcp", "off").await, 12.0);
    assert!(other.counts().get("pinned") > 0, "they leave the GPU beside what computes");
    leaves_nothing(other).await;

    leaves_nothing(prefill).await;
    leaves_nothing(decode).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_one_end_does_not_offer_it_rows_go_by_tcp_and_that_is_told() {
    let cluster = Arc::new(Devices::start());
    let prefill = cluster.node(PREFILL, CHUNKED);
    let decode = cluster.node(DECODE, Told { tcp: true, ..Told::default() });
    cluster.until_ready(&[&prefill, &decode]).await;
    cluster.answers_at_once(PROMPT, 1, 3).await;
    assert_eq!(prefill.ways("tcp", "not_offered").await, 3.0);
    assert_eq!(prefill.counts().get("communicators"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_communicator_that_fails_costs_no_answer_and_tcp_takes_its_place() {
    for fails in ["prefill fail-at:1", "prefill fail-at:30", "decode fail-at:1", "decode fail-at:30"] {
        let (cluster, prefill, decode) = fault(fails).await;
        for seed in 0..4 {
            cluster.answers_at_once(PROMPT, 1 + 8 * seed, 8).await;
        }
        assert!(prefill.ways("nccl", "both_offer_it").await > 0.0 && prefill.ways("tcp", "failed").await > 0.0, "{fails}");
        for node in [&prefill, &decode] {
            eventually(LIMIT, "its end was aborted", || async { node.counts().get("communicators") == 0 }).await;
            assert_eq!(node.counts().get("aborted"), 1, "{fails}");
            node.until_nothing_is_held().await;
        }
        leaves_nothing(prefill).await;
        leaves_nothing(decode).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_hangs_is_given_up_in_time() {
    for hangs in ["prefill hang-at:5", "decode hang-at:5", "prefill hang-join", "decode hang-join"] {
        let (cluster, prefill, decode) = fault(hangs).await;
        let joins = hangs.ends_with("join");
        for seed in 0..3 {
            let begun = Instant::now();
            cluster.answers_at_once(PROMPT, 1 + 4 * seed, 4).await;
            let limit = if joins { DEADLINE / 3 } else { DEADLINE };
            assert!(begun.elapsed() < limit, "{hangs}: {:?}", begun.elapsed());
        }
        for node in [&prefill, &decode] {
            eventually(LIMIT, "its end was aborted", || async { node.counts().get("communicators") == 0 }).await;
            node.until_nothing_is_held().await;
        }
        cluster.answers(PROMPT, 100).await;
        assert!(prefill.ways("tcp", "failed").await > 0.0, "{hangs}");
        assert_eq!(prefill.ways("nccl", "both_offer_it").await == 0.0, joins, "{hangs}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_in_any_phase_takes_nobody_with_it() {
    for (role, piece) in [(PREFILL, 1), (PREFILL, 7), (PREFILL, 20), (DECODE, 1), (DECODE, 7), (DECODE, 20)] {
        let cluster = Arc::new(Devices::start());
        let dies = format!("die-at:{piece}");
        let of = |other: &str| if other == PREFILL { CHUNKED } else { Told::default() };
        let told = |other: &str| Told { fault: if other == role { &dies } else { "" }, ..of(other) };
        let (mut prefill, mut decode) = (cluster.node(PREFILL, told(PREFILL)), cluster.node(DECODE, told(DECODE)));
        let other = cluster.node(role, of(role));
        cluster.until_ready(&[&prefill, &decode, &other]).await;
        let dying = if role == PREFILL { &mut prefill } else { &mut decode };
        let mut seed = 1;
        while dying.process.ended().is_none() {
            assert!(seed < 400, "it never dies of piece {piece}");
            cluster.answers_at_once(PROMPT, seed, 4).await;
            seed += 4;
        }
        cluster.answers_at_once(PROMPT, seed, 4).await;
        let lives = if role == PREFILL { &decode } else { &prefill };
        lives.until_nothing_is_held().await;
        eventually(LIMIT, "the end to the dead node was aborted", || async { lives.counts().get("aborted") >= 1 }).await;
        other.until_nothing_is_held().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_change_on_their_way_are_seen_where_they_are_looked_at() {
    let cluster = Arc::new(Devices::start());
    let prefill = cluster.node(PREFILL, Told { fault: "flip-at:9", flags: &[CHUNKS, &["--nccl-checksums", "1"]].concat(), tcp: false });
    let decode = cluster.node(DECODE, Told::default());
    cluster.until_ready(&[&prefill, &decode]).await;
    let seed = until_nccl(&cluster, &prefill).await;
    cluster.answers_at_once(PROMPT, seed, 4).await;
    assert_eq!(decode.scrape().await.sum("overfill_kv_checksum_failures_total", &[]), 1.0);
    // That handoff failed, and the communicator is as good as before.
    assert_eq!(prefill.counts().get("aborted"), 0);
    assert!(prefill.counts().get("sent") > 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_leave_leave_the_others_in_step() {
    let (cluster, prefill, decode) = fault("").await;
    let mut seed = until_nccl(&cluster, &prefill).await;
    for round in 0..10 {
        let leaving: Vec<_> = (0..6)
            .map(|n| {
                let cluster = cluster.clone();
                tokio::spawn(async move { cluster.leaves(PROMPT, seed + 100 + n, Duration::from_millis(u64::from(3 * n + round))).await })
            })
            .collect();
        cluster.answers_at_once(PROMPT, seed, 3).await;
        for left in leaving {
            left.await.unwrap();
        }
        seed += 200;
    }
    assert_eq!(prefill.counts().get("aborted") + decode.counts().get("aborted"), 0);
    prefill.until_nothing_is_held().await;
    decode.until_nothing_is_held().await;
    leaves_nothing(prefill).await;
    leaves_nothing(decode).await;
}

#[test]
fn gpus_of_one_machine_have_the_sum_of_what_each_had() {
    assert_eq!(overfill_devices::sums(), "[22.0, 44.0, 66.0]\n".repeat(2));
}
