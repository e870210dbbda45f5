//! With AVX-512 BF16: rows of one operand times vectors of the other, two multiply-adds an instruction.

use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh,
    _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_mask_storeu_epi32, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_or_si512,
    _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_slli_epi32,
};

use rayon::prelude::*;

use super::super::{Onto, View, ViewMut, check_shapes};
use super::Written;

/// Rows of a tile: with two vectors of columns 24 sums, of 32 registers.
const ROWS: usize = 12;
/// Columns of a tile: two vectors.
const COLUMNS: usize = 2 * LANES;
const LANES: usize = 16;
/// Pairs along the summed dimension that one pass takes: 16 KB of a panel of columns, half of a core's first cache.
const DEPTH: usize = 128;
/// Panels of rows, and of columns, that one task multiplies: what it reads and writes fits in a core's second cache.
const ROW_PANELS: usize = 10;
const COLUMN_PANELS: usize = 8;

/// Whether this CPU multiplies pairs of bfloat16.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// See [`super::multiply`]; only where [`available`] says so.
pub(super) fn multiply(to: ViewMut<'_>, left: View<'_>, right: View<'_>, onto: Onto, panels: &mut [Vec<u32>; 2]) {
    assert!(available(), "this CPU does not multiply pairs of bfloat16");
    check_shapes(&to, &left, &right);
    let (rows, columns, depth) = (to.rows, to.columns, left.columns.div_ceil(2));
    if rows == 0 || columns == 0 {
        return;
    }
    let right = right.transposed();
    let [a, b] = panels;
    pack::<ROWS>(a, left);
    pack::<COLUMNS>(b, right);
    let (left, right) = (a.as_slice(), b.as_slice());
    let result = &Written(to.data.as_mut_ptr());
    let blocks = |n: usize, of: usize| (0..n).step_by(of).map(move |start| start..(start + of).min(n));
    let tasks: Vec<_> = blocks(columns.div_ceil(COLUMNS), COLUMN_PANELS)
        .flat_map(|c| blocks(rows.div_ceil(ROWS), ROW_PANELS).map(move |r| (r, c.clone())))
        .collect();
    tasks.into_par_iter().for_each(|(row_panels, column_panels)| {
        for start in (0..depth).step_by(DEPTH) {
            let steps = DEPTH.min(depth - start);
            let add = start > 0 || onto == Onto::Add;
            for c in column_panels.clone() {
                let b = &right[(c * depth + start) * COLUMNS..][..steps * COLUMNS];
                for r in row_panels.clone() {
                    let a = &left[(r * depth + start) * ROWS..][..steps * ROWS];
                    let (row, column) = (r * ROWS, c * COLUMNS);
                    let size = (ROWS.min(rows - row), COLUMNS.min(columns - column));
                    // SAFETY: the CPU has the instructions; rows and columns of `size` from here on lie in the result, and
                    // no other task writes to them.
                    unsafe { tile(a, b, result.0.add(row * to.stride + column), to.stride, size, add) };
                }
            }
        }
    });
}

/// Packs the rows of `from`: panels of `WIDTH` rows, in each `[columns / 2, WIDTH]` pairs. What is missing is 0.
fn pack<const WIDTH: usize>(to: &mut Vec<u32>, from: View<'_>) {
    let depth = from.columns.div_ceil(2);
    to.resize(from.rows.div_ceil(WIDTH) * WIDTH * depth, 0);
    to.par_chunks_mut((WIDTH * depth).max(1)).enumerate().for_each(|(panel, to)| {
        let first = panel * WIDTH;
        let rows = first..(first + WIDTH).min(from.rows);
        let pack = if from.strides[1] == 1 { pack_rows::<WIDTH> } else { pack_columns::<WIDTH> };
        // SAFETY: the CPU has the instructions.
        unsafe { pack(to, from, rows) }
    });
}

fn mask(lanes: usize) -> u16 {
    if lanes >= LANES { u16::MAX } else { (1 << lanes) - 1 }
}

/// `lanes` numbers from the beginning of `from` on, zeros after them.
#[target_feature(enable = "avx512f,avx512bf16")]
fn load(from: &[f32], lanes: usize) -> __m512 {
    assert!(lanes <= LANES && lanes <= from.len());
    // SAFETY: masked lanes are not read, the others lie in the slice.
    unsafe { _mm512_maskz_loadu_ps(mask(lanes), from.as_ptr()) }
}

/// Where a row's numbers lie one after the other.
#[target_feature(enable = "avx512f,avx512bf16")]
fn pack_rows<const WIDTH: usize>(to: &mut [u32], from: View<'_>, rows: std::ops::Range<usize>) {
    let first = rows.start;
    let mut pairs = [[0u32; LANES]; WIDTH];
    for (block, to) in to.chunks_mut(LANES * WIDTH).enumerate() {
        let column = block * 2 * LANES;
        let here = (from.columns - column).min(2 * LANES);
        for row in rows.clone() {
            let numbers = &from.data[row * from.strides[0] + column..][..here];
            let low = load(numbers, here.min(LANES));
            let high = load(&numbers[here.min(LANES)..], here.saturating_sub(LANES));
            let rounded: __m512bh = _mm512_cvtne2ps_pbh(high, low);
            // SAFETY: both are 64 bytes of plain numbers.
            pairs[row - first] = unsafe { std::mem::transmute::<__m512bh, [u32; LANES]>(rounded) };
        }
        for (i, to) in to.chunks_exact_mut(WIDTH).enumerate() {
            for (to, row) in to.iter_mut().zip(&pairs) {
                *to = row[i];
            }
        }
    }
}

/// Where the numbers of a column lie one after the other.
#[target_feature(enable = "avx512f,avx512bf16")]
fn pack_columns<const WIDTH: usize>(to: &mut [u32], from: View<'_>, rows: std::ops::Range<usize>) {
    assert!(from.strides[0] == 1, "neither rows nor columns lie one after the other");
    for (pair, to) in to.chunks_exact_mut(WIDTH).enumerate() {
        for (part, to) in to.chunks_mut(LANES).enumerate() {
            let lanes = rows.len().saturating_sub(part * LANES).min(LANES);
            let rounded = |column: usize| -> __m512i {
                if column >= from.columns || lanes == 0 {
                    return _mm512_setzero_si512();
                }
                let numbers = load(&from.data[column * from.strides[1] + rows.start + part * LANES..], lanes);
                // SAFETY: both are 32 bytes of plain numbers.
                let halves = unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers)) };
                _mm512_cvtepu16_epi32(halves)
            };
            let pairs = _mm512_or_si512(rounded(2 * pair), _mm512_slli_epi32::<16>(rounded(2 * pair + 1)));
            // SAFETY: only as many lanes are written as `to` has.
            unsafe { _mm512_mask_storeu_epi32(to.as_mut_ptr().cast(), mask(to.len()), pairs) };
        }
    }
}

/// One tile: adds the products of two panels to `size` rows and columns at `to`, or puts them there.
///
/// # Safety
/// `size` rows and columns at `to`, rows `stride` apart, must be this caller's to write.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile(a: &[u32], b: &[u32], to: *mut f32, stride: usize, size: (usize, usize), add: bool) {
    let pairs = |from: &[u32]| -> __m512bh {
        debug_assert!(from.len() >= LANES);
        // SAFETY: 64 bytes of plain numbers, within the slice.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.as_ptr().cast())) }
    };
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for (a, b) in a.as_chunks::<ROWS>().0.iter().zip(b.as_chunks::<COLUMNS>().0) {
        let columns = [pairs(&b[..LANES]), pairs(&b[LANES..])];
        for (sums, a) in sums.iter_mut().zip(a) {
            // SAFETY: both are 64 bytes of plain numbers.
            let row = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a.cast_signed())) };
            sums[0] = _mm512_dpbf16_ps(sums[0], row, columns[0]);
            sums[1] = _mm512_dpbf16_ps(sums[1], row, columns[1]);
        }
    }
    let masks = [mask(size.1), mask(size.1.saturating_sub(LANES))];
    for (r, sums) in sums.into_iter().enumerate().take(size.0) {
        for (part, (sum, mask)) in sums.into_iter().zip(masks).enumerate() {
            // SAFETY: the caller's; masked lanes are not touched.
            unsafe {
                let to = to.add(r * stride + part * LANES);
                let sum = if add { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum) } else { sum };
                _mm512_mask_storeu_ps(to, mask, sum);
            }
        }
    }
}
