//! Matrices in main memory, and the little linear algebra that pruning needs of faer.
//!
//! Rows lie one after the other. Products run on all cores, in f32; what is factorised is f64, since a Gram matrix has
//! the square of its factor's condition number.

use faer::linalg::matmul::matmul;
use faer::prelude::Solve;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};

use crate::error::CompressError;

/// A matrix of f32, rows one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    rows: usize,
    columns: usize,
    numbers: Vec<f32>,
}

impl Matrix {
    /// Of `rows` times `columns` numbers.
    ///
    /// # Panics
    /// Where it is another count.
    pub fn new(rows: usize, columns: usize, numbers: Vec<f32>) -> Self {
        assert_eq!(rows * columns, numbers.len(), "a matrix of {rows} x {columns}");
        Self { rows, columns, numbers }
    }

    /// Of zeros.
    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self::new(rows, columns, vec![0.0; rows * columns])
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// All numbers, row by row.
    pub fn numbers(&self) -> &[f32] {
        &self.numbers
    }

    /// All numbers, row by row.
    pub fn numbers_mut(&mut self) -> &mut [f32] {
        &mut self.numbers
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.numbers[i * self.columns..(i + 1) * self.columns]
    }

    /// The rows of these numbers, in this order.
    pub fn select_rows(&self, rows: impl IntoIterator<Item = usize>) -> Self {
        let mut numbers = Vec::new();
        rows.into_iter().for_each(|i| numbers.extend_from_slice(self.row(i)));
        Self { rows: numbers.len() / self.columns.max(1), columns: self.columns, numbers }
    }

    /// The columns of these numbers, in this order.
    pub fn select_columns(&self, columns: &[usize]) -> Self {
        let numbers = (0..self.rows).flat_map(|i| columns.iter().map(move |&c| self.numbers[i * self.columns + c])).collect();
        Self { rows: self.rows, columns: columns.len(), numbers }
    }

    /// Each column times its factor.
    pub fn scale_columns(&mut self, factors: &[f32]) {
        assert_eq!(factors.len(), self.columns, "a factor for each column");
        for row in self.numbers.chunks_exact_mut(self.columns) {
            row.iter_mut().zip(factors).for_each(|(x, f)| *x *= f);
        }
    }

    /// `self · other`.
    pub fn times(&self, other: &Self) -> Self {
        let mut product = Self::zeros(self.rows, other.columns);
        matmul(product.view_mut(), Accum::Replace, self.view(), other.view(), 1.0, Par::rayon(0));
        product
    }

    /// `self · otherᵀ`: rows through a linear map `[out, in]`.
    pub fn through(&self, map: &Self) -> Self {
        let mut product = Self::zeros(self.rows, map.rows);
        matmul(product.view_mut(), Accum::Replace, self.view(), map.view().transpose(), 1.0, Par::rayon(0));
        product
    }

    /// `selfᵀ · other`.
    pub fn transposed_times(&self, other: &Self) -> Self {
        let mut product = Self::zeros(self.columns, other.columns);
        matmul(product.view_mut(), Accum::Replace, self.view().transpose(), other.view(), 1.0, Par::rayon(0));
        product
    }

    fn view(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.numbers, self.rows, self.columns)
    }

    fn view_mut(&mut self) -> MatMut<'_, f32> {
        MatMut::from_row_major_slice_mut(&mut self.numbers, self.rows, self.columns)
    }
}

/// A sum of `xᵀ y` over rows that come batch by batch: f32 within a batch, f64 across them.
pub struct Products(Mat<f64>);

impl Products {
    /// Of rows `x` of `rows` numbers and rows `y` of `columns`.
    pub fn new(rows: usize, columns: usize) -> Self {
        Self(Mat::zeros(rows, columns))
    }

    /// Adds the products of one batch, `x` `[n, rows]` and `y` `[n, columns]`.
    pub fn add(&mut self, x: &Matrix, y: &Matrix) {
        let batch = x.transposed_times(y);
        for (i, row) in batch.numbers.chunks_exact(batch.columns).enumerate() {
            row.iter().enumerate().for_each(|(j, &p)| self.0[(i, j)] += f64::from(p));
        }
    }

    /// The diagonal's sum.
    pub fn trace(&self) -> f64 {
        self.0.diagonal().column_vector().iter().sum()
    }

    /// The sum of its numbers, each times that of `other`ᵀ in its place.
    pub fn inner_with_transposed(&self, other: &Matrix) -> f64 {
        (0..other.rows).map(|j| other.row(j).iter().enumerate().map(|(i, x)| self.0[(i, j)] * f64::from(*x)).sum::<f64>()).sum()
    }

    /// Eigenvectors of the `kept` largest eigenvalues, as columns `[n, kept]`, largest first; and all eigenvalues, largest first.
    ///
    /// # Errors
    /// [`CompressError::Numbers`] where the iteration does not converge: the numbers are not finite.
    pub fn principal(&self, kept: usize) -> Result<(Matrix, Vec<f64>), CompressError> {
        let eigen =
            self.0.self_adjoint_eigen(Side::Lower).map_err(|_| CompressError::Numbers("the eigenvalues of the residual stream".into()))?;
        let n = self.0.nrows();
        let vectors = eigen.U();
        let numbers = (0..n).flat_map(|i| (0..kept).map(move |j| vectors[(i, n - 1 - j)] as f32)).collect();
        let values = (0..n).map(|j| eigen.S().column_vector()[n - 1 - j]).collect();
        Ok((Matrix::new(n, kept, numbers), values))
    }
}

/// Ridge least squares with a prior: the `w` `[out, in]` that minimises `|x wᵀ − y|² + λ |w − prior|²`.
///
/// `gram` is `xᵀx`, `cross` is `xᵀy`, and λ is `ridge` times the mean of the Gram matrix's diagonal. Where `prior` fits already,
/// it is what comes out.
///
/// # Errors
/// [`CompressError::Numbers`] where the Gram matrix is not finite.
pub fn ridge(gram: &Products, cross: &Products, prior: &Matrix, ridge: f64) -> Result<Matrix, CompressError> {
    let n = gram.0.nrows();
    let before = Mat::from_fn(n, prior.rows, |i, j| f64::from(prior.numbers[j * n + i]));
    let mut wanted = cross.0.clone();
    matmul(wanted.as_mut(), Accum::Add, &gram.0, &before, -1.0, Par::rayon(0));
    let lambda = ridge * gram.trace() / n as f64;
    let mut regular = gram.0.clone();
    (0..n).for_each(|i| regular[(i, i)] += lambda);
    let factor = regular.llt(Side::Lower).map_err(|_| CompressError::Numbers("a least-squares fit".into()))?;
    factor.solve_in_place(&mut wanted);
    let numbers = (0..prior.rows)
        .flat_map(|j| {
            (0..n).map({
                let (w, b) = (&wanted, &before);
                move |i| (b[(i, j)] + w[(i, j)]) as f32
            })
        })
        .collect();
    Ok(Matrix::new(prior.rows, n, numbers))
}
