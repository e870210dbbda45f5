//! `custom`: JSON lines with a `prompt`, and maybe `output_tokens`.

use anyhow::Context;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

use super::tokens::Count;
use super::{Conversation, DatasetArgs, Door, Workload};

#[derive(Deserialize)]
struct Line {
    prompt: String,
    #[serde(default)]
    output_tokens: Option<u32>,
}

pub(super) fn read(args: &DatasetArgs, door: Door, count: &Count, seed: u64, requests: usize) -> anyhow::Result<Workload> {
    let mut lines = Vec::new();
    for (number, line) in args.file()?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line: Line = serde_json::from_str(line).with_context(|| format!("line {} is no object with a `prompt`", number + 1))?;
        let max_tokens = args.output_len.or(line.output_tokens).unwrap_or(args.custom_output_len).max(1);
        let tokens = count.tokens(&line.prompt)?;
        lines.push(Conversation::one(door.text(line.prompt), tokens, max_tokens));
    }
    let (conversations, notes) = args.choose(lines, &mut ChaCha8Rng::seed_from_u64(seed), requests);
    Ok(Workload::of(conversations, false, notes))
}
