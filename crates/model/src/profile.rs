//! Where a forward pass spends its time.

use std::time::{Duration, Instant};

/// Parts of a forward pass that are timed on their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Looking up the tokens' rows.
    Embedding,
    /// Both normalisations of each layer and the last one, with the rounding of their results.
    Norm,
    /// The product with the query, key and value weights.
    Qkv,
    /// The rotary embedding, and storing keys and values.
    Append,
    /// What the caller does with a layer's keys and values.
    OnLayer,
    /// Attention over the cache.
    Attention,
    /// The product with the output weights, with the rounding of what goes in.
    Output,
    /// The product with the gate and up weights.
    GateUp,
    /// The gated activation, with the rounding of its result.
    Gate,
    /// The product with the down weights.
    Down,
    /// The product with the head.
    Head,
}

impl Part {
    /// All parts, in the order of a pass.
    pub const ALL: [Self; 11] = [
        Self::Embedding,
        Self::Norm,
        Self::Qkv,
        Self::Append,
        Self::OnLayer,
        Self::Attention,
        Self::Output,
        Self::GateUp,
        Self::Gate,
        Self::Down,
        Self::Head,
    ];
}

/// What one part took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Of the engine's thread.
    pub time: Duration,
    /// Bytes of weights and KV cache that had to be read.
    pub bytes: usize,
    /// Floating-point operations, a multiply-add being two.
    pub operations: usize,
}

/// Times of parts, summed over forward passes; off until [`Profile::begin`].
#[derive(Default)]
pub struct Profile {
    on: bool,
    costs: [Cost; Part::ALL.len()],
}

impl Profile {
    /// Forgets what was measured and measures from now on.
    pub fn begin(&mut self) {
        *self = Self { on: true, ..Self::default() };
    }

    /// What each part took since [`Profile::begin`].
    pub fn costs(&self) -> impl Iterator<Item = (Part, Cost)> {
        Part::ALL.into_iter().zip(self.costs)
    }

    /// When a part begins.
    pub(crate) fn start(&self) -> Option<Instant> {
        self.on.then(Instant::now)
    }

    /// When it ends.
    pub(crate) fn stop(&mut self, part: Part, started: Option<Instant>, bytes: usize, operations: usize) {
        if let Some(started) = started {
            let cost = &mut self.costs[part as usize];
            cost.time += started.elapsed();
            cost.bytes += bytes;
            cost.operations += operations;
        }
    }
}
