//! Products of operands rounded to bfloat16, summed in f32: by AMX where the CPU has it, else by AVX-512 BF16, else the same roundings
//! before f32 products.
//!
//! Operands are packed into panels, pairs of numbers along the summed dimension side by side, as the instructions read them. The
//! blocks, and so the order of every sum, are decided by the shapes alone, whatever the threads; another unit has another order.

#[cfg(target_arch = "x86_64")]
mod pairs;
#[cfg(target_arch = "x86_64")]
mod tiles;

use half::bf16;
#[cfg(target_arch = "x86_64")]
use overfill_kernels::{Line, amx::Amx};
use rayon::prelude::*;

use super::{Onto, View, ViewMut};

/// Packed operands, kept from product to product: those of the unit that the CPU has.
#[derive(Default)]
pub(super) struct Panels {
    #[cfg(target_arch = "x86_64")]
    tiles: [Vec<Line>; 2],
    #[cfg(target_arch = "x86_64")]
    pairs: [Vec<u32>; 2],
}

/// `to = left x right`, or added to it, of operands rounded to bfloat16, on all threads of the rayon pool.
///
/// # Panics
/// Where the shapes do not fit.
pub(super) fn multiply(to: ViewMut<'_>, left: View<'_>, right: View<'_>, onto: Onto, panels: &mut Panels) {
    #[cfg(target_arch = "x86_64")]
    if let Some(amx) = Amx::detect()
        && pairs::available()
    {
        return tiles::multiply(amx, to, left, right, onto, &mut panels.tiles);
    } else if pairs::available() {
        return pairs::multiply(to, left, right, onto, &mut panels.pairs);
    }
    let _ = panels;
    emulated(to, left, right, onto);
}

/// Where the result lies; each task writes to its own part.
#[cfg(target_arch = "x86_64")]
struct Written(*mut f32);
// SAFETY: tasks write to parts that do not overlap, and nobody reads before all are done.
#[cfg(target_arch = "x86_64")]
unsafe impl Sync for Written {}

/// The same with f32 products of rounded operands.
fn emulated(to: ViewMut<'_>, left: View<'_>, right: View<'_>, onto: Onto) {
    let rounded = |data: &[f32]| -> Vec<f32> { data.par_iter().map(|x| bf16::from_f32(*x).to_f32()).collect() };
    let (a, b) = (rounded(left.data), rounded(right.data));
    super::multiply(to, View { data: &a, ..left }, View { data: &b, ..right }, onto);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each unit that the CPU has computes is what all others do, but for the order of the sums.
    #[test]
    fn all_ways_round_alike() {
        type Product = Box<dyn Fn(ViewMut<'_>, View<'_>, View<'_>)>;
        let mut units: Vec<(&str, Product)> = vec![("any", Box::new(|to, a, b| multiply(to, a, b, Onto::Add, &mut Panels::default())))];
        #[cfg(target_arch = "x86_64")]
        if pairs::available() {
            units.push(("pairs", Box::new(|to, a, b| pairs::multiply(to, a, b, Onto::Add, &mut Default::default()))));
        }
        let numbers = |n: usize, seed: usize| (0..n).map(|i| ((i * 7919 + seed * 31) % 1009) as f32 / 500.0 - 1.0).collect::<Vec<_>>();
        for (rows, depth, columns) in [(5, 9, 3), (140, 523, 300), (33, 1100, 17)] {
            let (left, right) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
            // Each operand with its rows one after the other, and with its columns.
            let lefts = [View::new(&left, depth), View::new(&left, rows).transposed()];
            let rights = [View::new(&right, columns), View::new(&right, depth).transposed()];
            for (left, right) in lefts.into_iter().flat_map(|left| rights.map(|right| (left, right))) {
                let mut want = vec![0.5; rows * columns];
                emulated(ViewMut::new(&mut want, columns), left, right, Onto::Add);
                for (unit, product) in &units {
                    let mut got = vec![0.5; rows * columns];
                    product(ViewMut::new(&mut got, columns), left, right);
                    let far = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(far < 1e-3, "{unit}: {far}");
                }
            }
        }
    }
}
