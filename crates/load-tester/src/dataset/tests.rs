//! What every data set promises: as many requests as asked for, of the lengths asked for, the same for the same seed.

use std::collections::{HashMap, HashSet};
use std::io::Write;

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    dataset: DatasetArgs,
}

fn draw(door: Door, seed: u64, flags: &str) -> anyhow::Result<Workload> {
    Flags::parse_from(std::iter::once("test").chain(flags.split_whitespace())).dataset.draw(door, seed, None)
}

fn ids(workload: &Workload) -> Vec<Vec<u32>> {
    let ids = |c: &Conversation| match &c.turns[0].input {
        Input::Ids(ids) => ids.clone(),
        other => panic!("{other:?}"),
    };
    workload.conversations.iter().map(ids).collect()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn random_prompts_have_the_lengths_that_were_asked_for() {
    let flags =
        "--num-prompts 500 --random-input-len 100 --random-output-len 20 --random-range-ratio 0.2 --random-prefix-len 7 --vocab-size 50";
    let workload = draw(Door::Grpc, 1, flags).unwrap();
    let prompts = ids(&workload);
    assert_eq!(prompts.len(), 500);
    assert!(workload.ignore_eos);
    let lengths: HashSet<usize> = prompts.iter().map(|p| p.len() - 7).collect();
    assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&80), Some(&120)));
    let outputs: HashSet<u32> = workload.conversations.iter().map(|c| c.turns[0].max_tokens).collect();
    assert_eq!((outputs.iter().min(), outputs.iter().max()), (Some(&16), Some(&24)));
    assert!(prompts.iter().all(|p| p[..7] == prompts[0][..7] && p.iter().all(|id| *id < 50)));
    assert_ne!(prompts[0][7..20], prompts[1][7..20]);
    assert_eq!(prompts, ids(&draw(Door::Completions, 1, flags).unwrap()), "the same for every door, and every time");
    assert_ne!(prompts, ids(&draw(Door::Grpc, 2, flags).unwrap()));
    assert!(draw(Door::Grpc, 1, "--random-range-ratio 1").is_err());
    assert!(draw(Door::Grpc, 1, "--input-len 0").is_err());
    assert!(ids(&draw(Door::Grpc, 1, "--num-prompts 90 --input-len 1 --random-range-ratio 0.9").unwrap()).iter().all(|p| !p.is_empty()));
}

#[test]
fn chats_are_words() {
    let workload = draw(Door::Chat, 1, "--num-prompts 3 --input-len 20").unwrap();
    for conversation in &workload.conversations {
        let Input::Say(text) = &conversation.turns[0].input else { panic!("{conversation:?}") };
        assert_eq!((text.split(' ').count(), conversation.turns[0].tokens), (20, 20));
    }
    assert_eq!(workload.notes.len(), 1);
}

#[test]
fn prefixes_are_shared_evenly() {
    let flags = "--dataset-name prefix_repetition --num-prompts 25 --prefix-repetition-num-prefixes 4 --prefix-repetition-prefix-len 30 --prefix-repetition-suffix-len 5";
    let prompts = ids(&draw(Door::Grpc, 1, flags).unwrap());
    let mut prefixes: HashMap<&[u32], usize> = HashMap::new();
    for prompt in &prompts {
        assert_eq!(prompt.len(), 35);
        *prefixes.entry(&prompt[..30]).or_default() += 1;
    }
    let mut counts: Vec<usize> = prefixes.into_values().collect();
    counts.sort();
    assert_eq!(counts, [6, 6, 6, 7]);
}

#[test]
fn chats_of_several_turns_add_up() {
    let flags = "--dataset-name multi-turn --num-prompts 10 --multi-turn-num-turns 4 --multi-turn-prefix-len 9 --multi-turn-think-time 1.5";
    let workload = draw(Door::Grpc, 1, flags).unwrap();
    assert_eq!(workload.conversations.iter().map(|c| c.turns.len()).collect::<Vec<_>>(), [4, 4, 2]);
    assert!(workload.conversations.iter().all(|c| c.system == workload.conversations[0].system && c.system.is_some()));
    assert_eq!(workload.think, Duration::from_millis(1500));
    assert!(draw(Door::Completions, 1, flags).unwrap_err().to_string().contains("openai-chat or grpc"));
}

#[test]
fn a_trace_shares_what_it_shared() {
    let line = |at: f64, input: u32, ids: &str| {
        format!("{{\"timestamp\": {at}, \"input_length\": {input}, \"output_length\": 7, \"hash_ids\": {ids}}}\n")
    };
    let trace = file(&(line(3000.0, 25, "[1, 2, 5]") + "\n" + &line(1000.0, 30, "[1, 2, 3]") + &line(2000.0, 12, "[4]")));
    let flags = format!("--dataset-name trace --dataset-path {} --trace-block-tokens 10", trace.path().display());
    let workload = draw(Door::Grpc, 1, &flags).unwrap();
    assert_eq!(workload.due, Some([0, 1, 2].map(Duration::from_secs).to_vec()), "in order, from the first");
    let prompts = ids(&workload);
    assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), [30, 12, 25]);
    assert_eq!(prompts[0][..20], prompts[2][..20]);
    assert_ne!(prompts[0][20..25], prompts[2][20..]);
    assert_ne!(prompts[0][..10], prompts[0][10..20]);
    assert_eq!(draw(Door::Grpc, 1, &(flags.clone() + " --num-prompts 2")).unwrap().conversations.len(), 2);
    let half = draw(Door::Grpc, 1, &(flags + " --trace-length-scale 0.5 --trace-speed 4")).unwrap();
    assert_eq!(ids(&half).iter().map(Vec::len).collect::<Vec<_>>(), [15, 6, 13]);
    assert_eq!(half.due.unwrap()[2], Duration::from_millis(500));
    let broken = file("{\"timestamp\": 1}\n");
    let error = draw(Door::Grpc, 1, &format!("--dataset-name trace --dataset-path {}", broken.path().display())).unwrap_err();
    assert!(error.to_string().contains("line 1"), "{error}");
}

#[test]
fn files_of_conversations_are_read() {
    let talk = |turns: &[(&str, &str)]| {
        let messages: Vec<_> = turns.iter().map(|(from, value)| serde_json::json!({ "from": from, "value": value })).collect();
        serde_json::json!({ "id": "x", "conversations": messages })
    };
    let question = "How many bytes make a token here?";
    let answer = "a".repeat(40);
    let long = "b".repeat(4 * 1025);
    let entries = serde_json::json!([
        talk(&[("human", question), ("gpt", &answer), ("human", question), ("gpt", &answer)]),
        talk(&[("human", "Hi"), ("gpt", &answer)]),
        talk(&[("human", &long), ("gpt", &answer)]),
        talk(&[("gpt", &answer)]),
    ]);
    let shared = file(&entries.to_string());
    let flags = |name: &str| format!("--dataset-name {name} --dataset-path {} --num-prompts 3", shared.path().display());
    let workload = draw(Door::Completions, 1, &flags("sharegpt")).unwrap();
    assert_eq!(workload.conversations.len(), 3);
    assert!(workload.notes[0].contains("1 fit entries for 3 requests"), "{:?}", workload.notes);
    let turn = &workload.conversations[0].turns[0];
    assert_eq!((&turn.input, turn.tokens, turn.max_tokens), (&Input::Text(question.into()), question.len().div_ceil(4), 10));
    let chats = draw(Door::Chat, 1, &flags("multi-turn")).unwrap();
    assert_eq!(chats.conversations.iter().map(|c| c.turns.len()).collect::<Vec<_>>(), [2, 1]);

    let lines = file("{\"prompt\": \"one\", \"output_tokens\": 5}\n\n{\"prompt\": \"two\"}\n");
    let flags = format!("--dataset-name custom --dataset-path {} --num-prompts 2 --disable-shuffle", lines.path().display());
    let workload = draw(Door::Chat, 1, &flags).unwrap();
    let turns: Vec<_> = workload.conversations.iter().map(|c| (c.turns[0].input.clone(), c.turns[0].max_tokens)).collect();
    assert_eq!(turns, [(Input::Say("one".into()), 5), (Input::Say("two".into()), 256)]);
    assert!(workload.notes.is_empty() && !workload.ignore_eos);
    assert!(draw(Door::Chat, 1, "--dataset-name custom").unwrap_err().to_string().contains("--dataset-path"));
}
