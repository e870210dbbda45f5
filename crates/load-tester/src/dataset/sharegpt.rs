//! ShareGPT files: a JSON array of conversations, each a list of `from` and `value`.

use anyhow::Context;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

use super::tokens::Count;
use super::{Conversation, DatasetArgs, Door, Input, Turn, Workload, chats};

/// Prompts and answers shorter than this, or longer than the next two, are left out, as `vllm bench serve` does.
const SHORTEST: usize = 4;
const LONGEST_PROMPT: usize = 1024;
const LONGEST: usize = 2048;

#[derive(Deserialize)]
struct Entry {
    #[serde(alias = "conversation")]
    conversations: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    from: String,
    value: String,
}

impl Entry {
    /// Questions and the answers to them, in order.
    fn exchanges(&self) -> impl Iterator<Item = (&str, &str)> {
        let asks = |m: &Message| m.from == "human" || m.from == "user";
        self.conversations.windows(2).filter(move |pair| asks(&pair[0]) && !asks(&pair[1])).map(|pair| (&*pair[0].value, &*pair[1].value))
    }
}

fn entries(args: &DatasetArgs) -> anyhow::Result<Vec<Entry>> {
    serde_json::from_str(&args.file()?).context("this is no ShareGPT file: it must be a JSON array of objects with `conversations`")
}

/// A question with its length and its answer's; `None` where it does not fit.
fn turn(question: &str, answer: &str, output_len: Option<u32>, count: &Count) -> anyhow::Result<Option<(usize, u32)>> {
    let tokens = count.tokens(question)?;
    let max_tokens = match output_len {
        Some(n) => n as usize,
        None => count.tokens(answer)?,
    };
    let fits =
        (SHORTEST..=LONGEST_PROMPT).contains(&tokens) && tokens + max_tokens <= LONGEST && (output_len.is_some() || max_tokens >= SHORTEST);
    Ok(fits.then_some((tokens, max_tokens as u32)))
}

/// `sharegpt`: the first question of each conversation.
pub(super) fn questions(args: &DatasetArgs, door: Door, count: &Count, seed: u64, requests: usize) -> anyhow::Result<Workload> {
    let output_len = args.output_len.or(args.sharegpt_output_len);
    let mut fit = Vec::new();
    for entry in entries(args)? {
        if let Some((question, answer)) = entry.exchanges().next()
            && let Some((tokens, max_tokens)) = turn(question, answer, output_len, count)?
        {
            fit.push(Conversation::one(door.text(question.to_owned()), tokens, max_tokens));
        }
    }
    let (conversations, notes) = args.choose(fit, &mut ChaCha8Rng::seed_from_u64(seed), requests);
    Ok(Workload::of(conversations, false, notes))
}

/// `multi-turn` of a file: the questions of its conversations, each answered by the server.
pub(super) fn chats(args: &DatasetArgs, count: &Count, seed: u64, requests: usize) -> anyhow::Result<Workload> {
    let mut fit = Vec::new();
    for entry in entries(args)? {
        let mut turns = Vec::new();
        for (question, answer) in entry.exchanges().take(args.multi_turn_num_turns as usize) {
            let Some((tokens, max_tokens)) = turn(question, answer, args.output_len, count)? else { break };
            turns.push(Turn { input: Input::Say(question.to_owned()), tokens, max_tokens });
        }
        if turns.len() > 1 {
            fit.push(Conversation { system: None, turns });
        }
    }
    let (chosen, notes) = args.choose(fit, &mut ChaCha8Rng::seed_from_u64(seed), requests);
    let mut left = requests;
    let mut conversations = Vec::new();
    for mut chat in chosen {
        chat.turns.truncate(left);
        left -= chat.turns.len();
        if chat.turns.is_empty() {
            break;
        }
        conversations.push(chat);
    }
    Ok(Workload { think: chats::think(args)?, ..Workload::of(conversations, false, notes) })
}
