//! With AMX: 32 rows, 32 outputs and 32 inputs in four instructions.

use std::ops::Range;

use super::rows::TILES_ROWS;
use super::{Bf16Matrix, Line, PAIRS};
use crate::amx::{Amx, ROWS, Sums};
use crate::destination::{Destination, PANEL};
use crate::simd::Simd;

/// Bytes of `x` that stay in the second-level cache while panels pass.
const X_BLOCK: usize = 512 << 10;

/// The product's columns of `panels`; `x` as [`super::rows::HalfRows::Tiles`].
pub(super) fn multiply(amx: Amx, w: &Bf16Matrix, x: &[Line], to: Destination<'_>, panels: Range<usize>) {
    let groups = w.groups();
    let panel_lines = |panel: usize| &w.lines[panel * groups * PAIRS..(panel + 1) * groups * PAIRS];
    // SAFETY: nothing that is called from here on uses tiles but this value.
    let mut tiles = unsafe { amx.tiles() };
    let mut sums = Sums::default();
    let each = (X_BLOCK / size_of::<Line>() / groups.max(1) / TILES_ROWS).max(1) * TILES_ROWS;
    for first in (0..to.rows).step_by(each) {
        let blocks = (first..(first + each).min(to.rows)).step_by(TILES_ROWS);
        for panel in panels.clone().step_by(2) {
            let (one, two) = (panel_lines(panel), (panel + 1 < panels.end).then(|| panel_lines(panel + 1)));
            for first in blocks.clone() {
                let rows = TILES_ROWS.min(to.rows - first);
                tiles.shape(rows);
                tiles.multiply(&x[first * groups..(first + rows) * groups], one, two, &mut sums);
                amx.avx512().run(
                    #[inline(always)]
                    || {
                        for row in 0..rows {
                            for (p, tile) in sums.0[row / ROWS].iter().enumerate().take(1 + usize::from(two.is_some())) {
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
