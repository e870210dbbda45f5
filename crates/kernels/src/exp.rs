//! The exponential function and the hyperbolic tangent on lanes.

use crate::simd::Simd;

/// `e^x` within 2 units in the last place; 0 below about -87 (and for minus infinity), `e^88` above 88.
///
/// Cody and Waite's range reduction to |r| <= ln(2) / 2, then a polynomial of degree 6 (Taylor's, its last terms
/// adjusted for the range as in Cephes' `expf`).
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Below -87.3 the result is no normal number: it is set to the smallest one and the factor below makes it 0.
    const LOWEST: f32 = -87.0;
    let clamped = s.min(s.max(x, s.splat(LOWEST)), s.splat(88.0));
    let n = s.round(s.mul(clamped, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), clamped);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    let scaled = s.mul(p, s.exp2_integral(n));
    // 1 where x >= LOWEST, 0 where it is much less: min(max(x - LOWEST + 1, 0) * huge, 1), without a comparison.
    let inside = s.max(s.add(s.sub(x, s.splat(LOWEST)), s.splat(1.0)), s.splat(0.0));
    let gate = s.sub(s.splat(1.0), s.max(s.sub(s.splat(1.0), s.mul(inside, s.splat(1e30))), s.splat(0.0)));
    s.mul(scaled, gate)
}

/// `tanh(x)` within 2e-7 of it: `1 - 2 / (e^2x + 1)`.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.sub(one, s.div(s.splat(2.0), s.add(exp(s, s.add(x, x)), one)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Scalar, dispatch};

    #[test]
    fn it_is_close_to_the_library_and_zero_far_below() {
        let mut x = 87.9f32;
        while x > -86.0 {
            let got = exp(Scalar, [x; 8])[0];
            let want = f64::from(x).exp() as f32;
            assert!((got - want).abs() <= 3.0 * f32::EPSILON * want, "exp({x}) = {got}, not {want}");
            x -= 0.0137;
        }
        assert_eq!(exp(Scalar, [0.0; 8])[0], 1.0);
        for x in [-89.0, -1000.0, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp(Scalar, [x; 8])[0], 0.0, "exp({x})");
        }
    }

    #[test]
    fn the_tangent_is_close_to_the_librarys() {
        let mut x = -50.0f32;
        while x < 50.0 {
            let (got, want) = (tanh(Scalar, [x; 8])[0], f64::from(x).tanh() as f32);
            assert!((got - want).abs() < 2e-7, "tanh({x}) = {got}, not {want}");
            x += 0.0137;
        }
        assert_eq!([tanh(Scalar, [0.0; 8])[0], tanh(Scalar, [-1e9; 8])[0], tanh(Scalar, [1e9; 8])[0]], [0.0, -1.0, 1.0]);
    }

    #[test]
    fn all_lanes_give_the_same_bits() {
        #[inline(always)]
        fn all<S: Simd>(s: S, x: &[f32; 16]) -> [u32; 16] {
            let mut e = [0.0f32; 16];
            for i in (0..16).step_by(S::LANES) {
                // SAFETY: both arrays have sixteen elements.
                unsafe { s.store(e.as_mut_ptr().add(i), exp(s, s.load(x.as_ptr().add(i)))) };
            }
            e.map(f32::to_bits)
        }
        for i in 0..10_000 {
            let x: [f32; 16] = std::array::from_fn(|l| 20.0 - ((i * 16 + l) as f32) * 0.000_7);
            let fast = dispatch!(all(&x));
            assert_eq!(fast, all(Scalar, &x));
        }
    }
}
