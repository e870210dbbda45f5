//! `overfill generate`: one prompt, answered in this process without a network.

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use overfill_model::solo::Solo;
use overfill_model::{Pair, ThreadPool};
use overfill_text::{Message, StopMatcher, TextModel};
use overfill_types::{FinishReason, GenerationConfig, Limits, Quality, SamplingParams, StopConditions};
use serde_json::json;

use crate::progress::spinner;
use crate::threads::ThreadArgs;
use crate::{Home, PairArgs};

#[derive(Args)]
pub(crate) struct GenerateArgs {
    /// The prompt; `-` reads it from standard input
    #[arg(required_unless_present = "token_ids")]
    prompt: Option<String>,
    /// The prompt as token ids, separated by commas
    #[arg(long, env = "OVERFILL_TOKEN_IDS", value_delimiter = ',', conflicts_with = "prompt")]
    token_ids: Vec<u32>,
    /// Continue the prompt as it is, without the chat template
    #[arg(long, env = "OVERFILL_RAW")]
    raw: bool,
    /// A system message before the prompt
    #[arg(long, env = "OVERFILL_SYSTEM", conflicts_with_all = ["raw", "token_ids"])]
    system: Option<String>,
    #[command(flatten)]
    pair: PairArgs,
    /// Which models write: overfill (the full model reads, the decode model writes), full or decode (one does both)
    #[arg(long, env = "OVERFILL_QUALITY", default_value = "overfill")]
    quality: Quality,
    /// Most tokens to write
    #[arg(long, env = "OVERFILL_MAX_TOKENS", default_value_t = 256)]
    max_tokens: usize,
    /// 0 is greedy [default: the pair's own, else 0]
    #[arg(long, env = "OVERFILL_TEMPERATURE")]
    temperature: Option<f32>,
    /// Keep the most likely tokens that together have this probability [default: the pair's own, else 1: all]
    #[arg(long, env = "OVERFILL_TOP_P")]
    top_p: Option<f32>,
    /// Keep this many of the most likely tokens; 0 keeps all [default: the pair's own, else 0]
    #[arg(long, env = "OVERFILL_TOP_K")]
    top_k: Option<u32>,
    /// Keep tokens at least this times as likely as the most likely one [default: the pair's own, else 0]
    #[arg(long, env = "OVERFILL_MIN_P")]
    min_p: Option<f32>,
    /// Divides the logits of tokens that were seen; 1 is off [default: the pair's own, else 1]
    #[arg(long, env = "OVERFILL_REPETITION_PENALTY")]
    repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens that the answer holds
    #[arg(long, env = "OVERFILL_PRESENCE_PENALTY", default_value_t = 0.0, allow_hyphen_values = true)]
    presence_penalty: f32,
    /// Subtracted for each time that the answer holds a token
    #[arg(long, env = "OVERFILL_FREQUENCY_PENALTY", default_value_t = 0.0, allow_hyphen_values = true)]
    frequency_penalty: f32,
    /// Key of the draws: the same seed gives the same answer
    #[arg(long, env = "OVERFILL_SEED", default_value_t = 0)]
    seed: u64,
    /// End before this string (may be given several times)
    #[arg(long, env = "OVERFILL_STOP")]
    stop: Vec<String>,
    /// Write on past the model's end-of-sequence tokens
    #[arg(long, env = "OVERFILL_IGNORE_EOS")]
    ignore_eos: bool,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Where the models compute: cpu or cuda:N
    #[arg(long, env = "OVERFILL_DEVICE", default_value = "cpu")]
    device: String,
    /// Print one JSON object instead of the text
    #[arg(long, env = "OVERFILL_JSON")]
    json: bool,
}

pub(crate) fn run(args: GenerateArgs, home: &Home) -> anyhow::Result<()> {
    let dir = args.pair.dir(home)?;
    let text = TextModel::open(&dir)?;
    let prompt = args.prompt_tokens(&text)?;
    let sampling = args.sampling(text.manifest.generation);
    sampling.validate()?;
    let stop = StopConditions { max_tokens: args.max_tokens, stop_token_ids: Vec::new(), ignore_eos: args.ignore_eos };
    Limits { max_context: text.manifest.max_context(), vocab_size: text.manifest.vocab_size() }.check(&prompt, &stop)?;
    let mut stops = StopMatcher::new(args.stop.clone())?;

    let loading = spinner("loading the pair");
    let threads = args.threads.count();
    let device = overfill_model::device::parse(&args.device)?;
    let mut solo = Solo::load(&Pair::open(&dir)?, &device, ThreadPool::new(threads, &[])?)?.writing(args.quality);
    loading.finish_and_clear();

    let mut detokenizer = text.detokenizer(&prompt);
    let (mut answer, mut ids, mut matched) = (String::new(), Vec::new(), false);
    let show = |piece: &str, answer: &mut String| {
        answer.push_str(piece);
        if !args.json {
            print!("{piece}");
            // Nobody reads: the loop ends by itself soon.
            let _ = std::io::stdout().flush();
        }
    };
    let eos = text.manifest.tokenizer.eos_token_ids.clone();
    let told = solo.generate(&prompt, &sampling, &stop, |sampled| {
        ids.push(sampled.token);
        if !stop.ignore_eos && eos.contains(&sampled.token) {
            return ControlFlow::Continue(());
        }
        let piece = stops.push(&detokenizer.push(sampled.token));
        show(&piece.text, &mut answer);
        matched = piece.stop.is_some();
        if matched { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    if !matched {
        let piece = stops.push(&detokenizer.finish());
        show(&piece.text, &mut answer);
        if piece.stop.is_none() {
            show(&stops.finish(), &mut answer);
        }
    }

    let finish = told.finish.unwrap_or(FinishReason::Stop);
    let milliseconds = |d: Duration| d.as_secs_f64() * 1e3;
    let gaps = ids.len().saturating_sub(1);
    let itl = if gaps > 0 { milliseconds(told.time_of_rest) / gaps as f64 } else { 0.0 };
    let rate = if itl > 0.0 { 1e3 / itl } else { 0.0 };
    if args.json {
        let told = json!({
            "text": answer, "token_ids": ids, "finish_reason": finish.as_str(), "prompt_tokens": prompt.len(),
            "ttft_ms": milliseconds(told.time_to_first), "itl_ms": itl, "tokens_per_second": rate,
        });
        println!("{told}");
    } else {
        println!();
        eprintln!(
            "[{} prompt tokens, {} written ({}) | TTFT {:.0} ms | ITL {itl:.1} ms | {rate:.1} tokens/s]",
            prompt.len(),
            ids.len(),
            finish.as_str(),
            milliseconds(told.time_to_first)
        );
    }
    Ok(())
}

impl GenerateArgs {
    fn prompt_tokens(&self, text: &TextModel) -> anyhow::Result<Vec<u32>> {
        let Some(prompt) = &self.prompt else { return Ok(self.token_ids.clone()) };
        let mut prompt = prompt.clone();
        if prompt == "-" {
            prompt.clear();
            std::io::stdin().read_to_string(&mut prompt).context("standard input is no text")?;
        }
        if prompt.is_empty() {
            bail!("the prompt is empty: write one");
        }
        if self.raw || !text.has_template() {
            return Ok(text.encode(&prompt)?);
        }
        let mut messages = Vec::new();
        messages.extend(self.system.iter().map(|s| Message { role: "system".into(), content: s.clone() }));
        messages.push(Message { role: "user".into(), content: prompt });
        Ok(text.encode_chat(&messages)?)
    }

    fn sampling(&self, of_pair: GenerationConfig) -> SamplingParams {
        let said = GenerationConfig {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        };
        said.or(of_pair).fill(SamplingParams {
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            ..SamplingParams::greedy()
        })
    }
}
