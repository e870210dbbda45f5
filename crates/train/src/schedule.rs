//! The learning rate over a run: a linear rise, then half a cosine.

use serde::{Deserialize, Serialize};

/// How the learning rate goes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The highest.
    pub peak: f32,
    /// Share of all steps in which it rises.
    pub warmup: f32,
    /// Share of the peak that is left at the end.
    pub last: f32,
}

impl Schedule {
    /// The rate of step `step` of `steps`, counted from 0; never 0.
    pub fn rate(&self, step: u64, steps: u64) -> f32 {
        // In f32: 0.1 as f64 is a little more than a tenth, which would be one step too many of a hundred.
        let rise = ((self.warmup * steps as f32).ceil() as u64).min(steps);
        if step < rise {
            return (f64::from(self.peak) * (step + 1) as f64 / rise as f64) as f32;
        }
        let done = (step - rise) as f64 / (steps - rise).max(1) as f64;
        let share = f64::from(self.last) + (1.0 - f64::from(self.last)) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        (f64::from(self.peak) * share) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_and_falls() {
        let schedule = Schedule { peak: 2.0, warmup: 0.1, last: 0.25 };
        let rates: Vec<f32> = (0..100).map(|step| schedule.rate(step, 100)).collect();
        assert_eq!((rates[0], rates[9], rates[10]), (0.2, 2.0, 2.0));
        assert!(rates[..10].is_sorted() && rates[10..].is_sorted_by(|a, b| a >= b));
        assert!(rates[99] > 0.5 && rates[99] < 0.51, "{}", rates[99]);
        assert_eq!(Schedule { warmup: 0.0, ..schedule }.rate(0, 1), 2.0);
        assert_eq!(Schedule { warmup: 1.0, ..schedule }.rate(4, 5), 2.0);
    }
}
