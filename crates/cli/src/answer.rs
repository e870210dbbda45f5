//! `overfill answer`: a file of prompts becomes a file of conversations, answered by one arm of a pair in bulk.
//!
//! Answers are appended as they are written, in the order of the prompts and by whole lines. Run again, it goes on after
//! the last whole line, and the file becomes the same as if it had never been stopped. With `--self-prompt` the model writes the
//! prompts too (`self_prompt`).

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use overfill_compress::data::read_prompts;
use overfill_compress::{Arm, Conversation, Question, Writing, answer};
use overfill_model::{Device, Pair, ThreadPool, Workspace};
use overfill_text::TextModel;
use overfill_types::{Quality, SamplingParams};
use serde_json::Value;

use crate::progress::bar;
use crate::self_prompt::{self, SelfPromptArgs};
use crate::threads::ThreadArgs;
use crate::{Home, PairArgs};

#[derive(Args)]
#[command(after_help = "Prompts are lines like {\"prompt\": …} or {\"messages\": […]}. What else a line says is carried along.")]
pub(crate) struct AnswerArgs {
    #[command(flatten)]
    pub(crate) pair: PairArgs,
    /// JSON lines of prompts
    #[arg(long, env = "OVERFILL_DATA", required_unless_present = "self_prompt")]
    data: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) self_prompt: SelfPromptArgs,
    /// Where the answered lines go; what is there already is kept and gone on from
    #[arg(long, env = "OVERFILL_OUT")]
    pub(crate) out: PathBuf,
    /// Who answers: full, decode or overfill
    #[arg(long, env = "OVERFILL_MODE", default_value = "full")]
    pub(crate) mode: Quality,
    /// 0 is greedy
    #[arg(long, env = "OVERFILL_TEMPERATURE", default_value_t = 0.5)]
    pub(crate) temperature: f32,
    /// Key of the draws; the number of its line is added for each prompt
    #[arg(long, env = "OVERFILL_SEED", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Most tokens of an answer; one that is cut off there says so
    #[arg(long, env = "OVERFILL_MAX_TOKENS", default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) max_tokens: u16,
    /// Longest prompt in tokens; longer ones are left out and counted
    #[arg(long, env = "OVERFILL_MAX_PROMPT", default_value_t = 1024)]
    pub(crate) max_prompt: usize,
    /// Answers at a time
    #[arg(long, env = "OVERFILL_BATCH", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) batch: u16,
    #[command(flatten)]
    pub(crate) threads: ThreadArgs,
}

/// The key of an answered line that says who answered, as `--mode` has it.
const WRITER: &str = "writer";

pub(crate) fn run(args: AnswerArgs, home: &Home) -> anyhow::Result<()> {
    match (args.self_prompt.self_prompt, args.data.clone()) {
        (Some(conversations), _) => self_prompt::run(&args, conversations.get(), home),
        (None, Some(data)) => answer_file(args, &data, home),
        (None, None) => bail!("there are no prompts: name a file of them with --data, or have the model write them with --self-prompt"),
    }
}

fn answer_file(args: AnswerArgs, data: &Path, home: &Home) -> anyhow::Result<()> {
    let sampling = SamplingParams { temperature: args.temperature, seed: args.seed, ..SamplingParams::greedy() };
    sampling.validate()?;
    let dir = args.pair.dir(home)?;
    let text = TextModel::open(&dir)?;
    let max_tokens = usize::from(args.max_tokens);
    let max_prompt = args.max_prompt.min(text.manifest.max_context().saturating_sub(max_tokens));

    let prompts = read_prompts(data)?;
    let all = prompts.len();
    let mut fitting = VecDeque::new();
    for (at, prompt) in prompts.into_iter().enumerate() {
        let tokens = text.encode_chat(&prompt.messages).with_context(|| format!("{}, conversation {}", data.display(), at + 1))?;
        if tokens.len() <= max_prompt {
            let sampling = SamplingParams { seed: args.seed.wrapping_add(at as u64), ..sampling.clone() };
            fitting.push_back((prompt, Question { prompt: tokens, sampling, max_tokens }));
        }
    }
    let left_out = all - fitting.len();
    let (mut out, last) = reopen(&args.out)?;
    let done = last.as_ref().map_or(0, |last| last.lines);
    if let Some(last) = last {
        let same = fitting.get(done - 1).is_some_and(|(prompt, _)| last.conversation.messages == prompt.messages);
        if !same {
            bail!("{} holds answers to other prompts than those of {}: name another file", args.out.display(), data.display());
        }
        let wrote = last.conversation.other.get(WRITER).and_then(Value::as_str);
        if wrote.is_some_and(|wrote| wrote != args.mode.as_str()) {
            bail!(
                "{} holds answers of --mode {}, and --mode {} was asked for: name another file",
                args.out.display(),
                wrote.unwrap_or_default(),
                args.mode.as_str()
            );
        }
        fitting.drain(..done);
    }

    let pair = Pair::open(&dir)?;
    let threads = args.threads.count();
    let mut workspace = Workspace::new(ThreadPool::new(threads, &[])?);
    let full = pair.load_full(&Device::Cpu, workspace.pool())?;
    let other = if args.mode == Quality::Full { None } else { Some(pair.load_decode(&Device::Cpu, workspace.pool())?) };
    let transform = pair.load_transform(workspace.pool())?;
    let arm = match (&other, args.mode) {
        (Some(decode), Quality::Overfill) => Arm::Overfill { decode, transform: &transform },
        (Some(decode), _) => Arm::Alone(decode),
        (None, _) => Arm::Full,
    };
    let end = text.manifest.tokenizer.eos_token_ids.clone();
    let positions = fitting.iter().map(|(_, asked)| asked.prompt.len()).max().unwrap_or(0) + max_tokens;
    let how = Writing { batch: args.batch.into(), positions, formats: pair.manifest.kv_formats, end };

    let bar = bar((done + fitting.len()) as u64, "answers");
    bar.set_position(done as u64);
    let (mut conversations, asked): (VecDeque<Conversation>, Vec<Question>) = fitting.into_iter().unzip();
    let mut tokens = 0;
    answer(&full, arm, &how, &mut workspace, asked, |_, written| -> anyhow::Result<()> {
        let Some(mut conversation) = conversations.pop_front() else { return Ok(()) };
        conversation.other.insert(WRITER.into(), args.mode.as_str().into());
        tokens += written.len();
        bar.inc(1);
        let complete = written.last().is_some_and(|token| how.end.contains(token));
        let mut line = Conversation { response: text.decode(&written, false), complete, ..conversation }.to_line();
        line.push('\n');
        out.write_all(line.as_bytes()).with_context(|| format!("{} cannot be written", args.out.display()))
    })?;
    bar.finish_and_clear();
    eprintln!(
        "{} answers of {tokens} tokens written to {}, {done} were there; {left_out} of {all} prompts left out, longer than {max_prompt} tokens",
        bar.position() - done as u64,
        args.out.display()
    );
    Ok(())
}

/// The last whole line of a file of answers.
struct Last {
    lines: usize,
    conversation: Conversation,
}

/// Opens a file of answers to append to it. What comes after its last whole line is cut off.
fn reopen(path: &Path) -> anyhow::Result<(File, Option<Last>)> {
    let failed = || format!("{} cannot be opened", path.display());
    let file = File::options().read(true).append(true).create(true).open(path).with_context(failed)?;
    let mut reader = BufReader::new(&file);
    let (mut lines, mut whole, mut line, mut last) = (0, 0, String::new(), String::new());
    loop {
        line.clear();
        let read = reader.read_line(&mut line).with_context(failed)?;
        if !line.ends_with('\n') {
            break;
        }
        lines += 1;
        whole += read as u64;
        std::mem::swap(&mut line, &mut last);
    }
    file.set_len(whole).with_context(failed)?;
    if lines == 0 {
        return Ok((file, None));
    }
    let conversation = overfill_compress::data::parse(&last).map_err(|what| anyhow::anyhow!("{}, line {lines}: {what}", path.display()))?;
    Ok((file, Some(Last { lines, conversation })))
}
