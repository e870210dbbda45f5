//! What is done row by row between products: RMS norm, rotary embedding, gated activation; forward and backward.

use overfill_compress::vector::{dot, exp, sum, vectorised};
use overfill_model::family::Gate;
use rayon::prelude::*;

/// Rows that one task takes; sums over rows are made of sums over this many, so their order is fixed.
const ROWS: usize = 16;

/// `y = x / rms(x) * weight`, row by row; `inverse` gets `1 / rms(x)` of each row.
///
/// # Panics
/// Where `x` is no whole number of rows as long as `weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut Vec<f32>, inverse: &mut Vec<f32>) {
    let width = weight.len();
    assert!(x.len().is_multiple_of(width), "{} numbers are no rows of {width}", x.len());
    y.resize(x.len(), 0.0);
    inverse.resize(x.len() / width, 0.0);
    let rows = x.par_chunks(ROWS * width).zip(y.par_chunks_mut(ROWS * width)).zip(inverse.par_chunks_mut(ROWS));
    rows.for_each(|((x, y), inverse)| {
        vectorised(|| {
            for ((x, y), inverse) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(inverse) {
                let scale = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
                *inverse = scale;
                for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                    *y = x * scale * w;
                }
            }
        });
    });
}

/// Adds the gradient of an RMS norm's input to `dx`, and that of its weight to `dweight`.
pub(super) fn rms_norm_backward(dy: &[f32], x: &[f32], weight: &[f32], inverse: &[f32], dx: &mut [f32], dweight: &mut [f32]) {
    let width = weight.len();
    let rows = dy.par_chunks(ROWS * width).zip(x.par_chunks(ROWS * width));
    let rows = rows.zip(dx.par_chunks_mut(ROWS * width)).zip(inverse.par_chunks(ROWS));
    let partial: Vec<Vec<f32>> = rows
        .map(|(((dy, x), dx), inverse)| {
            let mut sums = vec![0.0f32; width];
            vectorised(|| {
                let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width)).zip(inverse);
                for (((dy, x), dx), &inverse) in rows {
                    let inner = sum(width, |i| dy[i] * weight[i] * x[i]) as f32;
                    let pull = inner * inverse * inverse * inverse / width as f32;
                    for ((((dx, dy), x), w), sum) in dx.iter_mut().zip(dy).zip(x).zip(weight).zip(&mut sums) {
                        *dx += dy * w * inverse - x * pull;
                        *sum += dy * x * inverse;
                    }
                }
            });
            sums
        })
        .collect();
    for sums in partial {
        dweight.iter_mut().zip(sums).for_each(|(d, s)| *d += s);
    }
}

/// Rotates the first `heads` heads of each row of `x`, which are `stride` numbers apart, by the angle of its position: of the part of a
/// head that turns, first half against the second. `back` rotates the other way, which is also the gradient's way.
pub(super) fn rotate(x: &mut [f32], stride: usize, heads: usize, head_dim: usize, cos: &[f32], sin: &[f32], back: bool) {
    let half = cos.len() / (x.len() / stride).max(1);
    let rows = x.par_chunks_mut(ROWS * stride).zip(cos.par_chunks(ROWS * half)).zip(sin.par_chunks(ROWS * half));
    rows.for_each(|((x, cos), sin)| {
        vectorised(|| {
            for ((row, cos), sin) in x.chunks_exact_mut(stride).zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half)) {
                for head in row[..heads * head_dim].chunks_exact_mut(head_dim) {
                    let (a, b) = head.split_at_mut(half);
                    for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                        let s = if back { -*s } else { *s };
                        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                    }
                }
            }
        });
    });
}

/// Twice the root of 2 / pi, of GELU's approximation.
const TWO_ROOTS: f32 = 1.595_769;
const CUBE: f32 = 0.044_715;

/// What a gate `g` goes through, and its slope.
#[inline(always)]
fn act(gate: Gate, g: f32) -> (f32, f32) {
    let (inner, slope) = match gate {
        Gate::Silu => (g, 1.0),
        Gate::Gelu => (TWO_ROOTS * (g + CUBE * g * g * g), TWO_ROOTS * (1.0 + 3.0 * CUBE * g * g)),
    };
    let sigmoid = 1.0 / (1.0 + exp(-inner));
    (g * sigmoid, sigmoid + g * sigmoid * (1.0 - sigmoid) * slope)
}

/// `y = act(gate) * up`; a row of `gate_up` is `[gate, up]`, each `width` long.
pub(super) fn gated(gate: Gate, gate_up: &[f32], width: usize, y: &mut Vec<f32>) {
    y.resize(gate_up.len() / 2, 0.0);
    gate_up.par_chunks(ROWS * 2 * width).zip(y.par_chunks_mut(ROWS * width)).for_each(|(gate_up, y)| {
        vectorised(|| match gate {
            Gate::Silu => forward_rows(Gate::Silu, gate_up, width, y),
            Gate::Gelu => forward_rows(Gate::Gelu, gate_up, width, y),
        });
    });
}

/// The gradient of `[gate, up]` from that of the activation, put in place of `gate_up`.
pub(super) fn gated_backward(gate: Gate, gate_up: &mut [f32], width: usize, dy: &[f32]) {
    gate_up.par_chunks_mut(ROWS * 2 * width).zip(dy.par_chunks(ROWS * width)).for_each(|(gate_up, dy)| {
        vectorised(|| match gate {
            Gate::Silu => backward_rows(Gate::Silu, gate_up, width, dy),
            Gate::Gelu => backward_rows(Gate::Gelu, gate_up, width, dy),
        });
    });
}

#[inline(always)]
fn forward_rows(act_of: Gate, gate_up: &[f32], width: usize, y: &mut [f32]) {
    for (row, y) in gate_up.chunks_exact(2 * width).zip(y.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at(width);
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = act(act_of, *g).0 * u;
        }
    }
}

#[inline(always)]
fn backward_rows(act_of: Gate, gate_up: &mut [f32], width: usize, dy: &[f32]) {
    for (row, dy) in gate_up.chunks_exact_mut(2 * width).zip(dy.chunks_exact(width)) {
        let (gate, up) = row.split_at_mut(width);
        for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
            let (acted, slope) = act(act_of, *g);
            (*g, *u) = (dy * *u * slope, dy * acted);
        }
    }
}

/// Adds `bias` to every row of `x`.
pub(super) fn add_bias(x: &mut [f32], bias: &[f32]) {
    x.par_chunks_mut(bias.len()).for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
}

/// Adds the sum of all rows of `dy` to `dbias`.
pub(super) fn bias_backward(dy: &[f32], dbias: &mut [f32]) {
    let width = dbias.len();
    let partial: Vec<Vec<f32>> = dy
        .par_chunks(ROWS * width)
        .map(|rows| {
            let mut sums = vec![0.0f32; width];
            rows.chunks_exact(width).for_each(|row| sums.iter_mut().zip(row).for_each(|(s, x)| *s += x));
            sums
        })
        .collect();
    for sums in partial {
        dbias.iter_mut().zip(sums).for_each(|(d, s)| *d += s);
    }
}
