//! Teacher-forced scoring with the engine that serves: how likely each arm finds the tokens of given answers, and how far
//! it is from the full model at each of them.
//!
//! **Invariant:** what is scored is what is served: the same kernels, cache and wire formats, and the first token of an
//! OverFill answer comes from the full model's logits. A figure does not depend on what else is scored beside it.

use std::ops::Range;
use std::sync::Mutex;

use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama, ModelError, ThreadPool, Workspace};
use overfill_types::KvFormats;

use crate::data::Example;
use crate::read::{Arm, BLOCK_TOKENS, Handoff, Prompt, read, tables};

/// Token positions in one batch of examples: they bound the caches' memory.
const BATCH_POSITIONS: usize = 4096;
/// Response tokens whose logits are held at once, for the full model and one other: 19 MB each for a vocabulary of 49,152.
const SLAB_ROWS: usize = 96;

/// How one arm scores one example, token by token of its response.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scored {
    /// Log-probability of the token, in nats.
    pub log_probs: Vec<f32>,
    /// KL divergence of the arm's distribution from the full model's, in nats.
    pub divergences: Vec<f32>,
    /// Whether the arm's most likely token is the full model's.
    pub agrees: Vec<bool>,
}

impl Scored {
    /// Sum of the tokens' negative log-probabilities. Without its first token, which the full model writes when the pair
    /// is served, where `first` is false.
    pub fn loss(&self, first: bool) -> f64 {
        self.log_probs.iter().skip(usize::from(!first)).map(|l| -f64::from(*l)).sum()
    }
}

/// Scores every arm on every example: `[arm][example]`. `progress` is told how many examples are done.
///
/// # Errors
/// [`ModelError::Mismatch`] where an example has an empty prompt or response or a token id that a model does not know;
/// where a forward pass fails.
pub fn score(
    full: &Llama,
    arms: &[Arm<'_>],
    formats: KvFormats,
    workspace: &mut Workspace,
    examples: &[Example],
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<Scored>>, ModelError> {
    if let Some(at) = examples.iter().position(|e| e.prompt.is_empty() || e.response.is_empty()) {
        return Err(ModelError::Mismatch(format!("example {at} has an empty prompt or response: nothing can be scored")));
    }
    let mut all = vec![Vec::with_capacity(examples.len()); arms.len()];
    let mut done = 0;
    while done < examples.len() {
        let mut positions = 0;
        let fitting = examples[done..].iter().take_while(|e| {
            positions += length(e).next_multiple_of(BLOCK_TOKENS);
            positions <= BATCH_POSITIONS
        });
        let count = fitting.count().max(1);
        let batch = Batch::new(&examples[done..done + count]);
        for (all, scored) in all.iter_mut().zip(batch.score(full, arms, formats, workspace)?) {
            all.extend(scored);
        }
        done += count;
        progress(done);
    }
    Ok(all)
}

/// Positions that are read: the last token of a response is never.
fn length(example: &Example) -> usize {
    example.prompt.len() + example.response.len() - 1
}

/// Tokens of one example's response.
#[derive(Clone)]
struct Part {
    example: usize,
    tokens: Range<usize>,
}

/// Examples that are scored in the same forward passes.
struct Batch<'e> {
    examples: &'e [Example],
    /// Prompt and response of each, one after the other.
    sequences: Vec<Vec<u32>>,
    tables: Vec<Vec<BlockId>>,
    blocks: usize,
}

impl<'e> Batch<'e> {
    fn new(examples: &'e [Example]) -> Self {
        let (tables, blocks) = tables(examples.iter().map(length));
        let sequences = examples.iter().map(|e| [e.prompt.as_slice(), &e.response].concat()).collect();
        Self { examples, sequences, tables, blocks }
    }

    /// All response tokens in slabs of at most [`SLAB_ROWS`].
    fn slabs(&self) -> Vec<Vec<Part>> {
        let mut slabs = Vec::new();
        let (mut slab, mut room) = (Vec::new(), SLAB_ROWS);
        for (example, Example { response, .. }) in self.examples.iter().enumerate() {
            let mut start = 0;
            while start < response.len() {
                let end = response.len().min(start + room);
                slab.push(Part { example, tokens: start..end });
                room -= end - start;
                start = end;
                if room == 0 {
                    slabs.push(std::mem::take(&mut slab));
                    room = SLAB_ROWS;
                }
            }
        }
        if !slab.is_empty() {
            slabs.push(slab);
        }
        slabs
    }

    fn score(&self, full: &Llama, arms: &[Arm<'_>], formats: KvFormats, workspace: &mut Workspace) -> Result<Vec<Vec<Scored>>, ModelError> {
        let cache = |model: &Llama| KvCache::new(model.config().kv, formats.cache, self.blocks, BLOCK_TOKENS, model.device());
        let mut full_cache = cache(full)?;
        let mut caches = arms
            .iter()
            .map(|arm| match arm {
                Arm::Full => Ok(None),
                Arm::Overfill { decode: model, .. } | Arm::Alone(model) => cache(model).map(Some),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut handoffs = Vec::new();
        for (arm, to) in arms.iter().zip(&mut caches) {
            if let (Arm::Overfill { transform, .. }, Some(to)) = (arm, to) {
                handoffs.push(Handoff { transform, format: formats.wire, to });
            }
        }
        let prompts: Vec<Prompt<'_>> =
            self.examples.iter().zip(&self.tables).map(|(e, blocks)| Prompt { tokens: &e.prompt, blocks }).collect();
        read(full, &prompts, &mut full_cache, workspace, &mut handoffs)?;
        for (arm, cache) in arms.iter().zip(&mut caches) {
            if let (Arm::Alone(model), Some(cache)) = (arm, cache) {
                read(model, &prompts, cache, workspace, &mut [])?;
            }
        }

        let mut scored = vec![vec![Scored::default(); self.examples.len()]; arms.len()];
        for slab in self.slabs() {
            let logits = self.logits(full, &slab, &mut full_cache, workspace)?;
            let reference = Reference::new(workspace.pool(), logits, full.config().vocab_size);
            let rows: Vec<(usize, usize)> = slab.iter().flat_map(|p| p.tokens.clone().map(|t| (p.example, t))).collect();
            let tokens: Vec<u32> = rows.iter().map(|&(e, t)| self.examples[e].response[t]).collect();
            for ((arm, cache), scored) in arms.iter().zip(&mut caches).zip(&mut scored) {
                let own = match (arm, cache) {
                    (Arm::Alone(model), Some(cache)) => self.logits(model, &slab, cache, workspace)?,
                    (Arm::Overfill { decode, .. }, Some(cache)) => {
                        let rest = slab.iter().map(|p| Part { tokens: p.tokens.start.max(1)..p.tokens.end, ..p.clone() });
                        let rest: Vec<Part> = rest.filter(|p| !p.tokens.is_empty()).collect();
                        let logits = if rest.is_empty() { Vec::new() } else { self.logits(decode, &rest, cache, workspace)? };
                        reference.with_first(&rows, logits, decode.config().vocab_size)
                    }
                    _ => reference.logits.clone(),
                };
                for (&(e, _), token) in rows.iter().zip(reference.compare(workspace.pool(), &own, &tokens)?) {
                    scored[e].log_probs.push(token.log_prob);
                    scored[e].divergences.push(token.divergence);
                    scored[e].agrees.push(token.agrees);
                }
            }
        }
        Ok(scored)
    }

    /// What `model` expects at each token of the parts: `[tokens, vocab]`. It reads the token before each; before the first of
    /// a response that is the prompt's last one (again, which changes nothing).
    fn logits(&self, model: &Llama, parts: &[Part], cache: &mut KvCache, workspace: &mut Workspace) -> Result<Vec<f32>, ModelError> {
        let chunks: Vec<Chunk<'_>> = parts
            .iter()
            .map(|Part { example, tokens }| {
                let first = self.examples[*example].prompt.len() + tokens.start - 1;
                let tokens = &self.sequences[*example][first..first + tokens.len()];
                Chunk { tokens, start: first, blocks: &self.tables[*example], logits: true }
            })
            .collect();
        Ok(model.forward_each(&chunks, cache, workspace)?.read()?.to_vec())
    }
}

/// The full model's logits `[rows, vocab]`, and the log-sum-exp of each row.
struct Reference {
    logits: Vec<f32>,
    vocabulary: usize,
    norms: Vec<f64>,
}

/// How one token is found.
struct Token {
    log_prob: f32,
    divergence: f32,
    agrees: bool,
}

impl Reference {
    fn new(pool: &ThreadPool, logits: Vec<f32>, vocabulary: usize) -> Self {
        let rows: Vec<&[f32]> = logits.chunks_exact(vocabulary).collect();
        let norms = each(pool, rows.len(), |i| norm(rows[i]));
        Self { logits, vocabulary, norms }
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.logits[row * self.vocabulary..(row + 1) * self.vocabulary]
    }

    /// A decode model's logits, completed with the full model's before each first token of a response.
    fn with_first(&self, rows: &[(usize, usize)], rest: Vec<f32>, vocabulary: usize) -> Vec<f32> {
        let mut rest = rest.chunks_exact(vocabulary);
        let mut logits = Vec::with_capacity(rows.len() * vocabulary);
        for (i, &(_, token)) in rows.iter().enumerate() {
            let end = logits.len() + vocabulary;
            let row = if token == 0 { self.row(i) } else { rest.next().unwrap_or_default() };
            logits.extend(row.iter().take(vocabulary));
            logits.resize(end, f32::NEG_INFINITY);
        }
        logits
    }

    /// Compares another model's logits for the same rows; the vocabulary that both know counts.
    fn compare(&self, pool: &ThreadPool, logits: &[f32], tokens: &[u32]) -> Result<Vec<Token>, ModelError> {
        let vocabulary = logits.len() / tokens.len();
        let common = vocabulary.min(self.vocabulary);
        if let Some(token) = tokens.iter().find(|t| **t as usize >= common) {
            return Err(ModelError::Mismatch(format!("token id {token} is out of the models' common vocabulary of {common}")));
        }
        Ok(each(pool, tokens.len(), |i| {
            let (theirs, ours) = (&self.row(i)[..common], &logits[i * vocabulary..i * vocabulary + common]);
            let (full_norm, norm) = (self.norms[i], norm(ours));
            let divergence: f64 = theirs
                .iter()
                .zip(ours)
                .map(|(&p, &q)| {
                    let p = f64::from(p) - full_norm;
                    let weight = f64::from((p as f32).exp());
                    if weight > 0.0 { weight * (p - (f64::from(q) - norm)) } else { 0.0 }
                })
                .sum();
            Token {
                log_prob: (f64::from(ours[tokens[i] as usize]) - norm) as f32,
                divergence: divergence.max(0.0) as f32,
                agrees: greatest(ours) == greatest(theirs),
            }
        }))
    }
}

/// Log-sum-exp.
fn norm(logits: &[f32]) -> f64 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from((l - highest).exp())).sum();
    f64::from(highest) + sum.ln()
}

/// Index of the greatest; the first of several.
fn greatest(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best
}

/// `of(0)`, `of(1)`, … computed by the pool's threads.
fn each<T: Send>(pool: &ThreadPool, count: usize, of: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let results: Vec<Mutex<Option<T>>> = (0..count).map(|_| Mutex::new(None)).collect();
    pool.run(count, |i| {
        // Each is locked once, by the thread that has it.
        if let Ok(mut result) = results[i].lock() {
            *result = Some(of(i));
        }
    });
    // One without a result panicked, and the run with it.
    results.into_iter().filter_map(|result| result.into_inner().ok().flatten()).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use overfill_model::{Device, Transform};
    use overfill_types::pair::WeightFormat;
    use overfill_types::{KvFormat, KvTransform, WireFormat};

    use super::*;

    fn load(name: &str, pool: &ThreadPool) -> Llama {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name);
        Llama::load(&folder, WeightFormat::F32, &Device::Cpu, pool).unwrap()
    }

    fn examples() -> Vec<Example> {
        let tokens = |from: u32, count: u32| (0..count).map(|i| (from + i * 37) % 128).collect::<Vec<_>>();
        [(1, 1), (5, 9), (40, 33), (17, 1), (3, 70), (100, 20)]
            .map(|(p, r)| Example { prompt: tokens(p, p), response: tokens(r + 11, r) })
            .to_vec()
    }

    /// The logits before each token of the response, token by token, one sequence by itself.
    fn plain(model: &Llama, reader: &Llama, transform: Option<&Transform>, formats: KvFormats, example: &Example) -> Vec<Vec<f32>> {
        let blocks: Vec<BlockId> = (0..16).map(BlockId).collect();
        let mut workspace = Workspace::new(ThreadPool::new(1, &[]).unwrap());
        let new = |model: &Llama| KvCache::new(model.config().kv, formats.cache, 16, 16, &Device::Cpu).unwrap();
        let (mut cache, mut other) = (new(model), new(reader));
        let mut all = Vec::new();
        let chunk = Chunk { tokens: &example.prompt, start: 0, blocks: &blocks, logits: true };
        let first = match transform {
            Some(transform) => reader.forward(&[chunk], &mut other, &mut workspace, &mut |layer, from, pool| {
                let passage = overfill_model::Passage { format: formats.wire, blocks: &blocks, start: 0, count: example.prompt.len() };
                transform.carry(pool, layer, passage, from, &mut cache)
            }),
            None => model.forward(&[chunk], &mut cache, &mut workspace, &mut |_, _, _| Ok(())),
        };
        all.push(first.unwrap().read().unwrap().to_vec());
        for (i, token) in example.response[..example.response.len() - 1].iter().enumerate() {
            let chunk = Chunk { tokens: &[*token], start: example.prompt.len() + i, blocks: &blocks, logits: true };
            all.push(model.forward(&[chunk], &mut cache, &mut workspace, &mut |_, _, _| Ok(())).unwrap().read().unwrap().to_vec());
        }
        all
    }

    fn log_softmax(logits: &[f32]) -> Vec<f64> {
        let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        logits.iter().map(|l| f64::from(*l) - sum.ln()).collect()
    }

    #[test]
    fn scores_are_those_of_one_token_after_the_other() {
        let mut workspace = Workspace::new(ThreadPool::new(2, &[]).unwrap());
        let (full, decode) = (load("full", workspace.pool()), load("narrow", workspace.pool()));
        let kv = full.config().kv;
        let transform = Transform::load(&KvTransform::Identity, Path::new("."), kv, kv, workspace.pool()).unwrap();
        let formats = KvFormats { cache: KvFormat::F16, wire: WireFormat::Int8 };
        let examples = examples();
        let arms = [Arm::Full, Arm::Overfill { decode: &decode, transform: &transform }, Arm::Alone(&decode)];
        let all = score(&full, &arms, formats, &mut workspace, &examples, |_| ()).unwrap();
        for (e, example) in examples.iter().enumerate() {
            let theirs = plain(&full, &full, None, formats, example);
            let ours = [
                theirs.clone(),
                plain(&decode, &full, Some(&transform), formats, example),
                plain(&decode, &decode, None, formats, example),
            ];
            for (arm, ours) in ours.iter().enumerate() {
                let scored = &all[arm][e];
                assert_eq!(scored.log_probs.len(), example.response.len());
                for (t, token) in example.response.iter().enumerate() {
                    let (p, q) = (log_softmax(&theirs[t]), log_softmax(&ours[t]));
                    let divergence: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
                    let place = format!("arm {arm}, example {e}, token {t}");
                    assert!((f64::from(scored.log_probs[t]) - q[*token as usize]).abs() < 1e-5, "{place}");
                    assert!((f64::from(scored.divergences[t]) - divergence).abs() < 1e-5, "{place}: {divergence}");
                    assert_eq!(scored.agrees[t], greatest(&theirs[t]) == greatest(&ours[t]), "{place}");
                }
            }
            assert!(all[0][e].divergences.iter().all(|d| *d < 1e-6) && all[0][e].agrees.iter().all(|a| *a));
            assert_eq!(all[1][e].log_probs[0], all[0][e].log_probs[0], "the full model gives the first token");
            if example.response.len() > 1 {
                assert_ne!(all[1][e].log_probs[1], all[2][e].log_probs[1], "the full model's cache makes a difference");
            }
            let alone = score(&full, &arms, formats, &mut workspace, &examples[e..=e], |_| ()).unwrap();
            assert!((0..3).all(|arm| alone[arm][0] == all[arm][e]), "company changes nothing");
        }
    }

    #[test]
    fn slabs_hold_every_token_once() {
        for lengths in [vec![1], vec![95], vec![96], vec![97], vec![40, 56], vec![192, 3, 93], vec![300, 1, 1]] {
            let examples: Vec<Example> = lengths.iter().map(|n| Example { prompt: vec![1], response: vec![2; *n] }).collect();
            let slabs = Batch::new(&examples).slabs();
            let sizes: Vec<usize> = slabs.iter().map(|slab| slab.iter().map(|part| part.tokens.len()).sum()).collect();
            assert!(sizes.iter().all(|size| (1..=SLAB_ROWS).contains(size)), "{lengths:?}: {sizes:?}");
            let all: Vec<(usize, usize)> = slabs.iter().flatten().flat_map(|p| p.tokens.clone().map(|t| (p.example, t))).collect();
            let wanted: Vec<(usize, usize)> = lengths.iter().enumerate().flat_map(|(e, n)| (0..*n).map(move |t| (e, t))).collect();
            assert_eq!(all, wanted);
        }
    }

    #[test]
    fn what_cannot_be_scored_is_refused() {
        let mut workspace = Workspace::new(ThreadPool::new(1, &[]).unwrap());
        let full = load("full", workspace.pool());
        for (prompt, response) in [(vec![], vec![1]), (vec![1], vec![]), (vec![1], vec![100_000])] {
            let examples = [Example { prompt: vec![1], response: vec![2] }, Example { prompt, response }];
            assert!(score(&full, &[Arm::Full], KvFormats::default(), &mut workspace, &examples, |_| ()).is_err());
        }
    }
}
