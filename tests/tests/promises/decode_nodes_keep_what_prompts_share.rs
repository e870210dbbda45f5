//! A decode node keeps the KV cache of prompts: one that begins alike is handed over from there on, and is answered as by a node
//! that has seen nothing. What the decode model has read is never taken for the full model's.

use std::ops::ControlFlow;
use std::time::Duration;

use overfill_model::solo::Solo;
use overfill_model::{Device, Sampled, ThreadPool};
use overfill_tests::cluster::{Builder, request, tokens};
use overfill_tests::tiny::{self, Kind, TinyPair};
use overfill_types::{Role, SamplingParams, StopConditions};

const NEW: usize = 40;

fn reference(pair: &TinyPair, prompt: &[u32]) -> Vec<u32> {
    let mut solo = Solo::load(&pair.open(), &Device::Cpu, ThreadPool::new(2, &[]).unwrap()).unwrap();
    let mut ids = Vec::new();
    let take = |s: &Sampled| {
        ids.push(s.token);
        ControlFlow::Continue(())
    };
    let stop = StopConditions { max_tokens: NEW, stop_token_ids: vec![], ignore_eos: true };
    solo.generate(prompt, &SamplingParams::greedy(), &stop, take).unwrap();
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_same_prompt_and_of_a_chats_next_turns() {
    for kind in [Kind::Identity, Kind::Prune("firstlast"), Kind::Projection] {
        let pair = tiny::pair(kind, 31);
        let cluster = Builder::new(&pair.dir).start().await;
        let decode = cluster.nodes(Role::Decode).remove(0);
        let (mut prompt, mut hits) = (tiny::prompt(70, 1), 0);
        // The same twice, one of whole blocks alone, then turns of a chat: question and answer, and another question.
        for (turn, found) in [(0, 0), (0, 64), (1, 64), (1, 64 + 80), (1, 64 + 80 + 80)] {
            if turn > 0 {
                prompt.extend(reference(&pair, &prompt));
                prompt.extend(tiny::prompt(40, turn + prompt.len() as u64));
            }
            let mut asked = request(&prompt, &SamplingParams::greedy(), NEW as u32);
            asked.ignore_eos = true;
            assert_eq!(
                tokens(cluster.client().await, asked).await.unwrap(),
                reference(&pair, &prompt),
                "{kind:?}, {} tokens",
                prompt.len()
            );
            let status = overfill_tests::nodes::status(&decode).await;
            assert_eq!(status.prefix_hits - hits, found, "{kind:?}, {} tokens", prompt.len());
            hits = status.prefix_hits;
        }
        cluster.nothing_is_held(Duration::from_secs(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_prompt_of_whole_blocks() {
    let pair = tiny::pair(Kind::Identity, 31);
    let cluster = Builder::new(&pair.dir).start().await;
    let decode = cluster.nodes(Role::Decode).remove(0);
    let prompt = tiny::prompt(64, 1);
    let expected = reference(&pair, &prompt);
    for _ in 0..3 {
        let mut asked = request(&prompt, &SamplingParams::greedy(), NEW as u32);
        asked.ignore_eos = true;
        assert_eq!(tokens(cluster.client().await, asked).await.unwrap(), expected);
    }
    let status = overfill_tests::nodes::status(&decode).await;
    assert_eq!((status.prefix_queries, status.prefix_hits), (3 * 64, 2 * 64));
    cluster.nothing_is_held(Duration::from_secs(1)).await;
}
