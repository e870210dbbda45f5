//! `overfill bench train`: training tokens per second, without a full model: random weights, keys, values and targets.

use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use overfill_compress::product::Precision;
use overfill_model::config::{LayerAttention, Rope, Scalars};
use overfill_model::{Family, LlamaConfig};
use overfill_train::AdamOptions;
use overfill_train::adam::{Adam, norm};
use overfill_train::net::{Batch, Context, Divergence, KvRows, Mix, Net, Objective, Sequence, Shape, State, Target, Teacher};
use overfill_types::KvGeometry;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::bench::spread::Spread;
use crate::threads::ThreadArgs;

/// Tokens whose probabilities the full model is taken to have told.
const TOP: usize = 32;

#[derive(Args)]
pub(crate) struct TrainArgs {
    /// Width of the residual stream
    #[arg(long, default_value_t = 432)]
    hidden: usize,
    /// Width of the MLP
    #[arg(long, default_value_t = 1152)]
    intermediate: usize,
    /// Response tokens of each sequence of a batch
    #[arg(long, value_delimiter = ',', default_value = "60,66,72,78,84,90")]
    responses: Vec<usize>,
    /// Prompt tokens of each, read by the full model
    #[arg(long, value_delimiter = ',', default_value = "150,200,250,300,350,400")]
    prompts: Vec<usize>,
    /// Train the pruned-only baseline: prompts are read by the model itself
    #[arg(long)]
    alone: bool,
    /// What the large products read: f32 or bf16
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// Steps that are measured, after one that is not
    #[arg(long, default_value_t = 5)]
    steps: usize,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Print one JSON object
    #[arg(long, env = "OVERFILL_JSON")]
    json: bool,
}

/// Random numbers between -`size` and `size`.
fn numbers(n: usize, size: f32, seed: u64) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| random.random_range(-size..size)).collect()
}

pub(crate) fn run(args: &TrainArgs) -> anyhow::Result<()> {
    anyhow::ensure!(args.responses.len() == args.prompts.len(), "as many prompts as responses are needed");
    let threads = args.threads.count();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("threads cannot be started")?;
    let config = LlamaConfig {
        family: Family::Llama,
        hidden_size: args.hidden,
        intermediate_size: args.intermediate,
        vocab_size: 49_152,
        heads: 9,
        kv: KvGeometry { layers: 30, kv_heads: 3, head_dim: 64 },
        rms_norm_eps: 1e-5,
        rope: Rope::plain(100_000.0, 64),
        local_rope: None,
        layers: vec![LayerAttention::default(); 30],
        scalars: Scalars::plain(64),
        max_context: 8192,
        tied_embeddings: false,
        eos_token_ids: Vec::new(),
    };
    let seconds = pool.install(|| measure(args, &config));
    let tokens: usize = args.responses.iter().sum();
    let step = Spread::of(seconds).median();
    let rate = tokens as f64 / step;
    if args.json {
        println!("{}", json!({ "response_tokens": tokens, "seconds_per_step": step, "tokens_per_second": rate, "threads": threads }));
    } else {
        println!("{rate:.0} response tokens/s ({tokens} in a step of {:.0} ms, {threads} threads)", step * 1e3);
    }
    Ok(())
}

/// Seconds of each step: forward, loss, backward, clipping and AdamW.
fn measure(args: &TrainArgs, config: &LlamaConfig) -> Vec<f64> {
    let shape = Shape::new(config, false, false);
    let entries = shape.entries();
    let mut parameters = numbers(shape.len(), 0.05, 1);
    let row = config.kv.row();
    let contexts: Vec<Context> = args
        .prompts
        .iter()
        .map(|&tokens| Context {
            tokens,
            layers: (0..config.kv.layers as u64)
                .map(|l| KvRows { k: numbers(tokens * row, 1.0, l), v: numbers(tokens * row, 1.0, l + 99) })
                .collect(),
        })
        .collect();
    let tokens: Vec<Vec<u32>> = args
        .responses
        .iter()
        .zip(&args.prompts)
        .map(|(response, prompt)| (0..if args.alone { response + prompt } else { *response }).map(|i| (i * 7919 % 49_152) as u32).collect())
        .collect();
    let sequences: Vec<Sequence<'_>> =
        contexts.iter().zip(&tokens).map(|(c, tokens)| Sequence { context: (!args.alone).then_some(c), tokens }).collect();
    let ids: Vec<u32> = (0..TOP as u32).map(|i| i * 97).collect();
    let log_probs = vec![-(TOP as f32 * 1.1).ln(); TOP];
    let mut first = 0;
    let mut targets = Vec::new();
    for (tokens, response) in tokens.iter().zip(&args.responses) {
        first += tokens.len();
        let rows = first - response..first;
        targets.extend(rows.map(|row| Target {
            row,
            token: (row * 31 % 49_152) as u32,
            teacher: Some(Teacher { ids: &ids, log_probs: &log_probs, state: &[] }),
        }));
    }
    let batch = Batch { sequences: &sequences, targets: &targets };
    let objective =
        Objective { mix: Mix { ce: 0.5, distill: 1.0, divergence: Divergence::Kl, states: 0.0 }, scale: 1.0 / targets.len() as f32 };
    let net = Net::new(shape, config);
    let mut adam = Adam::new(AdamOptions::default(), parameters.len());
    let mut gradients = vec![0.0; parameters.len()];
    let mut state = State::new(args.precision);
    let mut seconds = Vec::new();
    for _ in 0..=args.steps {
        let begun = Instant::now();
        net.train(&parameters, &batch, objective, &mut state, &mut gradients, false);
        let length = norm(&gradients);
        adam.step(&mut parameters, &gradients, &entries, 1e-6, (1.0 / length.max(1.0)) as f32);
        seconds.push(begun.elapsed().as_secs_f64());
    }
    seconds.split_off(1)
}
