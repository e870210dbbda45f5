//! Products with a quantised weight matrix: `y = x W^T`.
//!
//! Each row of `x` is rounded to 8-bit integers in groups of 32, each group with its own scale, as llama.cpp does.
//! Products within a group are summed exactly, as integers; groups are summed as f32 from input 0 to the last, one chain
//! for each output. So a row's result does not depend on the rows beside it.
//!
//! Weights are repacked at load into panels of eight output columns whose codes lie in the order in which
//! [`Simd::dot_u4`] and [`Simd::dot_i8`] read them.

use rayon::prelude::*;

use crate::ggml::BlockFormat;
use crate::output::Output;
use crate::simd::{Simd, dispatch};
use crate::split;

/// Output columns in a panel.
const PANEL: usize = 8;
/// Rows of `x` that share a pass over a panel.
const TILE: usize = 4;
/// Inputs that share an activation scale.
const ROUNDED: usize = 32;

/// 32 bytes of codes: four inputs (eight, in halves) of eight outputs.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Line([u8; 32]);

/// A value for each output of a panel.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Eight([f32; PANEL]);

/// A quantised weight matrix `[out, in]`, packed for the CPU.
pub struct QuantisedMatrix {
    format: BlockFormat,
    outputs: usize,
    inputs: usize,
    /// `[panel][group][line]`
    codes: Vec<Line>,
    /// `[panel][group]`
    scales: Vec<Eight>,
    /// `[panel][group]`; empty where the format has none.
    mins: Vec<Eight>,
}

impl QuantisedMatrix {
    /// Packs `[outputs, inputs]` weights from the blocks of a GGUF file; `None` where `bytes` are not as many as that takes.
    pub fn from_blocks(format: BlockFormat, bytes: &[u8], outputs: usize, inputs: usize) -> Option<Self> {
        let row_bytes = inputs / format.block() * format.bytes();
        if inputs == 0 || !inputs.is_multiple_of(format.block()) || bytes.len() != outputs * row_bytes {
            return None;
        }
        let groups = inputs / format.group();
        let lines = Self::lines(format);
        let panels = outputs.div_ceil(PANEL);
        let mut matrix = Self {
            format,
            outputs,
            inputs,
            codes: vec![Line([0; 32]); panels * groups * lines],
            scales: vec![Eight([0.0; PANEL]); panels * groups],
            mins: vec![Eight([0.0; PANEL]); if format.has_min() { panels * groups } else { 0 }],
        };
        let rows_of = |panel: usize| bytes[panel * PANEL * row_bytes..].chunks_exact(row_bytes).take(PANEL).enumerate();
        matrix.codes.par_chunks_mut(groups * lines).zip(matrix.scales.par_chunks_mut(groups)).enumerate().for_each(
            |(panel, (codes, scales))| {
                for (column, row) in rows_of(panel) {
                    for (g, (codes, scale)) in codes.chunks_exact_mut(lines).zip(scales.iter_mut()).enumerate() {
                        let group = format.group_of(row, g);
                        scale.0[column] = group.scale;
                        for (l, line) in codes.iter_mut().enumerate() {
                            for i in 0..4 {
                                let code = |at: usize| group.codes[at + l * 4 + i] as u8;
                                line.0[column * 4 + i] = if format.four_bits() { code(0) | code(16) << 4 } else { code(0) };
                            }
                        }
                    }
                }
            },
        );
        matrix.mins.par_chunks_mut(groups).enumerate().for_each(|(panel, mins)| {
            for (column, row) in rows_of(panel) {
                mins.iter_mut().enumerate().for_each(|(g, min)| min.0[column] = format.group_of(row, g).min);
            }
        });
        Some(matrix)
    }

    /// Lines of codes in a group.
    fn lines(format: BlockFormat) -> usize {
        if format.four_bits() { 4 } else { format.group() / 4 }
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
        let (panel, column) = (output / PANEL, output % PANEL);
        let (group, lines) = (self.format.group(), Self::lines(self.format));
        for (g, to) in to.chunks_exact_mut(group).enumerate() {
            let at = panel * (self.inputs / group) + g;
            let (scale, min) = (self.scales[at].0[column], self.mins.get(at).map_or(0.0, |m| m.0[column]));
            for (i, to) in to.iter_mut().enumerate() {
                let code = if self.format.four_bits() {
                    i32::from(self.codes[at * lines + i % 16 / 4].0[column * 4 + i % 4] >> (i / 16 * 4) & 15)
                } else {
                    i32::from(self.codes[at * lines + i / 4].0[column * 4 + i % 4] as i8)
                };
                *to = scale * (code - self.format.zero()) as f32 + min;
            }
        }
    }

    /// `y = x W^T`: `x` is `[rows, inputs]`, `y` is `[rows, outputs]`. Runs on the current rayon pool.
    pub fn multiply(&self, x: &[f32], rows: usize, y: &mut [f32]) {
        assert_eq!(x.len(), rows * self.inputs, "x is [rows, inputs]");
        assert_eq!(y.len(), rows * self.outputs, "y is [rows, outputs]");
        let x = Rounded::new(x, self.inputs, self.format.group());
        let y = Output::new(y, self.outputs);
        split::panels(self.outputs.div_ceil(PANEL), rows, self.outputs * self.inputs, |panels| {
            dispatch!(multiply_panels(self, &x, rows, y, panels));
        });
    }
}

/// Rows of `x` as 8-bit integers: `scale * code`, a scale for every 32 inputs.
struct Rounded {
    /// `[rows, inputs]`, -127 to 127
    codes: Vec<i8>,
    /// `[rows, inputs / 32]`
    scales: Vec<f32>,
    /// Sums of the codes over each group of the weights, `[rows, inputs / group]`.
    sums: Vec<i32>,
}

impl Rounded {
    fn new(x: &[f32], inputs: usize, group: usize) -> Self {
        let mut codes = vec![0i8; x.len()];
        let mut scales = vec![0.0; x.len() / ROUNDED];
        let mut sums = vec![0; x.len() / group];
        let round = |codes: &mut [i8], scales: &mut [f32], sums: &mut [i32], x: &[f32]| {
            for ((codes, scale), x) in codes.chunks_exact_mut(ROUNDED).zip(scales).zip(x.chunks_exact(ROUNDED)) {
                let greatest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                *scale = greatest / 127.0;
                let inverse = if greatest > 0.0 { 127.0 / greatest } else { 0.0 };
                codes.iter_mut().zip(x).for_each(|(code, x)| *code = (x * inverse).round_ties_even() as i8);
            }
            for (sum, codes) in sums.iter_mut().zip(codes.chunks_exact(group)) {
                *sum = codes.iter().map(|c| i32::from(*c)).sum();
            }
        };
        codes
            .par_chunks_mut(inputs)
            .zip(scales.par_chunks_mut(inputs / ROUNDED))
            .zip(sums.par_chunks_mut(inputs / group).zip(x.par_chunks(inputs)))
            .with_min_len(8)
            .for_each(|((codes, scales), (sums, x))| round(codes, scales, sums, x));
        Self { codes, scales, sums }
    }
}

/// The product's columns of `panels`.
#[inline(always)]
fn multiply_panels<S: Simd>(s: S, w: &QuantisedMatrix, x: &Rounded, rows: usize, y: Output, panels: std::ops::Range<usize>) {
    for panel in panels {
        let mut row = 0;
        while row < rows {
            let count = TILE.min(rows - row);
            match count {
                4 => tile::<S, 4>(s, w, x, y, (row, panel)),
                3 => tile::<S, 3>(s, w, x, y, (row, panel)),
                2 => tile::<S, 2>(s, w, x, y, (row, panel)),
                _ => tile::<S, 1>(s, w, x, y, (row, panel)),
            }
            row += count;
        }
    }
}

/// `R` rows times one panel; `at` is the first row and the panel.
#[inline(always)]
fn tile<S: Simd, const R: usize>(s: S, w: &QuantisedMatrix, x: &Rounded, y: Output, at: (usize, usize)) {
    let (row, panel) = at;
    let (group, lines) = (w.format.group(), QuantisedMatrix::lines(w.format));
    let (groups, zero) = (w.inputs / group, w.format.zero());
    let codes = &w.codes[panel * groups * lines..][..groups * lines];
    let scales = &w.scales[panel * groups..][..groups];
    let mins = if w.mins.is_empty() { None } else { Some(&w.mins[panel * groups..][..groups]) };
    let x_codes: [&[i8]; R] = std::array::from_fn(|r| &x.codes[(row + r) * w.inputs..][..w.inputs]);
    let x_scales: [&[f32]; R] = std::array::from_fn(|r| &x.scales[(row + r) * (w.inputs / ROUNDED)..][..w.inputs / ROUNDED]);
    let x_sums: [&[i32]; R] = std::array::from_fn(|r| &x.sums[(row + r) * groups..][..groups]);

    let mut totals = [s.splat(0.0); R];
    for g in 0..groups {
        // SAFETY: a group has `lines` lines of 32 bytes in `codes` and `group` values in each row of `x`;
        // `lines` is 4 where codes have four bits, which groups of 32 have, else group / 4.
        let dots = unsafe {
            let codes = codes.as_ptr().add(g * lines);
            let values = x_codes.map(|x| x.as_ptr().add(g * group));
            if w.format.four_bits() { s.dot_u4(codes.cast(), values) } else { s.dot_i8(codes.cast(), lines, values) }
        };
        // SAFETY: eight values are there.
        let scale = unsafe { s.load(scales[g].0.as_ptr()) };
        for r in 0..R {
            let (x_scale, x_sum) = (x_scales[r][g * group / ROUNDED], x_sums[r][g]);
            totals[r] = s.fma(s.difference(dots[r], zero * x_sum), s.mul(scale, s.splat(x_scale)), totals[r]);
            if let Some(mins) = mins {
                // SAFETY: eight values are there.
                totals[r] = s.fma(unsafe { s.load(mins[g].0.as_ptr()) }, s.splat(x_scale * x_sum as f32), totals[r]);
            }
        }
    }
    for (r, total) in totals.into_iter().enumerate() {
        let mut line = [0.0f32; PANEL];
        // SAFETY: eight values have room.
        unsafe { s.store(line.as_mut_ptr(), total) };
        // SAFETY: no other thread writes this panel's columns.
        unsafe { y.write(row + r, panel * PANEL, &line) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Scalar;

    const FORMATS: [BlockFormat; 7] =
        [BlockFormat::Q4_0, BlockFormat::Q4_1, BlockFormat::Q5_0, BlockFormat::Q5_1, BlockFormat::Q8_0, BlockFormat::Q4K, BlockFormat::Q6K];

    /// Random blocks whose half-precision fields are small numbers.
    fn blocks(format: BlockFormat, count: usize) -> Vec<u8> {
        let mut state = 88_172_645_463_325_252u64;
        let mut bytes: Vec<u8> = (0..count * format.bytes())
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 24) as u8
            })
            .collect();
        let halves: &[usize] = match format {
            BlockFormat::Q6K => &[208],
            BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K => &[0, 2],
            _ => &[0],
        };
        for (b, block) in bytes.chunks_exact_mut(format.bytes()).enumerate() {
            for &at in halves {
                let value = half::f16::from_f32(((b * 37 + at) % 19) as f32 * 0.01 - 0.07);
                block[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
        }
        bytes
    }

    fn activations(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 2003) as f32 / 2003.0 - 0.5) * if i % 96 < 32 { 0.01 } else { 3.0 }).collect()
    }

    #[test]
    fn products_are_those_of_the_rows_with_rounded_activations() {
        for format in FORMATS {
            let (rows, outputs, inputs) = (5, 21, 512);
            let w = QuantisedMatrix::from_blocks(format, &blocks(format, outputs * inputs / format.block()), outputs, inputs).unwrap();
            let x = activations(rows * inputs);
            let mut y = vec![f32::NAN; rows * outputs];
            w.multiply(&x, rows, &mut y);
            let rounded = Rounded::new(&x, inputs, format.group());
            let mut weights = vec![0.0; inputs];
            for o in 0..outputs {
                w.row(o, &mut weights);
                for r in 0..rows {
                    let value = |i: usize| f64::from(rounded.codes[r * inputs + i]) * f64::from(rounded.scales[(r * inputs + i) / 32]);
                    let want: f64 = (0..inputs).map(|i| value(i) * f64::from(weights[i])).sum();
                    let size: f64 = (0..inputs).map(|i| (value(i) * f64::from(weights[i])).abs()).sum();
                    let got = f64::from(y[r * outputs + o]);
                    assert!((got - want).abs() <= 2e-6 * size + 1e-6, "{format:?} [{r}, {o}]: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_bits_in_any_company_and_on_any_lanes() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for format in FORMATS {
            let (rows, outputs, inputs) = (11, 77, 256);
            let w = QuantisedMatrix::from_blocks(format, &blocks(format, outputs * inputs / format.block()), outputs, inputs).unwrap();
            let x = activations(rows * inputs);
            let mut together = vec![f32::NAN; rows * outputs];
            pool.install(|| w.multiply(&x, rows, &mut together));
            for r in 0..rows {
                let mut alone = vec![f32::NAN; outputs];
                w.multiply(&x[r * inputs..(r + 1) * inputs], 1, &mut alone);
                assert_eq!(alone, together[r * outputs..(r + 1) * outputs], "{format:?}");
            }
            let mut scalar = vec![f32::NAN; rows * outputs];
            let rounded = Rounded::new(&x, inputs, format.group());
            multiply_panels(Scalar, &w, &rounded, rows, Output::new(&mut scalar, outputs), 0..outputs.div_ceil(PANEL));
            assert_eq!(scalar, together, "{format:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_such_matrix_are_refused() {
        let bytes = blocks(BlockFormat::Q8_0, 8);
        assert!(QuantisedMatrix::from_blocks(BlockFormat::Q8_0, &bytes, 4, 64).is_some());
        assert!(QuantisedMatrix::from_blocks(BlockFormat::Q8_0, &bytes, 4, 48).is_none());
        assert!(QuantisedMatrix::from_blocks(BlockFormat::Q8_0, &bytes[1..], 4, 64).is_none());
        assert!(QuantisedMatrix::from_blocks(BlockFormat::Q4K, &bytes, 4, 64).is_none());
    }
}
