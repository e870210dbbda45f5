//! What one engine's forward passes compute with: threads, and buffers that are kept from step to step.

use std::sync::Mutex;

use overfill_kernels::{Activations, AttentionScratch, Pool};

use crate::profile::Profile;
use crate::sample::{Sampled, Sampler};

/// Threads and buffers of one engine. Buffers grow to the largest step and stay, so a decode step allocates next to nothing.
pub struct Workspace {
    pub(crate) pool: Pool,
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
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    /// `[wanted, vocab]`
    pub(crate) logits: Vec<f32>,
    pub(crate) attention: AttentionScratch,
}

impl Workspace {
    /// With these threads. Forward passes run on the calling thread and the pool's.
    pub fn new(pool: Pool) -> Self {
        Self {
            pool,
            profile: Profile::default(),
            x: Vec::new(),
            input: Activations::new(),
            qkv: Vec::new(),
            attended: Vec::new(),
            gate_up: Vec::new(),
            cos: Vec::new(),
            sin: Vec::new(),
            logits: Vec::new(),
            attention: AttentionScratch::default(),
        }
    }

    /// Its threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Chooses a token from each row of the last forward pass's logits, in parallel. Each sampler comes with its
    /// sequence's next position; there are as many as rows.
    ///
    /// # Panics
    /// Where there are not as many samplers as rows of logits.
    pub fn sample<'s>(&mut self, samplers: impl IntoIterator<Item = (&'s mut Sampler, usize)>) -> Vec<Sampled> {
        let samplers: Vec<_> = samplers.into_iter().collect();
        assert!(!samplers.is_empty() && self.logits.len().is_multiple_of(samplers.len()), "a sampler for each row of logits");
        let vocabulary = self.logits.len() / samplers.len();
        let rows: Vec<_> = self
            .logits
            .chunks_exact_mut(vocabulary)
            .zip(samplers)
            .map(|(logits, (sampler, position))| Mutex::new((logits, sampler, position, None)))
            .collect();
        self.pool.run(rows.len(), |i| {
            // Each row is locked once, by the thread that has it.
            if let Ok(mut row) = rows[i].lock() {
                let (logits, sampler, position, sampled) = &mut *row;
                *sampled = Some(sampler.sample(logits, *position));
            }
        });
        // A row without a token panicked, and the run with it.
        rows.into_iter().filter_map(|row| row.into_inner().ok().and_then(|row| row.3)).collect()
    }
}
