//! On any unit: one multiply-add a link.

use std::ops::Range;

use super::rows::BLOCK_ROWS;
use super::{Bf16Matrix, GROUP, Line, PAIRS};
use crate::destination::{Destination, PANEL, even};
use crate::simd::Simd;

/// Bytes of `x` that stay in the second-level cache while panels pass.
const X_BLOCK: usize = 256 << 10;

/// The product's columns of `panels`; `x` as [`super::rows::HalfRows::Singles`].
#[inline(always)]
pub(super) fn multiply<S: Simd>(s: S, w: &Bf16Matrix, x: &[f32], to: Destination<'_>, panels: Range<usize>) {
    let (width, lines) = (w.groups() * GROUP, w.groups() * PAIRS);
    let each = (X_BLOCK / 4 / width.max(1) / BLOCK_ROWS).max(1) * BLOCK_ROWS;
    for first in (0..to.rows).step_by(each) {
        let blocks = (first..(first + each).min(to.rows)).step_by(BLOCK_ROWS);
        let mut panel = panels.start;
        while panel < panels.end {
            // Two vectors share the loads of `x`: two panels with sixteen lanes, both halves of one with eight.
            let two = S::LANES == 16 && panel + 1 < panels.end;
            let count = if two { 2 } else { 1 };
            let lines = &w.lines[panel * lines..(panel + count) * lines];
            for first in blocks.clone() {
                let rows = BLOCK_ROWS.min(to.rows - first);
                let columns = &x[first * width..(first + rows) * width];
                let most = if S::LANES == 16 { 6 } else { 3 };
                let mut row = 0;
                while row < rows {
                    let count = even(rows - row, most);
                    let at = At { columns, rows, first, row, panel };
                    macro_rules! rows {
                        ($($n:literal)*) => {
                            match count {
                                $($n if S::LANES == 8 || two => tile::<S, $n, 2>(s, lines, to, at),
                                $n => tile::<S, $n, 1>(s, lines, to, at),)*
                                _ => unreachable!("a tile has at most 6 rows"),
                            }
                        };
                    }
                    rows!(1 2 3 4 5 6);
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
    /// `[groups * 32, rows]`
    columns: &'a [f32],
    rows: usize,
    first: usize,
    row: usize,
    panel: usize,
}

/// `R` rows times `P` vectors of outputs.
#[allow(clippy::needless_range_loop)] // a row's or a vector's place in several arrays
#[inline(always)]
fn tile<S: Simd, const R: usize, const P: usize>(s: S, lines: &[Line], to: Destination<'_>, at: At<'_>) {
    let At { columns, rows, first, row, panel } = at;
    let groups = columns.len() / rows / GROUP;
    assert!(row + R <= rows && lines.len() * PANEL == P.max(PANEL / S::LANES) * S::LANES * groups * PAIRS);
    let output = |p: usize| p * S::LANES;
    let mut totals = [[s.splat(0.0); P]; R];
    for g in 0..groups {
        let mut chains = [[[s.splat(0.0); P]; R]; 2];
        for pair in g * PAIRS..(g + 1) * PAIRS {
            let mut line = [[s.splat(0.0); P]; 2];
            for p in 0..P {
                let at = output(p) / PANEL * groups * PAIRS + pair;
                // SAFETY: there are 16 lines of 16 pairs for each group and panel, together `P` vectors or more.
                let [low, high] = unsafe { s.load_bf16_pairs(lines.as_ptr().add(at).cast::<u32>().add(output(p) % PANEL)) };
                (line[0][p], line[1][p]) = (low, high);
            }
            for odd in 0..2 {
                for r in 0..R {
                    // SAFETY: the block has `rows` values for each input.
                    let value = s.splat(unsafe { *columns.get_unchecked((2 * pair + odd) * rows + row + r) });
                    for p in 0..P {
                        chains[odd][r][p] = s.fma(line[odd][p], value, chains[odd][r][p]);
                    }
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                totals[r][p] = s.add(totals[r][p], s.add(chains[0][r][p], chains[1][r][p]));
            }
        }
    }
    for (r, totals) in totals.into_iter().enumerate() {
        for (p, total) in totals.into_iter().enumerate() {
            // SAFETY: this thread alone has these panels.
            unsafe { to.write(s, first + row + r, panel * PANEL + output(p), total) };
        }
    }
}
