//! Our GPU kernels, run on the CPU: the C compiler takes `kernels/*.cu` as they are, with `kernels/on_host.c` around them, and
//! what comes out is held against candle's operations, and against our sampler.

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use half::f16;
use libloading::Library;
use overfill_kv::BlockId;
use overfill_kv::wire::{decode, encode};
use overfill_types::{KvFormat, KvGeometry, SamplingParams, WireFormat};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::json;

use crate::cache::KvCache;
use crate::config::{LlamaConfig, Scalars};
use crate::gpu::attention::{append, attend};
use crate::gpu::choice::{Draw, SHARED};
use crate::gpu::step::Step;
use crate::gpu::tiles::{SEGMENT, Tiles, fits, shared, slots};
use crate::pass::Chunk;
use crate::rope::Rotary;
use crate::sample::Sampler;

const BLOCK: usize = 16;

/// What `on_host.c` takes for a launch of `attention`.
#[repr(C)]
struct Arguments {
    out: *mut f32,
    partial: *mut f32,
    q: *const f32,
    keys: *const c_void,
    values: *const c_void,
    tables: *const i32,
    tiles: *const i32,
    heads: c_int,
    kv_heads: c_int,
    head_dim: c_int,
    block_tokens: c_int,
    window: c_int,
    scale: f32,
    cap: f32,
}

/// What `on_host.c` takes for a launch of `pack` or `unpack`.
#[repr(C)]
struct WireArguments {
    packed: *mut u8,
    keys: *mut c_void,
    values: *mut c_void,
    slots: *const i32,
    tokens: c_int,
    kv_heads: c_int,
    head_dim: c_int,
}

type Wire = unsafe extern "C" fn(*const WireArguments, c_int) -> c_int;
type Choose = unsafe extern "C" fn(*const f32, c_int, *const Draw, *mut c_int, c_int, c_int) -> c_int;
type Attention = unsafe extern "C" fn(*const Arguments, c_int, c_int, c_int) -> c_int;
type Join = unsafe extern "C" fn(*mut f32, *const f32, c_int, c_int, c_int) -> c_int;
type Append = unsafe extern "C" fn(*mut c_void, *const f32, *const i32, c_int, c_int) -> c_int;

/// The kernels for one format of the cache.
fn library(format: KvFormat) -> &'static Library {
    static F16: OnceLock<Library> = OnceLock::new();
    static F32: OnceLock<Library> = OnceLock::new();
    let (cell, define) = if format == KvFormat::F16 { (&F16, "CACHE_F16") } else { (&F32, "CACHE_F32") };
    cell.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let made = folder.path().join("kernels.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gpu/kernels/on_host.c");
        let flags = ["-O2", "-std=gnu11", "-ffp-contract=off", "-shared", "-fPIC", "-lm"];
        let compiler = Command::new("cc").arg(source).args(flags).arg(format!("-D{define}")).arg("-o").arg(&made).output().unwrap();
        assert!(compiler.status.success(), "{}", String::from_utf8_lossy(&compiler.stderr));
        // SAFETY: loading it runs nothing.
        unsafe { Library::new(made) }.unwrap()
    })
}

/// Numbers as a cache of a format holds them.
fn stored(format: KvFormat, numbers: &[f32]) -> Vec<u8> {
    match format {
        KvFormat::F16 => numbers.iter().flat_map(|n| f16::from_f32(*n).to_ne_bytes()).collect(),
        _ => numbers.iter().flat_map(|n| n.to_ne_bytes()).collect(),
    }
}

/// Keys and values of one layer, and sequences that have their places in it.
struct Case {
    config: LlamaConfig,
    format: KvFormat,
    window: Option<usize>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Tokens that each sequence has, and its blocks.
    sequences: Vec<(usize, Vec<BlockId>)>,
}

impl Case {
    fn new(rng: &mut StdRng, config: &LlamaConfig, format: KvFormat, window: Option<usize>, lengths: &[usize]) -> Self {
        let blocks: usize = lengths.iter().map(|length| length.div_ceil(BLOCK)).sum();
        let mut numbers: Vec<BlockId> = (0..blocks as u32).map(BlockId).collect();
        numbers.shuffle(rng);
        let sequences = lengths.iter().map(|length| (*length, numbers.split_off(numbers.len() - length.div_ceil(BLOCK)))).collect();
        let mut rows = || (0..blocks * BLOCK * config.kv.row()).map(|_| f16::from_f32(rng.random_range(-2.0..2.0)).to_f32()).collect();
        let (keys, values) = (rows(), rows());
        Self { config: config.clone(), format, window, keys, values, sequences }
    }

    /// The last `count` tokens of sequences, as a pass reads them.
    fn chunks<'a>(&'a self, counts: &[usize], tokens: &'a [u32]) -> Vec<Chunk<'a>> {
        let chunk = |((length, blocks), count): (&'a (usize, Vec<BlockId>), &usize)| Chunk {
            tokens: &tokens[..*count],
            start: length - count,
            blocks,
            logits: false,
        };
        self.sequences.iter().zip(counts).map(chunk).collect()
    }

    /// What the kernel makes of queries `[tokens, heads, head_dim]`, with one block for a sequence or one for each of its segments.
    fn by_kernel(&self, chunks: &[Chunk<'_>], q: &[f32], split: bool) -> Vec<f32> {
        let LlamaConfig { heads, kv, scalars, .. } = &self.config;
        let mut tiles = Tiles::of(chunks, BLOCK, heads / kv.kv_heads, kv.kv_heads);
        let longest = chunks.iter().map(|chunk| chunk.start + chunk.tokens.len()).max().unwrap();
        tiles.segments = if split { longest.div_ceil(SEGMENT) } else { 1 };
        let rows = q.len() / kv.head_dim;
        let (mut out, mut partial) = (vec![f32::NAN; q.len()], vec![f32::NAN; rows * tiles.segments * (kv.head_dim + 2)]);
        let (keys, values) = (stored(self.format, &self.keys), stored(self.format, &self.values));
        let arguments = Arguments {
            out: out.as_mut_ptr(),
            partial: partial.as_mut_ptr(),
            q: q.as_ptr(),
            keys: keys.as_ptr().cast(),
            values: values.as_ptr().cast(),
            tables: tiles.tables.as_ptr(),
            tiles: tiles.tiles.as_ptr(),
            heads: *heads as c_int,
            kv_heads: kv.kv_heads as c_int,
            head_dim: kv.head_dim as c_int,
            block_tokens: BLOCK as c_int,
            window: self.window.map_or(c_int::MAX, |window| window as c_int),
            scale: scalars.attention as f32,
            cap: scalars.attention_cap.unwrap_or(0.0) as f32,
        };
        let (count, segments, bytes) = (tiles.tiles.len() / 4, tiles.segments as c_int, 4 * shared(kv.head_dim));
        // SAFETY: the library has these functions, and what they are given is as large as the kernels say.
        unsafe {
            let attention = library(self.format).get::<Attention>("host_attention").unwrap();
            assert_eq!(attention(&raw const arguments, count as c_int, segments, bytes as c_int), 0, "threads wait for each other");
            if segments > 1 {
                let join = library(self.format).get::<Join>("host_join").unwrap();
                assert_eq!(join(out.as_mut_ptr(), partial.as_ptr(), rows as c_int, segments, kv.head_dim as c_int), 0);
            }
        }
        let lost = out.iter().position(|number| !number.is_finite());
        assert_eq!(lost, None, "every row is of one tile: {} x {} of {}, {segments} segments", heads, kv.head_dim, out.len());
        out
    }

    /// What candle's operations make of them.
    fn by_candle(&self, chunks: &[Chunk<'_>], q: &[f32]) -> Vec<f32> {
        let kv = self.config.kv;
        let slots = self.keys.len() / kv.row();
        let cache = KvCache::in_tensors(KvGeometry { layers: 1, ..kv }, self.format, slots / BLOCK, BLOCK);
        let tensors = cache.tensors(0, 0).unwrap();
        for (to, numbers) in [(&tensors.k, &self.keys), (&tensors.v, &self.values)] {
            let rows = Tensor::from_slice(numbers, (slots, kv.kv_heads, kv.head_dim), &Device::Cpu).unwrap();
            to.slice_set(&rows.to_dtype(to.dtype()).unwrap(), 0, 0).unwrap();
        }
        let q = Tensor::from_slice(q, (q.len() / self.config.heads / kv.head_dim, self.config.heads, kv.head_dim), &Device::Cpu).unwrap();
        let mut config = self.config.clone();
        config.layers[0].window = self.window;
        let step = Step::new(&config, &Rotary::new(&config), (chunks, 0), &Device::Cpu).unwrap();
        attend(&cache, &step, 0, &q).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }
}

/// A model with such heads, of which nothing else matters.
fn config(heads: usize, kv_heads: usize, head_dim: usize, cap: Option<f64>) -> LlamaConfig {
    let json = json!({
        "model_type": "llama", "hidden_size": heads * head_dim, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 4096, "eos_token_id": 2,
    });
    let config = LlamaConfig::from_hugging_face(&json.to_string(), None).unwrap();
    LlamaConfig { scalars: Scalars { attention_cap: cap, ..config.scalars }, ..config }
}

/// Heads of SmolLM2 135M, of Llama 3 and of Gemma 2; one that leaves threads without a dimension; one KV head for all.
fn configs() -> Vec<LlamaConfig> {
    vec![config(9, 3, 64, None), config(8, 2, 128, None), config(4, 2, 256, Some(50.0)), config(6, 2, 80, None), config(16, 1, 8, None)]
}

fn queries(rng: &mut StdRng, tokens: usize, config: &LlamaConfig) -> Vec<f32> {
    (0..tokens * config.heads * config.kv.head_dim).map(|_| rng.random_range(-3.0..3.0)).collect()
}

#[test]
fn the_kernel_computes_what_candle_does() {
    let (mut rng, tokens) = (StdRng::seed_from_u64(1), vec![0; 64]);
    for config in configs() {
        for (format, window) in [(KvFormat::F16, None), (KvFormat::F32, Some(40)), (KvFormat::F16, Some(600))] {
            let lengths = [1, 17, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 150];
            let counts = [1, 17, 1, 6, 21];
            let case = Case::new(&mut rng, &config, format, window, &lengths);
            let chunks = case.chunks(&counts, &tokens);
            let q = queries(&mut rng, counts.iter().sum(), &config);
            let (kernel, candle) = (case.by_kernel(&chunks, &q, false), case.by_candle(&chunks, &q));
            let off = kernel.iter().zip(&candle).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 2e-5, "{} heads of {}, {format:?}, window {window:?}: {off}", config.heads, config.kv.head_dim);
            assert_eq!(kernel, case.by_kernel(&chunks, &q, true), "segments may be joined by another block");
        }
    }
}

#[test]
fn a_row_is_the_same_bits_whatever_is_beside_it_and_however_its_prompt_is_cut() {
    let (mut rng, tokens) = (StdRng::seed_from_u64(2), vec![0; 64]);
    for config in configs() {
        let row = config.heads * config.kv.head_dim;
        let case = Case::new(&mut rng, &config, KvFormat::F16, None, &[SEGMENT + 37, 90]);
        let q = queries(&mut rng, 40, &config);
        let whole = case.by_kernel(&case.chunks(&[37, 3], &tokens), &q, false);
        for (at, count) in [(0, 1), (1, 12), (13, 24)] {
            let (length, blocks) = &case.sequences[0];
            let alone = Chunk { tokens: &tokens[..count], start: length - 37 + at, blocks, logits: false };
            for split in [false, true] {
                let own = case.by_kernel(&[alone], &q[at * row..(at + count) * row], split);
                assert_eq!(own, whole[at * row..(at + count) * row], "tokens {at}..{}", at + count);
            }
        }
    }
}

#[test]
fn rows_go_to_their_slots() {
    let (mut rng, tokens) = (StdRng::seed_from_u64(3), vec![0; 64]);
    let config = config(9, 3, 64, None);
    for format in [KvFormat::F16, KvFormat::F32] {
        let case = Case::new(&mut rng, &config, format, None, &[50, 33]);
        let chunks = case.chunks(&[20, 33], &tokens);
        let row = config.kv.row();
        let from: Vec<f32> = (0..53 * row).map(|_| rng.random_range(-2.0..2.0)).collect();
        let mut cache = KvCache::in_tensors(KvGeometry { layers: 1, ..config.kv }, format, case.keys.len() / row / BLOCK, BLOCK);
        let rows = Tensor::from_slice(&from, (53, config.kv.kv_heads, config.kv.head_dim), &Device::Cpu).unwrap();
        let step = Step::new(&config, &Rotary::new(&config), (&chunks, 0), &Device::Cpu).unwrap();
        append(&mut cache, &step, 0, &rows, &rows).unwrap();
        let expected: Vec<f32> = cache.tensors(0, 0).unwrap().k.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let mut got = stored(format, &vec![0.0; case.keys.len()]);
        let slots = slots(&chunks, BLOCK);
        // SAFETY: as above; every slot is of the cache.
        unsafe {
            let append = library(format).get::<Append>("host_append").unwrap();
            assert_eq!(append(got.as_mut_ptr().cast(), from.as_ptr(), slots.as_ptr(), slots.len() as c_int, row as c_int), 0);
        }
        assert!(got == stored(format, &expected));
    }
}

#[test]
fn a_pass_is_cut_into_tiles() {
    assert!(configs().iter().all(fits));
    assert!(!fits(&config(32, 1, 64, None)) && !fits(&config(4, 2, 512, None)) && !fits(&config(4, 2, 20, None)));
    let blocks: Vec<BlockId> = [7, 3, 9].map(BlockId).into();
    let tokens = [0; 40];
    let chunk = |count: usize, start, blocks| Chunk { tokens: &tokens[..count], start, blocks, logits: false };
    let tiles = Tiles::of(&[chunk(7, 0, &blocks[..1]), chunk(1, 40, &blocks)], BLOCK, 3, 3);
    let expected = [[0, 5, 0, 0], [5, 2, 5, 0], [7, 1, 40, 1]];
    assert_eq!(tiles, Tiles { tables: vec![7, 7, 3, 9], tiles: expected.concat(), segments: 1 });
    assert_eq!(slots(&[chunk(3, 15, &blocks)], BLOCK), [7 * 16 + 15, 3 * 16, 3 * 16 + 1]);
    let table: Vec<BlockId> = (0..200).map(BlockId).collect();
    let long = chunk(1, 3000, &table);
    assert_eq!(Tiles::of(&[long], BLOCK, 3, 3).segments, 6, "each of six segments has a block");
    assert_eq!(Tiles::of(&vec![long; 200], BLOCK, 3, 3).segments, 1, "there are enough blocks");
}

#[test]
fn rows_leave_and_come_as_the_wire_has_them() {
    let mut rng = StdRng::seed_from_u64(6);
    for (kv_heads, head_dim, format) in [(3, 64, KvFormat::F16), (2, 200, KvFormat::F32), (1, 6, KvFormat::F16)] {
        let geometry = KvGeometry { layers: 1, kv_heads, head_dim };
        let (slots, row) = (40, geometry.row());
        // As the cache rounds them; a head of nothing, one of the smallest numbers, and one with what is no number.
        let mut numbers: Vec<f32> =
            (0..slots * row).map(|_| rng.random_range(-1.0..1.0f32).powi(5) * 30.0).map(|n| f16::from_f32(n).to_f32()).collect();
        let taken: Vec<i32> = vec![7, 8, 9, 0, 39, 25, 24, 3];
        numbers[7 * row..7 * row + head_dim].fill(0.0);
        numbers[9 * row..9 * row + head_dim].fill(f16::from_bits(1).to_f32());
        [numbers[0], numbers[39 * row]] = [f32::NAN; 2];
        let other: Vec<f32> = numbers.iter().rev().copied().collect();
        let of = |numbers: &[f32]| -> Vec<f32> {
            taken.iter().flat_map(|&slot| numbers[slot as usize * row..(slot as usize + 1) * row].to_vec()).collect()
        };
        let expected = [&numbers, &other].map(|numbers| encode(WireFormat::Int8, &geometry, &of(numbers))).concat();

        let (mut keys, mut values) = (stored(format, &numbers), stored(format, &other));
        let mut packed = vec![0xaa; expected.len()];
        let mut run = |keys: &mut Vec<u8>, values: &mut Vec<u8>, packs: bool| {
            let arguments = WireArguments {
                packed: packed.as_mut_ptr(),
                keys: keys.as_mut_ptr().cast(),
                values: values.as_mut_ptr().cast(),
                slots: taken.as_ptr(),
                tokens: taken.len() as c_int,
                kv_heads: kv_heads as c_int,
                head_dim: head_dim as c_int,
            };
            // SAFETY: as above; the slots are of the rows, and the bytes are those of so many.
            let stuck = unsafe { library(format).get::<Wire>("host_wire").unwrap()(&raw const arguments, packs.into()) };
            assert_eq!(stuck, 0, "threads wait for each other");
            packed.clone()
        };
        assert!(run(&mut keys, &mut values, true) == expected, "{geometry} in {format:?}");
        assert!(keys == stored(format, &numbers) && values == stored(format, &other), "rows that leave stay as they are");

        let (mut keys, mut values) = (vec![0x55; keys.len()], vec![0x55; values.len()]);
        let untouched = keys.clone();
        run(&mut keys, &mut values, false);
        let size = keys.len() / slots;
        for (came, half) in [(keys, &expected[..expected.len() / 2]), (values, &expected[expected.len() / 2..])] {
            let mut decoded = Vec::new();
            assert!(decode(WireFormat::Int8, &geometry, half, &mut decoded));
            let mut expected = untouched.clone();
            for (&slot, rows) in taken.iter().zip(stored(format, &decoded).chunks(size)) {
                expected[slot as usize * size..(slot as usize + 1) * size].copy_from_slice(rows);
            }
            assert!(came == expected, "{geometry} in {format:?}");
        }
    }
}

/// Logits of a row: peaked, flat, in few different values, with infinities and what is no number.
fn row_of_logits(rng: &mut StdRng, vocabulary: usize, kind: usize) -> Vec<f32> {
    let spread = [1.0, 6.0, 2.0, 3.0, 0.0][kind % 5];
    let mut logits: Vec<f32> = (0..vocabulary).map(|_| rng.random_range(-1.0..1.0f32).powi(3) * 4.0 * spread).collect();
    if kind % 5 == 2 {
        logits.iter_mut().for_each(|logit| *logit = (*logit * 2.0).round() / 2.0);
    }
    if kind % 5 == 3 {
        for (i, other) in [f32::NAN, f32::NEG_INFINITY, -0.0, 0.0, -f32::NAN].into_iter().enumerate() {
            logits[(7 * i + kind) % vocabulary] = other;
        }
    }
    logits
}

#[test]
fn the_kernel_chooses_the_tokens_that_the_sampler_does() {
    let mut rng = StdRng::seed_from_u64(4);
    for vocabulary in [1, 5, 512, 513, 3000] {
        let rows = 60;
        let mut logits: Vec<Vec<f32>> = (0..rows).map(|kind| row_of_logits(&mut rng, vocabulary, kind)).collect();
        let params = |rng: &mut StdRng, row: usize| SamplingParams {
            temperature: [0.0, 1.0, 0.2, 2.5][row % 4],
            top_p: if rng.random_bool(0.5) { 1.0 } else { [0.0, 0.3, 0.9, 0.999][rng.random_range(0..4)] },
            top_k: if rng.random_bool(0.5) { 0 } else { rng.random_range(1..60) },
            min_p: if rng.random_bool(0.6) { 0.0 } else { rng.random_range(0.0..0.5) },
            seed: row as u64,
            ..SamplingParams::greedy()
        };
        // The last rows first: which row a block takes is told, not guessed.
        let numbers: Vec<usize> = (0..rows).rev().collect();
        let params: Vec<SamplingParams> = numbers.iter().map(|&row| params(&mut rng, row)).collect();
        let draw = |(&row, params): (&usize, &SamplingParams)| Draw::of(row, Sampler::new(params.clone(), &[]).plain(100 + row).unwrap());
        let draws: Vec<Draw> = numbers.iter().zip(&params).map(draw).collect();
        let (all, mut chosen) = (logits.concat(), vec![-1; rows]);
        // SAFETY: as above; there are as many rows of logits as draws.
        unsafe {
            let choose = library(KvFormat::F16).get::<Choose>("host_choose").unwrap();
            let stuck = choose(all.as_ptr(), vocabulary as c_int, draws.as_ptr(), chosen.as_mut_ptr(), rows as c_int, SHARED as c_int);
            assert_eq!(stuck, 0, "threads wait for each other");
        }
        for ((row, params), chosen) in numbers.into_iter().zip(params).zip(chosen) {
            let expected = Sampler::new(params.clone(), &[]).sample(&mut logits[row], 100 + row).token;
            assert_eq!(chosen, expected as c_int, "row {row} of {vocabulary}: {params:?}");
        }
    }
}

#[test]
fn no_row_of_numbers_gives_token_0() {
    let params = SamplingParams { temperature: 1.0, ..SamplingParams::greedy() };
    for logits in [[f32::NAN; 3], [f32::NEG_INFINITY; 3], [f32::INFINITY; 3]] {
        let draw = Draw::of(0, Sampler::new(params.clone(), &[]).plain(1).unwrap());
        let mut chosen = -1;
        // SAFETY: as above, of one row.
        unsafe {
            let choose = library(KvFormat::F16).get::<Choose>("host_choose").unwrap();
            assert_eq!(choose(logits.as_ptr(), 3, &raw const draw, &raw mut chosen, 1, SHARED as c_int), 0);
        }
        assert_eq!(chosen, Sampler::new(params.clone(), &[]).sample(&mut logits.clone(), 1).token as c_int, "{logits:?}");
    }
}
