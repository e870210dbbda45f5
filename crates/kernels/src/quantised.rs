//! Quantised weight matrices.
//!
//! Products within a group of 32 weights (16 in Q6_K) are summed exactly, as integers; groups are summed as f32 from
//! input 0 to the last, one chain for each output. So a row's result does not depend on the rows beside it.
//!
//! Weights are repacked at load into panels of 16 output columns whose codes lie in the order in which
//! [`Simd::dot_u4`] and [`Simd::dot_i8`] read them.

use std::cell::RefCell;

use crate::activations::{Activations, GROUP};
use crate::disjoint::Disjoint;
use crate::ggml::BlockFormat;
use crate::pool::Pool;
use crate::product::{PANEL, Target, even};
use crate::simd::{LINE, Simd};

/// Bytes of rounded `x` that stay in the second-level cache while panels pass.
const X_BLOCK: usize = 256 << 10;

/// 64 bytes of codes: four inputs (eight, in halves) of 16 outputs.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; LINE]);

/// Scales or minima, `[panel][group][16]`.
enum Factors {
    /// As the file has them.
    F16(Vec<[u16; PANEL]>),
    /// Products of a block's scale and a group's, which half precision does not hold.
    F32(Vec<[f32; PANEL]>),
}

/// A quantised weight matrix `[out, in]`, packed for the CPU.
pub struct QuantisedMatrix {
    format: BlockFormat,
    outputs: usize,
    inputs: usize,
    /// `[panel][group][line]`
    codes: Vec<Line>,
    scales: Factors,
    mins: Option<Factors>,
}

impl Factors {
    fn new(format: BlockFormat, count: usize) -> Self {
        if format.block() == GROUP { Self::F16(vec![[0; PANEL]; count]) } else { Self::F32(vec![[0.0; PANEL]; count]) }
    }

    fn set(&mut self, at: usize, column: usize, value: f32) {
        match self {
            Self::F16(all) => all[at][column] = half::f16::from_f32(value).to_bits(),
            Self::F32(all) => all[at][column] = value,
        }
    }

    fn get(&self, at: usize, column: usize) -> f32 {
        match self {
            Self::F16(all) => half::f16::from_bits(all[at][column]).to_f32(),
            Self::F32(all) => all[at][column],
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F16(all) => size_of_val(all.as_slice()),
            Self::F32(all) => size_of_val(all.as_slice()),
        }
    }

    /// `LANES` of the factors `at`, from column `column` on.
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, at: usize, column: usize) -> S::V {
        debug_assert!(column + S::LANES <= PANEL);
        match self {
            // SAFETY: 16 values are there, `column` leaves `LANES` of them.
            Self::F16(all) => unsafe { s.load_f16(all[at].as_ptr().add(column)) },
            // SAFETY: as above.
            Self::F32(all) => unsafe { s.load(all[at].as_ptr().add(column)) },
        }
    }
}

impl QuantisedMatrix {
    /// Packs `[outputs, inputs]` weights from the blocks of a GGUF file; `None` where `bytes` are not as many as that takes.
    pub fn from_blocks(pool: &Pool, format: BlockFormat, bytes: &[u8], outputs: usize, inputs: usize) -> Option<Self> {
        let row_bytes = inputs / format.block() * format.bytes();
        if inputs == 0 || !inputs.is_multiple_of(format.block()) || bytes.len() != outputs * row_bytes {
            return None;
        }
        let (groups, lines, panels) = (inputs / format.group(), format.lines(), outputs.div_ceil(PANEL));
        let mut codes = vec![Line([0; LINE]); panels * groups * lines];
        let mut scales = Factors::new(format, panels * groups);
        let mut mins = format.has_min().then(|| Factors::new(format, panels * groups));
        for (o, row) in bytes.chunks_exact(row_bytes).enumerate() {
            for g in 0..groups {
                let (scale, min) = format.factors(row, g);
                scales.set(o / PANEL * groups + g, o % PANEL, scale);
                if let Some(mins) = &mut mins {
                    mins.set(o / PANEL * groups + g, o % PANEL, min);
                }
            }
        }
        let to = Disjoint::new(&mut codes);
        pool.run(panels, |panel| {
            // SAFETY: each panel is written once.
            let panel_lines = unsafe { to.part(panel * groups * lines, groups * lines) };
            for (column, row) in bytes[panel * PANEL * row_bytes..].chunks_exact(row_bytes).take(PANEL).enumerate() {
                for (g, lines) in panel_lines.chunks_exact_mut(lines).enumerate() {
                    let codes = format.codes(row, g);
                    for (l, line) in lines.iter_mut().enumerate() {
                        for i in 0..4 {
                            let code = |at: usize| codes[at + l * 4 + i];
                            line.0[column * 4 + i] = if format.four_bits() { code(0) | code(16) << 4 } else { code(0) };
                        }
                    }
                }
            }
        });
        Some(Self { format, outputs, inputs, codes, scales, mins })
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(self.codes.as_slice()) + self.scales.bytes() + self.mins.as_ref().map_or(0, Factors::bytes)
    }

    pub(crate) fn row(&self, output: usize, to: &mut [f32]) {
        let (panel, column) = (output / PANEL, output % PANEL);
        let (group, lines) = (self.format.group(), self.format.lines());
        for (g, to) in to.chunks_exact_mut(group).enumerate() {
            let at = panel * (self.inputs / group) + g;
            let (scale, min) = (self.scales.get(at, column), self.mins.as_ref().map_or(0.0, |m| m.get(at, column)));
            for (i, to) in to.iter_mut().enumerate() {
                let code = if self.format.four_bits() {
                    self.codes[at * lines + i % 16 / 4].0[column * 4 + i % 4] >> (i / 16 * 4) & 15
                } else {
                    self.codes[at * lines + i / 4].0[column * 4 + i % 4]
                };
                *to = scale * (i32::from(code) - self.format.zero()) as f32 + min;
            }
        }
    }

    /// The product's columns of `panels`.
    #[inline(always)]
    pub(crate) fn multiply<S: Simd>(&self, s: S, x: &Activations, to: Target<'_>, panels: std::ops::Range<usize>) {
        let (rows, inputs) = (to.rows(), self.inputs);
        assert!(x.width() == inputs && x.rows() == rows && panels.end * PANEL < self.outputs + PANEL);
        // With sixteen lanes taking halves of bytes apart costs as much as multiplying them: many rows share that work.
        let spread = S::LANES == 16 && self.format.four_bits() && rows >= SPREAD_ROWS;
        let four = self.format.four_bits() && !spread;
        // More rows would not fit the registers.
        let most = match (S::LANES, four) {
            (16, false) => 8,
            _ => 4,
        };
        let per_panel = inputs / self.format.group() * self.format.lines();
        let block = (X_BLOCK / inputs / most).max(1) * most;
        // Taken out, since what runs in a closure is not compiled for this vector unit.
        let mut scratch = SPREAD.take();
        for first in (0..rows).step_by(block) {
            let end = (first + block).min(rows);
            for panel in panels.clone() {
                let mut codes = &self.codes[panel * per_panel..(panel + 1) * per_panel];
                if spread {
                    spread_halves(s, codes, self.format.zero(), &mut scratch);
                    codes = &scratch;
                }
                let mut row = first;
                while row < end {
                    let count = even(end - row, most);
                    for column in (0..PANEL).step_by(S::LANES) {
                        let at = At { row, panel, column };
                        macro_rules! rows {
                            ($($n:literal)*) => {
                                match count {
                                    $($n if four => tile::<S, $n, true>(s, self, codes, x, to, at),
                                    $n => tile::<S, $n, false>(s, self, codes, x, to, at),)*
                                    _ => unreachable!("a tile has at most 8 rows"),
                                }
                            };
                        }
                        rows!(1 2 3 4 5 6 7 8);
                    }
                    row += count;
                }
            }
        }
        SPREAD.set(scratch);
    }
}

/// Rows from which on four-bit codes are spread to bytes before they are multiplied.
const SPREAD_ROWS: usize = 5;

thread_local! {
    /// One panel's codes, spread.
    static SPREAD: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Four-bit codes of a panel as bytes that stand for the same weights with a zero of 128: eight lines for each four.
#[inline(always)]
fn spread_halves<S: Simd>(_: S, codes: &[Line], zero: i32, to: &mut Vec<Line>) {
    let more = (128 - zero) as u8;
    to.resize(codes.len() * 2, Line([0; LINE]));
    for (group, to) in codes.as_chunks::<4>().0.iter().zip(to.as_chunks_mut::<8>().0) {
        for (l, line) in group.iter().enumerate() {
            for (i, both) in line.0.iter().enumerate() {
                to[l].0[i] = (both & 15) + more;
                to[4 + l].0[i] = (both >> 4) + more;
            }
        }
    }
}

/// Where a tile lies: its first row, its panel, its first column in the panel.
#[derive(Clone, Copy)]
struct At {
    row: usize,
    panel: usize,
    column: usize,
}

/// `R` rows times `LANES` outputs of one panel, whose codes are `codes`: halves of bytes if `FOUR`, else bytes with a zero of 128.
#[inline(always)]
fn tile<S: Simd, const R: usize, const FOUR: bool>(s: S, w: &QuantisedMatrix, codes: &[Line], x: &Activations, to: Target<'_>, at: At) {
    let (group, zero) = (w.format.group(), w.format.zero());
    let lines = if FOUR { 4 } else { group / 4 };
    let groups = w.inputs / group;
    let first = at.panel * groups;
    let codes = codes[..groups * lines].as_ptr().cast::<u8>();
    let x_codes: [&[i8]; R] = std::array::from_fn(|r| &x.codes[(at.row + r) * w.inputs..][..w.inputs]);
    let x_scales: [&[f32]; R] = std::array::from_fn(|r| &x.scales[(at.row + r) * (w.inputs / GROUP)..][..w.inputs / GROUP]);
    let x_sums: [&[i32]; R] = std::array::from_fn(|r| &x.sums[(at.row + r) * (w.inputs / 16)..][..w.inputs / 16]);
    // A group's place among the scales (of 32) and the sums (of 16).
    let per_scale = GROUP / group;

    let mut totals = [s.splat(0.0); R];
    for g in 0..groups {
        let sums: [i32; R] = std::array::from_fn(|r| if per_scale == 1 { x_sums[r][g * 2] + x_sums[r][g * 2 + 1] } else { x_sums[r][g] });
        // SAFETY: a group has `lines` lines of 64 bytes, of which `column` leaves 4 * LANES, and `group` values in each row of
        // `x`: 32 where codes have four bits, else 4 * lines. Rounded values are from -127 to 127.
        let dots = unsafe {
            let codes = codes.add(g * lines * LINE + at.column * 4);
            let values = x_codes.map(|x| x.as_ptr().add(g * group));
            if FOUR { s.dot_u4(codes, values, sums.map(|sum| -zero * sum)) } else { s.dot_i8(codes, lines, values, sums) }
        };
        let scale = w.scales.load(s, first + g, at.column);
        for r in 0..R {
            totals[r] = s.fma(s.to_f32(dots[r]), s.mul(scale, s.splat(x_scales[r][g / per_scale])), totals[r]);
        }
        if let Some(mins) = &w.mins {
            let min = mins.load(s, first + g, at.column);
            for r in 0..R {
                totals[r] = s.fma(min, s.splat(x_scales[r][g / per_scale] * sums[r] as f32), totals[r]);
            }
        }
    }
    for (r, total) in totals.into_iter().enumerate() {
        // SAFETY: this thread alone has this panel.
        unsafe { to.write(s, at.row + r, at.panel * PANEL + at.column, total) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::tests::blocks;

    #[test]
    fn bytes_that_are_no_such_matrix_are_refused() {
        let pool = Pool::new(1, &[]).unwrap();
        let pack = |format, bytes: &[u8], outputs, inputs| QuantisedMatrix::from_blocks(&pool, format, bytes, outputs, inputs);
        let bytes = blocks(BlockFormat::Q8_0, 8);
        assert!(pack(BlockFormat::Q8_0, &bytes, 4, 64).is_some());
        assert!(pack(BlockFormat::Q8_0, &bytes, 4, 48).is_none());
        assert!(pack(BlockFormat::Q8_0, &bytes[1..], 4, 64).is_none());
        assert!(pack(BlockFormat::Q4K, &bytes, 4, 64).is_none());
    }
}
