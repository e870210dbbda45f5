//! Keys and values as integers from -127 to 127 with a scale for each head of each token: what a number is, is its code times the scale.
//! These are the wire's codes and scales too, so rows come and go without being rounded again.
//!
//! Codes lie in tiles of 16 tokens: keys, plus 128, as [`Simd::dot_i8`](crate::simd::Simd::dot_i8) reads them,
//! `[head_dim / 4][16 tokens][4]`; values as [`Simd::dot_weights`](crate::simd::Simd::dot_weights) does,
//! `[head_dim / 16][4][16 numbers][4 tokens]`.

use crate::activations::greatest_magnitude;
use crate::disjoint::Disjoint;
use crate::kv::{KvShape, Piece, Run, SourceRows, untouched};
use crate::simd::{Simd, dispatch};
use crate::thread_pool::ThreadPool;

/// Tokens of a tile.
pub(crate) const TILE: usize = 16;

/// One layer's keys and values.
pub(crate) struct Int8 {
    /// `[blocks, kv_heads, block_tokens / 16]` tiles of keys.
    pub(crate) k: Vec<u8>,
    /// Likewise of values.
    pub(crate) v: Vec<u8>,
    /// `[blocks, kv_heads, 2, block_tokens]`: of keys, then of values.
    pub(crate) scales: Vec<f32>,
}

/// Which of a token's two rows.
#[derive(Clone, Copy)]
enum Which {
    Keys,
    Values,
}

impl Which {
    /// What a code of 0 is stored as.
    fn zero(self) -> u8 {
        match self {
            Self::Keys => 0x80,
            Self::Values => 0,
        }
    }
}

impl KvShape {
    /// Bytes of a tile of keys: heads are widened to whole groups of 32.
    pub(crate) fn k_tile(self) -> usize {
        self.head_dim.next_multiple_of(32) * TILE
    }

    /// Bytes of a tile of values.
    pub(crate) fn v_tile(self) -> usize {
        self.padded() * TILE
    }

    /// The first tile of a KV head in a block.
    #[inline(always)]
    pub(crate) fn tile_at(self, block: usize, kv_head: usize) -> usize {
        (block * self.kv_heads + kv_head) * (self.block_tokens / TILE)
    }

    /// The first scale of a KV head's keys in a block.
    #[inline(always)]
    pub(crate) fn k_scales_at(self, block: usize, kv_head: usize) -> usize {
        (block * self.kv_heads + kv_head) * 2 * self.block_tokens
    }

    /// The first scale of a KV head's values in a block.
    #[inline(always)]
    pub(crate) fn v_scales_at(self, block: usize, kv_head: usize) -> usize {
        self.k_scales_at(block, kv_head) + self.block_tokens
    }

    /// Bytes of one token: codes and scales of both.
    pub(crate) fn int8_token(self) -> usize {
        self.kv_heads * ((self.k_tile() + self.v_tile()) / TILE + 2 * size_of::<f32>())
    }

    fn codes(self, which: Which) -> usize {
        match which {
            Which::Keys => self.k_tile(),
            Which::Values => self.v_tile(),
        }
    }

    /// Where the code of number `i` of a head lies, from its block's first tile on.
    #[inline(always)]
    fn code_at(self, which: Which, head: usize, slot: usize, i: usize) -> usize {
        let (tile, slot) = (self.tile_at(0, head) + slot / TILE, slot % TILE);
        tile * self.codes(which)
            + match which {
                Which::Keys => i / 4 * 64 + slot * 4 + i % 4,
                Which::Values => i / 16 * 256 + slot / 4 * 64 + i % 16 * 4 + slot % 4,
            }
    }

    /// Where a head's scale lies, from its block's first on.
    #[inline(always)]
    fn scale_at(self, which: Which, head: usize, slot: usize) -> usize {
        slot + match which {
            Which::Keys => self.k_scales_at(0, head),
            Which::Values => self.v_scales_at(0, head),
        }
    }
}

/// The parts of a block that one task writes.
struct Block<'a> {
    k: &'a mut [u8],
    v: &'a mut [u8],
    scales: &'a mut [f32],
}

impl Block<'_> {
    /// Stores the codes of one head of one token, as signed bytes.
    fn set(&mut self, shape: KvShape, which: Which, (head, slot): (usize, usize), scale: f32, codes: &[u8]) {
        let at = shape.code_at(which, head, slot, 0);
        match which {
            Which::Keys => {
                for (to, codes) in self.k[at..].chunks_mut(64).zip(codes.chunks(4)) {
                    to.iter_mut().zip(codes).for_each(|(to, code)| *to = code ^ which.zero());
                }
            }
            Which::Values => {
                for (to, codes) in self.v[at..].chunks_mut(256).zip(codes.chunks(16)) {
                    to.iter_mut().step_by(4).zip(codes).for_each(|(to, code)| *to = code ^ which.zero());
                }
            }
        }
        self.scales[shape.scale_at(which, head, slot)] = scale;
    }
}

/// Rounds a head as the wire does; gives its scale.
#[inline(always)]
fn round_head<S: Simd>(s: S, numbers: &[f32], codes: &mut [u8]) -> f32 {
    let scale = greatest_magnitude(s, numbers) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (code, x) in codes.iter_mut().zip(numbers) {
        *code = ((x * inverse).round_ties_even() as i8).cast_unsigned();
    }
    scale
}

impl Int8 {
    pub(super) fn new(shape: KvShape) -> Self {
        let tiles = shape.tile_at(shape.blocks, 0);
        let scales = shape.k_scales_at(shape.blocks, 0);
        let (k, v) = (vec![0; tiles * shape.k_tile()], vec![0; tiles * shape.v_tile()]);
        Self { k: untouched(k), v: untouched(v), scales: untouched(vec![0.0; scales]) }
    }

    pub(super) fn claim(&mut self, pool: &ThreadPool) {
        super::claim(pool, &mut self.k);
        super::claim(pool, &mut self.v);
        super::claim(pool, &mut self.scales);
    }

    /// Calls `write` for each piece, with the block that it goes to.
    fn each(&mut self, pool: &ThreadPool, shape: KvShape, pieces: &[Piece], write: impl Fn(&mut Block<'_>, &Piece) + Sync) {
        let (k, v, scales) = (Disjoint::new(&mut self.k), Disjoint::new(&mut self.v), Disjoint::new(&mut self.scales));
        pool.rows(pieces.len(), shape.row() * 4, |i| {
            let piece = &pieces[i];
            let part = |each: usize| (shape.tile_at(piece.block, 0) * each, shape.tile_at(1, 0) * each);
            let ((k_at, k_len), (v_at, v_len)) = (part(shape.k_tile()), part(shape.v_tile()));
            // SAFETY: no two pieces are of one block.
            let mut block = unsafe {
                Block {
                    k: k.part(k_at, k_len),
                    v: v.part(v_at, v_len),
                    scales: scales.part(shape.k_scales_at(piece.block, 0), shape.k_scales_at(1, 0)),
                }
            };
            write(&mut block, piece);
        });
    }

    /// Rounds rows, each head of each token by itself, as the wire does.
    pub(super) fn write(&mut self, pool: &ThreadPool, shape: KvShape, pieces: &[Piece], from: SourceRows<'_, f32>) {
        let head_dim = shape.head_dim;
        self.each(pool, shape, pieces, |block, piece| {
            let mut codes = vec![0; head_dim];
            for (t, head) in (0..piece.count).flat_map(|t| (0..shape.kv_heads).map(move |head| (t, head))) {
                let at = (piece.row + t) * from.stride + head * head_dim;
                for (which, rows) in [(Which::Keys, from.k), (Which::Values, from.v)] {
                    let scale = dispatch!(round_head(&rows[at..at + head_dim], &mut codes));
                    block.set(shape, which, (head, piece.offset + t), scale, &codes);
                }
            }
        });
    }

    /// Stores rows as the wire has them: scales `[tokens, kv_heads]`, then codes `[tokens, kv_heads, head_dim]`.
    pub(super) fn write_bytes(&mut self, pool: &ThreadPool, shape: KvShape, pieces: &[Piece], tokens: usize, k: &[u8], v: &[u8]) {
        let KvShape { kv_heads, head_dim, .. } = shape;
        let both = [k, v].map(|bytes| bytes.split_at(tokens * kv_heads * size_of::<f32>()));
        self.each(pool, shape, pieces, |block, piece| {
            for (t, head) in (0..piece.count).flat_map(|t| (0..kv_heads).map(move |head| (t, head))) {
                let row = (piece.row + t) * kv_heads + head;
                for (which, (scales, codes)) in [Which::Keys, Which::Values].into_iter().zip(both) {
                    let scale = f32::from_le_bytes(scales.as_chunks().0[row]);
                    block.set(shape, which, (head, piece.offset + t), scale, &codes[row * head_dim..][..head_dim]);
                }
            }
        });
    }

    pub(super) fn read(&self, shape: KvShape, run: Run<'_>, to_k: &mut [f32], to_v: &mut [f32]) {
        self.rows(shape, run, |which, row, scale, codes| {
            let to = if matches!(which, Which::Keys) { &mut *to_k } else { &mut *to_v };
            let to = &mut to[row * shape.head_dim..][..shape.head_dim];
            to.iter_mut().zip(codes).for_each(|(to, code)| *to = f32::from(code) * scale);
        });
    }

    /// Rows as [`Self::write_bytes`] takes them.
    pub(super) fn copy(&self, shape: KvShape, run: Run<'_>, k: &mut [u8], v: &mut [u8]) {
        let scales = run.tokens * shape.kv_heads * size_of::<f32>();
        let [mut to_k, mut to_v] = [k, v].map(|bytes| bytes.split_at_mut(scales));
        self.rows(shape, run, |which, row, scale, codes| {
            let (scales, to) = if matches!(which, Which::Keys) { &mut to_k } else { &mut to_v };
            scales.as_chunks_mut().0[row] = scale.to_le_bytes();
            let to = &mut to[row * shape.head_dim..][..shape.head_dim];
            to.iter_mut().zip(codes).for_each(|(to, code)| *to = code.cast_unsigned());
        });
    }

    /// Calls `row` for each head of each token: which of both, its place among `[tokens, kv_heads]`, its scale, its codes.
    fn rows(&self, shape: KvShape, run: Run<'_>, mut row: impl FnMut(Which, usize, f32, &mut dyn Iterator<Item = i8>)) {
        for (block, offset, count, first) in run.pieces(shape.block_tokens) {
            for (t, head) in (0..count).flat_map(|t| (0..shape.kv_heads).map(move |head| (t, head))) {
                for (which, from) in [(Which::Keys, &self.k), (Which::Values, &self.v)] {
                    let from = &from[shape.tile_at(block, 0) * shape.codes(which)..];
                    let code = |i| (from[shape.code_at(which, head, offset + t, i)] ^ which.zero()).cast_signed();
                    let scale = self.scales[shape.k_scales_at(block, 0) + shape.scale_at(which, head, offset + t)];
                    row(which, (first + t) * shape.kv_heads + head, scale, &mut (0..shape.head_dim).map(code));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{KvFormat, KvLayer};

    #[test]
    fn rows_are_what_their_codes_say_and_travel_unchanged() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        for (head_dim, block_tokens) in [(6, 16), (64, 32), (40, 16)] {
            let shape = KvShape { kv_heads: 2, head_dim, block_tokens, blocks: 5 };
            let (row, tokens) = (shape.row(), 30);
            let numbers = |seed: usize| -> Vec<f32> {
                (0..tokens * row).map(|i| ((i + seed) * 7919 % 2003) as f32 / 900.0 - 1.0).map(|x| x * x * x).collect()
            };
            let (k, v) = (numbers(0), numbers(5));
            let run = Run { blocks: &[3, 0, 2], start: 7, tokens };
            let mut layer = KvLayer::new(shape, KvFormat::Int8);
            layer.write(&pool, &[run], &k, &v, row);
            let (mut read_k, mut read_v) = (vec![0.0; k.len()], vec![0.0; v.len()]);
            layer.read(run, &mut read_k, &mut read_v);
            for (read, written) in [(&read_k, &k), (&read_v, &v)] {
                for (read, written) in read.chunks(head_dim).zip(written.chunks(head_dim)) {
                    let greatest = written.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                    assert!(read.iter().zip(written).all(|(a, b)| (a - b).abs() <= greatest * 0.501 / 127.0));
                }
            }
            // To another place, and back.
            let bytes = tokens * shape.kv_heads * (4 + head_dim);
            let [mut k, mut v, mut k_again, mut v_again] = std::array::from_fn(|_| vec![0; bytes]);
            layer.copy(&pool, run, &mut k, &mut v);
            let (mut other, there) = (KvLayer::new(shape, KvFormat::Int8), Run { blocks: &[4, 1], start: 1, ..run });
            other.write_bytes(&pool, there, &k, &v);
            other.copy(&pool, there, &mut k_again, &mut v_again);
            assert!(k == k_again && v == v_again);
            let (mut there_k, mut there_v) = (vec![0.0; read_k.len()], vec![0.0; read_v.len()]);
            other.read(there, &mut there_k, &mut there_v);
            assert!(there_k == read_k && there_v == read_v);
        }
    }
}
