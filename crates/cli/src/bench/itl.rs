//! `overfill bench itl`: how long running sequences wait for their next token, alone and while long prompts arrive.
//!
//! It is a client of a cluster that runs: some sequences write without an end; then prompts are sent one after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_proto::v1::{GenerateRequest, Sampling, TokenIds, generate_event, generate_request};
use overfill_transport::Connector;
use overfill_transport::connection::Channel;
use serde_json::json;
use tokio::task::JoinSet;

use crate::bench::spread::Spread;

/// Tokens of a running sequence's prompt.
const SHORT: usize = 32;

#[derive(Args)]
pub(crate) struct ItlArgs {
    /// The router's gRPC address
    #[arg(long, env = "OVERFILL_ROUTER", default_value = "127.0.0.1:8001")]
    router: String,
    /// Sequences that run all the time
    #[arg(long, env = "OVERFILL_SEQUENCES", default_value_t = 4)]
    sequences: usize,
    /// Tokens that each of them writes before it is replaced
    #[arg(long, env = "OVERFILL_NEW_TOKENS", default_value_t = 400)]
    new_tokens: u32,
    /// Tokens of the prompts that arrive
    #[arg(long, env = "OVERFILL_PROMPT_TOKENS", default_value_t = 1500)]
    prompt_tokens: usize,
    /// Seconds of each of the two phases
    #[arg(long, env = "OVERFILL_SECONDS", default_value_t = 10)]
    seconds: u64,
    /// Token ids of prompts are below this
    #[arg(long, env = "OVERFILL_VOCABULARY", default_value_t = 49152)]
    vocabulary: usize,
    /// Print a JSON object
    #[arg(long, env = "OVERFILL_JSON")]
    json: bool,
}

/// What is going on: gaps between tokens belong to it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Warming = 0,
    Idle = 1,
    Arriving = 2,
    Over = 3,
}

struct Shared {
    client: InferenceClient<Channel>,
    phase: AtomicU8,
    prompts: AtomicUsize,
    vocabulary: usize,
}

pub(crate) fn run(args: &ItlArgs) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let shared = Arc::new(Shared {
            client: InferenceClient::new(Connector::default().connect(&args.router)?),
            phase: AtomicU8::new(Phase::Warming as u8),
            prompts: AtomicUsize::new(0),
            vocabulary: args.vocabulary,
        });
        let mut running = JoinSet::new();
        for sequence in 0..args.sequences {
            running.spawn(write_on(shared.clone(), sequence, args.new_tokens));
        }
        let wait = || tokio::time::sleep(Duration::from_secs(args.seconds));
        tokio::time::sleep(Duration::from_secs(2)).await;
        shared.enter(Phase::Idle);
        wait().await;
        shared.enter(Phase::Arriving);
        let mut answered = 0;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(args.seconds) {
            shared.answer(args.prompt_tokens, 2, |_| {}).await?;
            answered += 1;
        }
        shared.enter(Phase::Over);
        let (mut idle, mut arriving) = (Vec::new(), Vec::new());
        while let Some(sequence) = running.join_next().await {
            let (a, b) = sequence??;
            idle.extend(a);
            arriving.extend(b);
        }
        report(args, answered, &Spread::of(idle), &Spread::of(arriving));
        Ok(())
    })
}

/// Writes answer after answer; the gaps between tokens in milliseconds, idle and while prompts arrive.
async fn write_on(shared: Arc<Shared>, sequence: usize, new_tokens: u32) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let (mut idle, mut arriving) = (Vec::new(), Vec::new());
    // Not all of them end at once.
    let mut tokens = new_tokens / 2 + new_tokens / 2 * sequence as u32 / 7 % new_tokens.max(1);
    while shared.phase() != Phase::Over as u8 {
        let mut last: Option<(Instant, u8)> = None;
        shared
            .answer(SHORT, tokens.max(2), |n| {
                let (now, phase) = (Instant::now(), shared.phase());
                // The first gap has the hand-over in it.
                if let Some((before, then)) = last
                    && then == phase
                    && n > 2
                {
                    let gap = (now - before).as_secs_f64() * 1e3;
                    if phase == Phase::Idle as u8 {
                        idle.push(gap);
                    } else if phase == Phase::Arriving as u8 {
                        arriving.push(gap);
                    }
                }
                last = Some((now, phase));
            })
            .await?;
        tokens = new_tokens;
    }
    Ok((idle, arriving))
}

impl Shared {
    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    fn phase(&self) -> u8 {
        self.phase.load(Ordering::Acquire)
    }

    /// One answer to a prompt that nobody else has; `on_token` is called with the number of each token.
    async fn answer(&self, prompt_tokens: usize, new_tokens: u32, mut on_token: impl FnMut(usize)) -> anyhow::Result<()> {
        let own = self.prompts.fetch_add(1, Ordering::Relaxed);
        let ids = (0..prompt_tokens).map(|i| ((7919 * (i + 1) + 1009 * own) % self.vocabulary) as u32).collect();
        let request = GenerateRequest {
            input: Some(generate_request::Input::TokenIds(TokenIds { ids })),
            sampling: Some(Sampling { temperature: Some(0.0), ..Sampling::default() }),
            max_tokens: Some(new_tokens),
            ignore_eos: true,
            ..GenerateRequest::default()
        };
        let mut events = self.client.clone().generate(request).await?.into_inner();
        let mut tokens = 0;
        while let Some(event) = events.message().await? {
            if let Some(generate_event::Event::Delta(delta)) = event.event {
                for _ in delta.tokens {
                    tokens += 1;
                    on_token(tokens);
                }
            }
        }
        Ok(())
    }
}

fn report(args: &ItlArgs, answered: usize, idle: &Spread, arriving: &Spread) {
    let percentiles = |gaps: &Spread| [gaps.median(), gaps.percentile(99.0)];
    let ([idle_50, idle_99], [arriving_50, arriving_99]) = (percentiles(idle), percentiles(arriving));
    let (idle, arriving) = (idle.values(), arriving.values());
    if args.json {
        let line = json!({
            "bench": "itl", "sequences": args.sequences, "prompt_tokens": args.prompt_tokens, "prompts": answered,
            "idle_ms": { "p50": idle_50, "p99": idle_99, "gaps": idle.len() },
            "arriving_ms": { "p50": arriving_50, "p99": arriving_99, "gaps": arriving.len() },
        });
        println!("{line}");
    } else {
        println!("idle      p50 {idle_50:7.2} ms  p99 {idle_99:7.2} ms  ({} gaps)", idle.len());
        println!(
            "arriving  p50 {arriving_50:7.2} ms  p99 {arriving_99:7.2} ms  ({} gaps, {answered} prompts of {} tokens): p99 {:.2} x",
            arriving.len(),
            args.prompt_tokens,
            arriving_99 / idle_99
        );
    }
}
