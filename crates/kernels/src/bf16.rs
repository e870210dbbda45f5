//! Products of bfloat16 weights with rows rounded to bfloat16, summed in f32.
//!
//! One order of sums, on every CPU: inputs are taken in groups of 32; the even inputs of a group are one chain of fused multiply-adds
//! from zero, the odd ones another; the sum of both is added to the output's total. This is what AMX does in one instruction (`TDPBF16PS`:
//! twelve times as many multiply-adds a second as f32 has, where it was measured). `VDPBF16PS` does two links of one chain at a time, and other units
//! do one.
//!
//! Both instructions take numbers below the least normal one for zero. Numbers below 2^-50 are made zero as they are rounded, so that
//! this never happens: all that is left are multiples of 2^-57, whose products and sums are multiples of 2^-114.

#[cfg(target_arch = "x86_64")]
mod pairs;
mod rows;
mod singles;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;

use half::bf16;

use crate::activations::Activations;
use crate::destination::{Destination, PANEL};
use crate::packing::{Packed, Packer};
use crate::simd::dispatch;

pub(crate) use rows::{HalfRows, round_row};
use singles::multiply as singles;

/// Inputs whose two chains are begun from zero.
const GROUP: usize = 32;
/// Pairs of inputs in a group.
const PAIRS: usize = GROUP / 2;
/// What is less counts as zero.
const LEAST: f32 = 1.0 / (1u64 << 50) as f32;

/// 16 pairs of bfloat16: an input pair's weights of a panel's outputs, or the pairs of a row's group. The even input is first.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct Line(pub [[u16; 2]; 16]);

/// A weight matrix `[out, in]` of bfloat16, packed for the CPU.
pub struct Bf16Matrix {
    outputs: usize,
    inputs: usize,
    /// `[panel][group][16 pairs]`; inputs that there are not are zero.
    lines: Packed<Line>,
}

/// The bits of the bfloat16 next to `x`, ties to even; zero for what is less than [`LEAST`].
#[inline(always)]
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = ((bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16) as u16;
    // A NaN stays one, whatever bits of it are left out.
    let rounded = if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded };
    if x.abs() < LEAST { 0 } else { rounded }
}

/// [`round`] of a number that is a bfloat16 already.
#[inline(always)]
fn keep(bits: u16) -> u16 {
    const LEAST_BITS: u16 = (LEAST.to_bits() >> 16) as u16;
    const INFINITE: u16 = 0x7f80;
    match bits & 0x7fff {
        size if size < LEAST_BITS => 0,
        size if size > INFINITE => bits | 0x40,
        _ => bits,
    }
}

/// The number that a bfloat16's bits stand for.
#[inline(always)]
fn number(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

impl Bf16Matrix {
    /// Packs bfloat16 weights `[outputs, inputs]`.
    pub fn new(packer: &Packer<'_>, weights: &[bf16], outputs: usize, inputs: usize) -> Self {
        assert_eq!(weights.len(), outputs * inputs, "a matrix of {outputs} x {inputs}");
        let each = inputs.div_ceil(GROUP) * PAIRS;
        let lines = packer.panels(outputs.div_ceil(PANEL), each, Line::default(), |panel, lines| {
            let rows = &weights[panel * PANEL * inputs..];
            // A group of all columns at a time: its lines stay in the first-level cache.
            for (group, lines) in lines.chunks_exact_mut(PAIRS).enumerate() {
                for (column, row) in rows.chunks_exact(inputs).take(PANEL).enumerate() {
                    let mut kept = [0; GROUP];
                    kept.iter_mut().zip(&row[group * GROUP..]).for_each(|(kept, w)| *kept = keep(w.to_bits()));
                    lines.iter_mut().zip(kept.as_chunks::<2>().0).for_each(|(line, pair)| line.0[column] = *pair);
                }
            }
        });
        Self { outputs, inputs, lines }
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.lines)
    }

    pub(crate) fn row(&self, output: usize, to: &mut [f32]) {
        let lines = &self.lines[output / PANEL * self.groups() * PAIRS..];
        to.iter_mut().enumerate().for_each(|(i, to)| *to = number(lines[i / 2].0[output % PANEL][i % 2]));
    }

    fn groups(&self) -> usize {
        self.inputs.div_ceil(GROUP)
    }

    /// The product's columns of `panels`, on the unit that the rows were rounded for.
    pub(crate) fn multiply(&self, x: &Activations, to: Destination<'_>, panels: Range<usize>) {
        assert!(x.width() == self.inputs && x.rows() == to.rows && panels.end * PANEL < self.outputs + PANEL);
        match x.halves() {
            #[cfg(target_arch = "x86_64")]
            HalfRows::Tiles(amx, x) => tiles::multiply(*amx, self, x, to, panels),
            #[cfg(target_arch = "x86_64")]
            HalfRows::Pairs(unit, x) => pairs::multiply(*unit, self, x, to, panels),
            HalfRows::Singles(x) => dispatch!(singles(self, x, to, panels)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lanes;
    use crate::product::Matrix;
    use crate::product::tests::product;
    use crate::thread_pool::ThreadPool;

    /// One output, as the module says that it is summed.
    fn sum(x: &[f32], w: &[f32]) -> f32 {
        let mut total = 0.0f32;
        for (x, w) in x.chunks(GROUP).zip(w.chunks(GROUP)) {
            let chain = |odd: usize| {
                let link = |sum, (x, w): (&f32, &f32)| number(round(*x)).mul_add(number(round(*w)), sum);
                x.iter().zip(w).skip(odd).step_by(2).fold(0.0f32, link)
            };
            total += chain(0) + chain(1);
        }
        total
    }

    /// Numbers of any size, zeros of both signs and numbers that count as zero among them.
    fn numbers(count: usize) -> impl Strategy<Value = Vec<f32>> {
        let one = prop_oneof![4 => -2.0f32..2.0, 2 => any::<u32>().prop_map(f32::from_bits), 1 => Just(0.0), 1 => Just(-0.0), 1 => -1e-15f32..1e-15];
        prop::collection::vec(one, count)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn sums_are_in_the_one_order_on_every_unit(
            (_, outputs, inputs, x, w) in (1usize..40, 1usize..40, 1usize..100)
                .prop_flat_map(|(r, o, i)| (Just(r), Just(o), Just(i), numbers(r * i), numbers(o * i))),
        ) {
            // All that are not a number are the same one.
            let bits = |x: f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
            let pool = ThreadPool::new(1, &[]).unwrap();
            let halves: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
            let w: Vec<f32> = halves.iter().map(|w| w.to_f32()).collect();
            let matrix = Matrix::Bf16(Bf16Matrix::new(&Packer::new(&pool), &halves, outputs, inputs));
            for unit in lanes::here() {
                let y = lanes::on(unit, || product(&pool, &matrix, &x));
                for (r, x) in x.chunks(inputs).enumerate() {
                    for (o, w) in w.chunks(inputs).enumerate() {
                        prop_assert_eq!(bits(y[r * outputs + o]), bits(sum(x, w)), "[{}, {}] on {}", r, o, unit);
                    }
                }
            }
        }
    }

    #[test]
    fn rounding_is_halves_but_for_what_is_small() {
        let mut seen = 0u32;
        for i in 0..=u16::MAX {
            assert_eq!(keep(i), round(number(i)), "{i:x}");
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(i) << 16 | low);
                let want = bf16::from_f32(x);
                if x.is_nan() {
                    assert!(number(round(x)).is_nan());
                } else if x.abs() < LEAST {
                    assert_eq!(round(x), 0);
                } else {
                    assert_eq!(round(x), want.to_bits(), "{x}");
                    seen += 1;
                }
            }
        }
        assert!(seen > 100_000);
    }
}
