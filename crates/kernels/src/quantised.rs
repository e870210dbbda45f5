//! Quantised weight matrices.
//!
//! Products within a group of 32 weights (16 in Q6_K) are summed exactly, as integers; groups are summed as f32 from
//! input 0 to the last, one chain for each output. So a row's result does not depend on the rows beside it.
//!
//! Weights are repacked at load into panels of 16 output columns whose codes lie in the order in which
//! [`Simd::dot_u4`] and [`Simd::dot_i8`] read them.

use std::ops::Range;

use crate::activations::{Activations, BLOCK_ROWS, GROUP, RoundedBlock};
use crate::destination::{Destination, PANEL, even};
use crate::disjoint::Disjoint;
use crate::ggml::{BlockFormat, round_q8_0};
use crate::number::{F16, Number};
use crate::packing::{Packed, Packer};
use crate::simd::{LINE, Simd};

/// Bytes of rounded `x` that stay in the second-level cache while panels pass.
const X_BLOCK: usize = 256 << 10;

/// 64 bytes of codes: four inputs (eight, in halves) of 16 outputs.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; LINE]);

/// Scales and minima, in each of the formats' precision.
enum Factors {
    /// As the file has them.
    F16(Pairs<F16>),
    /// Products of a block's scale and a group's, which half precision does not hold.
    F32(Pairs<f32>),
}

/// Both `[panel][group][16]`; no minima where the format has none.
struct Pairs<T> {
    scales: Packed<[T; PANEL]>,
    mins: Packed<[T; PANEL]>,
}

/// A quantised weight matrix `[out, in]`, packed for the CPU.
pub struct QuantisedMatrix {
    format: BlockFormat,
    outputs: usize,
    inputs: usize,
    /// `[panel][group][line]`
    codes: Packed<Line>,
    factors: Factors,
}

impl<T: Number> Pairs<T> {
    /// Of `factors` of a panel's group and column.
    fn new(
        packer: &Packer<'_>,
        format: BlockFormat,
        panels: usize,
        groups: usize,
        factors: impl Fn(usize, usize, usize) -> (f32, f32) + Sync,
    ) -> Self {
        let pack = |groups, which: fn((f32, f32)) -> f32| {
            packer.panels(panels, groups, [T::default(); PANEL], |panel, values| {
                for (group, values) in values.iter_mut().enumerate() {
                    values.iter_mut().enumerate().for_each(|(column, value)| *value = T::from_f32(which(factors(panel, group, column))));
                }
            })
        };
        Self { scales: pack(groups, |(scale, _)| scale), mins: pack(if format.has_min() { groups } else { 0 }, |(_, min)| min) }
    }

    fn get(&self, at: usize, column: usize) -> (f32, f32) {
        (self.scales[at][column].to_f32(), self.mins.get(at).map_or(0.0, |min| min[column].to_f32()))
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.scales) + size_of_val(&*self.mins)
    }
}

impl Factors {
    fn get(&self, at: usize, column: usize) -> (f32, f32) {
        match self {
            Self::F16(all) => all.get(at, column),
            Self::F32(all) => all.get(at, column),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F16(all) => all.bytes(),
            Self::F32(all) => all.bytes(),
        }
    }
}

impl QuantisedMatrix {
    /// Packs `[outputs, inputs]` weights from the blocks of a GGUF file; `None` where `bytes` are not as many as that takes.
    pub fn from_blocks(packer: &Packer<'_>, format: BlockFormat, bytes: &[u8], outputs: usize, inputs: usize) -> Option<Self> {
        let row_bytes = inputs / format.block() * format.bytes();
        if inputs == 0 || !inputs.is_multiple_of(format.block()) || bytes.len() != outputs * row_bytes {
            return None;
        }
        let (groups, lines, panels) = (inputs / format.group(), format.lines(), outputs.div_ceil(PANEL));
        let row = |panel: usize, column: usize| bytes.get((panel * PANEL + column) * row_bytes..)?.get(..row_bytes);
        let of_group = |panel, group, column| row(panel, column).map_or((0.0, 0.0), |row| format.factors(row, group));
        let factors = if format.block() == GROUP {
            Factors::F16(Pairs::new(packer, format, panels, groups, of_group))
        } else {
            Factors::F32(Pairs::new(packer, format, panels, groups, of_group))
        };
        let codes = packer.panels(panels, groups * lines, Line([0; LINE]), |panel, of_panel| {
            for (group, of_group) in of_panel.chunks_exact_mut(lines).enumerate() {
                for (column, row) in (0..PANEL).map_while(|column| Some((column, row(panel, column)?))) {
                    let codes = format.codes(row, group);
                    for (l, line) in of_group.iter_mut().enumerate() {
                        for i in 0..4 {
                            let code = |at: usize| codes[at + l * 4 + i];
                            line.0[column * 4 + i] = if format.four_bits() { code(0) | code(16) << 4 } else { code(0) };
                        }
                    }
                }
            }
        });
        Some(Self { format, outputs, inputs, codes, factors })
    }

    /// Packs numbers `[outputs, inputs]`, rounded to [`BlockFormat::Q8_0`] as llama.cpp does it; `None` where rows are not whole groups, or
    /// there are not as many numbers.
    pub fn rounded<T: Copy + Sync>(
        packer: &Packer<'_>,
        numbers: &[T],
        to_f32: impl Fn(T) -> f32 + Sync,
        outputs: usize,
        inputs: usize,
    ) -> Option<Self> {
        let format = BlockFormat::Q8_0;
        if inputs == 0 || !inputs.is_multiple_of(format.block()) || numbers.len() != outputs * inputs {
            return None;
        }
        let row_bytes = inputs / format.block() * format.bytes();
        let mut bytes = vec![0; outputs * row_bytes];
        let to = Disjoint::new(&mut bytes);
        packer.pool().rows(outputs, inputs, |row| {
            // SAFETY: each row is written once, by the thread that has it.
            let to = unsafe { to.part(row * row_bytes, row_bytes) };
            let groups = numbers[row * inputs..(row + 1) * inputs].chunks_exact(format.block());
            for (group, block) in groups.zip(to.chunks_exact_mut(format.bytes())) {
                round_q8_0(std::array::from_fn(|i| to_f32(group[i])), block);
            }
        });
        Self::from_blocks(packer, format, &bytes, outputs, inputs)
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.codes) + self.factors.bytes()
    }

    pub(crate) fn row(&self, output: usize, to: &mut [f32]) {
        let (panel, column) = (output / PANEL, output % PANEL);
        let (group, lines) = (self.format.group(), self.format.lines());
        for (g, to) in to.chunks_exact_mut(group).enumerate() {
            let at = panel * (self.inputs / group) + g;
            let (scale, min) = self.factors.get(at, column);
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
    pub(crate) fn multiply<S: Simd>(&self, s: S, x: &Activations, to: Destination<'_>, panels: Range<usize>) {
        assert!(x.width() == self.inputs && x.rows() == to.rows && panels.end * PANEL < self.outputs + PANEL);
        let each = (X_BLOCK / self.inputs / BLOCK_ROWS).max(1) * BLOCK_ROWS;
        for begin in (0..to.rows).step_by(each) {
            let blocks = (begin..(begin + each).min(to.rows)).step_by(BLOCK_ROWS);
            let mut panel = panels.start;
            while panel < panels.end {
                // With sixteen lanes there are registers for two panels, which share the loads of `x`. One row has next to none to
                // share, and memory is read faster in one run than in two.
                let two = S::LANES == 16 && to.rows > 1 && panel + 1 < panels.end;
                for first in blocks.clone() {
                    let block = x.rounded(first);
                    let most = if two { 6 } else { 4 };
                    let mut row = 0;
                    while row < block.rows {
                        let count = even(block.rows - row, most);
                        for column in (0..PANEL).step_by(S::LANES) {
                            // With several rows the vector unit is what is waited for: the next panels' codes come from memory meanwhile.
                            let ahead = to.rows > 1 && first == begin && row == 0 && column == 0;
                            let at = At { block, first, row, panel, column, ahead };
                            macro_rules! rows {
                                ($($n:literal)*) => {
                                    match count {
                                        $($n if two => self.tile::<S, $n, 2>(s, to, at),
                                        $n => self.tile::<S, $n, 1>(s, to, at),)*
                                        _ => unreachable!("a tile has at most 6 rows"),
                                    }
                                };
                            }
                            rows!(1 2 3 4 5 6);
                        }
                        row += count;
                    }
                }
                panel += if two { 2 } else { 1 };
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const P: usize>(&self, s: S, to: Destination<'_>, at: At<'_>) {
        match (&self.factors, self.format.zero()) {
            (Factors::F16(f), 0) => tile::<S, Fours<false>, _, R, P>(s, self, f, to, at),
            (Factors::F16(f), 8) => tile::<S, Fours<true>, _, R, P>(s, self, f, to, at),
            (Factors::F16(f), _) => tile::<S, Bytes<8>, _, R, P>(s, self, f, to, at),
            (Factors::F32(f), 0) => tile::<S, Fours<false>, _, R, P>(s, self, f, to, at),
            (Factors::F32(f), _) => tile::<S, Bytes<4>, _, R, P>(s, self, f, to, at),
        }
    }
}

/// Where a tile lies: the block of `x` with its first row, the tile's first row in it, its first panel, its first column in the panel;
/// and whether it fetches the codes of the panels after its own into the second-level cache.
#[derive(Clone, Copy)]
struct At<'a> {
    block: RoundedBlock<'a>,
    first: usize,
    row: usize,
    panel: usize,
    column: usize,
    ahead: bool,
}

/// How a group's codes are stored.
trait Codes {
    /// Lines of a group.
    const LINES: usize;
    /// Inputs of a group.
    const GROUP: usize;

    /// For each of `R` rows from `row` on: the products of group `group`'s codes of `P` panels, each less its zero, with the row's values.
    ///
    /// # Safety
    /// `LINES` lines of codes are there; the block has these rows.
    unsafe fn dots<S: Simd, const R: usize, const P: usize>(
        s: S,
        codes: [*const u8; P],
        x: RoundedBlock<'_>,
        group: usize,
        row: usize,
    ) -> [[S::I; P]; R];
}

/// Halves of bytes, with a zero of 8 or without one.
struct Fours<const ZERO: bool>;

impl<const ZERO: bool> Codes for Fours<ZERO> {
    const LINES: usize = 4;
    const GROUP: usize = GROUP;

    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const P: usize>(
        s: S,
        codes: [*const u8; P],
        x: RoundedBlock<'_>,
        group: usize,
        row: usize,
    ) -> [[S::I; P]; R] {
        let at = group * x.rows + row;
        // SAFETY: the caller's promise; rounded values are from -127 to 127.
        unsafe { s.dot_u4(codes, x.codes.as_ptr().add(at * GROUP), if ZERO { Some(x.by_8.as_ptr().add(at)) } else { None }) }
    }
}

/// Bytes with a zero of 128.
struct Bytes<const LINES: usize>;

impl<const LINES: usize> Codes for Bytes<LINES> {
    const LINES: usize = LINES;
    const GROUP: usize = 4 * LINES;

    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const P: usize>(
        s: S,
        codes: [*const u8; P],
        x: RoundedBlock<'_>,
        group: usize,
        row: usize,
    ) -> [[S::I; P]; R] {
        let at = group * x.rows + row;
        // SAFETY: the caller's promise; rounded values are from -127 to 127. A group of 16 is the half of one of `x`.
        unsafe {
            if Self::GROUP == GROUP {
                s.dot_i8::<R, P, LINES>(codes, x.codes.as_ptr().add(at * GROUP), x.by_128.as_ptr().add(at))
            } else {
                let values = x.codes.as_ptr().add((group / 2 * x.rows + row) * GROUP + group % 2 * 16);
                s.dot_i8::<R, P, LINES>(codes, values, x.halves_by_128.as_ptr().add(at))
            }
        }
    }
}

/// `R` rows times `LANES` outputs of each of `P` panels.
#[allow(clippy::needless_range_loop)] // a row's or a panel's place in several arrays
#[inline(always)]
fn tile<S: Simd, C: Codes, T: Number, const R: usize, const P: usize>(
    s: S,
    w: &QuantisedMatrix,
    factors: &Pairs<T>,
    to: Destination<'_>,
    at: At<'_>,
) {
    let At { block: x, first, row, panel, column, ahead } = at;
    let groups = w.inputs / C::GROUP;
    assert!(row + R <= x.rows && x.scales.len() == w.inputs / GROUP * x.rows && column + S::LANES <= PANEL);
    assert!((panel + P) * groups * C::LINES <= w.codes.len() && (panel + P) * groups <= factors.scales.len());
    let has_mins = factors.mins.len() == factors.scales.len();
    // Loops rather than closures: what runs in a closure that is not inlined is not compiled for this vector unit.
    let mut totals = [[s.splat(0.0); P]; R];
    for g in 0..groups {
        let of_x = g * C::GROUP / GROUP * x.rows + row;
        // SAFETY: the panels have `LINES` lines and 16 scales for each group, of which `column` leaves `LANES` outputs'; `x` has these
        // rows, with a scale for each group of 32. Formats with minima have as many minima as scales, and groups of 32.
        unsafe {
            let mut codes = [w.codes.as_ptr().cast::<u8>(); P];
            let mut scales = [s.splat(0.0); P];
            for p in 0..P {
                let group = (panel + p) * groups + g;
                codes[p] = codes[p].add(group * C::LINES * LINE + column * 4);
                scales[p] = T::load(s, factors.scales.as_ptr().add(group).cast::<T>().add(column));
            }
            if ahead {
                for codes in codes {
                    for line in 0..C::LINES {
                        s.prefetch(codes.wrapping_add((P * groups * C::LINES + line) * LINE));
                    }
                }
            }
            let dots: [[S::I; P]; R] = C::dots(s, codes, x, g, row);
            for r in 0..R {
                let scale = s.splat(*x.scales.get_unchecked(of_x + r));
                for p in 0..P {
                    totals[r][p] = s.fma(s.to_f32(dots[r][p]), s.mul(scales[p], scale), totals[r][p]);
                }
            }
            if has_mins {
                let mut mins = [s.splat(0.0); P];
                for p in 0..P {
                    mins[p] = T::load(s, factors.mins.as_ptr().add((panel + p) * groups + g).cast::<T>().add(column));
                }
                for r in 0..R {
                    let sum = s.splat(*x.sums.get_unchecked(of_x + r));
                    for p in 0..P {
                        totals[r][p] = s.fma(mins[p], sum, totals[r][p]);
                    }
                }
            }
        }
    }
    for (r, totals) in totals.into_iter().enumerate() {
        for (p, total) in totals.into_iter().enumerate() {
            // SAFETY: this thread alone has these panels.
            unsafe { to.write(s, first + row + r, (panel + p) * PANEL + column, total) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::tests::blocks;
    use crate::thread_pool::ThreadPool;

    #[test]
    fn bytes_that_are_no_such_matrix_are_refused() {
        let pool = ThreadPool::new(1, &[]).unwrap();
        let pack =
            |format, bytes: &[u8], outputs, inputs| QuantisedMatrix::from_blocks(&Packer::new(&pool), format, bytes, outputs, inputs);
        let bytes = blocks(BlockFormat::Q8_0, 8);
        assert!(pack(BlockFormat::Q8_0, &bytes, 4, 64).is_some());
        assert!(pack(BlockFormat::Q8_0, &bytes, 4, 48).is_none());
        assert!(pack(BlockFormat::Q8_0, &bytes[1..], 4, 64).is_none());
        assert!(pack(BlockFormat::Q4K, &bytes, 4, 64).is_none());
    }
}
