//! Rows rounded to bfloat16, laid out for the unit that will multiply them.

use super::{GROUP, Line, PAIRS, number, round};
use crate::activations::Place;
#[cfg(target_arch = "x86_64")]
use crate::amx::Amx;
#[cfg(target_arch = "x86_64")]
use crate::avx512_bf16::Avx512Bf16;
use crate::disjoint::Disjoint;
use crate::simd::Simd;
#[cfg(target_arch = "x86_64")]
use crate::simd::{allowed, preferred};

/// Rows of a block of tiles: two tiles.
pub(super) const TILES_ROWS: usize = 32;
/// Rows of the other units' blocks: a multiple of their tiles' rows.
pub(super) const BLOCK_ROWS: usize = 24;

/// Rounded rows, widened with zeros to whole groups.
pub(crate) enum HalfRows {
    /// In blocks `[groups, rows of the block]`.
    #[cfg(target_arch = "x86_64")]
    Tiles(Amx, Vec<Line>),
    /// In blocks `[groups * 16, rows of the block]`: the inputs `4i` and `4i + 2` of a group, then `4i + 1` and `4i + 3`, the first of two in
    /// the upper half.
    #[cfg(target_arch = "x86_64")]
    Pairs(Avx512Bf16, Vec<u32>),
    /// As f32, in blocks `[groups * 32, rows of the block]`.
    Singles(Vec<f32>),
}

/// Where rounded rows are written.
#[derive(Clone, Copy)]
pub(crate) struct RoundTo<'a> {
    rows: usize,
    groups: usize,
    to: To<'a>,
}

#[derive(Clone, Copy)]
enum To<'a> {
    #[cfg(target_arch = "x86_64")]
    Tiles(Disjoint<'a, Line>),
    #[cfg(target_arch = "x86_64")]
    Pairs(Disjoint<'a, u32>),
    Singles(Disjoint<'a, f32>),
}

impl Default for HalfRows {
    fn default() -> Self {
        Self::Singles(Vec::new())
    }
}

impl HalfRows {
    /// Makes room for `rows` rows of `width` inputs, as the best unit reads them that this CPU has.
    pub(crate) fn begin(&mut self, rows: usize, width: usize) -> RoundTo<'_> {
        let groups = width.div_ceil(GROUP);
        let count = rows * groups * GROUP;
        #[cfg(target_arch = "x86_64")]
        if let Some(amx) = Amx::detect()
            && allowed("amx")
        {
            if !matches!(self, Self::Tiles(..)) {
                *self = Self::Tiles(amx, Vec::new());
            }
        } else if let Some(pairs) = Avx512Bf16::detect()
            && preferred("avx512bf16", pairs.is_fast())
        {
            if !matches!(self, Self::Pairs(..)) {
                *self = Self::Pairs(pairs, Vec::new());
            }
        } else if !matches!(self, Self::Singles(_)) {
            *self = Self::Singles(Vec::new());
        }
        let to = match self {
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(_, all) => {
                all.resize(rows * groups, Line::default());
                To::Tiles(Disjoint::new(all))
            }
            #[cfg(target_arch = "x86_64")]
            Self::Pairs(_, all) => {
                all.resize(count / 2, 0);
                To::Pairs(Disjoint::new(all))
            }
            Self::Singles(all) => {
                all.resize(count, 0.0);
                To::Singles(Disjoint::new(all))
            }
        };
        RoundTo { rows, groups, to }
    }
}

/// Rounds row `row`.
#[inline(always)]
pub(crate) fn round_row<S: Simd>(_: S, values: &[f32], row: usize, RoundTo { rows, groups, to }: RoundTo<'_>) {
    for (g, values) in values.chunks(GROUP).enumerate() {
        let mut codes = [0u16; GROUP];
        match values.as_array::<GROUP>() {
            Some(values) => (0..GROUP).for_each(|i| codes[i] = round(values[i])),
            None => codes.iter_mut().zip(values).for_each(|(code, value)| *code = round(*value)),
        }
        match to {
            #[cfg(target_arch = "x86_64")]
            To::Tiles(to) => {
                let at = Place::of(row, rows, TILES_ROWS).at(g, groups, 1);
                // SAFETY: this place is this row's, and one thread has it.
                let line = unsafe { &mut to.part(at, 1)[0] };
                line.0.as_flattened_mut().copy_from_slice(&codes);
            }
            #[cfg(target_arch = "x86_64")]
            To::Pairs(to) => {
                let place = Place::of(row, rows, BLOCK_ROWS);
                for i in 0..PAIRS {
                    let first = i / 2 * 4 + i % 2;
                    let pair = u32::from(codes[first]) << 16 | u32::from(codes[first + 2]);
                    // SAFETY: as above.
                    unsafe { to.part(place.at(g * PAIRS + i, groups * PAIRS, 1), 1)[0] = pair };
                }
            }
            To::Singles(to) => {
                let place = Place::of(row, rows, BLOCK_ROWS);
                for (i, code) in codes.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { to.part(place.at(g * GROUP + i, groups * GROUP, 1), 1)[0] = number(*code) };
                }
            }
        }
    }
}
