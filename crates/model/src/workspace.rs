//! What one engine's forward passes compute with: threads, and buffers that are kept from step to step.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use candle_core::Tensor;
use overfill_kernels::{Activations, AttentionScratch, ThreadPool};

use crate::error::ModelError;
use crate::gpu::choice;
use crate::profile::Profile;
use crate::rope::Turns;
use crate::sample::{Plain, Sampled, Sampler, logprob};

/// What becomes of one row of logits.
pub enum Row<'s> {
    /// The sequence's next token is chosen, for this position.
    Choose(&'s mut Sampler, usize),
    /// The next token is known: it and so many most likely ones are reported with their log-probabilities.
    Known(u32, usize),
}

/// The logits of a forward pass, where they were computed.
pub struct Logits<'w> {
    pub(crate) workspace: &'w mut Workspace,
}

impl<'w> Logits<'w> {
    /// Brings them to main memory, `[wanted, vocab]`.
    ///
    /// # Errors
    /// Where a GPU fails.
    pub fn read(self) -> Result<&'w mut [f32], ModelError> {
        if let Some(unread) = self.workspace.unread.take() {
            self.workspace.logits = unread.flatten_all()?.to_vec1()?;
        }
        Ok(&mut self.workspace.logits)
    }
}

/// Threads and buffers of one engine. Buffers grow to the largest step and stay, so a decode step allocates next to nothing.
pub struct Workspace {
    pub(crate) pool: ThreadPool,
    /// Where time goes, if asked for.
    pub profile: Profile,
    /// The residual stream, `[tokens, hidden]`.
    pub(crate) x: Vec<f32>,
    /// What goes into a product.
    pub(crate) input: Activations,
    /// Queries, keys and values, `[tokens, q + 2 kv]`.
    pub(crate) qkv: Vec<f32>,
    /// `[tokens, heads * head_dim]`
    pub(crate) attended: Vec<f32>,
    /// `[tokens, 2 * mlp]`
    pub(crate) gate_up: Vec<f32>,
    /// What attention or MLP adds to the residual stream, `[tokens, hidden]`, where it is not added as it comes.
    pub(crate) added: Vec<f32>,
    pub(crate) turns: Turns,
    /// `[wanted, vocab]`; empty where they are [`Self::unread`].
    pub(crate) logits: Vec<f32>,
    /// The same, where another device than the CPU computed them.
    pub(crate) unread: Option<Tensor>,
    pub(crate) attention: AttentionScratch,
}

impl Workspace {
    /// With these threads. Forward passes run on the calling thread and the pool's.
    pub fn new(pool: ThreadPool) -> Self {
        Self {
            pool,
            profile: Profile::default(),
            x: Vec::new(),
            input: Activations::new(),
            qkv: Vec::new(),
            attended: Vec::new(),
            gate_up: Vec::new(),
            added: Vec::new(),
            turns: Turns::default(),
            logits: Vec::new(),
            unread: None,
            attention: AttentionScratch::default(),
        }
    }

    /// Its threads.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// The residual stream after the last layer, before the last norm, of the first `rows` tokens that the last forward pass gave
    /// logits of: `[rows, hidden]`. Of a model on the CPU only.
    ///
    /// # Panics
    /// Where it gave fewer.
    pub fn states(&self, rows: usize, hidden: usize) -> &[f32] {
        &self.x[..rows * hidden]
    }

    /// Chooses a token from each row of the last forward pass's logits, in parallel. Each sampler comes with its
    /// sequence's next position; there are as many as rows. `None` where the choice panicked, which is that sequence's affair.
    ///
    /// # Panics
    /// Where there are not as many samplers as rows of logits.
    pub fn sample<'s>(&mut self, samplers: impl IntoIterator<Item = (&'s mut Sampler, usize)>) -> Vec<Option<Sampled>> {
        self.tokens(samplers.into_iter().map(|(sampler, position)| Row::Choose(sampler, position)))
    }

    /// The token of each row of the last forward pass's logits, chosen or known, in parallel. There are as many as rows. `None`
    /// where that panicked, or a GPU failed.
    ///
    /// # Panics
    /// Where there are not.
    pub fn tokens<'s>(&mut self, rows: impl IntoIterator<Item = Row<'s>>) -> Vec<Option<Sampled>> {
        let mut rows: Vec<_> = rows.into_iter().map(Some).collect();
        let mut tokens: Vec<Option<Sampled>> = vec![None; rows.len()];
        if let Some(logits) = self.unread.take() {
            let read = choose_there(&logits, &mut rows, &mut tokens).and_then(|()| rows_of(&logits, &rows));
            match read {
                Ok(read) => self.logits = read,
                Err(error) => {
                    tracing::error!(%error, "no token can be chosen of what a GPU has computed");
                    return tokens;
                }
            }
        }
        let left: Vec<usize> = (0..rows.len()).filter(|i| rows[*i].is_some()).collect();
        if left.is_empty() {
            return tokens;
        }
        assert!(self.logits.len().is_multiple_of(left.len()), "each row of logits has its use");
        let vocabulary = self.logits.len() / left.len();
        let rows: Vec<_> = self
            .logits
            .chunks_exact_mut(vocabulary)
            .zip(rows.into_iter().flatten())
            .map(|(logits, row)| Mutex::new((logits, row, None)))
            .collect();
        self.pool.run(rows.len(), |i| {
            // Each row is locked once, by the thread that has it.
            if let Ok(mut locked) = rows[i].lock() {
                let (logits, row, sampled) = &mut *locked;
                let choice = AssertUnwindSafe(|| match row {
                    Row::Choose(sampler, position) => sampler.sample(logits, *position),
                    Row::Known(token, most) => Sampled { token: *token, logprob: Some(logprob(logits, *token, *most)) },
                });
                *sampled = catch_unwind(choice).ok();
            }
        });
        for (row, at) in rows.into_iter().zip(left) {
            tokens[at] = row.into_inner().ok().and_then(|row| row.2);
        }
        tokens
    }
}

/// Takes those rows of which a GPU can choose the token, and has it do so.
fn choose_there(logits: &Tensor, rows: &mut [Option<Row<'_>>], tokens: &mut [Option<Sampled>]) -> Result<(), ModelError> {
    let plain = rows.iter().enumerate().filter_map(|(i, row)| match row {
        Some(Row::Choose(sampler, position)) => Some((i, sampler.plain(*position)?)),
        _ => None,
    });
    let plain: Vec<(usize, Plain)> = plain.collect();
    if plain.is_empty() {
        return Ok(());
    }
    let Some(chosen) = choice::choose(logits, &plain)? else { return Ok(()) };
    for ((i, _), token) in plain.into_iter().zip(chosen) {
        if let Some(Row::Choose(sampler, _)) = rows[i].take() {
            sampler.observe(token);
            tokens[i] = Some(Sampled { token, logprob: None });
        }
    }
    Ok(())
}

/// The logits of those rows that are left, in main memory.
fn rows_of(logits: &Tensor, rows: &[Option<Row<'_>>]) -> Result<Vec<f32>, ModelError> {
    let left: Vec<u32> = (0..).zip(rows).filter(|(_, row)| row.is_some()).map(|(i, _)| i).collect();
    if left.is_empty() {
        return Ok(Vec::new());
    }
    let index = Tensor::from_slice(&left, left.len(), logits.device())?;
    Ok(logits.index_select(&index, 0)?.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use overfill_kernels::ThreadPool;
    use overfill_types::SamplingParams;

    use super::*;

    /// Logits of another device: those of the rows that are looked at come to main memory, in their order.
    #[test]
    fn tokens_are_of_their_rows_wherever_logits_lie() {
        let logits = [[0.0, 3.0, 1.0], [5.0, 3.0, 1.0], [0.0, 1.0, 2.0]];
        let mut workspace = Workspace::new(ThreadPool::new(1, &[]).unwrap());
        let mut first = Sampler::new(SamplingParams::greedy(), &[]);
        let mut last = Sampler::new(SamplingParams { logprobs: Some(1), ..SamplingParams::greedy() }, &[]);
        let mut tokens =
            |workspace: &mut Workspace| workspace.tokens([Row::Choose(&mut first, 1), Row::Known(1, 0), Row::Choose(&mut last, 1)]);
        workspace.logits = logits.concat();
        let here = tokens(&mut workspace);
        let chosen: Vec<u32> = here.iter().flatten().map(|sampled| sampled.token).collect();
        assert_eq!(chosen, [1, 1, 2]);
        workspace.unread = Some(Tensor::new(&logits, &Device::Cpu).unwrap());
        workspace.logits.clear();
        assert_eq!(tokens(&mut workspace), here);
        assert!(workspace.unread.is_none());
        let too_few = Some(Tensor::new(&[logits[0], logits[1]], &Device::Cpu).unwrap());
        workspace.unread = too_few;
        assert_eq!(tokens(&mut workspace), [None, None, None], "what a device cannot give is nobody's token");
    }
}
