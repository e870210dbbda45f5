//! Means with their uncertainty: the bootstrap, over samples, within tasks.
//!
//! **Invariant:** what is compared was drawn alike: in each draw all arms are given the same samples.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Draws of the bootstrap: enough for the second digit of an interval's ends.
const DRAWS: usize = 1000;
/// Key of the draws. Fixed, so that the same results give the same intervals.
const SEED: u64 = 2508;

/// A figure and where it lies with a probability of 95 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Of all samples.
    pub value: f64,
    /// 2.5 % of the draws are below.
    pub low: f64,
    /// 2.5 % of the draws are above.
    pub high: f64,
}

/// Samples of every task that one draw consists of, by their numbers among all samples.
pub type Draw = Vec<Vec<usize>>;

/// The draws, all samples themselves being the first. `tasks` are the samples of each task.
pub fn draws(tasks: &[Vec<usize>]) -> Vec<Draw> {
    let mut generator = ChaCha8Rng::seed_from_u64(SEED);
    let mut draws = vec![tasks.to_vec()];
    draws.extend((0..DRAWS).map(|_| {
        let draw = |samples: &Vec<usize>| samples.iter().map(|_| samples[generator.random_range(0..samples.len())]).collect();
        tasks.iter().map(draw).collect::<Draw>()
    }));
    draws
}

/// The estimate of what `of` computes of a draw. Draws of which it is not a number (a ratio to nothing) are left out.
pub fn estimate(draws: &[Draw], of: impl Fn(&Draw) -> f64) -> Estimate {
    let value = draws.first().map_or(f64::NAN, &of);
    let mut drawn: Vec<f64> = draws.iter().skip(1).map(of).filter(|x| x.is_finite()).collect();
    drawn.sort_unstable_by(f64::total_cmp);
    let at = |part: f64| drawn.get(((drawn.len() as f64 * part) as usize).min(drawn.len().saturating_sub(1))).copied().unwrap_or(f64::NAN);
    Estimate { value, low: at(0.025), high: at(0.975) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_that_of_a_mean() {
        // 400 samples of variance 1/4: the standard error is 0.025.
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let draws = draws(&[(0..400).collect()]);
        let mean = |draw: &Draw| draw[0].iter().map(|i| values[*i]).sum::<f64>() / 400.0;
        let Estimate { value, low, high } = estimate(&draws, mean);
        assert_eq!(value, 0.5);
        assert!((low - 0.451).abs() < 0.006 && (high - 0.549).abs() < 0.006, "{low} {high}");
        assert_eq!(estimate(&draws, mean), estimate(&super::draws(&[(0..400).collect()]), mean), "the same draws each time");
        assert!(estimate(&draws, |_| f64::NAN).value.is_nan());
    }
}
