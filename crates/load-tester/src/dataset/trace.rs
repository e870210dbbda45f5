//! `trace`: requests as they once arrived, in Mooncake's format. A line has `timestamp` (milliseconds), `input_length`,
//! `output_length`, and maybe `hash_ids`: names of the prompt's blocks. The same name gives the same tokens, so that prompts
//! share what they shared when they were recorded. The texts themselves are not in such a file: tokens are drawn.

use std::time::Duration;

use anyhow::{Context, ensure};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

use super::tokens::Tokens;
use super::{Conversation, DatasetArgs, Workload};

#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: usize,
    output_length: usize,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

pub(super) fn read(args: &DatasetArgs, tokens: &Tokens, seed: u64, requests: Option<usize>) -> anyhow::Result<Workload> {
    let (speed, scale) = (args.trace_speed, args.trace_length_scale);
    ensure!(speed > 0.0 && speed.is_finite(), "--trace-speed is {speed}: it must be above 0");
    ensure!(scale > 0.0 && scale.is_finite(), "--trace-length-scale is {scale}: it must be above 0");
    let scaled = |length: usize| ((length as f64 * scale).round() as usize).max(1);
    let mut lines = Vec::new();
    for (number, line) in args.file()?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let what = || format!("line {} is no object with timestamp, input_length and output_length", number + 1);
        lines.push(serde_json::from_str::<Line>(line).with_context(what)?);
    }
    lines.sort_by(|a, b| a.timestamp.total_cmp(&b.timestamp));
    lines.truncate(requests.unwrap_or(usize::MAX));
    let begun = lines.first().map_or(0.0, |l| l.timestamp);
    let block = scaled(args.trace_block_tokens as usize);
    let mut own = ChaCha8Rng::seed_from_u64(seed);
    let (mut conversations, mut due) = (Vec::new(), Vec::new());
    for line in lines {
        let length = scaled(line.input_length);
        let mut ids = Vec::with_capacity(length);
        for name in line.hash_ids {
            // A generator of its own, keyed by name and seed: block after block, whoever asks.
            let mut shared = ChaCha8Rng::seed_from_u64(seed);
            shared.set_stream(name.wrapping_add(1));
            ids.extend(tokens.draw(&mut shared, block.min(length - ids.len())));
        }
        ids.extend(tokens.draw(&mut own, length - ids.len()));
        conversations.push(Conversation::one(tokens.input(ids), length, u32::try_from(scaled(line.output_length)).unwrap_or(u32::MAX)));
        let at = (line.timestamp - begun) / 1e3 / speed;
        due.push(Duration::try_from_secs_f64(at).context("a timestamp is no number of milliseconds")?);
    }
    Ok(Workload { due: Some(due), ..Workload::of(conversations, true, Vec::new()) })
}
