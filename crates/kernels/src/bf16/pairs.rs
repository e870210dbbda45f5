//! With AVX-512 BF16: two links of a chain an instruction.

use std::ops::Range;

use super::rows::BLOCK_ROWS;
use super::{Bf16Matrix, GROUP, Line, PAIRS};
use crate::avx512_bf16::Avx512Bf16;
use crate::destination::{Destination, PANEL, even};

/// Bytes of `x` that stay in the second-level cache while panels pass.
const X_BLOCK: usize = 256 << 10;
/// Rows of a tile: with two panels and two chains 24 sums, of 32 registers.
const MOST: usize = 6;

/// The product's columns of `panels`; `x` as [`super::rows::HalfRows::Pairs`].
pub(super) fn multiply(unit: Avx512Bf16, w: &Bf16Matrix, x: &[u32], to: Destination<'_>, panels: Range<usize>) {
    unit.run(
        #[inline(always)]
        || {
            let (pairs, lines) = (w.groups() * PAIRS, w.groups() * PAIRS);
            let each = (X_BLOCK / 2 / (w.groups() * GROUP).max(1) / BLOCK_ROWS).max(1) * BLOCK_ROWS;
            for first in (0..to.rows).step_by(each) {
                let blocks = (first..(first + each).min(to.rows)).step_by(BLOCK_ROWS);
                for panel in panels.clone().step_by(2) {
                    let count = 2.min(panels.end - panel);
                    let lines = &w.lines[panel * lines..(panel + count) * lines];
                    for first in blocks.clone() {
                        let rows = BLOCK_ROWS.min(to.rows - first);
                        let columns = &x[first * pairs..(first + rows) * pairs];
                        let mut row = 0;
                        while row < rows {
                            let at = At { columns, rows, first, row, panel };
                            let tall = even(rows - row, MOST);
                            macro_rules! rows {
                                ($($n:literal)*) => {
                                    match (tall, count) {
                                        $(($n, 2) => tile::<$n, 2>(unit, lines, to, at),
                                        ($n, _) => tile::<$n, 1>(unit, lines, to, at),)*
                                        _ => unreachable!("a tile has at most 6 rows"),
                                    }
                                };
                            }
                            rows!(1 2 3 4 5 6);
                            row += tall;
                        }
                    }
                }
            }
        },
    );
}

/// Where a tile lies: the block of `x` with its rows and its first row, the tile's first row in it, its first panel.
#[derive(Clone, Copy)]
struct At<'a> {
    /// `[groups * 16, rows]`
    columns: &'a [u32],
    rows: usize,
    first: usize,
    row: usize,
    panel: usize,
}

/// `R` rows times the outputs of `P` panels.
#[allow(clippy::needless_range_loop)] // a row's or a panel's place in several arrays
#[inline(always)]
fn tile<const R: usize, const P: usize>(unit: Avx512Bf16, lines: &[Line], to: Destination<'_>, at: At<'_>) {
    let At { columns, rows, first, row, panel } = at;
    let groups = columns.len() / rows / PAIRS;
    assert!(row + R <= rows && lines.len() == P * groups * PAIRS);
    let mut totals = [[unit.zero(); P]; R];
    for g in 0..groups {
        let mut chains = [[[unit.zero(); P]; R]; 2];
        for pair in (g * PAIRS..(g + 1) * PAIRS).step_by(2) {
            let mut line = [[unit.zero_pairs(); P]; 2];
            for p in 0..P {
                // SAFETY: there are 16 lines for each group and panel.
                let both = unsafe { unit.load_links(lines.as_ptr().add(p * groups * PAIRS + pair).cast()) };
                (line[0][p], line[1][p]) = (both[0], both[1]);
            }
            for odd in 0..2 {
                for r in 0..R {
                    // SAFETY: the block has `rows` values for each pair.
                    let value = unit.splat(unsafe { *columns.get_unchecked((pair + odd) * rows + row + r) });
                    for p in 0..P {
                        chains[odd][r][p] = unit.two_links(chains[odd][r][p], line[odd][p], value);
                    }
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                totals[r][p] = unit.add(totals[r][p], unit.add(chains[0][r][p], chains[1][r][p]));
            }
        }
    }
    for (r, totals) in totals.into_iter().enumerate() {
        for (p, total) in totals.into_iter().enumerate() {
            // SAFETY: this thread alone has these panels.
            unsafe { to.write(unit.avx512(), first + row + r, (panel + p) * PANEL, total) };
        }
    }
}
