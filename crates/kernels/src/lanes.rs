//! Tests on every vector unit that this CPU has, not on its best alone; and that each of their operations gives the
//! scalar one's bits.

use std::cell::Cell;

thread_local! {
    static ONLY: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Whether kernels that this thread starts may run on these vectors. (A pool's other threads may use any.)
pub(crate) fn allowed(unit: &str) -> bool {
    ONLY.get().is_none_or(|only| only == unit)
}

/// Whether kernels may run on these vectors, which are not among the fast ones or are.
#[cfg(target_arch = "x86_64")]
pub(crate) fn preferred(unit: &str, fast: bool) -> bool {
    ONLY.get().map_or(fast, |only| only == unit)
}

/// The vector units that this CPU has, the scalar lanes included.
pub(crate) fn here() -> Vec<&'static str> {
    let mut all = vec!["scalar"];
    #[cfg(target_arch = "x86_64")]
    {
        all.extend(crate::avx2::Avx2::detect().map(|_| "avx2"));
        all.extend(crate::avx512::Avx512::detect().map(|_| "avx512"));
        all.extend(crate::avx512_bf16::Avx512Bf16::detect().map(|_| "avx512bf16"));
        all.extend(crate::amx::Amx::detect().map(|_| "amx"));
    }
    #[cfg(target_arch = "aarch64")]
    {
        all.push("neon");
        all.extend(crate::neon::Neon::detect().map(|_| "dotprod"));
    }
    all
}

/// Calls `run` with kernels on `unit` alone, one of [`here`].
pub(crate) fn on<R>(unit: &'static str, run: impl FnOnce() -> R) -> R {
    /// Ends it, on a panic too.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            ONLY.set(None);
        }
    }
    ONLY.set(Some(unit));
    let _end = End;
    run()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::simd::{LINE, Simd, dispatch};

    /// Applies `operation` to all lanes of `a`, `b` and `c`.
    #[inline(always)]
    fn map<S: Simd>(s: S, abc: [&[f32; 16]; 3], operation: impl Fn([S::V; 3]) -> S::V) -> [f32; 16] {
        let mut to = [0.0; 16];
        for i in (0..16).step_by(S::LANES) {
            // SAFETY: arrays of 16.
            unsafe { s.store(to.as_mut_ptr().add(i), operation(abc.map(|x| s.load(x.as_ptr().add(i))))) };
        }
        to
    }

    /// The greatest number of all lanes, -9 at least.
    #[inline(always)]
    fn greatest<S: Simd>(s: S, a: &[f32; 16]) -> f32 {
        // SAFETY: an array of 16.
        let vector = |i| s.greatest(s.max(unsafe { s.load(a.as_ptr().add(i)) }, s.splat(-9.0)));
        (0..16).step_by(S::LANES).map(vector).fold(-9.0, f32::max)
    }

    #[inline(always)]
    fn floats<S: Simd>(s: S, abc: [&[f32; 16]; 3]) -> Vec<[f32; 16]> {
        vec![
            map(s, abc, |[a, b, c]| s.fma(a, b, c)),
            map(s, abc, |[a, b, _]| s.add(a, b)),
            map(s, abc, |[a, b, _]| s.sub(a, b)),
            map(s, abc, |[a, b, _]| s.mul(a, b)),
            map(s, abc, |[a, b, _]| s.div(a, b)),
            map(s, abc, |[a, b, _]| s.max(a, b)),
            map(s, abc, |[a, b, _]| s.min(a, b)),
            map(s, abc, |[a, _, _]| s.round(a)),
            map(s, abc, |_| s.splat(abc[0][0])),
            [greatest(s, abc[1]); 16],
        ]
    }

    #[inline(always)]
    fn exp2<S: Simd>(s: S, a: &[f32; 16]) -> [f32; 16] {
        map(s, [a; 3], |[a, _, _]| s.exp2_integral(a))
    }

    #[inline(always)]
    fn halves<S: Simd>(s: S, bits: &[u16; 16]) -> [[f32; 16]; 3] {
        let pairs = bits.map(|bits| u32::from(bits) | u32::from(!bits) << 16);
        let mut to = [[0.0; 16]; 3];
        for i in (0..16).step_by(S::LANES) {
            // SAFETY: arrays of 16.
            unsafe {
                s.store(to[0].as_mut_ptr().add(i), s.load_f16(bits.as_ptr().add(i)));
                let [lower, upper] = s.load_bf16_pairs(pairs.as_ptr().add(i));
                s.store(to[1].as_mut_ptr().add(i), lower);
                s.store(to[2].as_mut_ptr().add(i), upper);
            }
        }
        to
    }

    /// As integers, and their sum.
    #[inline(always)]
    fn rounded<S: Simd>(s: S, a: &[f32; 16]) -> ([i8; 16], i32) {
        let mut to = [0; 16];
        for i in (0..16).step_by(S::LANES) {
            // SAFETY: arrays of 16; the values are from -127 to 127.
            unsafe { s.store_i8(to.as_mut_ptr().add(i), s.load(a.as_ptr().add(i))) };
        }
        // SAFETY: as above.
        (to, unsafe { s.sum_i8(to.as_ptr()) })
    }

    /// Both dot products of 16 outputs with three rows, and their integers as f32. The second vector of outputs has the codes backwards.
    #[inline(always)]
    fn dots<S: Simd>(s: S, codes: &[[u8; 8 * LINE]; 2], x: &[[i8; 32]; 3]) -> [[[[f32; 16]; 2]; 3]; 5] {
        let mut to = [[[[0.0; 16]; 2]; 3]; 5];
        let weights = x.map(|x| x.map(i8::saturating_abs));
        let signed = codes.map(|codes| codes.map(|code| code.cast_signed().max(-127)));
        let values = x.as_ptr().cast::<i8>();
        let by_128 = |lines: usize| x.map(|x| -128 * x[..4 * lines].iter().map(|x| i32::from(*x)).sum::<i32>());
        for i in (0..16).step_by(S::LANES) {
            // SAFETY: eight lines of codes and 32 values in each row are there, and room for 16.
            unsafe {
                let codes = codes.each_ref().map(|codes| codes.as_ptr().add(i * 4));
                let signed = signed.each_ref().map(|codes| codes.as_ptr().add(i * 4));
                let all = [
                    s.dot_u4(codes, values, Some([7, -100_000, 0].as_ptr())),
                    s.dot_u4(codes, values, None),
                    s.dot_i8::<3, 2, 8>(codes, values, by_128(8).as_ptr()),
                    s.dot_i8::<3, 2, 4>(codes, values, by_128(4).as_ptr()),
                    s.dot_weights::<3, 2, 4>(signed, weights.as_ptr().cast()),
                ];
                for (to, dots) in to.iter_mut().flatten().flatten().zip(all.into_iter().flatten().flatten()) {
                    s.store(to.as_mut_ptr().add(i), s.to_f32(dots));
                }
            }
        }
        to
    }

    /// The bits of numbers; all that are not a number are the same one.
    fn bits(all: impl IntoIterator<Item = f32>) -> Vec<u32> {
        all.into_iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
    }

    /// What `run` gives on each unit must be what it gives on the scalar lanes.
    fn same<R: PartialEq + std::fmt::Debug>(run: impl Fn() -> R) -> Result<(), TestCaseError> {
        let want = on("scalar", &run);
        for unit in here() {
            prop_assert_eq!(&on(unit, &run), &want, "on {}", unit);
        }
        Ok(())
    }

    #[test]
    fn every_half_is_loaded_alike() {
        for first in (0..=u16::MAX).step_by(16) {
            let raw: [u16; 16] = std::array::from_fn(|i| first + i as u16);
            same(|| bits(dispatch!(halves(&raw)).concat())).unwrap();
            let bfloat = |bits| half::bf16::from_bits(bits).to_f32();
            let want = [raw.map(|raw| half::f16::from_bits(raw).to_f32()), raw.map(bfloat), raw.map(|raw| bfloat(!raw))].concat();
            assert_eq!(bits(dispatch!(halves(&raw)).concat()), bits(want));
        }
    }

    #[test]
    fn every_power_of_two_is_exact() {
        for n in -126i16..=112 {
            let n: [f32; 16] = std::array::from_fn(|i| f32::from(n + i as i16));
            same(|| bits(dispatch!(exp2(&n)))).unwrap();
            assert_eq!(dispatch!(exp2(&n)), n.map(f32::exp2));
        }
    }

    proptest! {
        #[test]
        fn floats_are_the_scalar_ones_bit_for_bit(
            // Any bits at all, or of a middling size, or halves, which round to even.
            a in prop::array::uniform16(prop_oneof![any::<u32>().prop_map(f32::from_bits), -4.0f32..4.0, (-40i16..40).prop_map(|x| f32::from(x) / 2.0)]),
            b in prop::array::uniform16(prop_oneof![any::<u32>().prop_map(f32::from_bits), -4.0f32..4.0, Just(-0.0), Just(f32::NAN), Just(f32::INFINITY)]),
            c in prop::array::uniform16(prop_oneof![any::<u32>().prop_map(f32::from_bits), -4.0f32..4.0, Just(0.0), Just(f32::NEG_INFINITY)]),
        ) {
            same(|| bits(dispatch!(floats([&a, &b, &c])).concat()))?;
        }

        #[test]
        fn bytes_are_the_scalar_ones(
            a in prop::array::uniform16(prop_oneof![-127.0f32..127.0, (-127i8..127).prop_map(|x| f32::from(x) + 0.5), Just(-127.0), Just(127.0)]),
        ) {
            same(|| dispatch!(rounded(&a)))?;
        }

        #[test]
        fn dot_products_are_the_scalar_ones(
            codes in prop_oneof![prop::collection::vec(any::<u8>(), 8 * LINE), Just(vec![255; 8 * LINE]), Just(vec![0; 8 * LINE])],
            x in prop::array::uniform3(prop_oneof![prop::array::uniform32(-127i8..=127), Just([127; 32]), Just([-127; 32])]),
        ) {
            let codes: [u8; 8 * LINE] = codes.try_into().unwrap();
            let mut backwards = codes;
            backwards.reverse();
            same(|| dispatch!(dots(&[codes, backwards], &x)))?;
        }
    }
}
