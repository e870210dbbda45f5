//! `multi-turn` without a file: chats of drawn words. What the server answers goes into the next prompt.

use std::time::Duration;

use anyhow::Context;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::tokens::Tokens;
use super::{Conversation, DatasetArgs, Turn, Workload};

/// Chats with `count` turns in all; the last one may be shorter.
pub(super) fn draw(args: &DatasetArgs, tokens: &Tokens, seed: u64, count: usize) -> anyhow::Result<Workload> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let system = tokens.draw(&mut random, args.multi_turn_prefix_len);
    let system = tokens.say(&system).filter(|text| !text.is_empty());
    let input_len = args.input_len.unwrap_or(args.multi_turn_input_len).max(1);
    let max_tokens = args.output_len.unwrap_or(args.multi_turn_output_len).max(1);
    let turns = args.multi_turn_num_turns as usize;
    let mut conversations = Vec::with_capacity(count.div_ceil(turns));
    let mut left = count;
    while left > 0 {
        let here = turns.min(left);
        left -= here;
        let turns =
            (0..here).map(|_| Turn { input: tokens.input(tokens.draw(&mut random, input_len)), tokens: input_len, max_tokens }).collect();
        conversations.push(Conversation { system: system.clone(), turns });
    }
    Ok(Workload { think: think(args)?, ..Workload::of(conversations, true, Vec::new()) })
}

/// From an answer to the next turn.
pub(super) fn think(args: &DatasetArgs) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(args.multi_turn_think_time).context("--multi-turn-think-time must be a number of seconds, at least 0")
}
