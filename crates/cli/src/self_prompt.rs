//! `overfill answer --self-prompt N`: the full model makes up N conversations.
//!
//! The file is written chunk by chunk. Run again, the last chunk that is there is made again, and the file becomes
//! the same as if it had never been stopped.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::num::NonZeroU64;
use std::path::Path;

use anyhow::{Context, bail};
use clap::Args;
use overfill_compress::data::parse;
use overfill_compress::self_prompt::{Doubles, Draw, LeftOut, SelfPrompter, Settings, asked, attempt_of};
use overfill_compress::{Arm, Conversation, Question, Writing, answer};
use overfill_model::{Device, ModelError, Pair, ThreadPool, Workspace};
use overfill_text::TextModel;
use overfill_types::{Quality, SamplingParams};
use serde_json::Value;

use crate::Home;
use crate::answer::AnswerArgs;
use crate::progress::bar;

/// Chunks in a row that bring nothing, after which the model is taken to be none that makes up conversations.
const MOST_IN_VAIN: u32 = 8;

#[derive(Args)]
pub(crate) struct SelfPromptArgs {
    /// Have the full model make up so many conversations, the user's words too, in the place of --data
    #[arg(long, env = "OVERFILL_SELF_PROMPT", value_name = "N", conflicts_with = "data")]
    pub(crate) self_prompt: Option<NonZeroU64>,
    /// Part of the made-up answers after which the user has another turn
    #[arg(long, env = "OVERFILL_FURTHER_TURNS", default_value_t = 0.25)]
    further_turns: f64,
    /// Of the user's made-up words
    #[arg(long, env = "OVERFILL_USER_TEMPERATURE", default_value_t = 1.0)]
    user_temperature: f32,
    /// Of the user's made-up words
    #[arg(long, env = "OVERFILL_USER_TOP_P", default_value_t = 0.95)]
    user_top_p: f32,
    /// Most tokens of the user's made-up words; those that are cut off there are left out
    #[arg(long, env = "OVERFILL_USER_MAX_TOKENS", default_value_t = 160, value_parser = clap::value_parser!(u16).range(1..))]
    user_max_tokens: u16,
    /// Attempts at made-up conversations that are made, and written to the file, together
    #[arg(long, env = "OVERFILL_CHUNK", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    chunk: u16,
}

pub(crate) fn run(args: &AnswerArgs, conversations: u64, home: &Home) -> anyhow::Result<()> {
    let own = &args.self_prompt;
    if args.mode != Quality::Full {
        bail!("--self-prompt is written by the full model: leave --mode out");
    }
    if !(0.0..1.0).contains(&own.further_turns) {
        bail!("--further-turns is {}: it must be at least 0 and less than 1", own.further_turns);
    }
    let user = Draw { temperature: own.user_temperature, top_p: own.user_top_p, max_tokens: own.user_max_tokens.into() };
    let replies = Draw { temperature: args.temperature, top_p: 1.0, max_tokens: args.max_tokens.into() };
    for draw in [user, replies] {
        SamplingParams { temperature: draw.temperature, top_p: draw.top_p, ..SamplingParams::greedy() }.validate()?;
    }
    let dir = args.pair.dir(home)?;
    let text = TextModel::open(&dir)?;
    let pair = Pair::open(&dir)?;
    let mut workspace = Workspace::new(ThreadPool::new(args.threads.count(), &[])?);
    let model = pair.load_full(&Device::Cpu, workspace.pool())?;
    let max_context = text.manifest.max_context();
    let settings = Settings {
        seed: args.seed,
        user,
        answer: replies,
        further: own.further_turns,
        max_context: args.max_prompt.saturating_add(replies.max_tokens).min(max_context),
        chunk: own.chunk.into(),
    };
    let end = text.manifest.tokenizer.eos_token_ids.clone();
    let mut write = |asked: Vec<Question>| {
        let positions = asked.iter().map(|asked| asked.prompt.len() + asked.max_tokens).max().unwrap_or(0);
        let how = Writing { batch: args.batch.into(), positions, formats: pair.manifest.kv_formats, end: end.clone() };
        let mut written = Vec::new();
        answer(&model, Arm::Full, &how, &mut workspace, asked, |_, tokens| {
            written.push(tokens);
            Ok::<_, ModelError>(())
        })?;
        Ok(written)
    };
    let prompter = SelfPrompter { text: &text, settings, end: end.clone() };

    let (mut out, mut made) = reopen(&args.out, args.seed, own.chunk.into(), conversations)?;
    let (were, mut left_out) = (made.conversations, LeftOut::default());
    let mut in_vain = 0;
    let bar = bar(conversations, "conversations");
    while made.conversations < conversations {
        bar.set_position(made.conversations);
        let done = prompter.chunk(made.next_chunk, &mut made.doubles, &mut left_out, &mut write)?;
        in_vain = if done.is_empty() { in_vain + 1 } else { 0 };
        if in_vain == MOST_IN_VAIN {
            bail!("the last {} attempts brought no conversation of use: {left_out}", MOST_IN_VAIN * u32::from(own.chunk));
        }
        let mut lines = String::new();
        for conversation in done.iter().take(usize::try_from(conversations - made.conversations).unwrap_or(usize::MAX)) {
            made.conversations += 1;
            for turn in &conversation.turns {
                made.count(turn);
                lines += &turn.to_line();
                lines.push('\n');
            }
        }
        out.write_all(lines.as_bytes()).with_context(|| format!("{} cannot be written", args.out.display()))?;
        made.next_chunk += 1;
    }
    bar.finish_and_clear();
    eprintln!("{} conversations of {} answers in {}, {were} were there", made.conversations, made.answers, args.out.display());
    let share = |lines: &u64| 100.0 * *lines as f64 / made.answers.max(1) as f64;
    let kinds: Vec<String> = made.kinds.iter().map(|(kind, lines)| format!("{kind} {:.1} %", share(lines))).collect();
    eprintln!("kinds: {}", kinds.join(", "));
    eprintln!("left out now: {left_out}");
    Ok(())
}

/// What has been made.
#[derive(Default)]
struct Made {
    conversations: u64,
    answers: u64,
    /// Answers by kind.
    kinds: BTreeMap<String, u64>,
    doubles: Doubles,
    next_chunk: u64,
}

impl Made {
    fn count(&mut self, turn: &Conversation) {
        self.answers += 1;
        let kind = turn.other.get("kind").and_then(Value::as_str).unwrap_or("other");
        *self.kinds.entry(kind.to_owned()).or_default() += 1;
    }
}

/// Opens a file of conversations to append to it, without its last chunk, which may not be whole, unless all that is asked for is
/// there.
fn reopen(path: &Path, seed: u64, chunk: u64, conversations: u64) -> anyhow::Result<(File, Made)> {
    let failed = || format!("{} cannot be opened", path.display());
    let mut file = File::options().read(true).append(true).create(true).open(path).with_context(failed)?;
    let lines = attempts(path, &file, seed)?;
    let documents: HashSet<u64> = lines.iter().map(|line| line.attempt).collect();
    let whole = documents.len() as u64 >= conversations;
    let redone = lines.last().map_or(0, |line| line.attempt / chunk);
    let kept = lines.iter().take_while(|line| whole || line.attempt / chunk < redone).last().map_or(0, |line| line.end);
    file.set_len(kept).with_context(failed)?;

    let mut made = Made { next_chunk: redone, ..Made::default() };
    let mut last = None;
    file.seek(SeekFrom::Start(0)).with_context(failed)?;
    let mut reader = BufReader::new(&file);
    let mut line = String::new();
    for Line { attempt, end, .. } in lines.iter().take_while(|line| line.end <= kept) {
        line.clear();
        reader.read_line(&mut line).with_context(failed)?;
        let turn = parse(&line).map_err(|what| anyhow::anyhow!("{}, before byte {end}: {what}", path.display()))?;
        if last.replace(*attempt) != Some(*attempt) {
            made.conversations += 1;
            made.doubles.take(asked(&turn));
        }
        made.count(&turn);
    }
    Ok((file, made))
}

/// A whole line of such a file.
struct Line {
    attempt: u64,
    /// Byte after its end.
    end: u64,
}

/// The whole lines.
fn attempts(path: &Path, file: &File, seed: u64) -> anyhow::Result<Vec<Line>> {
    let (mut reader, mut line, mut end, mut all) = (BufReader::new(file), String::new(), 0, Vec::new());
    loop {
        line.clear();
        end += reader.read_line(&mut line).with_context(|| format!("{} cannot be read", path.display()))? as u64;
        if !line.ends_with('\n') {
            return Ok(all);
        }
        let document = serde_json::from_str::<Value>(&line).ok().and_then(|line| Some(line.get("document")?.as_str()?.to_owned()));
        let Some(attempt) = document.and_then(|document| attempt_of(&document, seed)) else {
            bail!("{}, line {}: no conversation that was made up with seed {seed}: name another file", path.display(), all.len() + 1);
        };
        all.push(Line { attempt, end });
    }
}
