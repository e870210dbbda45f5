//! What one engine's forward passes compute with: threads, and buffers that are kept from step to step.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use overfill_kernels::{Activations, AttentionScratch, ThreadPool};

use crate::profile::Profile;
use crate::rope::Turns;
use crate::sample::{Sampled, Sampler, logprob};

/// What becomes of one row of logits.
pub enum Row<'s> {
    /// The sequence's next token is chosen, for this position.
    Choose(&'s mut Sampler, usize),
    /// The next token is known: it and so many most likely ones are reported with their log-probabilities.
    Known(u32, usize),
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
    /// `[wanted, vocab]`
    pub(crate) logits: Vec<f32>,
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
    /// where that panicked.
    ///
    /// # Panics
    /// Where there are not.
    pub fn tokens<'s>(&mut self, rows: impl IntoIterator<Item = Row<'s>>) -> Vec<Option<Sampled>> {
        let rows: Vec<_> = rows.into_iter().collect();
        assert!(!rows.is_empty() && self.logits.len().is_multiple_of(rows.len()), "each row of logits has its use");
        let vocabulary = self.logits.len() / rows.len();
        let rows: Vec<_> =
            self.logits.chunks_exact_mut(vocabulary).zip(rows).map(|(logits, row)| Mutex::new((logits, row, None))).collect();
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
        rows.into_iter().map(|row| row.into_inner().ok().and_then(|row| row.2)).collect()
    }
}
