//! What a forward pass reads: sequences, packed as rows of one matrix.

use overfill_model::config::Rotation;
use overfill_model::rope::Frequencies;

/// One layer's keys (after the rotary embedding) and values of a run of tokens, each `[tokens, kv_heads * head_dim]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KvRows {
    /// Keys.
    pub k: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
}

/// Keys and values of tokens before a sequence's own, read by another model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Context {
    /// How many tokens.
    pub tokens: usize,
    /// Layer by layer.
    pub layers: Vec<KvRows>,
}

impl Context {
    /// Keeps the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        for rows in self.layers.iter_mut().flat_map(|l| [&mut l.k, &mut l.v]) {
            rows.truncate(rows.len() / self.tokens.max(1) * tokens);
        }
        self.tokens = self.tokens.min(tokens);
    }
}

/// A run of tokens that the network reads itself, after a context or from position 0.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// What comes before.
    pub context: Option<&'a Context>,
    /// Token ids; not empty.
    pub tokens: &'a [u32],
}

/// Where sequences lie among the rows, and their rotary embedding.
#[derive(Clone, Debug, Default)]
pub struct Packed {
    pub(super) spans: Vec<Span>,
    pub(super) rows: usize,
    /// Cosines and sines, each `[rows, turned / 2]`.
    global: (Vec<f32>, Vec<f32>),
    /// Likewise, of layers that turn otherwise.
    local: (Vec<f32>, Vec<f32>),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// First row.
    pub(super) first: usize,
    /// Rows.
    pub(super) tokens: usize,
    /// Tokens of its context.
    pub(super) context: usize,
}

impl Packed {
    /// Lays `sequences` one after the other; `local` are the frequencies of layers that turn otherwise, if there are any.
    pub fn new(sequences: &[Sequence<'_>], global: &Frequencies, local: Option<&Frequencies>) -> Self {
        let mut packed = Self::default();
        for sequence in sequences {
            let context = sequence.context.map_or(0, |c| c.tokens);
            packed.spans.push(Span { first: packed.rows, tokens: sequence.tokens.len(), context });
            packed.rows += sequence.tokens.len();
        }
        let positions = || packed.spans.iter().flat_map(|s| s.context..s.context + s.tokens);
        global.at_positions(positions(), &mut packed.global.0, &mut packed.global.1);
        if let Some(local) = local {
            local.at_positions(positions(), &mut packed.local.0, &mut packed.local.1);
        }
        packed
    }

    /// Cosines and sines of a layer, each `[rows, turned / 2]`; `None` where nothing turns.
    pub(super) fn turn(&self, rotation: Rotation) -> Option<(&[f32], &[f32])> {
        let (cos, sin) = match rotation {
            Rotation::Global => &self.global,
            Rotation::Local => &self.local,
            Rotation::None => return None,
        };
        Some((cos, sin))
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// First row of each sequence.
    pub fn firsts(&self) -> impl Iterator<Item = usize> {
        self.spans.iter().map(|s| s.first)
    }
}
