//! Matrices in main memory, and the linear algebra of least squares and principal components, which is faer's.
//!
//! Rows lie one after the other. Products are f32; what is factorised is f64, since a Gram matrix has the square of its
//! factor's condition number.

use faer::linalg::matmul::matmul;
use faer::prelude::Solve;
use faer::{Accum, Mat, MatRef, Par, Side};
use rayon::prelude::*;

use crate::error::CompressError;
use crate::product::{Onto, View, ViewMut, multiply};

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

    /// The identity, `[size, size]`.
    pub fn identity(size: usize) -> Self {
        let mut matrix = Self::zeros(size, size);
        matrix.numbers.iter_mut().step_by(size + 1).for_each(|x| *x = 1.0);
        matrix
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

    /// Matrices of the same columns, one below the other.
    ///
    /// # Panics
    /// Where their columns differ.
    pub fn stacked(parts: &[&Self]) -> Self {
        let columns = parts.first().map_or(0, |part| part.columns);
        assert!(parts.iter().all(|part| part.columns == columns), "matrices of the same columns");
        Self::new(parts.iter().map(|part| part.rows).sum(), columns, parts.iter().flat_map(|part| &part.numbers).copied().collect())
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
        multiply(product.view_mut(), self.view(), other.view(), Onto::Replace);
        product
    }

    /// `self · otherᵀ`: rows through a linear map `[out, in]`.
    pub fn through(&self, map: &Self) -> Self {
        let mut product = Self::zeros(self.rows, map.rows);
        multiply(product.view_mut(), self.view(), map.view().transposed(), Onto::Replace);
        product
    }

    /// `selfᵀ · other`.
    pub fn transposed_times(&self, other: &Self) -> Self {
        let mut product = Self::zeros(self.columns, other.columns);
        multiply(product.view_mut(), self.view().transposed(), other.view(), Onto::Replace);
        product
    }

    fn view(&self) -> View<'_> {
        View::new(&self.numbers, self.columns)
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut::new(&mut self.numbers, self.columns)
    }
}

/// A sum of `xᵀ y` over rows that come batch by batch: f32 within a batch, f64 across them.
pub struct Products {
    rows: usize,
    columns: usize,
    sums: Vec<f64>,
}

impl Products {
    /// Of rows `x` of `rows` numbers and rows `y` of `columns`.
    pub fn new(rows: usize, columns: usize) -> Self {
        Self { rows, columns, sums: vec![0.0; rows * columns] }
    }

    /// Adds the products of one batch, `x` `[n, rows]` and `y` `[n, columns]`.
    pub fn add(&mut self, x: &Matrix, y: &Matrix) {
        let batch = x.transposed_times(y);
        self.sums.par_iter_mut().zip(batch.numbers.par_iter()).for_each(|(sum, p)| *sum += f64::from(*p));
    }

    /// The diagonal's sum.
    pub fn trace(&self) -> f64 {
        self.sums.iter().step_by(self.columns + 1).sum()
    }

    /// The sum of its numbers, each times that of `otherᵀ` in its place.
    pub fn inner_with_transposed(&self, other: &Matrix) -> f64 {
        let row = |i: usize| self.sums[i * self.columns..(i + 1) * self.columns].iter().enumerate();
        (0..self.rows).map(|i| row(i).map(|(j, s)| s * f64::from(other.row(j)[i])).sum::<f64>()).sum()
    }

    fn view(&self) -> MatRef<'_, f64> {
        MatRef::from_row_major_slice(&self.sums, self.rows, self.columns)
    }

    /// Eigenvectors of the `kept` largest eigenvalues, as columns `[n, kept]`, largest first; and all eigenvalues, largest first.
    ///
    /// # Errors
    /// [`CompressError::Numbers`] where the iteration does not converge: the numbers are not finite.
    pub fn principal(&self, kept: usize) -> Result<(Matrix, Vec<f64>), CompressError> {
        let broken = || CompressError::Numbers("the eigenvalues of the residual stream".into());
        let eigen = self.view().self_adjoint_eigen(Side::Lower).map_err(|_| broken())?;
        let n = self.rows;
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
    let n = gram.rows;
    let before = Mat::from_fn(n, prior.rows, |i, j| f64::from(prior.numbers[j * n + i]));
    let mut wanted = cross.view().to_owned();
    matmul(wanted.as_mut(), Accum::Add, gram.view(), &before, -1.0, Par::rayon(0));
    let lambda = ridge * gram.trace() / n as f64;
    let mut regular = gram.view().to_owned();
    (0..n).for_each(|i| regular[(i, i)] += lambda);
    let factor = regular.llt(Side::Lower).map_err(|_| CompressError::Numbers("a least-squares fit".into()))?;
    factor.solve_in_place(&mut wanted);
    let numbers = (0..prior.rows).flat_map(|j| wanted.col(j).iter().zip(before.col(j).iter()).map(|(w, b)| (w + b) as f32)).collect();
    Ok(Matrix::new(prior.rows, n, numbers))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize, mut seed: u64) -> Matrix {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        Matrix::new(rows, columns, (0..rows * columns).map(|_| next()).collect())
    }

    fn sums(x: &Matrix, y: &Matrix) -> Products {
        let mut sums = Products::new(x.columns(), y.columns());
        // In two batches, as they come.
        let half = x.rows() / 2;
        for rows in [0..half, half..x.rows()] {
            sums.add(&x.select_rows(rows.clone()), &y.select_rows(rows));
        }
        sums
    }

    fn distance(a: &Matrix, b: &Matrix) -> f32 {
        a.numbers().iter().zip(b.numbers()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn a_map_is_found_again() {
        let (x, map) = (random(60, 7, 1), random(5, 7, 2));
        let found = ridge(&sums(&x, &x), &sums(&x, &x.through(&map)), &Matrix::zeros(5, 7), 1e-9).unwrap();
        assert!(distance(&found, &map) < 1e-4, "{found:?}");
    }

    #[test]
    fn a_prior_that_fits_stays_whatever_the_ridge() {
        let (x, map) = (random(60, 7, 3), random(5, 7, 4));
        for strength in [1e-6, 0.02, 10.0] {
            let found = ridge(&sums(&x, &x), &sums(&x, &x.through(&map)), &map, strength).unwrap();
            assert!(distance(&found, &map) < 1e-5, "{strength}: {found:?}");
        }
    }

    #[test]
    fn no_other_map_is_better() {
        let (x, y, prior) = (random(40, 6, 5), random(40, 3, 6), random(3, 6, 7));
        let (gram, cross) = (sums(&x, &x), sums(&x, &y));
        let lambda = 0.3 * gram.trace() / 6.0;
        let cost = |w: &Matrix| {
            let squares = |a: &Matrix, b: &Matrix| a.numbers().iter().zip(b.numbers()).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            squares(&x.through(w), &y) + lambda * squares(w, &prior)
        };
        let best = ridge(&gram, &cross, &prior, 0.3).unwrap();
        for i in 0..best.numbers().len() {
            for step in [-0.01, 0.01] {
                let mut other = best.clone();
                other.numbers_mut()[i] += step;
                assert!(cost(&other) > cost(&best), "weight {i}");
            }
        }
    }

    #[test]
    fn principal_directions_are_orthonormal_and_hold_the_most() {
        let mut x = random(80, 9, 8);
        x.scale_columns(&[3.0, 0.1, 1.0, 0.2, 5.0, 0.1, 0.1, 2.0, 0.1]);
        let gram = sums(&x, &x);
        let (basis, energies) = gram.principal(4).unwrap();
        let product = basis.transposed_times(&basis);
        for i in 0..4 {
            for j in 0..4 {
                assert!((product.row(i)[j] - if i == j { 1.0 } else { 0.0 }).abs() < 1e-5);
            }
        }
        assert!(energies.is_sorted_by(|a, b| a >= b));
        let kept: f64 = x.times(&basis).numbers().iter().map(|x| f64::from(x * x)).sum();
        assert!((kept - energies[..4].iter().sum::<f64>()).abs() < 1e-3 * kept);
        assert!((gram.trace() - energies.iter().sum::<f64>()).abs() < 1e-6 * kept);
    }
}
