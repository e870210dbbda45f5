//! Loops that the compiler vectorises for the CPU at hand, and the exponential function in a form that it can.

/// Runs `f` compiled for the best vector unit of this CPU. `f` is a closure whose loops are its own or `#[inline(always)]`.
#[inline(always)]
pub fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Lanes of the sums below: two vectors of the widest unit. The order of a sum is fixed by this number alone.
const LANES: usize = 32;
/// Numbers that are summed in single precision before the sum goes on in double.
const RUN: usize = 4096;

/// The exponential function; relative error below 1e-6, 0 below -87 and the largest at 88.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// Adding it rounds to the nearest whole number, which then lies in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let low = x < -87.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let p = p * r * r + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if low { 0.0 } else { p * scale }
}

/// The sum of `f` over all indices below `n`, in one fixed order.
#[inline(always)]
pub fn sum(n: usize, f: impl Fn(usize) -> f32) -> f64 {
    let mut total = 0.0;
    let mut start = 0;
    while start < n {
        let end = (start + RUN).min(n);
        let mut lanes = [0.0f32; LANES];
        let mut at = start;
        while at + LANES <= end {
            for (lane, sum) in lanes.iter_mut().enumerate() {
                *sum += f(at + lane);
            }
            at += LANES;
        }
        for (lane, i) in (at..end).enumerate() {
            lanes[lane] += f(i);
        }
        total += lanes.iter().map(|x| f64::from(*x)).sum::<f64>();
        start = end;
    }
    total
}

/// `sum a[i] * b[i]`
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    sum(n, |i| a[i] * b[i]) as f32
}

/// The largest number; minus infinity where there is none. Not a number is passed over.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| a.max(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_function_is_close() {
        vectorised(|| {
            for i in -8700..8800 {
                let x = i as f32 * 0.01 + 0.000_37;
                let want = f64::from(x.clamp(-87.0, 88.0)).exp();
                let got = f64::from(exp(x));
                assert!((got - want).abs() <= 1e-6 * want, "exp({x}) = {got}, not {want}");
            }
        });
        assert_eq!((exp(f32::NEG_INFINITY), exp(-200.0), exp(0.0)), (0.0, 0.0, 1.0));
        assert!(exp(1000.0).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_take_every_number() {
        for n in [0, 1, 31, 32, 33, 4095, 4096, 4097, 10_000] {
            let x: Vec<f32> = (0..n).map(|i| (i % 13) as f32).collect();
            let (total, most) = vectorised(|| (sum(n, |i| x[i]), max(&x)));
            assert_eq!(total, x.iter().map(|x| f64::from(*x)).sum::<f64>());
            assert_eq!(most, x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
