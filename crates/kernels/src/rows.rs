//! What happens to rows between two products: normalisation, the gated activation, the rotary embedding, what is added to the
//! residual stream, and the bound of the logits.

use std::ops::Range;

use crate::activations::{Activations, Reads};
use crate::disjoint::Disjoint;
use crate::exp::{exp, tanh};
use crate::simd::{Simd, dispatch};
use crate::thread_pool::ThreadPool;

/// Root-mean-square normalisation of `x`, `[rows, width]`: `x / sqrt(mean(x^2) + eps) * weight`, ready for a product.
pub fn rms_norm(pool: &ThreadPool, x: &[f32], weight: &[f32], eps: f32, reads: Reads, out: &mut Activations) {
    let width = weight.len();
    assert!(width > 0 && x.len().is_multiple_of(width), "x is [rows, width]");
    out.fill(pool, (x.len() / width, width), reads, width / 8, |row, to| {
        dispatch!(normalise(&x[row * width..(row + 1) * width], weight, eps, to))
    });
}

/// Root-mean-square normalisation in place: in each row of `x`, `[rows, stride]`, of each run of `weight.len()` values within `at`.
///
/// # Panics
/// Where `at` is not whole runs within a row.
pub fn norm_parts(pool: &ThreadPool, x: &mut [f32], stride: usize, at: Range<usize>, weight: &[f32], eps: f32) {
    let length = at.len();
    assert!(
        !weight.is_empty() && length.is_multiple_of(weight.len()) && at.end <= stride && x.len().is_multiple_of(stride),
        "x is [rows, stride]"
    );
    let rows = x.len() / stride;
    let x = Disjoint::new(x);
    pool.rows(rows, length / 8, |row| {
        // SAFETY: each row is changed once, by the thread that has it.
        let x = unsafe { x.part(row * stride + at.start, length) };
        dispatch!(normalise_parts(x, weight, eps));
    });
}

/// What is added to the residual stream, `x += of(y)`.
#[derive(Clone, Copy, Debug)]
pub enum Addend<'a> {
    /// `y` times a number.
    Scaled(f32),
    /// `y` with its root-mean-square normalised: weights `[width]`, epsilon.
    Normed(&'a [f32], f32),
}

/// Adds rows of `y` to those of `x`, both `[rows, width]`. `y` is used up.
pub fn add(pool: &ThreadPool, x: &mut [f32], y: &mut [f32], width: usize, addend: Addend<'_>) {
    assert!(width > 0 && x.len() == y.len() && x.len().is_multiple_of(width), "x and y are [rows, width]");
    let rows = x.len() / width;
    let (x, y) = (Disjoint::new(x), Disjoint::new(y));
    pool.rows(rows, width / 8, |row| {
        // SAFETY: each row is changed once, by the thread that has it.
        let (x, y) = unsafe { (x.part(row * width, width), y.part(row * width, width)) };
        match addend {
            Addend::Scaled(factor) => x.iter_mut().zip(&*y).for_each(|(x, y)| *x = y.mul_add(factor, *x)),
            Addend::Normed(weight, eps) => {
                dispatch!(normalise_parts(y, weight, eps));
                x.iter_mut().zip(&*y).for_each(|(x, y)| *x += y);
            }
        }
    });
}

/// `cap * tanh(x / cap)` in place, of rows `[rows, width]`: what is far from zero comes close to the cap.
pub fn soft_cap(pool: &ThreadPool, x: &mut [f32], width: usize, cap: f32) {
    assert!(width > 0 && x.len().is_multiple_of(width), "x is [rows, width]");
    let rows = x.len() / width;
    let x = Disjoint::new(x);
    pool.rows(rows, width / 2, |row| {
        // SAFETY: each row is changed once, by the thread that has it.
        let x = unsafe { x.part(row * width, width) };
        dispatch!(capped(x, cap));
    });
}

/// What an MLP's gate goes through before it is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x / (1 + e^-x)`
    Silu,
    /// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`, Hendrycks and Gimpel's approximation of `x` times the normal distribution.
    Gelu,
}

/// `act(gate) * up` of rows `[gate, up]`, ready for a product. `gate_up` is `[rows, 2 * width]`.
pub fn gated(pool: &ThreadPool, gate_up: &[f32], width: usize, act: Gate, reads: Reads, out: &mut Activations) {
    assert!(width > 0 && gate_up.len().is_multiple_of(2 * width), "gate_up is [rows, 2 * width]");
    out.fill(pool, (gate_up.len() / (2 * width), width), reads, width / 2, |row, to| {
        let (gate, up) = gate_up[row * 2 * width..(row + 1) * 2 * width].split_at(width);
        match act {
            Gate::Silu => dispatch!(by_silu(gate, up, to)),
            Gate::Gelu => dispatch!(by_gelu(gate, up, to)),
        }
    });
}

/// The rotary embedding of the first `heads` heads of each row of `x`, `[rows, stride]`. Of each head, `[head_dim]`, as many values
/// turn as there are cosines and sines twice; their two halves are the parts of complex numbers. `cos` and `sin` are
/// `[rows, turned / 2]`.
pub fn rotate(pool: &ThreadPool, x: &mut [f32], stride: usize, heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
    assert!(heads * head_dim <= stride && x.len().is_multiple_of(stride), "x is [rows, stride]");
    let rows = x.len() / stride;
    let half = cos.len() / rows.max(1);
    assert!(cos.len() == rows * half && sin.len() == rows * half && 2 * half <= head_dim, "cos and sin are [rows, turned / 2]");
    let x = Disjoint::new(x);
    pool.rows(rows, heads * head_dim / 8, |row| {
        // SAFETY: each row is changed once, by the thread that has it.
        let x = unsafe { x.part(row * stride, heads * head_dim) };
        let (cos, sin) = (&cos[row * half..(row + 1) * half], &sin[row * half..(row + 1) * half]);
        dispatch!(turn(x, head_dim, cos, sin));
    });
}

/// One output lane's sum of squares is of the inputs that are equal modulo 16; lanes are joined in pairs.
#[inline(always)]
fn normalise<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, to: &mut [f32]) {
    let scale = inverse_root_mean_square(s, x, eps);
    for ((to, x), w) in to.iter_mut().zip(x).zip(weight) {
        *to = x * scale * w;
    }
}

/// As [`normalise`], in place, of each run of `weight.len()` values.
#[inline(always)]
fn normalise_parts<S: Simd>(s: S, x: &mut [f32], weight: &[f32], eps: f32) {
    for part in x.chunks_exact_mut(weight.len()) {
        let scale = inverse_root_mean_square(s, part, eps);
        for (x, w) in part.iter_mut().zip(weight) {
            *x = *x * scale * w;
        }
    }
}

#[inline(always)]
fn inverse_root_mean_square<S: Simd>(_: S, x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (whole, rest) = x.as_chunks::<16>();
    for x in whole {
        for i in 0..16 {
            lanes[i] = x[i].mul_add(x[i], lanes[i]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = x.mul_add(*x, *lane);
    }
    1.0 / (join(lanes) / x.len() as f32 + eps).sqrt()
}

/// The sum of 16 lanes: halves are added, then halves of these, to the end.
#[inline(always)]
pub(crate) fn join(lanes: [f32; 16]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

#[inline(always)]
fn by_silu<S: Simd>(s: S, gate: &[f32], up: &[f32], to: &mut [f32]) {
    both(
        s,
        gate,
        up,
        to,
        #[inline(always)]
        |g, u| silu(s, g, u),
    );
}

#[inline(always)]
fn by_gelu<S: Simd>(s: S, gate: &[f32], up: &[f32], to: &mut [f32]) {
    both(
        s,
        gate,
        up,
        to,
        #[inline(always)]
        |g, u| gelu(s, g, u),
    );
}

/// `of(gate, up)`, value by value.
#[inline(always)]
fn both<S: Simd>(s: S, gate: &[f32], up: &[f32], to: &mut [f32], of: impl Fn(S::V, S::V) -> S::V) {
    let whole = to.len() - to.len() % S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: all three have more than `i + LANES` values, or as many.
        unsafe { s.store(to.as_mut_ptr().add(i), of(s.load(gate.as_ptr().add(i)), s.load(up.as_ptr().add(i)))) };
    }
    if whole < to.len() {
        let (mut g, mut u) = ([0.0; 16], [0.0; 16]);
        let rest = to.len() - whole;
        g[..rest].copy_from_slice(&gate[whole..]);
        u[..rest].copy_from_slice(&up[whole..]);
        let mut both = [0.0; 16];
        // SAFETY: arrays of 16.
        unsafe { s.store(both.as_mut_ptr(), of(s.load(g.as_ptr()), s.load(u.as_ptr()))) };
        to[whole..].copy_from_slice(&both[..rest]);
    }
}

/// `gate / (1 + e^-gate) * up`
#[inline(always)]
fn silu<S: Simd>(s: S, gate: S::V, up: S::V) -> S::V {
    s.mul(s.div(gate, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), gate)))), up)
}

/// `gate / (1 + e^-2u) * up`, `u = sqrt(2 / pi) (gate + 0.044715 gate^3)`: half of `1 + tanh(u)` is the logistic function of `2 u`.
#[inline(always)]
fn gelu<S: Simd>(s: S, gate: S::V, up: S::V) -> S::V {
    const MINUS_TWO_ROOTS: f32 = -1.595_769;
    let cube = s.mul(s.mul(gate, gate), gate);
    let u = s.mul(s.fma(s.splat(0.044_715), cube, gate), s.splat(MINUS_TWO_ROOTS));
    s.mul(s.div(gate, s.add(s.splat(1.0), exp(s, u))), up)
}

/// `cap * tanh(x / cap)` of all values.
#[inline(always)]
pub(crate) fn capped<S: Simd>(s: S, x: &mut [f32], cap: f32) {
    let (factor, inverse) = (s.splat(cap), s.splat(1.0 / cap));
    let mut chunks = x.chunks_exact_mut(S::LANES);
    for chunk in &mut chunks {
        // SAFETY: the chunk has `LANES` values.
        unsafe { s.store(chunk.as_mut_ptr(), s.mul(factor, tanh(s, s.mul(s.load(chunk.as_ptr()), inverse)))) };
    }
    let rest = chunks.into_remainder();
    let mut last = [0.0; 16];
    last[..rest.len()].copy_from_slice(rest);
    // SAFETY: an array of 16.
    unsafe { s.store(last.as_mut_ptr(), s.mul(factor, tanh(s, s.mul(s.load(last.as_ptr()), inverse)))) };
    rest.copy_from_slice(&last[..rest.len()]);
}

#[inline(always)]
fn turn<S: Simd>(_: S, x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    for head in x.chunks_exact_mut(head_dim) {
        let (first, rest) = head.split_at_mut(cos.len());
        for (((a, b), c), s) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
            (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activations::tests::ANY_WIDTH;
    use crate::simd::Scalar;

    fn noise(n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 2003) as f32 / 2003.0 - 0.5) * scale).collect()
    }

    #[test]
    fn rows_are_what_the_formulas_say_on_any_lanes() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        for width in [576, 104, 6] {
            let (rows, x, w) = (9, noise(9 * 2 * width, 6.0), noise(width, 2.0));
            let mut out = Activations::new();
            rms_norm(&pool, &x[..rows * width], &w, 1e-5, ANY_WIDTH, &mut out);
            for r in 0..rows {
                let row = &x[r * width..(r + 1) * width];
                let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                let mut scalar = vec![0.0; width];
                normalise(Scalar, row, &w, 1e-5, &mut scalar);
                assert_eq!(scalar, out.values[r * width..(r + 1) * width]);
                for i in 0..width {
                    let want = f64::from(row[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]);
                    assert!((f64::from(scalar[i]) - want).abs() < 1e-5);
                }
            }
            for act in [Gate::Silu, Gate::Gelu] {
                gated(&pool, &x, width, act, ANY_WIDTH, &mut out);
                for r in 0..rows {
                    let (gate, up) = x[r * 2 * width..(r + 1) * 2 * width].split_at(width);
                    let mut scalar = vec![0.0; width];
                    match act {
                        Gate::Silu => by_silu(Scalar, gate, up, &mut scalar),
                        Gate::Gelu => by_gelu(Scalar, gate, up, &mut scalar),
                    }
                    assert_eq!(scalar, out.values[r * width..(r + 1) * width]);
                    for i in 0..width {
                        let g = f64::from(gate[i]);
                        let acted = match act {
                            Gate::Silu => g / (1.0 + (-g).exp()),
                            Gate::Gelu => 0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3))).tanh()),
                        };
                        let want = acted * f64::from(up[i]);
                        assert!((f64::from(scalar[i]) - want).abs() < 1e-5, "{act:?}: {} is not {want}", scalar[i]);
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_added_and_capped_is_what_the_formulas_say_on_any_lanes() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        let rms = |x: &[f32]| (x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64 + 1e-5).sqrt();
        for width in [64, 40, 6] {
            let (x, y, w) = (noise(5 * width, 6.0), noise(5 * width + 1, 9.0)[1..].to_vec(), noise(width, 2.0));
            let (mut scaled, mut normed, mut parts, mut bounded) = (x.clone(), x.clone(), x.clone(), x.clone());
            add(&pool, &mut scaled, &mut y.clone(), width, Addend::Scaled(0.25));
            add(&pool, &mut normed, &mut y.clone(), width, Addend::Normed(&w, 1e-5));
            norm_parts(&pool, &mut parts, width, 2..width, &w[..(width - 2) / 2], 1e-5);
            soft_cap(&pool, &mut bounded, width, 2.5);
            let mut scalar = x.clone();
            scalar.chunks_exact_mut(width).for_each(|row| capped(Scalar, row, 2.5));
            assert_eq!(scalar, bounded);
            for i in 0..x.len() {
                let (row, at) = (i / width * width, i % width);
                let close = |got: f32, want: f64| assert!((f64::from(got) - want).abs() < 1e-5, "{got} is not {want}");
                let (v, half) = (f64::from(x[i]), (width - 2) / 2);
                close(scaled[i], v + 0.25 * f64::from(y[i]));
                close(normed[i], v + f64::from(y[i]) / rms(&y[row..row + width]) * f64::from(w[at]));
                close(bounded[i], 2.5 * (v / 2.5).tanh());
                let part = at.checked_sub(2).map(|at| (row + 2 + at / half * half, at % half));
                close(parts[i], part.map_or(v, |(first, at)| v / rms(&x[first..first + half]) * f64::from(w[at])));
            }
        }
    }

    #[test]
    fn a_rotation_turns_a_part_of_a_head_only() {
        let pool = ThreadPool::new(1, &[]).unwrap();
        let (mut whole, mut part) = (vec![1.0, 2.0, 3.0, 4.0], vec![1.0, 2.0, 3.0, 4.0, 9.0, 8.0]);
        let angles = [0.3f32, 1.2];
        rotate(&pool, &mut whole, 4, 1, 4, &angles.map(f32::cos), &angles.map(f32::sin));
        rotate(&pool, &mut part, 6, 1, 6, &angles.map(f32::cos), &angles.map(f32::sin));
        assert_eq!(part, [whole, vec![9.0, 8.0]].concat());
    }

    #[test]
    fn a_rotation_turns_the_first_heads_only() {
        let pool = ThreadPool::new(1, &[]).unwrap();
        let mut x = vec![1.0, 2.0, 3.0, 4.0, 9.0, 9.0];
        let angles = [0.3f32, 1.2];
        rotate(&pool, &mut x, 6, 1, 4, &angles.map(f32::cos), &angles.map(f32::sin));
        let want = [
            0.3f32.cos() - 3.0 * 0.3f32.sin(),
            2.0 * 1.2f32.cos() - 4.0 * 1.2f32.sin(),
            0.3f32.sin() + 3.0 * 0.3f32.cos(),
            2.0 * 1.2f32.sin() + 4.0 * 1.2f32.cos(),
        ];
        for (got, want) in x.iter().zip(want) {
            assert!((got - want).abs() < 1e-6);
        }
        assert_eq!(x[4..], [9.0, 9.0]);
    }
}
