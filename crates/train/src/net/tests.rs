//! Gradients against finite differences, and what a network's output must not depend on.

#[path = "../../../../tests/reference/families.rs"]
mod families;

use overfill_compress::product::Precision;
use overfill_model::config::{LayerAttention, Rope, Rotation, Scalars};
use overfill_model::{Family, LlamaConfig, Weights};
use overfill_types::KvGeometry;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const VOCAB: usize = 37;

/// A model of a family, with what sets it apart in more than one layer.
fn config(family: Family) -> LlamaConfig {
    let mut config = LlamaConfig {
        family,
        // Not the width of all heads together.
        hidden_size: 20,
        intermediate_size: 14,
        vocab_size: VOCAB,
        heads: 6,
        kv: KvGeometry { layers: 3, kv_heads: 2, head_dim: 8 },
        rms_norm_eps: 1e-5,
        rope: Rope::plain(100.0, 8),
        local_rope: None,
        layers: vec![LayerAttention::default(); 3],
        scalars: Scalars::plain(8),
        max_context: 64,
        tied_embeddings: true,
        eos_token_ids: Vec::new(),
    };
    match family {
        Family::Qwen3 => config.layers[1].window = Some(3),
        Family::SmolLm3 => config.layers[1].rotation = Rotation::None,
        Family::Granite => config.scalars = Scalars { embedding: 1.6, residual: 0.4, attention: 0.5, logits: 0.7, ..config.scalars },
        Family::Gemma => config.scalars.embedding = 1.6,
        Family::Gemma2 => {
            config.scalars = Scalars { embedding: 1.6, attention_cap: Some(1.5), logits_cap: Some(2.0), ..config.scalars };
            config.layers[0].window = Some(4);
        }
        Family::Gemma3 => {
            config.local_rope = Some(Rope::plain(7.0, 8));
            config.layers[2] = LayerAttention { window: Some(4), rotation: Rotation::Local };
        }
        Family::Phi3 => config.rope.turned = 6,
        _ => {}
    }
    config
}

fn random(n: usize, size: f32, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-size..size)).collect()
}

/// A network of either kind with random parameters; norms' weights near 1.
fn network(tied: bool, biases: bool, projected: Option<usize>, taught: Option<usize>) -> (Net, Vec<f32>) {
    network_of(&config(Family::Qwen2), tied, biases, projected, taught)
}

fn network_of(config: &LlamaConfig, tied: bool, biases: bool, projected: Option<usize>, taught: Option<usize>) -> (Net, Vec<f32>) {
    let shape = Shape { projected, taught, ..Shape::new(config, biases, tied) };
    let mut parameters = random(shape.len(), 0.6, 1);
    for entry in shape.entries().iter().filter(|e| e.name.ends_with("norm.weight")) {
        parameters[entry.range.clone()].iter_mut().for_each(|w| *w += 1.0);
    }
    (Net::new(shape, config), parameters)
}

fn context(tokens: usize, row: usize, seed: u64) -> Context {
    let layers = (0..3).map(|l| KvRows { k: random(tokens * row, 1.0, seed + l), v: random(tokens * row, 1.0, seed + 10 + l) });
    Context { tokens, layers: layers.collect() }
}

const TOKENS: [&[u32]; 3] = [&[1, 5, 9, 5, 30, 2, 17], &[36, 0, 4], &[8, 8, 8, 21, 3]];
const TEACHER: ([u32; 4], [f32; 4]) = ([3, 30, 9, 21], [-0.7, -1.6, -2.5, -3.5]);
/// Of a full model that is a little narrower.
const STATE: [f32; 7] = [0.3, -1.9, 0.1, 1.2, -0.4, 0.8, -1.0];

fn targets() -> Vec<Target<'static>> {
    let teacher = Some(Teacher { ids: &TEACHER.0, log_probs: &TEACHER.1, state: &STATE });
    vec![
        Target { row: 1, token: 9, teacher },
        Target { row: 4, token: 2, teacher },
        Target { row: 6, token: 36, teacher: None },
        Target { row: 8, token: 4, teacher: None },
        Target { row: 14, token: 0, teacher },
    ]
}

const OBJECTIVE: Objective = Objective { mix: Mix { ce: 0.4, distill: 1.3, divergence: Divergence::Kl, states: 0.7 }, scale: 0.2 };

fn loss(net: &Net, parameters: &[f32], objective: Objective, sequences: &[Sequence<'_>], state: &mut State) -> f64 {
    net.run(parameters, sequences, state, &mut |_, _, _| {});
    total(&net.loss(parameters, &targets(), objective.mix.divergence, state), objective)
}

fn total(rows: &[RowLoss], objective: Objective) -> f64 {
    rows.iter().map(|r| f64::from(objective.scale) * f64::from(r.mixed(objective.mix))).sum()
}

/// Of every parameter, and in random directions: the slope that backward tells is the loss's.
#[test]
fn gradients_are_slopes() {
    let kinds = [
        (Family::Qwen2, true, false, None, None),
        (Family::Qwen2, false, true, None, Some(7)),
        (Family::Qwen2, false, false, Some(10), None),
        (Family::Qwen2, true, true, Some(16), Some(7)),
        (Family::Qwen2, true, false, None, None),
        (Family::Qwen3, true, true, None, None),
        (Family::SmolLm3, true, false, None, None),
        (Family::Granite, true, false, None, Some(7)),
        (Family::Gemma, true, false, None, None),
        (Family::Gemma2, false, false, Some(10), None),
        (Family::Gemma3, true, false, None, None),
        (Family::Phi3, false, false, None, None),
        (Family::Olmo2, false, false, None, None),
    ];
    for ((family, tied, biases, projected, taught), divergence) in kinds.into_iter().zip(divergence::EACH.into_iter().cycle()) {
        let objective = Objective { mix: Mix { divergence, ..OBJECTIVE.mix }, ..OBJECTIVE };
        let (net, parameters) = network_of(&config(family), tied, biases, projected, taught);
        let row = projected.unwrap_or(16);
        let contexts = [context(6, row, 100), context(11, row, 200)];
        let sequences = [
            Sequence { context: Some(&contexts[0]), tokens: TOKENS[0] },
            Sequence { context: None, tokens: TOKENS[1] },
            Sequence { context: Some(&contexts[1]), tokens: TOKENS[2] },
        ];
        let mut state = State::default();
        let mut gradients = vec![f32::NAN; parameters.len()];
        let batch = Batch { sequences: &sequences, targets: &targets() };
        let rows = net.train(&parameters, &batch, objective, &mut state, &mut gradients, false);
        let told = total(&rows, objective);
        assert!((told - loss(&net, &parameters, objective, &sequences, &mut state)).abs() < 1e-5);

        for entry in net.shape.entries() {
            let own = &gradients[entry.range.clone()];
            let length = own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(length > 1e-6, "{} has no gradient", entry.name);
            for direction in 0..4u64 {
                // Along the gradient itself, then along random directions of length 1.
                let mut along: Vec<f64> = match direction {
                    0 => own.iter().map(|g| f64::from(*g)).collect(),
                    seed => random(own.len(), 1.0, 1000 + seed).into_iter().map(f64::from).collect(),
                };
                let norm = along.iter().map(|x| x * x).sum::<f64>().sqrt();
                along.iter_mut().for_each(|x| *x /= norm);
                let expected: f64 = along.iter().zip(own).map(|(a, g)| a * f64::from(*g)).sum();
                let mut at = |step: f64| {
                    let mut moved = parameters.clone();
                    moved[entry.range.clone()].iter_mut().zip(&along).for_each(|(w, a)| *w += (step * a) as f32);
                    loss(&net, &moved, objective, &sequences, &mut state)
                };
                let mut difference = |step: f64| (at(step) - at(-step)) / (2.0 * step);
                // Two steps, so that what is cubic in the step cancels.
                let slope = (4.0 * difference(2e-3) - difference(4e-3)) / 3.0;
                let error = (slope - expected).abs();
                assert!(
                    error < 1e-3 + 0.01 * length,
                    "{} direction {direction}: slope {slope}, backward says {expected} of {length} ({family}, tied {tied}, biases {biases}, projected {projected:?}, taught {taught:?}, {divergence:?})",
                    entry.name
                );
            }
        }
    }
}

/// A batch's gradients are the sum of its sequences', added or not.
#[test]
fn gradients_add_up() {
    let (net, parameters) = network(false, true, None, None);
    let contexts = [context(6, 16, 100), context(11, 16, 200)];
    let first = Sequence { context: Some(&contexts[0]), tokens: TOKENS[0] };
    let second = Sequence { context: Some(&contexts[1]), tokens: TOKENS[2] };
    let target = |row| Target { row, token: 7, teacher: None };
    let mut state = State::default();
    let mut together = vec![0.0; parameters.len()];
    let batch = Batch { sequences: &[first, second], targets: &[target(3), target(9)] };
    net.train(&parameters, &batch, OBJECTIVE, &mut state, &mut together, false);
    let mut one_by_one = vec![f32::NAN; parameters.len()];
    for (sequence, row, add) in [(first, 3, false), (second, 2, true)] {
        let batch = Batch { sequences: &[sequence], targets: &[target(row)] };
        net.train(&parameters, &batch, OBJECTIVE, &mut state, &mut one_by_one, add);
    }
    for (a, b) in together.iter().zip(&one_by_one) {
        assert!((a - b).abs() < 1e-5, "{a} is not {b}");
    }
}

/// Reading a sequence in two halves, the first one's keys and values as the second's context, gives the same logits.
#[test]
fn a_context_is_what_was_read_before() {
    let (net, parameters) = network(false, true, None, None);
    let tokens: Vec<u32> = (0..150).map(|i| (i * 7 % VOCAB) as u32).collect();
    let mut state = State::default();
    let mut read = Context { tokens: 90, layers: Vec::new() };
    net.run(&parameters, &[Sequence { context: None, tokens: &tokens }], &mut state, &mut |_, saved, _| {
        let shape = net.shape.layer;
        let part = |from: usize| saved.qkv.chunks(shape.qkv()).take(90).flat_map(|r| &r[from..from + shape.kv_row()]).copied().collect();
        read.layers.push(KvRows { k: part(shape.q()), v: part(shape.q() + shape.kv_row()) });
    });
    let whole = net.logits(&parameters, &[100, 149], &mut state);
    net.run(&parameters, &[Sequence { context: Some(&read), tokens: &tokens[90..] }], &mut state, &mut |_, _, _| {});
    let half = net.logits(&parameters, &[10, 59], &mut state);
    let difference = whole.iter().zip(half).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference < 1e-4, "{difference}");
}

/// The same bits on any number of threads: what a resumed run rests on.
#[test]
fn threads_do_not_change_a_bit() {
    let (net, parameters) = network(false, true, Some(10), None);
    let context = context(40, 10, 100);
    let tokens: Vec<u32> = (0..200).map(|i| (i * 7 % VOCAB) as u32).collect();
    let sequences = [Sequence { context: Some(&context), tokens: &tokens }, Sequence { context: None, tokens: &tokens[..70] }];
    let targets: Vec<Target<'_>> = (0..270).map(|row| Target { row, token: (row % VOCAB) as u32, teacher: None }).collect();
    let run = |threads: usize, precision: Precision| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut gradients = vec![0.0; parameters.len()];
            let batch = Batch { sequences: &sequences, targets: &targets };
            net.train(&parameters, &batch, OBJECTIVE, &mut State::new(precision), &mut gradients, false);
            gradients
        })
    };
    let [exact, rounded] = [Precision::F32, Precision::Bf16].map(|precision| {
        let one = run(1, precision);
        for threads in [2, 3] {
            assert!(run(threads, precision) == one, "{threads} threads, {precision:?}");
        }
        one
    });
    // Rounding to eight bits moves a gradient a little and leaves its direction.
    let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine = product(&exact, &rounded) / (product(&exact, &exact) * product(&rounded, &rounded)).sqrt();
    assert!(cosine > 0.999 && exact != rounded, "{cosine}");
}

/// The loss of a row is what its definition says, also where the full model's known tokens hold almost all probability.
#[test]
fn losses_are_those_of_the_definition() {
    let (net, parameters) = network(true, false, None, None);
    let mut state = State::default();
    net.run(&parameters, &[Sequence { context: None, tokens: TOKENS[0] }], &mut state, &mut |_, _, _| {});
    let logits = net.logits(&parameters, &[6], &mut state);
    let total: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
    let log_q: Vec<f64> = logits.iter().map(|x| f64::from(*x) - total.ln()).collect();
    for log_probs in [TEACHER.1, [-0.001, -8.0, -9.0, -10.0]] {
        let teacher = Some(Teacher { ids: &TEACHER.0, log_probs: &log_probs, state: &STATE });
        let told = net.loss(&parameters, &[Target { row: 6, token: 11, teacher }], Divergence::Kl, &mut state)[0];
        let known: f64 = log_probs.iter().map(|p| f64::from(*p).exp()).sum();
        let q_known: f64 = TEACHER.0.iter().map(|id| log_q[*id as usize].exp()).sum();
        let kl: f64 = TEACHER.0.iter().zip(&log_probs).map(|(id, p)| f64::from(*p).exp() * (f64::from(*p) - log_q[*id as usize])).sum();
        let kl = kl + (1.0 - known).max(1e-30) * ((1.0 - known).max(1e-30) / (1.0 - q_known)).ln();
        assert!((f64::from(told.ce) + log_q[11]).abs() < 1e-5);
        assert!((f64::from(told.kl) - kl).abs() < 1e-4, "{} is not {kl}", told.kl);
        // Without a map nothing is said of states.
        assert_eq!(told.states, 0.0);
    }
}

#[test]
fn the_network_computes_what_transformers_computes_in_every_family() {
    let fixture = families::Fixture::open();
    let (tokens, rows) = (fixture.tokens(), fixture.rows());
    for (name, config, expected) in fixture.cases() {
        let at = tempfile::tempdir().unwrap();
        families::folder(config, at.path());
        let weights = Weights::open(at.path()).unwrap();
        let shape = match Shape::of(&weights, at.path()) {
            Ok(shape) => shape,
            Err(e) => {
                assert!(name.ends_with("biases") && e.to_string().contains("bias"), "{name}: {e}");
                continue;
            }
        };
        let parameters = shape.read(&weights, at.path()).unwrap();
        let net = Net::new(shape, weights.config());
        let mut state = State::default();
        net.run(&parameters, &[Sequence { context: None, tokens: &tokens }], &mut state, &mut |_, _, _| ());
        let logits = net.logits(&parameters, &rows, &mut state);
        let far = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(logits.len() == expected.len() && far < 1e-4, "{name}: {far}");
    }
}
