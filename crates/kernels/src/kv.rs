//! One layer of the paged KV cache.
//!
//! A block holds its tokens' keys as `[kv_heads, head_dim, block_tokens]` and their values as
//! `[kv_heads, block_tokens, head_dim]` (padded to 16): attention then reads both with whole vectors, over tokens for the
//! scores and over the head for the sums, and never adds across a vector. Int8 has tiles of its own (`kv/int8.rs`).

pub(crate) mod int8;

use crate::disjoint::Disjoint;
use crate::huge_pages;
use crate::kv::int8::Int8;
use crate::number::{F16, Number};
use crate::thread_pool::ThreadPool;

/// Token positions in a block are a multiple of this.
pub const BLOCK_MULTIPLE: usize = 16;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// 32-bit floats.
    F32,
    /// Half precision.
    F16,
    /// Integers from -127 to 127, with a 32-bit scale for each head of each token.
    Int8,
}

/// Shape of one layer of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Values in a head.
    pub head_dim: usize,
    /// Token positions in a block: a multiple of [`BLOCK_MULTIPLE`].
    pub block_tokens: usize,
    /// Blocks.
    pub blocks: usize,
}

impl KvShape {
    /// Numbers in a row: one token's keys, or values.
    pub fn row(self) -> usize {
        self.kv_heads * self.head_dim
    }

    pub(crate) fn padded(self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    /// First key of a KV head in a block.
    #[inline(always)]
    pub(crate) fn k_at(self, block: usize, kv_head: usize) -> usize {
        (block * self.kv_heads + kv_head) * self.head_dim * self.block_tokens
    }

    /// First value of a KV head in a block.
    #[inline(always)]
    pub(crate) fn v_at(self, block: usize, kv_head: usize) -> usize {
        (block * self.kv_heads + kv_head) * self.padded() * self.block_tokens
    }
}

/// Keys (after the rotary embedding) and values of one layer, all sequences together.
pub struct KvLayer {
    shape: KvShape,
    pub(crate) stored: Stored,
}

pub(crate) enum Stored {
    F32(Both<f32>),
    F16(Both<F16>),
    Int8(Int8),
}

pub(crate) struct Both<T> {
    pub(crate) k: Vec<T>,
    pub(crate) v: Vec<T>,
}

/// Consecutive tokens of one sequence, and where they go.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Block numbers of the sequence's table; cover `start + tokens` positions at least.
    pub blocks: &'a [u32],
    /// Position of the first token.
    pub start: usize,
    /// How many there are.
    pub tokens: usize,
}

impl Run<'_> {
    /// Pieces that lie in one block each: its number, the first token's offset in it, tokens, and the first token's place in the run.
    fn pieces(self, block_tokens: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == self.tokens {
                return None;
            }
            let position = self.start + done;
            let offset = position % block_tokens;
            let count = (block_tokens - offset).min(self.tokens - done);
            let piece = (self.blocks[position / block_tokens] as usize, offset, count, done);
            done += count;
            Some(piece)
        })
    }
}

impl KvLayer {
    /// All zero. Memory is taken from the system as it is first written.
    ///
    /// # Panics
    /// Where `block_tokens` is not a multiple of [`BLOCK_MULTIPLE`].
    pub fn new(shape: KvShape, format: KvFormat) -> Self {
        assert!(shape.block_tokens > 0 && shape.block_tokens.is_multiple_of(BLOCK_MULTIPLE), "blocks of {}", shape.block_tokens);
        let (k, v) = (shape.k_at(shape.blocks, 0), shape.v_at(shape.blocks, 0));
        // Integers, since the allocator gives those zeroed without touching them.
        let stored = match format {
            KvFormat::F32 => Stored::F32(Both { k: untouched(vec![0.0; k]), v: untouched(vec![0.0; v]) }),
            KvFormat::F16 => Stored::F16(Both { k: untouched(zeros(k)), v: untouched(zeros(v)) }),
            KvFormat::Int8 => Stored::Int8(Int8::new(shape)),
        };
        Self { shape, stored }
    }

    /// Its shape.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Has the system give all of its memory now: the first write to each page costs microseconds, which a handoff would wait for.
    pub fn claim(&mut self, pool: &ThreadPool) {
        match &mut self.stored {
            Stored::F32(both) => both.claim(pool),
            Stored::F16(both) => both.claim(pool),
            Stored::Int8(both) => both.claim(pool),
        }
    }

    /// Bytes that one token takes.
    pub fn bytes_per_token(shape: KvShape, format: KvFormat) -> usize {
        let numbers = shape.kv_heads * (shape.head_dim + shape.padded());
        match format {
            KvFormat::F32 => numbers * 4,
            KvFormat::F16 => numbers * 2,
            KvFormat::Int8 => shape.int8_token(),
        }
    }

    /// Stores the keys and values of `runs`, whose rows `[kv_heads, head_dim]` follow each other, `stride` numbers apart, in `k` and in `v`.
    ///
    /// # Panics
    /// Where rows or blocks are not there, or two runs write to one block.
    pub fn write(&mut self, pool: &ThreadPool, runs: &[Run<'_>], k: &[f32], v: &[f32], stride: usize) {
        let shape = self.shape;
        let tokens: usize = runs.iter().map(|r| r.tokens).sum();
        if tokens == 0 {
            return;
        }
        assert!(stride >= shape.row() && k.len().min(v.len()) >= (tokens - 1) * stride + shape.row(), "k and v are [tokens, stride]");
        let pieces = pieces(shape, runs);
        let from = SourceRows { k, v, stride };
        match &mut self.stored {
            Stored::F32(both) => both.write(pool, shape, &pieces, from, f32::from_f32),
            Stored::F16(both) => both.write(pool, shape, &pieces, from, F16::from_f32),
            Stored::Int8(both) => both.write(pool, shape, &pieces, from),
        }
    }

    /// Stores rows that are in the cache's own format already: little endian, `[tokens, kv_heads, head_dim]` in `k` and in `v`; of int8
    /// the scales come first, `[tokens, kv_heads]`.
    ///
    /// # Panics
    /// Where the bytes are not `run`'s rows, or blocks are not there.
    pub fn write_bytes(&mut self, pool: &ThreadPool, run: Run<'_>, k: &[u8], v: &[u8]) {
        let (shape, stride) = (self.shape, self.shape.row());
        let row = match self.stored {
            Stored::F32(_) => stride * 4,
            Stored::F16(_) => stride * 2,
            Stored::Int8(_) => stride + shape.kv_heads * 4,
        };
        assert!(k.len() == run.tokens * row && v.len() == k.len(), "k and v are [tokens, kv_heads, head_dim]");
        let pieces = pieces(shape, &[run]);
        match &mut self.stored {
            Stored::F32(both) => {
                let from = SourceRows { k: k.as_chunks().0, v: v.as_chunks().0, stride };
                both.write(pool, shape, &pieces, from, f32::from_le_bytes);
            }
            Stored::F16(both) => {
                let from = SourceRows { k: k.as_chunks().0, v: v.as_chunks().0, stride };
                both.write(pool, shape, &pieces, from, |bytes| F16(u16::from_le_bytes(bytes)));
            }
            Stored::Int8(both) => both.write_bytes(pool, shape, &pieces, run.tokens, k, v),
        }
    }

    /// Keys and values of `run`, each `[tokens, kv_heads, head_dim]`.
    ///
    /// # Panics
    /// Where blocks are not there.
    pub fn read(&self, run: Run<'_>, k: &mut [f32], v: &mut [f32]) {
        assert!(k.len() == run.tokens * self.shape.row() && v.len() == k.len(), "k and v are [tokens, kv_heads, head_dim]");
        match &self.stored {
            Stored::F32(both) => both.read(self.shape, run, k, v),
            Stored::F16(both) => both.read(self.shape, run, k, v),
            Stored::Int8(both) => both.read(self.shape, run, k, v),
        }
    }

    /// Keys and values of `run` as [`Self::write_bytes`] takes them: no number is converted.
    ///
    /// # Panics
    /// Where blocks are not there, or `k` and `v` have another size.
    pub fn copy(&self, pool: &ThreadPool, run: Run<'_>, k: &mut [u8], v: &mut [u8]) {
        match &self.stored {
            Stored::F32(both) => both.copy(pool, self.shape, run, k, v, f32::to_le_bytes),
            Stored::F16(both) => both.copy(pool, self.shape, run, k, v, |x| x.0.to_le_bytes()),
            Stored::Int8(both) => both.copy(self.shape, run, k, v),
        }
    }
}

/// Memory that comes in huge pages once it is touched.
fn untouched<T>(numbers: Vec<T>) -> Vec<T> {
    huge_pages::ask(&numbers);
    numbers
}

/// Zeroed memory that is not touched yet.
fn zeros(count: usize) -> Vec<F16> {
    let mut numbers = std::mem::ManuallyDrop::new(vec![0u16; count]);
    // SAFETY: `F16` is a transparent u16, so layout and alignment are the vector's own.
    unsafe { Vec::from_raw_parts(numbers.as_mut_ptr().cast(), numbers.len(), numbers.capacity()) }
}

/// Writes to each page once.
fn claim<T: Copy + Default + Send>(pool: &ThreadPool, all: &mut [T]) {
    /// Bytes of the smallest page.
    const PAGE: usize = 4096;
    let numbers = PAGE / size_of::<T>();
    let pages = all.len().div_ceil(numbers);
    let all = Disjoint::new(all);
    pool.rows(pages, 1000, |page| {
        // SAFETY: each place is written once.
        unsafe { all.part(page * numbers, 1)[0] = T::default() };
    });
}

/// Tokens that go into one block.
struct Piece {
    block: usize,
    offset: usize,
    count: usize,
    row: usize,
}

/// Where rows come from, as numbers of type `S`.
#[derive(Clone, Copy)]
struct SourceRows<'a, S> {
    k: &'a [S],
    v: &'a [S],
    stride: usize,
}

/// Where the tokens of `runs` go, block by block.
///
/// # Panics
/// Where a block is not there, or two runs write to one block.
fn pieces(shape: KvShape, runs: &[Run<'_>]) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity(runs.len());
    let mut first = 0;
    for run in runs {
        pieces.extend(run.pieces(shape.block_tokens).map(|(block, offset, count, at)| Piece { block, offset, count, row: first + at }));
        first += run.tokens;
    }
    assert!(pieces.iter().all(|p| p.block < shape.blocks), "a block table points outside of the cache");
    if pieces.len() > 1 {
        let mut blocks: Vec<usize> = pieces.iter().map(|p| p.block).collect();
        blocks.sort_unstable();
        assert!(blocks.windows(2).all(|w| w[0] != w[1]), "two sequences write to one block");
    }
    pieces
}

impl<T: Number> Both<T> {
    fn claim(&mut self, pool: &ThreadPool) {
        claim(pool, &mut self.k);
        claim(pool, &mut self.v);
    }

    fn write<S: Copy + Sync>(
        &mut self,
        pool: &ThreadPool,
        shape: KvShape,
        pieces: &[Piece],
        from: SourceRows<'_, S>,
        stored: impl Fn(S) -> T + Sync,
    ) {
        let KvShape { kv_heads, head_dim, block_tokens, .. } = shape;
        let padded = shape.padded();
        let (k, v) = (Disjoint::new(&mut self.k), Disjoint::new(&mut self.v));
        pool.rows(pieces.len(), shape.row() * 2, |i| {
            let piece = &pieces[i];
            // SAFETY: `pieces` saw that no two pieces are of one block.
            let (k, v) =
                unsafe { (k.part(shape.k_at(piece.block, 0), shape.k_at(1, 0)), v.part(shape.v_at(piece.block, 0), shape.v_at(1, 0))) };
            for t in 0..piece.count {
                let (at, slot) = ((piece.row + t) * from.stride, piece.offset + t);
                for head in 0..kv_heads {
                    let keys = &from.k[at + head * head_dim..][..head_dim];
                    let to = &mut k[head * head_dim * block_tokens..][..head_dim * block_tokens];
                    for (to, key) in to.chunks_exact_mut(block_tokens).zip(keys) {
                        to[slot] = stored(*key);
                    }
                    let values = &from.v[at + head * head_dim..][..head_dim];
                    let to = &mut v[(head * block_tokens + slot) * padded..][..head_dim];
                    to.iter_mut().zip(values).for_each(|(to, value)| *to = stored(*value));
                }
            }
        });
    }

    fn read(&self, shape: KvShape, run: Run<'_>, to_k: &mut [f32], to_v: &mut [f32]) {
        let KvShape { kv_heads, head_dim, block_tokens, .. } = shape;
        for (block, offset, count, first) in run.pieces(block_tokens) {
            for head in 0..kv_heads {
                let k = &self.k[shape.k_at(block, head)..][..head_dim * block_tokens];
                let v = &self.v[shape.v_at(block, head)..][..shape.padded() * block_tokens];
                for t in 0..count {
                    let at = (first + t) * shape.row() + head * head_dim;
                    let keys = k.chunks_exact(block_tokens).map(|d| d[offset + t].to_f32());
                    to_k[at..at + head_dim].iter_mut().zip(keys).for_each(|(to, key)| *to = key);
                    let values = v[(offset + t) * shape.padded()..].iter().map(|v| v.to_f32());
                    to_v[at..at + head_dim].iter_mut().zip(values).for_each(|(to, value)| *to = value);
                }
            }
        }
    }

    fn copy<const N: usize>(
        &self,
        pool: &ThreadPool,
        shape: KvShape,
        run: Run<'_>,
        k: &mut [u8],
        v: &mut [u8],
        bytes: impl Fn(T) -> [u8; N] + Sync,
    ) {
        let KvShape { kv_heads, head_dim, block_tokens, .. } = shape;
        let row = shape.row() * N;
        assert!(k.len() == run.tokens * row && v.len() == k.len(), "k and v are the bytes of [tokens, kv_heads, head_dim]");
        let pieces: Vec<_> = run.pieces(block_tokens).collect();
        let (to_k, to_v) = (Disjoint::new(k), Disjoint::new(v));
        pool.rows(pieces.len(), shape.row() * block_tokens, |i| {
            let (block, offset, count, first) = pieces[i];
            // SAFETY: pieces are of different tokens of the run, so their rows lie apart.
            let (to_k, to_v) = unsafe { (to_k.part(first * row, count * row), to_v.part(first * row, count * row)) };
            for head in 0..kv_heads {
                let k = &self.k[shape.k_at(block, head)..][..head_dim * block_tokens];
                let v = &self.v[shape.v_at(block, head)..][..shape.padded() * block_tokens];
                for t in 0..count {
                    let at = t * row + head * head_dim * N;
                    let (to_k, _) = to_k[at..at + head_dim * N].as_chunks_mut();
                    let keys = k[offset + t..].iter().step_by(block_tokens);
                    to_k.iter_mut().zip(keys).for_each(|(to, key)| *to = bytes(*key));
                    let (to_v, _) = to_v[at..at + head_dim * N].as_chunks_mut();
                    let values = &v[(offset + t) * shape.padded()..];
                    to_v.iter_mut().zip(values).for_each(|(to, value)| *to = bytes(*value));
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_across_blocks() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        let shape = KvShape { kv_heads: 2, head_dim: 6, block_tokens: 16, blocks: 5 };
        let stride = 40;
        let rows: Vec<f32> = (0..60 * stride).map(|i| i as f32 * 0.25 - 90.0).collect();
        for format in [KvFormat::F32, KvFormat::F16] {
            let mut layer = KvLayer::new(shape, format);
            let one = Run { blocks: &[3, 0, 2], start: 7, tokens: 30 };
            let other = Run { blocks: &[1, 4], start: 0, tokens: 3 };
            layer.write(&pool, &[one, other], &rows[4..], &rows[20..], stride);
            for (run, first) in [(one, 0), (other, 30)] {
                let (mut k, mut v) = (vec![0.0; run.tokens * 12], vec![0.0; run.tokens * 12]);
                layer.read(run, &mut k, &mut v);
                for t in 0..run.tokens {
                    let row = &rows[(first + t) * stride..];
                    let near = |a: f32, b: f32| (a - b).abs() <= if format == KvFormat::F32 { 0.0 } else { b.abs() / 2048.0 };
                    assert!((0..12).all(|i| near(k[t * 12 + i], row[4 + i]) && near(v[t * 12 + i], row[20 + i])));
                }
            }
        }
    }

    #[test]
    fn a_copy_has_the_bits_of_what_is_read() {
        let shape = KvShape { kv_heads: 2, head_dim: 6, block_tokens: 16, blocks: 5 };
        // Among them subnormal, infinite and negative numbers.
        let mut rows: Vec<f32> = (0..71 * 12).map(|i| (i as f32 - 400.0) * 1.7f32.powi(i % 40 - 30)).collect();
        (rows[3], rows[200]) = (f32::INFINITY, -0.0);
        for threads in [1, 3] {
            let pool = ThreadPool::new(threads, &[]).unwrap();
            for format in [KvFormat::F32, KvFormat::F16] {
                let mut layer = KvLayer::new(shape, format);
                layer.write(&pool, &[Run { blocks: &[3, 0, 2, 4, 1], start: 0, tokens: 70 }], &rows, &rows[5..], 12);
                for (start, tokens) in [(0, 70), (7, 30), (16, 16), (33, 1), (69, 1), (5, 0)] {
                    let run = Run { blocks: &[3, 0, 2, 4, 1], start, tokens };
                    let (mut k, mut v) = (vec![0.0; tokens * 12], vec![0.0; tokens * 12]);
                    layer.read(run, &mut k, &mut v);
                    let encode = |numbers: &[f32]| -> Vec<u8> {
                        let halves = || numbers.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
                        if format == KvFormat::F16 { halves() } else { numbers.iter().flat_map(|x| x.to_le_bytes()).collect() }
                    };
                    let (k, v) = (encode(&k), encode(&v));
                    let (mut copied_k, mut copied_v) = (vec![1; k.len()], vec![1; v.len()]);
                    layer.copy(&pool, run, &mut copied_k, &mut copied_v);
                    assert!(copied_k == k && copied_v == v, "{format:?} from {start} on, {tokens} tokens, {threads} threads");
                }
            }
        }
    }

    #[test]
    fn rows_in_the_caches_format_are_stored_bit_for_bit() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        let shape = KvShape { kv_heads: 2, head_dim: 6, block_tokens: 16, blocks: 5 };
        let run = Run { blocks: &[3, 0, 2], start: 7, tokens: 30 };
        let halves: Vec<half::f16> = (0..720u16).map(|i| half::f16::from_bits(i * 43)).collect();
        for format in [KvFormat::F32, KvFormat::F16] {
            let as_halves = || halves.iter().flat_map(|x| x.to_le_bytes()).collect();
            let as_floats = || halves.iter().flat_map(|x| x.to_f32().to_le_bytes()).collect();
            let bytes: Vec<u8> = if format == KvFormat::F16 { as_halves() } else { as_floats() };
            let numbers: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
            let read = |layer: &KvLayer| {
                let (mut k, mut v) = (vec![0.0; 360], vec![0.0; 360]);
                layer.read(run, &mut k, &mut v);
                k.into_iter().chain(v).map(f32::to_bits).collect::<Vec<_>>()
            };
            let (mut by_numbers, mut by_bytes) = (KvLayer::new(shape, format), KvLayer::new(shape, format));
            by_numbers.write(&pool, &[run], &numbers[..360], &numbers[360..], 12);
            let (k, v) = bytes.split_at(bytes.len() / 2);
            by_bytes.write_bytes(&pool, run, k, v);
            assert_eq!(read(&by_bytes), read(&by_numbers));
        }
    }

    #[test]
    #[should_panic(expected = "two sequences write to one block")]
    fn a_block_has_one_writer() {
        let shape = KvShape { kv_heads: 1, head_dim: 2, block_tokens: 16, blocks: 2 };
        let run = Run { blocks: &[1], start: 0, tokens: 1 };
        KvLayer::new(shape, KvFormat::F32).write(&ThreadPool::new(2, &[]).unwrap(), &[run, run], &[0.0; 8], &[0.0; 8], 4);
    }
}
