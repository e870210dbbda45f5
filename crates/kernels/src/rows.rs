//! What happens to rows between two products: normalisation, the gated activation, the rotary embedding.

use crate::activations::{Activations, Reads};
use crate::disjoint::Disjoint;
use crate::exp::exp;
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

/// `silu(gate) * up` of rows `[gate, up]`, ready for a product. `gate_up` is `[rows, 2 * width]`.
pub fn swiglu(pool: &ThreadPool, gate_up: &[f32], width: usize, reads: Reads, out: &mut Activations) {
    assert!(width > 0 && gate_up.len().is_multiple_of(2 * width), "gate_up is [rows, 2 * width]");
    out.fill(pool, (gate_up.len() / (2 * width), width), reads, width / 2, |row, to| {
        let (gate, up) = gate_up[row * 2 * width..(row + 1) * 2 * width].split_at(width);
        dispatch!(gated(gate, up, to));
    });
}

/// The rotary embedding of the first `heads` heads of each row of `x`, `[rows, stride]`; a head is `[head_dim]`, its two
/// halves are the parts of complex numbers. `cos` and `sin` are `[rows, head_dim / 2]`.
pub fn rotate(pool: &ThreadPool, x: &mut [f32], stride: usize, heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = head_dim / 2;
    assert!(heads * head_dim <= stride && x.len().is_multiple_of(stride), "x is [rows, stride]");
    let rows = x.len() / stride;
    assert!(cos.len() == rows * half && sin.len() == rows * half, "cos and sin are [rows, head_dim / 2]");
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
fn normalise<S: Simd>(_: S, x: &[f32], weight: &[f32], eps: f32, to: &mut [f32]) {
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
    let scale = 1.0 / (join(lanes) / x.len() as f32 + eps).sqrt();
    for ((to, x), w) in to.iter_mut().zip(x).zip(weight) {
        *to = x * scale * w;
    }
}

/// The sum of 16 lanes: halves are added, then halves of these, to the end.
#[inline(always)]
pub(crate) fn join(lanes: [f32; 16]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

#[inline(always)]
fn gated<S: Simd>(s: S, gate: &[f32], up: &[f32], to: &mut [f32]) {
    let whole = to.len() - to.len() % S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: all three have more than `i + LANES` values, or as many.
        unsafe { s.store(to.as_mut_ptr().add(i), silu(s, s.load(gate.as_ptr().add(i)), s.load(up.as_ptr().add(i)))) };
    }
    if whole < to.len() {
        let (mut g, mut u) = ([0.0; 16], [0.0; 16]);
        let rest = to.len() - whole;
        g[..rest].copy_from_slice(&gate[whole..]);
        u[..rest].copy_from_slice(&up[whole..]);
        let mut both = [0.0; 16];
        // SAFETY: arrays of 16.
        unsafe { s.store(both.as_mut_ptr(), silu(s, s.load(g.as_ptr()), s.load(u.as_ptr()))) };
        to[whole..].copy_from_slice(&both[..rest]);
    }
}

/// `gate / (1 + e^-gate) * up`
#[inline(always)]
fn silu<S: Simd>(s: S, gate: S::V, up: S::V) -> S::V {
    s.mul(s.div(gate, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), gate)))), up)
}

#[inline(always)]
fn turn<S: Simd>(_: S, x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    for head in x.chunks_exact_mut(head_dim) {
        let (first, second) = head.split_at_mut(head_dim / 2);
        for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
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
            swiglu(&pool, &x, width, ANY_WIDTH, &mut out);
            for r in 0..rows {
                let (gate, up) = x[r * 2 * width..(r + 1) * 2 * width].split_at(width);
                let mut scalar = vec![0.0; width];
                gated(Scalar, gate, up, &mut scalar);
                assert_eq!(scalar, out.values[r * width..(r + 1) * width]);
                for i in 0..width {
                    let g = f64::from(gate[i]);
                    let want = g / (1.0 + (-g).exp()) * f64::from(up[i]);
                    assert!((f64::from(scalar[i]) - want).abs() < 1e-5, "{} is not {want}", scalar[i]);
                }
            }
        }
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
