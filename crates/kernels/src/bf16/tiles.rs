//! With AMX: 32 rows, 32 outputs and 32 inputs in four instructions.

use std::ops::Range;

use super::rows::TILES_ROWS;
use super::{Bf16Matrix, GROUP, PAIRS};
use crate::amx::{Amx, ROWS, Sums, Tiles};
use crate::destination::{Destination, PANEL};
use crate::simd::Simd;

/// Bytes of `x` that stay in the second-level cache while panels pass.
const X_BLOCK: usize = 512 << 10;

/// The product's columns of `panels`; `x` as [`super::rows::HalfRows::Tiles`].
pub(super) fn multiply(amx: Amx, w: &Bf16Matrix, x: &[u16], to: Destination<'_>, panels: Range<usize>) {
    let (groups, width, lines) = (w.groups(), w.groups() * GROUP, w.groups() * PAIRS);
    let mut tiles = amx.tiles();
    let mut sums = Sums([[[[0.0; PANEL]; ROWS]; 2]; 2]);
    let mut shape = 0;
    let each = (X_BLOCK / 2 / width.max(1) / TILES_ROWS).max(1) * TILES_ROWS;
    for first in (0..to.rows).step_by(each) {
        let blocks = (first..(first + each).min(to.rows)).step_by(TILES_ROWS);
        for panel in panels.clone().step_by(2) {
            let two = panel + 1 < panels.end;
            let weights =
                [panel, if two { panel + 1 } else { panel }].map(|panel| w.lines[panel * lines..(panel + 1) * lines].as_ptr().cast());
            for first in blocks.clone() {
                let rows = TILES_ROWS.min(to.rows - first);
                let x = x[first * width..(first + rows) * width].as_ptr();
                if rows != shape {
                    tiles.shape(rows);
                    shape = rows;
                }
                let multiply = match (rows > ROWS, two) {
                    (false, false) => Tiles::multiply::<false, false>,
                    (false, true) => Tiles::multiply::<false, true>,
                    (true, false) => Tiles::multiply::<true, false>,
                    (true, true) => Tiles::multiply::<true, true>,
                };
                // SAFETY: the block has 32 inputs of each row for each group, a panel 16 lines for each.
                unsafe { multiply(&tiles, x, rows, weights, groups, &mut sums) };
                amx.avx512().run(
                    #[inline(always)]
                    || {
                        for row in 0..rows {
                            for (p, tile) in sums.0[row / ROWS][..if two { 2 } else { 1 }].iter().enumerate() {
                                // SAFETY: a tile's row has 16 sums; this thread alone has these panels.
                                unsafe {
                                    let total = amx.avx512().load(tile[row % ROWS].as_ptr());
                                    to.write(amx.avx512(), first + row, (panel + p) * PANEL, total);
                                }
                            }
                        }
                    },
                );
            }
        }
    }
}
