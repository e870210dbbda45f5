//! Prompts of random tokens: `random`, and `prefix_repetition`, where many share a beginning.

use anyhow::ensure;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::tokens::Tokens;
use super::{Conversation, DatasetArgs, Workload};

/// `random`.
pub(super) fn random(args: &DatasetArgs, tokens: &Tokens, seed: u64, count: usize) -> anyhow::Result<Workload> {
    let ratio = args.random_range_ratio;
    ensure!((0.0..1.0).contains(&ratio), "--random-range-ratio is {ratio}: it must be at least 0 and below 1");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let prefix = tokens.draw(&mut random, args.random_prefix_len);
    let input_len = args.input_len.unwrap_or(args.random_input_len);
    let output_len = args.output_len.unwrap_or(args.random_output_len);
    ensure!(input_len + prefix.len() > 0, "--random-input-len is 0: a prompt needs a token");
    let conversations = (0..count)
        .map(|_| {
            let own = around(input_len, ratio, &mut random).max(usize::from(prefix.is_empty()));
            let output = around(output_len as usize, ratio, &mut random).max(1) as u32;
            let mut ids = prefix.clone();
            ids.extend(tokens.draw(&mut random, own));
            let length = ids.len();
            Conversation::one(tokens.input(ids), length, output)
        })
        .collect();
    Ok(Workload::of(conversations, true, Vec::new()))
}

/// A length between (1 - ratio) and (1 + ratio) times `length`, both ends included.
fn around(length: usize, ratio: f64, random: &mut ChaCha8Rng) -> usize {
    let (low, high) = (length as f64 * (1.0 - ratio), length as f64 * (1.0 + ratio));
    random.random_range(low.floor() as usize..=high.ceil() as usize)
}

/// `prefix_repetition`: every prefix gets as many endings as the others, within one; the order is drawn.
pub(super) fn prefix_repetition(args: &DatasetArgs, tokens: &Tokens, seed: u64, count: usize) -> Workload {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let suffix_len = args.input_len.unwrap_or(args.prefix_repetition_suffix_len);
    let output_len = args.output_len.unwrap_or(args.prefix_repetition_output_len).max(1);
    let prefixes: Vec<Vec<u32>> =
        (0..args.prefix_repetition_num_prefixes).map(|_| tokens.draw(&mut random, args.prefix_repetition_prefix_len)).collect();
    let mut conversations: Vec<Conversation> = prefixes
        .iter()
        .cycle()
        .take(count)
        .map(|prefix| {
            let mut ids = prefix.clone();
            ids.extend(tokens.draw(&mut random, suffix_len));
            let length = ids.len();
            Conversation::one(tokens.input(ids), length, output_len)
        })
        .collect();
    if !args.disable_shuffle {
        conversations.shuffle(&mut random);
    }
    Workload::of(conversations, true, Vec::new())
}
