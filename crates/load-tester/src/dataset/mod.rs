//! What is asked: conversations of one turn or of several, drawn before the run begins.
//!
//! The names of the options and their defaults are `vllm bench serve`'s where it has them.

mod chats;
mod custom;
mod sharegpt;
mod synthetic;
#[cfg(test)]
mod tests;
mod tokens;
mod trace;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::backend::Door;
use tokens::{Count, Tokens};

/// Requests of a run that does not say how many.
const PROMPTS: usize = 1000;
/// Token ids of prompts are below this if nothing else is known: nearly every vocabulary is larger.
const VOCABULARY: usize = 32_000;

#[derive(Args)]
#[command(next_help_heading = "Prompts")]
pub(super) struct DatasetArgs {
    /// Where prompts come from
    #[arg(long, env = "OVERFILL_BENCH_DATASET_NAME", value_enum, default_value = "random")]
    pub(super) dataset_name: DatasetName,
    /// The file of a data set that has one
    #[arg(long, env = "OVERFILL_BENCH_DATASET_PATH")]
    dataset_path: Option<PathBuf>,
    /// Requests in all, each turn of a chat is one [default: 1000; of a trace: all]
    #[arg(long, env = "OVERFILL_BENCH_NUM_PROMPTS", value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    num_prompts: Option<u32>,
    /// Decides all that is drawn
    #[arg(long, env = "OVERFILL_BENCH_SEED", default_value_t = 0)]
    pub(super) seed: u64,
    /// Take a file's lines in their order
    #[arg(long, env = "OVERFILL_BENCH_DISABLE_SHUFFLE")]
    disable_shuffle: bool,
    /// Prompt tokens, whatever the data set calls them
    #[arg(long, env = "OVERFILL_BENCH_INPUT_LEN")]
    input_len: Option<usize>,
    /// Tokens of an answer, whatever the data set calls them
    #[arg(long, env = "OVERFILL_BENCH_OUTPUT_LEN", value_parser = clap::value_parser!(u32).range(1..))]
    output_len: Option<u32>,
    /// A pair's folder: its tokenizer counts a file's texts and its vocabulary bounds token ids [default: a token is taken for 4 bytes]
    #[arg(long, env = "OVERFILL_BENCH_TOKENIZER")]
    pub(super) tokenizer: Option<PathBuf>,
    /// Token ids of drawn prompts are below this [default: the tokenizer's, or 32000]
    #[arg(long, env = "OVERFILL_BENCH_VOCAB_SIZE", value_parser = clap::value_parser!(u32).range(1..))]
    vocab_size: Option<u32>,
    /// random: prompt tokens
    #[arg(long, env = "OVERFILL_BENCH_RANDOM_INPUT_LEN", default_value_t = 1024)]
    random_input_len: usize,
    /// random: tokens of an answer
    #[arg(long, env = "OVERFILL_BENCH_RANDOM_OUTPUT_LEN", default_value_t = 128)]
    random_output_len: u32,
    /// random: both lengths are drawn between (1 - this) and (1 + this) times what is given
    #[arg(long, env = "OVERFILL_BENCH_RANDOM_RANGE_RATIO", default_value_t = 0.0)]
    random_range_ratio: f64,
    /// random: tokens before each prompt, the same for all of them
    #[arg(long, env = "OVERFILL_BENCH_RANDOM_PREFIX_LEN", default_value_t = 0)]
    random_prefix_len: usize,
    /// prefix_repetition: tokens of a prefix
    #[arg(long, env = "OVERFILL_BENCH_PREFIX_REPETITION_PREFIX_LEN", default_value_t = 256)]
    prefix_repetition_prefix_len: usize,
    /// prefix_repetition: tokens after it, drawn anew for each prompt
    #[arg(long, env = "OVERFILL_BENCH_PREFIX_REPETITION_SUFFIX_LEN", default_value_t = 256)]
    prefix_repetition_suffix_len: usize,
    /// prefix_repetition: different prefixes
    #[arg(long, env = "OVERFILL_BENCH_PREFIX_REPETITION_NUM_PREFIXES", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    prefix_repetition_num_prefixes: u32,
    /// prefix_repetition: tokens of an answer
    #[arg(long, env = "OVERFILL_BENCH_PREFIX_REPETITION_OUTPUT_LEN", default_value_t = 128)]
    prefix_repetition_output_len: u32,
    /// sharegpt: tokens of an answer [default: as many as the file's answer has]
    #[arg(long, env = "OVERFILL_BENCH_SHAREGPT_OUTPUT_LEN")]
    sharegpt_output_len: Option<u32>,
    /// custom: tokens of an answer where the line does not say output_tokens
    #[arg(long, env = "OVERFILL_BENCH_CUSTOM_OUTPUT_LEN", default_value_t = 256)]
    custom_output_len: u32,
    /// multi-turn: turns of a chat
    #[arg(long, env = "OVERFILL_BENCH_MULTI_TURN_NUM_TURNS", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    multi_turn_num_turns: u32,
    /// multi-turn: tokens that the user says in a turn
    #[arg(long, env = "OVERFILL_BENCH_MULTI_TURN_INPUT_LEN", default_value_t = 64)]
    multi_turn_input_len: usize,
    /// multi-turn: tokens of an answer
    #[arg(long, env = "OVERFILL_BENCH_MULTI_TURN_OUTPUT_LEN", default_value_t = 64)]
    multi_turn_output_len: u32,
    /// multi-turn: tokens of a system message that all chats share
    #[arg(long, env = "OVERFILL_BENCH_MULTI_TURN_PREFIX_LEN", default_value_t = 0)]
    multi_turn_prefix_len: usize,
    /// multi-turn: seconds between an answer and the next turn
    #[arg(long, env = "OVERFILL_BENCH_MULTI_TURN_THINK_TIME", default_value_t = 0.0)]
    multi_turn_think_time: f64,
    /// trace: tokens that one of its hash_ids stands for
    #[arg(long, env = "OVERFILL_BENCH_TRACE_BLOCK_TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    trace_block_tokens: u32,
    /// trace: how much faster than it was recorded
    #[arg(long, env = "OVERFILL_BENCH_TRACE_SPEED", default_value_t = 1.0)]
    trace_speed: f64,
    /// trace: all lengths are multiplied by this, for models with a smaller context
    #[arg(long, env = "OVERFILL_BENCH_TRACE_LENGTH_SCALE", default_value_t = 1.0)]
    trace_length_scale: f64,
}

/// Where prompts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum DatasetName {
    /// Random tokens
    Random,
    /// The first question of each conversation of a ShareGPT file
    Sharegpt,
    /// A file of JSON lines with a `prompt`, and maybe `output_tokens`
    Custom,
    /// A few prefixes, each with many endings
    #[value(name = "prefix_repetition", alias = "prefix-repetition")]
    PrefixRepetition,
    /// Chats whose answers go into the next prompt; drawn, or of a ShareGPT file
    #[value(name = "multi-turn", alias = "multi_turn")]
    MultiTurn,
    /// A file of JSON lines with timestamp (ms), input_length, output_length and maybe hash_ids
    Trace,
}

/// One client's talk: the turns follow each other.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conversation {
    /// What comes before the first turn of a chat.
    pub(super) system: Option<String>,
    /// At least one.
    pub(super) turns: Vec<Turn>,
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Turn {
    pub(super) input: Input,
    /// Tokens of the input as planned; what a template and earlier turns add is not in it.
    pub(super) tokens: usize,
    /// Most tokens of the answer.
    pub(super) max_tokens: u32,
}

/// What a request reads.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Input {
    /// Continued as it is.
    Ids(Vec<u32>),
    /// Continued as it is.
    Text(String),
    /// The next message of a chat.
    Say(String),
}

/// All that a run asks.
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) conversations: Vec<Conversation>,
    /// When each conversation begins, if the data set says so itself.
    pub(super) due: Option<Vec<Duration>>,
    /// From an answer to the next turn.
    pub(super) think: Duration,
    /// Whether answers are to have their full length.
    pub(super) ignore_eos: bool,
    /// What a reader of the result should know.
    pub(super) notes: Vec<String>,
}

impl Workload {
    /// Requests that have nothing to do with those of the run, each on its own.
    pub(super) fn first_turns(self) -> impl Iterator<Item = Conversation> {
        self.conversations.into_iter().map(|mut c| {
            c.turns.truncate(1);
            c
        })
    }
}

impl DatasetArgs {
    /// Draws the prompts of one run; `count` overrides how many.
    ///
    /// # Errors
    /// Where options contradict each other, or a file cannot be read or is not what it should be.
    pub(super) fn draw(&self, door: Door, seed: u64, count: Option<usize>) -> anyhow::Result<Workload> {
        let asked = count.or(self.num_prompts.map(|n| n as usize));
        let count = asked.unwrap_or(PROMPTS);
        let chats = self.dataset_name == DatasetName::MultiTurn;
        ensure!(!chats || door != Door::Completions, "a chat of several turns needs --backend openai-chat or grpc");
        let counting = Count::open(self.tokenizer.as_deref())?;
        let vocabulary = self.vocab_size.map(|n| n as usize).or(counting.vocabulary()).unwrap_or(VOCABULARY);
        let tokens = Tokens::new(door, chats, vocabulary);
        let mut workload = match self.dataset_name {
            DatasetName::Random => synthetic::random(self, &tokens, seed, count)?,
            DatasetName::PrefixRepetition => synthetic::prefix_repetition(self, &tokens, seed, count),
            DatasetName::MultiTurn if self.dataset_path.is_none() => chats::draw(self, &tokens, seed, count)?,
            DatasetName::MultiTurn => sharegpt::chats(self, &counting, seed, count)?,
            DatasetName::Sharegpt => sharegpt::questions(self, door, &counting, seed, count)?,
            DatasetName::Custom => custom::read(self, door, &counting, seed, count)?,
            DatasetName::Trace => trace::read(self, &tokens, seed, asked)?,
        };
        ensure!(!workload.conversations.is_empty(), "the data set has no prompt that could be asked");
        if tokens.are_words() && !matches!(self.dataset_name, DatasetName::Sharegpt | DatasetName::Custom) {
            workload.notes.push(
                "prompts are words, about a token each: their lengths are near what was asked for, and counted as the server counts them"
                    .into(),
            );
        }
        Ok(workload)
    }

    /// Reads the data set's file.
    fn file(&self) -> anyhow::Result<String> {
        let path = self.dataset_path.as_ref().context("this data set is a file: name it with --dataset-path")?;
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// `count` of `entries`, in an order that the seed decides; from the beginning again where there are not enough.
    fn choose<T: Clone>(&self, mut entries: Vec<T>, random: &mut ChaCha8Rng, count: usize) -> (Vec<T>, Vec<String>) {
        let mut notes = Vec::new();
        if entries.is_empty() {
            return (entries, notes);
        }
        if !self.disable_shuffle {
            entries.shuffle(random);
        }
        if entries.len() < count {
            notes.push(format!(
                "the file has {} fit entries for {count} requests: they are repeated, and a prefix cache knows them",
                entries.len()
            ));
        }
        (entries.iter().cycle().take(count).cloned().collect(), notes)
    }
}

impl Door {
    /// A text that stands on its own, as this door takes it.
    fn text(self, text: String) -> Input {
        if self == Door::Chat { Input::Say(text) } else { Input::Text(text) }
    }
}

impl Conversation {
    /// A single request.
    fn one(input: Input, tokens: usize, max_tokens: u32) -> Self {
        Self { system: None, turns: vec![Turn { input, tokens, max_tokens }] }
    }
}

impl Workload {
    /// Conversations that arrive when the arrival process says.
    fn of(conversations: Vec<Conversation>, ignore_eos: bool, notes: Vec<String>) -> Self {
        Self { conversations, due: None, think: Duration::ZERO, ignore_eos, notes }
    }
}
