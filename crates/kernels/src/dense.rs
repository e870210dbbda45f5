//! Dense weight matrices: f32 or half precision.
//!
//! A matrix is repacked at load into panels of 16 output columns, `[panel][in][16]`, so that a product streams it once and
//! in order, whatever the batch. A tile of a few rows and one panel is summed over the whole width in registers: one
//! chain of fused multiply-adds per output, from input 0 to the last. That chain is the same for any number of rows and threads.

use std::ops::Range;

use half::f16;

use crate::activations::{Activations, BLOCK_ROWS};
use crate::destination::{Destination, PANEL, even};
use crate::number::{F16, Number};
use crate::packing::{Packed, Packer};
use crate::simd::Simd;

/// Bytes of `x` that stay in the second-level cache while panels pass.
const X_BLOCK: usize = 256 << 10;

/// One input's weights for the 16 outputs of a panel, aligned so that no load crosses a cache line.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Line<T>([T; PANEL]);

enum Lines {
    F32(Packed<Line<f32>>),
    F16(Packed<Line<F16>>),
}

/// A weight matrix `[out, in]`, packed for the CPU.
pub struct DenseMatrix {
    outputs: usize,
    inputs: usize,
    lines: Lines,
}

fn pack<T: Copy + Sync, N: Number>(
    packer: &Packer<'_>,
    weights: &[T],
    outputs: usize,
    inputs: usize,
    number: impl Fn(T) -> N + Sync,
) -> Packed<Line<N>> {
    assert_eq!(weights.len(), outputs * inputs, "a matrix of {outputs} x {inputs}");
    packer.panels(outputs.div_ceil(PANEL), inputs, Line([N::default(); PANEL]), |panel, lines| {
        for column in 0..PANEL.min(outputs - panel * PANEL) {
            let row = &weights[(panel * PANEL + column) * inputs..][..inputs];
            for (line, &w) in lines.iter_mut().zip(row) {
                line.0[column] = number(w);
            }
        }
    })
}

impl DenseMatrix {
    /// Packs f32 weights `[outputs, inputs]`.
    pub fn from_f32(packer: &Packer<'_>, weights: &[f32], outputs: usize, inputs: usize) -> Self {
        Self { outputs, inputs, lines: Lines::F32(pack(packer, weights, outputs, inputs, |w| w)) }
    }

    /// Packs half-precision weights `[outputs, inputs]`; products are exact in the weights and sum in f32.
    pub fn from_f16(packer: &Packer<'_>, weights: &[f16], outputs: usize, inputs: usize) -> Self {
        Self { outputs, inputs, lines: Lines::F16(pack(packer, weights, outputs, inputs, |w| F16(w.to_bits()))) }
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn bytes(&self) -> usize {
        match &self.lines {
            Lines::F32(lines) => size_of_val(&**lines),
            Lines::F16(lines) => size_of_val(&**lines),
        }
    }

    pub(crate) fn row(&self, output: usize, to: &mut [f32]) {
        fn column<N: Number>(lines: &[Line<N>], column: usize, to: &mut [f32]) {
            to.iter_mut().zip(lines).for_each(|(to, line)| *to = line.0[column].to_f32());
        }
        let first = output / PANEL * self.inputs;
        match &self.lines {
            Lines::F32(lines) => column(&lines[first..], output % PANEL, to),
            Lines::F16(lines) => column(&lines[first..], output % PANEL, to),
        }
    }

    /// The product's columns of `panels`.
    #[inline(always)]
    pub(crate) fn multiply<S: Simd>(&self, s: S, x: &Activations, to: Destination<'_>, panels: Range<usize>) {
        assert!(x.width() == self.inputs && x.rows() == to.rows);
        match &self.lines {
            Lines::F32(lines) => multiply(s, lines, x, to, panels),
            Lines::F16(lines) => multiply(s, lines, x, to, panels),
        }
    }
}

#[inline(always)]
fn multiply<S: Simd, T: Number>(s: S, lines: &[Line<T>], x: &Activations, to: Destination<'_>, panels: Range<usize>) {
    let inputs = x.width();
    let each = (X_BLOCK / 4 / inputs.max(1) / BLOCK_ROWS).max(1) * BLOCK_ROWS;
    for first in (0..to.rows).step_by(each) {
        let blocks = (first..(first + each).min(to.rows)).step_by(BLOCK_ROWS);
        let mut panel = panels.start;
        while panel < panels.end {
            // Two vectors share the loads of `x`: two panels with sixteen lanes, both halves of one with eight.
            let two = S::LANES == 16 && panel + 1 < panels.end;
            let count = if two { 2 } else { 1 };
            let lines = &lines[panel * inputs..(panel + count) * inputs];
            for first in blocks.clone() {
                let (rows, columns) = x.columns(first);
                let most = if S::LANES == 16 { 12 } else { 6 };
                let mut row = 0;
                while row < rows {
                    let count = even(rows - row, most);
                    let at = At { columns, rows, first, row, panel };
                    macro_rules! rows {
                        ($($n:literal)*) => {
                            match count {
                                $($n if S::LANES == 8 || two => tile::<S, T, $n, 2>(s, lines, to, at),
                                $n => tile::<S, T, $n, 1>(s, lines, to, at),)*
                                _ => unreachable!("a tile has at most 12 rows"),
                            }
                        };
                    }
                    rows!(1 2 3 4 5 6 7 8 9 10 11 12);
                    row += count;
                }
            }
            panel += count;
        }
    }
}

/// Where a tile lies: the block of `x` with its rows and its first row, the tile's first row in it, its first panel.
#[derive(Clone, Copy)]
struct At<'a> {
    /// `[inputs, rows]`
    columns: &'a [f32],
    rows: usize,
    first: usize,
    row: usize,
    panel: usize,
}

/// `R` rows times `P` vectors of outputs.
#[inline(always)]
fn tile<S: Simd, T: Number, const R: usize, const P: usize>(s: S, lines: &[Line<T>], to: Destination<'_>, at: At<'_>) {
    let At { columns, rows, first, row, panel } = at;
    let inputs = columns.len() / rows;
    assert!(row + R <= rows && lines.len() * PANEL == P.max(PANEL / S::LANES) * S::LANES * inputs);
    let output = |p: usize| p * S::LANES;
    let mut sums = [[s.splat(0.0); P]; R];
    for i in 0..inputs {
        let mut line = [s.splat(0.0); P];
        for (p, line) in line.iter_mut().enumerate() {
            // SAFETY: there are `inputs` lines of 16 values for each panel, together `P` vectors or more.
            *line = unsafe { T::load(s, lines.as_ptr().add(output(p) / PANEL * inputs + i).cast::<T>().add(output(p) % PANEL)) };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the block has `rows` values for each input.
            let value = s.splat(unsafe { *columns.get_unchecked(i * rows + row + r) });
            for (sum, w) in sums.iter_mut().zip(line) {
                *sum = s.fma(w, value, *sum);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (p, sum) in sums.into_iter().enumerate() {
            // SAFETY: this thread alone has these panels.
            unsafe { to.write(s, first + row + r, panel * PANEL + output(p), sum) };
        }
    }
}
