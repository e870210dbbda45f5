//! Each kernel on one thread, at the shapes of SmolLM2-135M. Throughput is in multiply-adds, or in bytes where reading is what costs.
//!
//! `cargo bench -p overfill-kernels`

#![allow(missing_docs, reason = "the macros make functions without")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use overfill_kernels::{
    Activations, AttentionScratch, Bf16Matrix, BlockFormat, DenseMatrix, Gate, Into, KvFormat, KvLayer, KvShape, Matrix, Packer,
    QuantisedMatrix, Reads, Run, Scores, ThreadPool, gated, paged_attention, products, rms_norm,
};

const HIDDEN: usize = 576;
const MLP: usize = 1536;

fn noise(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7919 % 2003) as f32 / 2003.0 - 0.5).collect()
}

/// Blocks of any numbers but scales that are odd.
fn blocks(format: BlockFormat, count: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..count * format.bytes()).map(|i| ((i * 7919) >> 3) as u8).collect();
    let halves: &[usize] = if format == BlockFormat::Q6K { &[208] } else { &[0, 2] };
    for block in bytes.chunks_exact_mut(format.bytes()) {
        for &at in halves {
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(0.01).to_le_bytes());
        }
    }
    bytes
}

fn matrices(pool: &ThreadPool, outputs: usize, inputs: usize) -> Vec<(String, Matrix)> {
    let w = noise(outputs * inputs);
    let halves: Vec<half::f16> = w.iter().map(|w| half::f16::from_f32(*w)).collect();
    let bfloats: Vec<half::bf16> = w.iter().map(|w| half::bf16::from_f32(*w)).collect();
    let mut all = vec![
        ("f32".to_owned(), Matrix::Dense(DenseMatrix::from_f32(&Packer::new(pool), &w, outputs, inputs))),
        ("f16".to_owned(), Matrix::Dense(DenseMatrix::from_f16(&Packer::new(pool), &halves, outputs, inputs))),
        ("bf16".to_owned(), Matrix::Bf16(Bf16Matrix::new(&Packer::new(pool), &bfloats, outputs, inputs))),
    ];
    for format in
        [BlockFormat::Q4_0, BlockFormat::Q4_1, BlockFormat::Q5_0, BlockFormat::Q5_1, BlockFormat::Q8_0, BlockFormat::Q4K, BlockFormat::Q6K]
    {
        if inputs.is_multiple_of(format.block()) {
            let bytes = blocks(format, outputs * inputs / format.block());
            if let Some(packed) = QuantisedMatrix::from_blocks(&Packer::new(pool), format, &bytes, outputs, inputs) {
                all.push((format!("{format:?}"), Matrix::Quantised(packed)));
            }
        }
    }
    all
}

fn product(c: &mut Criterion) {
    let Ok(pool) = ThreadPool::new(1, &[]) else { return };
    let mut group = c.benchmark_group("product");
    for (name, matrix) in matrices(&pool, HIDDEN, MLP) {
        for rows in [1, 2, 8, 32, 256] {
            let mut x = Activations::new();
            x.set(&pool, &noise(rows * MLP), MLP, Reads::of(&[&matrix]));
            let mut y = vec![0.0; rows * HIDDEN];
            group.throughput(Throughput::Elements((rows * HIDDEN * MLP) as u64));
            group.bench_function(BenchmarkId::new(&name, rows), |b| {
                b.iter(|| products(&pool, black_box(&x), &[&matrix], &mut y, Into::Place));
            });
        }
    }
}

fn rows(c: &mut Criterion) {
    let Ok(pool) = ThreadPool::new(1, &[]) else { return };
    let mut group = c.benchmark_group("rows");
    // As quantised matrices read them.
    let w = Matrix::Quantised(
        match QuantisedMatrix::from_blocks(&Packer::new(&pool), BlockFormat::Q8_0, &blocks(BlockFormat::Q8_0, 1), 1, 32) {
            Some(w) => w,
            None => return,
        },
    );
    let reads = Reads::of(&[&w]);
    for rows in [1, 32] {
        let mut out = Activations::new();
        let (x, weight) = (noise(rows * HIDDEN), noise(HIDDEN));
        group.throughput(Throughput::Elements((rows * HIDDEN) as u64));
        group.bench_function(BenchmarkId::new("rms_norm", rows), |b| {
            b.iter(|| rms_norm(&pool, black_box(&x), &weight, 1e-5, reads, &mut out))
        });
        let gate_up = noise(rows * 2 * MLP);
        group.throughput(Throughput::Elements((rows * MLP) as u64));
        group.bench_function(BenchmarkId::new("swiglu", rows), |b| {
            b.iter(|| gated(&pool, black_box(&gate_up), MLP, Gate::Silu, reads, &mut out))
        });
    }
}

fn attention(c: &mut Criterion) {
    let Ok(pool) = ThreadPool::new(1, &[]) else { return };
    let mut group = c.benchmark_group("attention");
    let shape = KvShape { kv_heads: 3, head_dim: 64, block_tokens: 16, blocks: 128 };
    let blocks: Vec<u32> = (0..128).collect();
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        let mut layer = KvLayer::new(shape, format);
        let filled = noise(2048 * shape.row());
        layer.write(&pool, &[Run { blocks: &blocks, start: 0, tokens: 2048 }], &filled, &filled, shape.row());
        for (start, tokens) in [(100, 1), (1500, 1), (0, 256), (1024, 256)] {
            let q = noise(tokens * HIDDEN);
            let mut out = vec![0.0; tokens * HIDDEN];
            let mut scratch = AttentionScratch::default();
            let pairs = tokens * start + tokens * (tokens + 1) / 2;
            group.throughput(Throughput::Elements((2 * pairs * HIDDEN) as u64));
            let run = [Run { blocks: &blocks, start, tokens }];
            group.bench_function(BenchmarkId::new(format!("{format:?}"), format!("{tokens} at {start}")), |b| {
                b.iter(|| paged_attention(&pool, &layer, black_box(&q), HIDDEN, 9, Scores::plain(64), &run, &mut out, &mut scratch));
            });
        }
    }
}

fn pool(c: &mut Criterion) {
    let Ok(pool) = ThreadPool::new(2, &[]) else { return };
    c.bench_function("an empty run on two threads", |b| b.iter(|| pool.run(2, |i| _ = black_box(i))));
}

criterion_group!(benches, product, rows, attention, pool);
criterion_main!(benches);
