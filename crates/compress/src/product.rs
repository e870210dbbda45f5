//! Products of matrices, which pruning and training are made of: in f32 by crate `gemm`, whose only home this is, or of
//! operands rounded to bfloat16. Everything else sees checked views.

mod bf16;

use std::str::FromStr;

use gemm::Parallelism;
use serde::{Deserialize, Serialize};

/// A matrix in memory: `rows x columns` numbers with a distance between rows and one between columns.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    strides: [usize; 2],
}

/// A matrix that is written to; rows may be further apart than they are long.
pub struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    stride: usize,
}

/// What becomes of the numbers that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onto {
    /// They are overwritten.
    Replace,
    /// The product is added to them.
    Add,
}

impl Onto {
    /// `Add` where there is something to add to.
    pub fn adding(adding: bool) -> Self {
        if adding { Self::Add } else { Self::Replace }
    }
}

impl<'a> View<'a> {
    /// Rows one after the other.
    ///
    /// # Panics
    /// Where `data` is no whole number of rows of `columns`.
    pub fn new(data: &'a [f32], columns: usize) -> Self {
        assert!(data.len().is_multiple_of(columns.max(1)), "{} numbers are no rows of {columns}", data.len());
        Self { data, rows: data.len() / columns.max(1), columns, strides: [columns, 1] }
    }

    /// `rows` rows of `columns`, the first at the beginning of `data`, `stride` numbers from one to the next.
    ///
    /// # Panics
    /// Where `data` is too short.
    pub fn strided(data: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * stride + columns <= data.len(), "{rows} rows of {columns} do not fit");
        Self { data, rows, columns, strides: [stride, 1] }
    }

    /// The same numbers, columns as rows.
    pub fn transposed(self) -> Self {
        Self { rows: self.columns, columns: self.rows, strides: [self.strides[1], self.strides[0]], ..self }
    }
}

impl<'a> ViewMut<'a> {
    /// Rows one after the other.
    ///
    /// # Panics
    /// Where `data` is no whole number of rows of `columns`.
    pub fn new(data: &'a mut [f32], columns: usize) -> Self {
        assert!(data.len().is_multiple_of(columns.max(1)), "{} numbers are no rows of {columns}", data.len());
        Self { rows: data.len() / columns.max(1), data, columns, stride: columns }
    }
}

/// `to = left x right`, or added to it, on all threads of the rayon pool that it is called in.
///
/// # Panics
/// Where the shapes do not fit.
pub fn multiply(to: ViewMut<'_>, left: View<'_>, right: View<'_>, onto: Onto) {
    let threads = rayon::current_num_threads();
    product(to, left, right, 1.0, onto, if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None });
}

/// `to (+)= factor * left x right` on the calling thread alone.
///
/// # Panics
/// Where the shapes do not fit.
pub fn multiply_here(to: ViewMut<'_>, left: View<'_>, right: View<'_>, factor: f32, onto: Onto) {
    product(to, left, right, factor, onto, Parallelism::None);
}

/// # Panics
/// Where `to` is not of the size of `left x right`, or there is no such product.
fn check_shapes(to: &ViewMut<'_>, left: &View<'_>, right: &View<'_>) {
    assert!(
        to.rows == left.rows && to.columns == right.columns && left.columns == right.rows,
        "{} x {} is not {} x {} times {} x {}",
        to.rows,
        to.columns,
        left.rows,
        left.columns,
        right.rows,
        right.columns
    );
}

fn product(to: ViewMut<'_>, left: View<'_>, right: View<'_>, factor: f32, onto: Onto, parallelism: Parallelism) {
    check_shapes(&to, &left, &right);
    // SAFETY: views are made with sizes that lie within their slices, and transposing keeps that; `to` is borrowed
    // mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            to.rows,
            to.columns,
            left.columns,
            to.data.as_mut_ptr(),
            1,
            to.stride as isize,
            onto == Onto::Add,
            left.data.as_ptr(),
            left.strides[1] as isize,
            left.strides[0] as isize,
            right.data.as_ptr(),
            right.strides[1] as isize,
            right.strides[0] as isize,
            1.0f32,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Numbers that a network's large products are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bfloat16 as they are read; sums, and all that is kept, are f32.
    Bf16,
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            other => Err(format!("'{other}' is no precision of training: use f32 or bf16")),
        }
    }
}

/// Makes a network's large products, with buffers that are kept from one to the next. Each of them panics where the shapes do
/// not fit.
#[derive(Default)]
pub struct Multiplier {
    precision: Precision,
    panels: bf16::Panels,
}

impl Multiplier {
    /// Multiplies numbers of this precision.
    pub fn new(precision: Precision) -> Self {
        Self { precision, ..Self::default() }
    }

    fn multiply(&mut self, to: ViewMut<'_>, left: View<'_>, right: View<'_>, onto: Onto) {
        match self.precision {
            Precision::F32 => multiply(to, left, right, onto),
            Precision::Bf16 => bf16::multiply(to, left, right, onto, &mut self.panels),
        }
    }

    /// `y = x wᵀ`, or added to it: `x` is `[rows, inputs]`, `w` `[outputs, inputs]`.
    pub fn linear(&mut self, y: &mut [f32], x: &[f32], w: &[f32], inputs: usize, onto: Onto) {
        let (x, w) = (View::new(x, inputs), View::new(w, inputs));
        self.multiply(ViewMut::new(y, w.rows), x, w.transposed(), onto);
    }

    /// Gradient of what went into a linear map: `dx = dy w`, or added to it.
    pub fn linear_input(&mut self, dx: &mut [f32], dy: &[f32], w: &[f32], inputs: usize, onto: Onto) {
        let w = View::new(w, inputs);
        self.multiply(ViewMut::new(dx, inputs), View::new(dy, w.rows), w, onto);
    }

    /// Gradient of a linear map's weights: `dw = dyᵀ x`, or added to it.
    pub fn linear_weight(&mut self, dw: &mut [f32], dy: &[f32], x: &[f32], inputs: usize, onto: Onto) {
        let outputs = dw.len() / inputs;
        self.multiply(ViewMut::new(dw, inputs), View::new(dy, outputs).transposed(), View::new(x, inputs), onto);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_three_loops() {
        let numbers = |n: usize, seed: usize| (0..n).map(|i| ((i * 31 + seed * 17) % 23) as f32 - 11.0).collect::<Vec<_>>();
        // Small whole numbers, whose products and sums both precisions have exactly; more than one block of each dimension.
        let shapes = [(1, 1, 1), (3, 5, 7), (17, 33, 9), (12, 64, 32), (131, 301, 290), (300, 40, 13)];
        for ((rows, inputs, outputs), precision) in shapes.into_iter().flat_map(|s| [(s, Precision::F32), (s, Precision::Bf16)]) {
            let mut products = Multiplier::new(precision);
            let (x, w, dy) = (numbers(rows * inputs, 1), numbers(outputs * inputs, 2), numbers(rows * outputs, 3));
            let mut y = vec![1.0; rows * outputs];
            products.linear(&mut y, &x, &w, inputs, Onto::Add);
            let mut dx = vec![9.0; rows * inputs];
            products.linear_input(&mut dx, &dy, &w, inputs, Onto::Replace);
            let mut dw = vec![9.0; outputs * inputs];
            products.linear_weight(&mut dw, &dy, &x, inputs, Onto::Replace);
            let sum = |n: usize, f: &dyn Fn(usize) -> f32| (0..n).map(f).sum::<f32>();
            for r in 0..rows {
                for o in 0..outputs {
                    assert_eq!(y[r * outputs + o], 1.0 + sum(inputs, &|i| x[r * inputs + i] * w[o * inputs + i]));
                }
                for i in 0..inputs {
                    assert_eq!(dx[r * inputs + i], sum(outputs, &|o| dy[r * outputs + o] * w[o * inputs + i]));
                }
            }
            for o in 0..outputs {
                for i in 0..inputs {
                    assert_eq!(dw[o * inputs + i], sum(rows, &|r| dy[r * outputs + o] * x[r * inputs + i]));
                }
            }
        }
    }
}
