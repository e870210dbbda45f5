//! Products of rows with weight matrices, `y = x W^T`, cut into parts for the threads of a pool.

use std::ops::Range;

use crate::activations::{Activations, Reads};
use crate::bf16::Bf16Matrix;
use crate::dense::DenseMatrix;
use crate::destination::{Destination, Into, PANEL};
use crate::disjoint::Disjoint;
use crate::quantised::QuantisedMatrix;
use crate::simd::{Simd, dispatch};
use crate::thread_pool::ThreadPool;

/// Bytes of weights below which a part is not worth handing to another thread: about a microsecond's reading.
const LEAST_BYTES: usize = 16 << 10;
/// Parts of a thread, so that one that is held up by another process does not hold up all.
const PARTS: usize = 8;

/// A weight matrix `[out, in]`, packed for the CPU.
pub enum Matrix {
    /// f32 or half precision.
    Dense(DenseMatrix),
    /// bfloat16.
    Bf16(Bf16Matrix),
    /// Blocks of small integers.
    Quantised(QuantisedMatrix),
}

impl Matrix {
    /// Width of the result.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Dense(m) => m.outputs(),
            Self::Bf16(m) => m.outputs(),
            Self::Quantised(m) => m.outputs(),
        }
    }

    /// Width of what it is multiplied with.
    pub fn inputs(&self) -> usize {
        match self {
            Self::Dense(m) => m.inputs(),
            Self::Bf16(m) => m.inputs(),
            Self::Quantised(m) => m.inputs(),
        }
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(m) => m.bytes(),
            Self::Bf16(m) => m.bytes(),
            Self::Quantised(m) => m.bytes(),
        }
    }

    /// Row `output` of the matrix, `[inputs]`: what an embedding looks up.
    pub fn row(&self, output: usize, to: &mut [f32]) {
        assert!(output < self.outputs() && to.len() == self.inputs(), "row {output} of {} x {}", self.outputs(), self.inputs());
        match self {
            Self::Dense(m) => m.row(output, to),
            Self::Bf16(m) => m.row(output, to),
            Self::Quantised(m) => m.row(output, to),
        }
    }

    fn panels(&self) -> usize {
        self.outputs().div_ceil(PANEL)
    }
}

impl Reads {
    /// How these matrices do.
    pub fn of(matrices: &[&Matrix]) -> Self {
        Self {
            exact: matrices.iter().any(|m| matches!(m, Matrix::Dense(_))),
            rounded: matrices.iter().any(|m| matches!(m, Matrix::Quantised(_))),
            halves: matrices.iter().any(|m| matches!(m, Matrix::Bf16(_))),
        }
    }
}

/// The products of `x` with several matrices, side by side: `y` is `[rows, sum of outputs]`.
///
/// **Invariant:** a row's numbers are the same bits whatever rows are beside it, and on any number of threads.
pub fn products(pool: &ThreadPool, x: &Activations, matrices: &[&Matrix], y: &mut [f32], into: Into) {
    let width: usize = matrices.iter().map(|m| m.outputs()).sum();
    assert!(matrices.iter().all(|m| m.inputs() == x.width()), "x is [rows, inputs]");
    assert_eq!(y.len(), x.rows() * width, "y is [rows, outputs]");
    if x.rows() == 0 {
        return;
    }
    let panels: usize = matrices.iter().map(|m| m.panels()).sum();
    // A part has pairs of panels, which tiles take together.
    let pairs = panels.div_ceil(2);
    let bytes: usize = matrices.iter().map(|m| m.bytes()).sum();
    let most = (bytes * x.rows().min(8) / LEAST_BYTES).clamp(1, pool.threads() * PARTS);
    let parts = if pool.threads() == 1 { 1 } else { pairs.min(most) };
    let y = Disjoint::new(y);
    pool.run(parts, |part| {
        let mine = part * pairs / parts * 2..((part + 1) * pairs / parts * 2).min(panels);
        let (mut panel, mut column) = (0, 0);
        for matrix in matrices {
            let end = panel + matrix.panels();
            let range = mine.start.max(panel)..mine.end.min(end);
            if range.start < range.end {
                let to = Destination { y, rows: x.rows(), width, column, outputs: matrix.outputs(), into };
                let panels = range.start - panel..range.end - panel;
                match matrix {
                    Matrix::Dense(m) => dispatch!(dense(m, x, to, panels)),
                    Matrix::Bf16(m) => m.multiply(x, to, panels),
                    Matrix::Quantised(m) => dispatch!(quantised(m, x, to, panels)),
                }
            }
            panel = end;
            column += matrix.outputs();
        }
    });
}

#[inline(always)]
fn dense<S: Simd>(s: S, matrix: &DenseMatrix, x: &Activations, to: Destination<'_>, panels: Range<usize>) {
    matrix.multiply(s, x, to, panels);
}

#[inline(always)]
fn quantised<S: Simd>(s: S, matrix: &QuantisedMatrix, x: &Activations, to: Destination<'_>, panels: Range<usize>) {
    matrix.multiply(s, x, to, panels);
}

#[cfg(test)]
pub(crate) mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::activations::tests::{ALL, ANY_WIDTH};
    use crate::ggml::BlockFormat;
    use crate::ggml::tests::{FORMATS, blocks};
    use crate::lanes;
    use crate::packing::Packer;

    pub(crate) fn noise(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 7919 % 2003) as f32 / 2003.0 - 0.5) * if i % 96 < 32 { 0.01 } else { 3.0 }).collect()
    }

    pub(crate) fn matrices(pool: &ThreadPool, outputs: usize, inputs: usize) -> Vec<(String, Matrix)> {
        let w = noise(outputs * inputs, 5);
        let b: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
        let h: Vec<f16> = w.iter().map(|w| f16::from_f32(*w)).collect();
        let mut all = vec![
            ("f32".to_owned(), Matrix::Dense(DenseMatrix::from_f32(&Packer::new(pool), &w, outputs, inputs))),
            ("bf16".to_owned(), Matrix::Bf16(Bf16Matrix::new(&Packer::new(pool), &b, outputs, inputs))),
            ("f16".to_owned(), Matrix::Dense(DenseMatrix::from_f16(&Packer::new(pool), &h, outputs, inputs))),
        ];
        for format in FORMATS.into_iter().filter(|f| inputs.is_multiple_of(f.block())) {
            let bytes = blocks(format, outputs * inputs / format.block());
            all.push((
                format!("{format:?}"),
                Matrix::Quantised(QuantisedMatrix::from_blocks(&Packer::new(pool), format, &bytes, outputs, inputs).unwrap()),
            ));
        }
        all
    }

    pub(crate) fn product(pool: &ThreadPool, matrix: &Matrix, x: &[f32]) -> Vec<f32> {
        let mut activations = Activations::new();
        activations.set(pool, x, matrix.inputs(), Reads::of(&[matrix]));
        let mut y = vec![f32::NAN; activations.rows() * matrix.outputs()];
        products(pool, &activations, &[matrix], &mut y, Into::Place);
        y
    }

    #[test]
    fn products_are_those_of_the_rows() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        for (rows, outputs, inputs) in [(5, 21, 512), (1, 33, 576), (11, 16, 256), (3, 7, 50)] {
            let x = noise(rows * inputs, 0);
            for (name, matrix) in matrices(&pool, outputs, inputs) {
                let y = product(&pool, &matrix, &x);
                let mut activations = Activations::new();
                activations.set(&pool, &x, inputs, if inputs.is_multiple_of(32) { ALL } else { ANY_WIDTH });
                let value = |i: usize| match matrix {
                    Matrix::Dense(_) => f64::from(x[i]),
                    Matrix::Bf16(_) => bf16::from_f32(x[i]).to_f64(),
                    Matrix::Quantised(_) => activations.seen(i / inputs, i % inputs),
                };
                let mut weights = vec![0.0; inputs];
                for o in 0..outputs {
                    matrix.row(o, &mut weights);
                    for r in 0..rows {
                        let terms = || (0..inputs).map(|i| value(r * inputs + i) * f64::from(weights[i]));
                        let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                        let got = f64::from(y[r * outputs + o]);
                        assert!((got - want).abs() <= 2e-6 * size + 1e-6, "{name} [{r}, {o}]: {got}, not {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_bits_in_any_company_and_on_any_lanes() {
        let (one, three) = (ThreadPool::new(1, &[]).unwrap(), ThreadPool::new(3, &[]).unwrap());
        let (rows, outputs, inputs) = (19, 77, 512);
        let x = noise(rows * inputs, 1);
        for (name, matrix) in matrices(&three, outputs, inputs) {
            let together = product(&three, &matrix, &x);
            for r in 0..rows {
                assert_eq!(product(&one, &matrix, &x[r * inputs..(r + 1) * inputs]), together[r * outputs..(r + 1) * outputs], "{name}");
            }
            for first in 1..9 {
                assert_eq!(product(&three, &matrix, &x[..first * inputs]), together[..first * outputs], "{name}, {first} rows");
            }
            for unit in lanes::here() {
                assert_eq!(lanes::on(unit, || product(&one, &matrix, &x)), together, "{name} on {unit}");
            }
        }
    }

    #[test]
    fn products_lie_side_by_side_and_can_be_added() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        let (rows, inputs) = (3, 64);
        let x = noise(rows * inputs, 2);
        let (a, b) = (DenseMatrix::from_f32(&Packer::new(&pool), &noise(20 * inputs, 3), 20, inputs), blocks(BlockFormat::Q8_0, 9 * 2));
        let a = Matrix::Dense(a);
        let b = Matrix::Quantised(QuantisedMatrix::from_blocks(&Packer::new(&pool), BlockFormat::Q8_0, &b, 9, inputs).unwrap());
        let (alone_a, alone_b) = (product(&pool, &a, &x), product(&pool, &b, &x));
        let mut activations = Activations::new();
        activations.set(&pool, &x, inputs, if inputs.is_multiple_of(32) { ALL } else { ANY_WIDTH });
        let mut y = vec![1.0; rows * 29];
        products(&pool, &activations, &[&a, &b], &mut y, Into::Sum);
        for r in 0..rows {
            for o in 0..29 {
                let alone = if o < 20 { alone_a[r * 20 + o] } else { alone_b[r * 9 + o - 20] };
                assert_eq!(y[r * 29 + o], 1.0 + alone);
            }
        }
    }
}
