//! What a forward pass reads: sequences, packed as rows of one matrix.

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
    /// `[rows, head_dim / 2]`
    pub(super) cos: Vec<f32>,
    /// `[rows, head_dim / 2]`
    pub(super) sin: Vec<f32>,
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
    /// Lays `sequences` one after the other.
    pub fn new(sequences: &[Sequence<'_>], frequencies: &Frequencies) -> Self {
        let mut packed = Self::default();
        for sequence in sequences {
            let context = sequence.context.map_or(0, |c| c.tokens);
            packed.spans.push(Span { first: packed.rows, tokens: sequence.tokens.len(), context });
            packed.rows += sequence.tokens.len();
        }
        let positions = packed.spans.iter().flat_map(|s| s.context..s.context + s.tokens);
        frequencies.at_positions(positions, &mut packed.cos, &mut packed.sin);
        packed
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
