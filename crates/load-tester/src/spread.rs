//! Mean, spread and percentiles of what was measured, from all values: nothing is put into buckets.

/// What is told of many values; none of it is a number where there are none.
#[derive(Clone, Debug)]
pub struct Spread {
    sorted: Vec<f64>,
    /// In the values' own unit, as everything here.
    pub mean: f64,
    /// Standard deviation of the values themselves, not of a sample of more.
    pub std: f64,
}

impl Spread {
    /// Of values in any order.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len() as f64;
        let mean = if sorted.is_empty() { f64::NAN } else { sorted.iter().sum::<f64>() / count };
        let std = (sorted.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count).sqrt();
        Self { sorted, mean, std }
    }

    /// The value that `percent` of all values do not exceed, between two of them on the straight line (as numpy does it).
    pub fn percentile(&self, percent: f64) -> f64 {
        let Some(last) = self.sorted.len().checked_sub(1) else { return f64::NAN };
        let place = (percent / 100.0).clamp(0.0, 1.0) * last as f64;
        let (below, above) = (place.floor() as usize, place.ceil() as usize);
        let (low, high) = (self.sorted[below], self.sorted[above.min(last)]);
        low + (high - low) * (place - below as f64)
    }

    /// The 50th percentile.
    pub fn median(&self) -> f64 {
        self.percentile(50.0)
    }

    /// All values, ascending.
    pub fn values(&self) -> &[f64] {
        &self.sorted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]);
        assert_eq!((spread.mean, spread.median()), (2.5, 2.5));
        assert!((spread.std - 1.25f64.sqrt()).abs() < 1e-12);
        assert_eq!((spread.percentile(0.0), spread.percentile(100.0)), (1.0, 4.0));
        // numpy.percentile([1, 2, 3, 4], 90) is 3.7, of 99 it is 3.97.
        assert!((spread.percentile(90.0) - 3.7).abs() < 1e-12);
        assert!((spread.percentile(99.0) - 3.97).abs() < 1e-12);
        let one = Spread::of([7.0]);
        assert_eq!((one.percentile(1.0), one.percentile(99.0), one.std), (7.0, 7.0, 0.0));
    }

    #[test]
    fn nothing_is_no_number() {
        let none = Spread::of([]);
        assert!(none.mean.is_nan() && none.std.is_nan() && none.median().is_nan());
    }
}
