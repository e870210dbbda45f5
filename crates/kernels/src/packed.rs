//! Products with a dense weight matrix: `y = x W^T`, f32 activations, weights in f32, bfloat16 or half precision.
//!
//! The matrix is repacked at load into panels of 16 output columns, `[panel][in][16]`, so that a product streams it
//! once and in order, whatever the batch. A tile of up to six rows of `x` and one panel is summed over the whole width
//! in registers: one chain of fused multiply-adds per output, from input 0 to the last. That chain is the same for any
//! number of rows and threads.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::output::Output;
use crate::simd::{Simd, dispatch};
use crate::split;

/// Output columns in a panel.
const PANEL: usize = 16;
/// Rows of `x` in a tile: 6 x 2 accumulators of 8 lanes leave room for two weights and a broadcast in 16 registers.
const TILE: usize = 6;
/// Bytes of `x` that are kept in the second-level cache while panels pass.
const X_BLOCK: usize = 256 << 10;

/// One input's weights for the 16 outputs of a panel. Aligned so that no load of eight crosses a cache line; its size has no padding.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Line<T>([T; PANEL]);

enum Lines {
    F32(Vec<Line<f32>>),
    Bf16(Vec<Line<u16>>),
    F16(Vec<Line<u16>>),
}

/// A weight matrix `[out, in]`, packed for the CPU.
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    lines: Lines,
}

/// How a stored weight becomes f32.
trait Element: Copy + Send + Sync {
    /// # Safety
    /// Eight values can be read at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Bf16Bits(u16);

impl Element for Bf16Bits {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise; the type is a transparent u16.
        unsafe { s.load_bf16(p.cast()) }
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct F16Bits(u16);

impl Element for F16Bits {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise; the type is a transparent u16.
        unsafe { s.load_f16(p.cast()) }
    }
}

fn pack<T: Copy + Send + Sync>(weights: &[T], outputs: usize, inputs: usize, zero: T) -> Vec<Line<T>> {
    assert_eq!(weights.len(), outputs * inputs, "a matrix of {outputs} x {inputs}");
    let mut lines = vec![Line([zero; PANEL]); outputs.div_ceil(PANEL) * inputs];
    if inputs > 0 {
        lines.par_chunks_mut(inputs).enumerate().for_each(|(panel, lines)| {
            for column in 0..PANEL.min(outputs - panel * PANEL) {
                let row = &weights[(panel * PANEL + column) * inputs..][..inputs];
                for (line, &w) in lines.iter_mut().zip(row) {
                    line.0[column] = w;
                }
            }
        });
    }
    lines
}

impl PackedMatrix {
    /// Packs f32 weights `[outputs, inputs]`.
    pub fn from_f32(weights: &[f32], outputs: usize, inputs: usize) -> Self {
        Self { outputs, inputs, lines: Lines::F32(pack(weights, outputs, inputs, 0.0)) }
    }

    /// Packs bfloat16 weights `[outputs, inputs]`; products are exact in the weights and sum in f32.
    pub fn from_bf16(weights: &[bf16], outputs: usize, inputs: usize) -> Self {
        let bits: Vec<u16> = weights.iter().map(|w| w.to_bits()).collect();
        Self { outputs, inputs, lines: Lines::Bf16(pack(&bits, outputs, inputs, 0)) }
    }

    /// Packs half-precision weights `[outputs, inputs]`; products are exact in the weights and sum in f32.
    pub fn from_f16(weights: &[f16], outputs: usize, inputs: usize) -> Self {
        let bits: Vec<u16> = weights.iter().map(|w| w.to_bits()).collect();
        Self { outputs, inputs, lines: Lines::F16(pack(&bits, outputs, inputs, 0)) }
    }

    /// Width of the result.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Width of what it is multiplied with.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Row `output` of the matrix, `[inputs]`: what an embedding looks up.
    pub fn row(&self, output: usize, to: &mut [f32]) {
        assert!(output < self.outputs && to.len() == self.inputs, "row {output} of {} x {}", self.outputs, self.inputs);
        let (first, column) = (output / PANEL * self.inputs, output % PANEL);
        match &self.lines {
            Lines::F32(lines) => to.iter_mut().zip(&lines[first..]).for_each(|(t, l)| *t = l.0[column]),
            Lines::Bf16(lines) => to.iter_mut().zip(&lines[first..]).for_each(|(t, l)| *t = bf16::from_bits(l.0[column]).to_f32()),
            Lines::F16(lines) => to.iter_mut().zip(&lines[first..]).for_each(|(t, l)| *t = f16::from_bits(l.0[column]).to_f32()),
        }
    }

    /// `y = x W^T`: `x` is `[rows, inputs]`, `y` is `[rows, outputs]`. Runs on the current rayon pool.
    pub fn multiply(&self, x: &[f32], rows: usize, y: &mut [f32]) {
        assert_eq!(x.len(), rows * self.inputs, "x is [rows, inputs]");
        assert_eq!(y.len(), rows * self.outputs, "y is [rows, outputs]");
        let panels = self.outputs.div_ceil(PANEL);
        let y = Output::new(y, self.outputs);
        split::panels(panels, rows, self.outputs * self.inputs, |range| match &self.lines {
            Lines::F32(lines) => dispatch!(multiply_panels(lines.as_ptr().cast::<f32>(), self.inputs, x, rows, y, range)),
            Lines::Bf16(lines) => dispatch!(multiply_panels(lines.as_ptr().cast::<Bf16Bits>(), self.inputs, x, rows, y, range)),
            Lines::F16(lines) => dispatch!(multiply_panels(lines.as_ptr().cast::<F16Bits>(), self.inputs, x, rows, y, range)),
        });
    }
}

/// The product's columns of `panels`.
#[inline(always)]
fn multiply_panels<S: Simd, T: Element>(
    s: S,
    weights: *const T,
    inputs: usize,
    x: &[f32],
    rows: usize,
    y: Output,
    panels: std::ops::Range<usize>,
) {
    let block = (X_BLOCK / 4 / inputs.max(1) / TILE).max(1) * TILE;
    for first in (0..rows).step_by(block) {
        let end = (first + block).min(rows);
        for panel in panels.clone() {
            // SAFETY: `pack` made `inputs` lines of `PANEL` values for every panel below `outputs.div_ceil(PANEL)`.
            let panel_weights = unsafe { weights.add(panel * inputs * PANEL) };
            let mut row = first;
            while row < end {
                let count = TILE.min(end - row);
                let x = &x[row * inputs..(row + count) * inputs];
                let at = (row, panel);
                match count {
                    6 => tile::<S, T, 6>(s, panel_weights, inputs, x, y, at),
                    5 => tile::<S, T, 5>(s, panel_weights, inputs, x, y, at),
                    4 => tile::<S, T, 4>(s, panel_weights, inputs, x, y, at),
                    3 => tile::<S, T, 3>(s, panel_weights, inputs, x, y, at),
                    2 => tile::<S, T, 2>(s, panel_weights, inputs, x, y, at),
                    _ => tile::<S, T, 1>(s, panel_weights, inputs, x, y, at),
                }
                row += count;
            }
        }
    }
}

/// `R` rows times one panel; `at` is the first row and the panel.
#[inline(always)]
fn tile<S: Simd, T: Element, const R: usize>(s: S, weights: *const T, inputs: usize, x: &[f32], y: Output, at: (usize, usize)) {
    assert_eq!(x.len(), R * inputs);
    let mut sums = [[s.splat(0.0); 2]; R];
    for i in 0..inputs {
        // SAFETY: the panel has `inputs` lines of 16 weights.
        let w = unsafe { [T::load(s, weights.add(i * PANEL)), T::load(s, weights.add(i * PANEL + 8))] };
        for (r, sum) in sums.iter_mut().enumerate() {
            // SAFETY: x has R * inputs values, r < R, i < inputs.
            let x = s.splat(unsafe { *x.get_unchecked(r * inputs + i) });
            sum[0] = s.fma(x, w[0], sum[0]);
            sum[1] = s.fma(x, w[1], sum[1]);
        }
    }
    let (row, panel) = at;
    for (r, sum) in sums.into_iter().enumerate() {
        let mut line = [0.0f32; PANEL];
        // SAFETY: sixteen values have room.
        unsafe {
            s.store(line.as_mut_ptr(), sum[0]);
            s.store(line.as_mut_ptr().add(8), sum[1]);
        }
        // SAFETY: no other thread writes this panel's columns.
        unsafe { y.write(row + r, panel * PANEL, &line) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Scalar;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        (0..n)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                (state as f32 / u32::MAX as f32) * 2.0 - 1.0
            })
            .collect()
    }

    /// One chain of fused multiply-adds per output.
    fn reference(x: &[f32], w: &[f32], rows: usize, outputs: usize, inputs: usize) -> Vec<f32> {
        let dot = |r: usize, o: usize| (0..inputs).fold(0.0f32, |sum, i| x[r * inputs + i].mul_add(w[o * inputs + i], sum));
        (0..rows).flat_map(|r| (0..outputs).map(move |o| (r, o))).map(|(r, o)| dot(r, o)).collect()
    }

    #[test]
    fn every_shape_gives_the_reference_bit_for_bit() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for (rows, outputs, inputs) in
            [(1, 16, 8), (1, 1, 1), (2, 17, 9), (6, 32, 64), (7, 49, 33), (13, 576, 72), (100, 40, 700), (1, 1000, 64), (0, 16, 8)]
        {
            let (x, w) = (noise(rows * inputs, 1), noise(outputs * inputs, 2));
            let packed = PackedMatrix::from_f32(&w, outputs, inputs);
            let want = reference(&x, &w, rows, outputs, inputs);
            let mut y = vec![f32::NAN; rows * outputs];
            packed.multiply(&x, rows, &mut y);
            assert_eq!(y, want, "{rows} x {outputs} x {inputs}");
            let mut parallel = vec![f32::NAN; rows * outputs];
            pool.install(|| packed.multiply(&x, rows, &mut parallel));
            assert_eq!(parallel, want);
            let mut scalar = vec![f32::NAN; rows * outputs];
            if let Lines::F32(lines) = &packed.lines {
                let y = Output::new(&mut scalar, outputs);
                multiply_panels::<Scalar, f32>(Scalar, lines.as_ptr().cast(), inputs, &x, rows, y, 0..outputs.div_ceil(PANEL));
            }
            assert_eq!(scalar, want);
        }
    }

    #[test]
    fn narrow_weights_multiply_as_their_f32_values() {
        let (rows, outputs, inputs) = (5, 40, 72);
        let (x, w) = (noise(rows * inputs, 3), noise(outputs * inputs, 4));
        let product = |packed: &PackedMatrix| {
            let mut y = vec![0.0; rows * outputs];
            packed.multiply(&x, rows, &mut y);
            y
        };
        let b: Vec<bf16> = w.iter().map(|&w| bf16::from_f32(w)).collect();
        let widened: Vec<f32> = b.iter().map(|w| w.to_f32()).collect();
        assert_eq!(product(&PackedMatrix::from_bf16(&b, outputs, inputs)), reference(&x, &widened, rows, outputs, inputs));
        let h: Vec<f16> = w.iter().map(|&w| f16::from_f32(w)).collect();
        let widened: Vec<f32> = h.iter().map(|w| w.to_f32()).collect();
        let packed = PackedMatrix::from_f16(&h, outputs, inputs);
        assert_eq!(product(&packed), reference(&x, &widened, rows, outputs, inputs));
        let mut row = vec![0.0; inputs];
        packed.row(33, &mut row);
        assert_eq!(row, widened[33 * inputs..34 * inputs]);
    }
}
