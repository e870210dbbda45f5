//! A prefill node serves short prompts beside long ones, and lets nobody wait for ever.

use overfill_proto::v1::{PrefillRequest, Sampling, StopTokens};
use overfill_tests::cluster::{Builder, Cluster};
use overfill_tests::nodes::{self, status};
use overfill_tests::processes::eventually;
use overfill_tests::tiny::{self, Kind};
use overfill_types::Role;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

/// Has a prompt read; its name is told when its first token is there.
fn read(cluster: &Cluster, name: &'static str, prompt: Vec<u32>, ended: &mpsc::Sender<&'static str>) -> AbortOnDropHandle<()> {
    let node = cluster.nodes(Role::Prefill).remove(0);
    let ended = ended.clone();
    AbortOnDropHandle::new(tokio::spawn(async move {
        let request = PrefillRequest {
            fingerprint: node.pairs[0].fingerprint.to_string(),
            request_id: name.into(),
            prompt,
            sampling: Some(Sampling { temperature: Some(0.0), ..Default::default() }),
            stop: Some(StopTokens { max_tokens: 1, ..Default::default() }),
            ..PrefillRequest::default()
        };
        let mut events = nodes::prefill(&node, request).await.unwrap();
        events.message().await.unwrap().unwrap();
        ended.send(name).await.unwrap();
    }))
}

/// Waits until the prefill node holds so many prompts, of which so many are being read.
async fn until(cluster: &Cluster, held: u32, running: u32) {
    let node = cluster.nodes(Role::Prefill).remove(0);
    eventually(PATIENCE, "prompts are held", || async {
        let status = status(&node).await;
        (status.sequences, status.running) == (held, running)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_prompt_does_not_wait_for_long_ones() {
    let pair = tiny::pair(Kind::Identity, 41);
    let cluster = Builder::new(&pair.dir).nodes(1, 0).prefill_flags(&["--chunk-tokens", "5"]).start().await;
    let (ended, mut order) = mpsc::channel(8);
    let mut tasks: Vec<_> = (0..4).map(|i| read(&cluster, "long", tiny::prompt(4000, i), &ended)).collect();
    until(&cluster, 4, 4).await;
    tasks.push(read(&cluster, "short", tiny::prompt(40, 9), &ended));
    // The long ones take 3,200 steps, the short one 40.
    assert_eq!(order.recv().await, Some("short"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_blocks_is_not_overtaken() {
    let pair = tiny::pair(Kind::Identity, 41);
    // 768 bytes a token: room for one long prompt and many short ones.
    let flags = ["--chunk-tokens", "1", "--kv-memory", "3M"];
    let cluster = Builder::new(&pair.dir).nodes(1, 0).prefill_flags(&flags).start().await;
    let (ended, mut order) = mpsc::channel(8);
    let mut tasks = vec![read(&cluster, "first", tiny::prompt(3900, 1), &ended)];
    until(&cluster, 1, 1).await;
    tasks.push(read(&cluster, "second", tiny::prompt(3900, 2), &ended));
    until(&cluster, 2, 1).await;
    tasks.push(read(&cluster, "short", tiny::prompt(40, 3), &ended));
    until(&cluster, 3, 1).await;
    assert_eq!(order.recv().await, Some("first"));
    let mut rest = [order.recv().await, order.recv().await];
    rest.sort();
    assert_eq!(rest, [Some("second"), Some("short")]);
    cluster.nothing_is_held(PATIENCE).await;
}
