//! `overfill answer --self-prompt`: conversations that are of use, the same ones however the run was cut and in whatever batch.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use overfill_compress::data;
use overfill_tests::processes::binary;

fn overfill(arguments: &[&str]) -> Output {
    Command::new(binary("overfill")).args(arguments).output().unwrap()
}

fn made(pair: &Path, out: &Path, conversations: u32, batch: u32) -> String {
    let (pair, out, conversations, batch) =
        (pair.display().to_string(), out.display().to_string(), conversations.to_string(), batch.to_string());
    let asked = ["answer", "--pair", &pair, "--out", &out, "--self-prompt", &conversations, "--batch", &batch, "--seed", "3"];
    let short = ["--user-max-tokens", "20", "--max-tokens", "6", "--chunk", "12"];
    let ran = overfill(&[&asked[..], &short].concat());
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stderr).unwrap()
}

#[test]
fn its_conversations_are_of_use_and_the_same_however_it_ran() {
    let fetched = overfill(&["fetch"]);
    let pair = PathBuf::from(String::from_utf8(fetched.stdout).unwrap().trim());
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("one.jsonl"), folder.path().join("other.jsonl"));
    let told = made(&pair, &one, 6, 12);
    assert!(told.contains("6 conversations of") && told.contains("kinds: ") && told.contains("left out now: "), "{told}");
    let whole = std::fs::read_to_string(&one).unwrap();

    let lines = data::read(&one).unwrap();
    assert!(lines.len() >= 6);
    for line in &lines {
        assert!(line.messages.iter().all(|message| !message.content.trim().is_empty() && !message.content.contains("<|im_")), "{line:?}");
        let asked = line.messages.iter().filter(|message| message.role == "user");
        assert!(asked.into_iter().all(|message| message.content.split_whitespace().count() >= 3), "{line:?}");
    }

    // Cut in the middle of a line of a later chunk, it becomes the same in another batch.
    std::fs::write(&other, &whole[..whole.len() * 9 / 10]).unwrap();
    made(&pair, &other, 6, 5);
    assert!(whole == std::fs::read_to_string(&other).unwrap(), "it went on as it would have");
    // What is there is enough: nothing is made, and nothing is lost.
    made(&pair, &other, 3, 12);
    assert!(whole == std::fs::read_to_string(&other).unwrap());

    let refused = |more: &[&str]| {
        let out = other.display().to_string();
        let ran = overfill(&[&["answer", "--pair", &pair.display().to_string(), "--out", &out, "--self-prompt", "5"][..], more].concat());
        assert!(!ran.status.success());
        String::from_utf8(ran.stderr).unwrap()
    };
    assert!(refused(&["--seed", "4"]).contains("made up with seed 4"));
    assert!(refused(&["--mode", "decode"]).contains("--mode"));
    assert!(refused(&["--further-turns", "1"]).contains("--further-turns is 1"));
    assert!(refused(&["--data", "x.jsonl"]).contains("--data"));
    assert!(whole == std::fs::read_to_string(&other).unwrap());
}
