//! What the full model has to say about an example: its keys and values, and its distribution at every response token.
//!
//! **Invariant:** keys and values are what a decode node would hold after a handoff: computed by the engine that serves,
//! rounded as its caches and the wire round, transformed. So the loss here is the loss when the pair is served.

use overfill_compress::Example;
use overfill_compress::vector::{exp, sum, vectorised};
use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama, Passage, Transform, Workspace};
use overfill_types::{KvFormats, KvGeometry};
use rayon::prelude::*;

use crate::error::TrainError;
use crate::net::{Context, KvRows};

/// Token positions in a block of the caches.
const BLOCK_TOKENS: usize = 16;
/// Prompt tokens in one forward pass.
const PASS_TOKENS: usize = 512;
/// Response tokens whose logits are held at once: 50 MB for a vocabulary of 49,152.
const LOGIT_ROWS: usize = 256;

/// What the full model says about one example.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lesson {
    /// Keys and values of the first tokens, as the decode model's layers get them.
    pub context: Context,
    /// For each response token the most likely tokens in its place, most likely first: `[response, top]`.
    pub ids: Vec<u32>,
    /// Logarithms of their probabilities, `[response, top]`.
    pub log_probs: Vec<f32>,
    /// The last hidden state that each response token is predicted from, divided by its root mean square: `[response, hidden]`;
    /// empty where it was not asked.
    pub states: Vec<f32>,
}

/// What is asked about an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// Of how many tokens, from the first on, keys and values are wanted.
    pub kept: usize,
    /// How many of the most likely tokens are wanted at each response token.
    pub top: usize,
    /// Whether hidden states are wanted there too; only with a `top`.
    pub states: bool,
}

/// How keys and values become the decode model's.
pub enum Carry {
    /// As a handoff carries them, into a cache of this geometry.
    Handoff(Transform, KvGeometry),
    /// As they are, from these layers: a trainable projection maps them.
    Raw(Vec<usize>),
}

/// The full model, and how its keys and values go over.
pub struct FullModel {
    /// The model itself.
    pub model: Llama,
    /// The way.
    pub carry: Carry,
    /// Formats of caches and wire.
    pub formats: KvFormats,
    /// Its threads and buffers.
    pub workspace: Workspace,
}

impl FullModel {
    /// Values of one key row that [`FullModel::read`] gives, and how many layers.
    pub fn rows(&self) -> (usize, usize) {
        match &self.carry {
            Carry::Handoff(_, geometry) => (geometry.row(), geometry.layers),
            Carry::Raw(layers) => (self.model.config().kv.row(), layers.len()),
        }
    }

    /// Reads an example. Where no likely tokens are wanted the response is read only as far as keys and values are.
    ///
    /// # Errors
    /// [`TrainError::Model`] where a token id is out of the vocabulary, or the example out of the context.
    pub fn read(&mut self, example: &Example, question: Question) -> Result<Lesson, TrainError> {
        let Question { kept, top, states } = question;
        let hidden = self.model.config().hidden_size;
        let tokens: Vec<u32> = example.prompt.iter().chain(&example.response).copied().collect();
        // The last token of the response is never read: nothing comes after it.
        let end = if top > 0 { (tokens.len() - 1).max(kept) } else { kept };
        let blocks: Vec<BlockId> = (0..end.div_ceil(BLOCK_TOKENS) as u32).map(BlockId).collect();
        let new = |geometry| KvCache::new(geometry, self.formats.cache, blocks.len(), BLOCK_TOKENS, self.model.device());
        let mut cache = new(self.model.config().kv)?;
        let mut lesson = Lesson::default();
        // The prompt's last token is read with the response: what comes after it is the response's first.
        let prompt = if top > 0 { example.prompt.len() - 1 } else { end };
        for start in (0..prompt).step_by(PASS_TOKENS) {
            let tokens = &tokens[start..(start + PASS_TOKENS).min(prompt)];
            let chunk = Chunk { tokens, start, blocks: &blocks, logits: false };
            self.model.forward(&[chunk], &mut cache, &mut self.workspace, &mut |_, _, _| Ok(()))?;
        }
        for start in (prompt..end).step_by(LOGIT_ROWS) {
            let tokens = &tokens[start..(start + LOGIT_ROWS).min(end)];
            let chunk = Chunk { tokens, start, blocks: &blocks, logits: true };
            let logits = self.model.forward_each(&[chunk], &mut cache, &mut self.workspace)?.read()?;
            for (ids, log_probs) in most_likely(logits, tokens.len(), top) {
                lesson.ids.extend(ids);
                lesson.log_probs.extend(log_probs);
            }
            if states {
                let rows = self.workspace.states(tokens.len(), hidden).chunks_exact(hidden);
                lesson.states.extend(rows.flat_map(|row| {
                    let size = (row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / hidden as f64).sqrt() as f32;
                    row.iter().map(move |x| x / size)
                }));
            }
        }
        lesson.context = self.context(&cache, &blocks, kept)?;
        Ok(lesson)
    }

    /// The first `kept` tokens' keys and values on their way to the decode model.
    fn context(&self, cache: &KvCache, blocks: &[BlockId], kept: usize) -> Result<Context, TrainError> {
        let mut layers = Vec::new();
        let mut read = |from: &KvCache, layer: usize| -> Result<(), TrainError> {
            let mut rows = KvRows::default();
            from.read(layer, blocks, 0, kept, &mut rows.k, &mut rows.v)?;
            layers.push(rows);
            Ok(())
        };
        match &self.carry {
            Carry::Raw(sources) => sources.iter().try_for_each(|&layer| read(cache, layer))?,
            Carry::Handoff(transform, geometry) => {
                let mut to = KvCache::new(*geometry, self.formats.cache, blocks.len(), BLOCK_TOKENS, self.model.device())?;
                for layer in 0..self.model.config().kv.layers {
                    let passage = Passage { format: self.formats.wire, blocks, start: 0, count: kept };
                    transform.carry(self.workspace.pool(), layer, passage, cache, &mut to)?;
                }
                (0..geometry.layers).try_for_each(|layer| read(&to, layer))?;
            }
        }
        Ok(Context { tokens: kept, layers })
    }
}

/// The `top` most likely tokens of each of `rows` rows of logits, and the logarithms of their probabilities.
fn most_likely(logits: &[f32], rows: usize, top: usize) -> Vec<(Vec<u32>, Vec<f32>)> {
    let vocab = logits.len() / rows;
    let top = top.min(vocab);
    let rows = logits.par_chunks_exact(vocab).map(|row| {
        let mut known: Vec<(f32, u32)> = Vec::with_capacity(8 * top);
        let better = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        let mut least = f32::NEG_INFINITY;
        for (id, &logit) in row.iter().enumerate() {
            if logit > least || known.len() < top {
                known.push((logit, id as u32));
                if known.len() == 8 * top {
                    known.select_nth_unstable_by(top - 1, better);
                    known.truncate(top);
                    least = known[top - 1].0;
                }
            }
        }
        known.sort_unstable_by(better);
        known.truncate(top);
        let most = known[0].0;
        let total = vectorised(|| sum(row.len(), |i| exp(row[i] - most)));
        let log_total = total.ln() as f32 + most;
        known.into_iter().map(|(logit, id)| (id, logit - log_total)).unzip()
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_likely_tokens_are_found_with_their_probabilities() {
        let (vocab, rows) = (1000, 3);
        let logits: Vec<f32> = (0..rows * vocab).map(|i| ((i * 7919) % 1009) as f32 * 0.01).collect();
        for (row, (ids, log_probs)) in logits.chunks_exact(vocab).zip(most_likely(&logits, rows, 5)) {
            let mut order: Vec<usize> = (0..vocab).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            for ((id, log_prob), want) in ids.iter().zip(log_probs).zip(order) {
                assert_eq!(row[*id as usize], row[want]);
                assert!((f64::from(log_prob) - (f64::from(row[want]) - total.ln())).abs() < 1e-5);
            }
        }
    }
}
