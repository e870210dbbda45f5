//! With AMX: 32 rows, 32 columns and 32 summed numbers in four instructions.

use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh,
    _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_or_si512, _mm512_setzero_si512, _mm512_shuffle_i32x4,
    _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use overfill_kernels::Line;
use overfill_kernels::amx::{Amx, ROWS, Sums};
use rayon::prelude::*;

use super::super::{Onto, View, ViewMut, check_shapes};
use super::Written;

/// Columns of a panel.
const PANEL: usize = 16;
/// Summed numbers of a step.
const STEP: usize = 32;
/// Rows, and columns, of what is multiplied at once: two tiles.
const BLOCK: usize = 2 * ROWS;
/// Steps of one pass: 32 KB of either operand, which stay in a core's first caches.
const STEPS: usize = 16;
/// Blocks of rows, and of columns, that one task multiplies: what it reads fits in a core's second cache.
const ROW_BLOCKS: usize = 8;
const COLUMN_BLOCKS: usize = 8;

/// See [`super::multiply`]; only where [`super::pairs::available`] says so.
pub(super) fn multiply(amx: Amx, to: ViewMut<'_>, left: View<'_>, right: View<'_>, onto: Onto, panels: &mut [Vec<Line>; 2]) {
    assert!(super::pairs::available(), "this CPU does not round pairs of bfloat16");
    check_shapes(&to, &left, &right);
    let (rows, columns, steps) = (to.rows, to.columns, left.columns.div_ceil(STEP));
    if rows == 0 || columns == 0 {
        return;
    }
    let [a, b] = panels;
    pack::<BLOCK, false>(a, left);
    pack::<PANEL, true>(b, right.transposed());
    let (a, b) = (a.as_slice(), b.as_slice());
    let result = &Written(to.data.as_mut_ptr());
    let blocks = |n: usize, of: usize| (0..n).step_by(of).map(move |start| start..(start + of).min(n));
    let tasks: Vec<_> = blocks(columns.div_ceil(BLOCK), COLUMN_BLOCKS)
        .flat_map(|c| blocks(rows.div_ceil(BLOCK), ROW_BLOCKS).map(move |r| (r, c.clone())))
        .collect();
    tasks.into_par_iter().for_each(|(row_blocks, column_blocks)| {
        // SAFETY: nothing that this task calls uses tiles but this value.
        let mut tiles = unsafe { amx.tiles() };
        let mut sums = Sums::default();
        for start in (0..steps).step_by(STEPS) {
            let count = STEPS.min(steps - start);
            let add = start > 0 || onto == Onto::Add;
            for c in column_blocks.clone() {
                let panel = |p: usize| &b[(p * steps + start) * PANEL..][..count * PANEL];
                let (one, two) = (panel(2 * c), (columns > c * BLOCK + PANEL).then(|| panel(2 * c + 1)));
                for r in row_blocks.clone() {
                    tiles.shape(BLOCK);
                    tiles.multiply(&a[(r * steps + start) * BLOCK..][..count * BLOCK], one, two, &mut sums);
                    let (row, column) = (r * BLOCK, c * BLOCK);
                    let size = (BLOCK.min(rows - row), BLOCK.min(columns - column));
                    // SAFETY: the CPU has AVX-512; rows and columns of `size` from here on lie in the result, and no other task writes
                    // to them.
                    unsafe { write(&sums, result.0.add(row * to.stride + column), to.stride, size, add) };
                }
            }
        }
    });
}

/// Packs the rows of `from`: blocks of `WIDTH` rows, in each `[steps, WIDTH]` lines of a row's 16 pairs, or (`ACROSS`) `[steps, 16]`
/// lines of a pair of each of the 16 rows. What is missing is 0.
fn pack<const WIDTH: usize, const ACROSS: bool>(to: &mut Vec<Line>, from: View<'_>) {
    let steps = from.columns.div_ceil(STEP);
    to.resize(from.rows.div_ceil(WIDTH) * WIDTH * steps, Line::default());
    to.par_chunks_mut((WIDTH * steps).max(1)).enumerate().for_each(|(block, to)| {
        for (step, to) in to.chunks_exact_mut(WIDTH).enumerate() {
            for (part, to) in to.chunks_exact_mut(PANEL).enumerate() {
                let row = block * WIDTH + part * PANEL;
                // SAFETY: the CPU has AVX-512 with BF16.
                unsafe { pack_square(to, from, row, step * STEP, ACROSS) }
            }
        }
    });
}

/// Packs 16 rows of 32 columns.
#[target_feature(enable = "avx512f,avx512bf16")]
fn pack_square(to: &mut [Line], from: View<'_>, row: usize, column: usize, across: bool) {
    let (rows, columns) = (PANEL.min(from.rows.saturating_sub(row)), STEP.min(from.columns - column));
    let mut lines = [_mm512_setzero_si512(); PANEL];
    let are_across = from.strides[1] != 1;
    if are_across {
        assert!(from.strides[0] == 1, "neither rows nor columns lie one after the other");
        let rounded = |column: usize| -> __m512i {
            // SAFETY: both are 32 bytes of plain numbers.
            let halves = unsafe {
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(load(&from.data[column * from.strides[1] + row..], rows)))
            };
            _mm512_cvtepu16_epi32(halves)
        };
        // A block's last rows, which may be none.
        if rows > 0 {
            for (pair, line) in lines.iter_mut().enumerate().take(columns.div_ceil(2)) {
                let first = column + 2 * pair;
                let second = if 2 * pair + 1 < columns { rounded(first + 1) } else { _mm512_setzero_si512() };
                *line = _mm512_or_si512(rounded(first), _mm512_slli_epi32::<16>(second));
            }
        }
    } else {
        for (r, line) in lines.iter_mut().enumerate().take(rows) {
            let numbers = &from.data[(row + r) * from.strides[0] + column..][..columns];
            let (low, high) = (load(numbers, columns.min(16)), load(&numbers[columns.min(16)..], columns.saturating_sub(16)));
            // SAFETY: both are 64 bytes of plain numbers.
            *line = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) };
        }
    }
    if across != are_across {
        lines = transposed(lines);
    }
    for (to, line) in to.iter_mut().zip(lines) {
        // SAFETY: a line is 64 bytes.
        unsafe { _mm512_storeu_si512(to.0.as_mut_ptr().cast(), line) };
    }
}

/// Number `i` of line `j` becomes number `j` of line `i`, of 32 bits each.
#[target_feature(enable = "avx512f")]
fn transposed(mut a: [__m512i; 16]) -> [__m512i; 16] {
    // Within quarters of lines: pairs of lines, then pairs of pairs.
    for i in (0..16).step_by(2) {
        (a[i], a[i + 1]) = (_mm512_unpacklo_epi32(a[i], a[i + 1]), _mm512_unpackhi_epi32(a[i], a[i + 1]));
    }
    for i in (0..16).step_by(4) {
        let [p, q, r, s] = [a[i], a[i + 1], a[i + 2], a[i + 3]];
        a[i] = _mm512_unpacklo_epi64(p, r);
        a[i + 1] = _mm512_unpackhi_epi64(p, r);
        a[i + 2] = _mm512_unpacklo_epi64(q, s);
        a[i + 3] = _mm512_unpackhi_epi64(q, s);
    }
    // Quarters among lines.
    let mut b = a;
    for i in 0..4 {
        let [p, q, r, s] = [a[i], a[i + 4], a[i + 8], a[i + 12]];
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(p, q), _mm512_shuffle_i32x4::<0xdd>(p, q));
        let (even_after, odd_after) = (_mm512_shuffle_i32x4::<0x88>(r, s), _mm512_shuffle_i32x4::<0xdd>(r, s));
        b[i] = _mm512_shuffle_i32x4::<0x88>(even, even_after);
        b[i + 8] = _mm512_shuffle_i32x4::<0xdd>(even, even_after);
        b[i + 4] = _mm512_shuffle_i32x4::<0x88>(odd, odd_after);
        b[i + 12] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_after);
    }
    b
}

fn mask(lanes: usize) -> u16 {
    if lanes >= 16 { u16::MAX } else { (1 << lanes) - 1 }
}

/// `lanes` numbers from the beginning of `from` on, zeros after them.
#[target_feature(enable = "avx512f")]
fn load(from: &[f32], lanes: usize) -> __m512 {
    assert!(lanes <= 16 && lanes <= from.len());
    // SAFETY: masked lanes are not read, the others lie in the slice.
    unsafe { _mm512_maskz_loadu_ps(mask(lanes), from.as_ptr()) }
}

/// Puts `size` rows and columns of sums at `to`, or adds them to what is there.
///
/// # Safety
/// `size` rows and columns at `to`, rows `stride` apart, must be this caller's to write.
#[target_feature(enable = "avx512f")]
unsafe fn write(sums: &Sums, to: *mut f32, stride: usize, size: (usize, usize), add: bool) {
    for r in 0..size.0 {
        for (part, tile) in sums.0[r / ROWS].iter().enumerate().take(size.1.div_ceil(PANEL)) {
            let mask = mask(size.1 - part * PANEL);
            // SAFETY: the caller's; masked lanes are not touched. A tile's row has 16 sums.
            unsafe {
                let to = to.add(r * stride + part * PANEL);
                let sum = _mm512_loadu_ps(tile[r % ROWS].as_ptr());
                let sum = if add { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum) } else { sum };
                _mm512_mask_storeu_ps(to, mask, sum);
            }
        }
    }
}
