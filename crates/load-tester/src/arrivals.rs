//! When requests are due: a plan that is drawn before the first of them is sent.
//!
//! The load is open: what the server does moves no arrival. The names and the arithmetic of the options are `vllm bench serve`'s.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Gamma};

#[derive(Args)]
#[command(next_help_heading = "Arrivals")]
pub(super) struct ArrivalArgs {
    /// Requests a second; inf sends all of them at once. Several, separated by commas, are measured one after the other
    #[arg(long, env = "OVERFILL_BENCH_REQUEST_RATE", value_delimiter = ',', default_value = "inf")]
    pub(super) request_rate: Vec<f64>,
    /// Shape of the gamma distribution of the gaps: 1 is a Poisson process, less is burstier, more is more even, inf is a metronome
    #[arg(long, env = "OVERFILL_BENCH_BURSTINESS", default_value_t = 1.0)]
    pub(super) burstiness: f64,
    /// Requests that arrive together; the bursts come at the rate divided by their size
    #[arg(long, env = "OVERFILL_BENCH_BURST_SIZE", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    burst_size: u32,
    /// Most requests under way; one that is due waits, and the wait is told
    #[arg(long, env = "OVERFILL_BENCH_MAX_CONCURRENCY", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(super) max_concurrency: Option<u32>,
    /// How the rate grows from --ramp-up-start-rps to --ramp-up-end-rps over the run
    #[arg(long, env = "OVERFILL_BENCH_RAMP_UP_STRATEGY", value_enum, requires_all = ["ramp_up_start_rps", "ramp_up_end_rps"])]
    pub(super) ramp_up_strategy: Option<RampUp>,
    /// Requests a second at the beginning of a ramp
    #[arg(long, env = "OVERFILL_BENCH_RAMP_UP_START_RPS")]
    pub(super) ramp_up_start_rps: Option<f64>,
    /// Requests a second at the end of a ramp
    #[arg(long, env = "OVERFILL_BENCH_RAMP_UP_END_RPS")]
    pub(super) ramp_up_end_rps: Option<f64>,
}

/// How a rate grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum RampUp {
    Linear,
    Exponential,
}

impl RampUp {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Exponential => "exponential",
        }
    }
}

/// The process that arrivals are drawn from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrivals {
    pub(super) rate: Rate,
    burstiness: f64,
    burst_size: usize,
}

/// Requests a second, over a run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rate {
    /// The same all the time; infinite: all at once.
    Constant(f64),
    /// From `start` to `end`, by the number of the request.
    Ramp { how: RampUp, start: f64, end: f64 },
}

impl ArrivalArgs {
    /// One process for each rate that is to be measured.
    ///
    /// # Errors
    /// Where options contradict each other or a number is out of its range.
    pub(super) fn processes(&self) -> anyhow::Result<Vec<Arrivals>> {
        ensure!(self.burstiness > 0.0, "--burstiness is {}: it must be above 0", self.burstiness);
        let process = |rate| Arrivals { rate, burstiness: self.burstiness, burst_size: self.burst_size as usize };
        if let (Some(how), Some(start), Some(end)) = (self.ramp_up_strategy, self.ramp_up_start_rps, self.ramp_up_end_rps) {
            ensure!(self.request_rate == [f64::INFINITY], "--request-rate and --ramp-up-strategy exclude each other: leave one out");
            ensure!(
                start.is_finite() && end.is_finite() && start > 0.0 && start <= end,
                "--ramp-up-start-rps is {start}, --ramp-up-end-rps {end}: both must be above 0, the end not below the start"
            );
            return Ok(vec![process(Rate::Ramp { how, start, end })]);
        }
        if self.ramp_up_start_rps.is_some() || self.ramp_up_end_rps.is_some() {
            bail!("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy linear or exponential");
        }
        for rate in &self.request_rate {
            ensure!(*rate > 0.0, "--request-rate is {rate}: it must be above 0, or inf");
        }
        Ok(self.request_rate.iter().map(|&rate| process(Rate::Constant(rate))).collect())
    }

    /// Whether the arrivals are left at what they are by default.
    pub(super) fn untouched(&self) -> bool {
        self.request_rate == [f64::INFINITY] && self.ramp_up_strategy.is_none()
    }
}

impl Arrivals {
    /// When each of `count` requests is due, from the beginning of the run on, in order.
    ///
    /// A constant rate is kept exactly: the gaps are scaled so that the last request is due at `count / rate`, as `vllm bench
    /// serve` does it, and runs of different seeds carry the same load.
    ///
    /// # Errors
    /// Where the burstiness is too extreme to be drawn from.
    pub(super) fn schedule(&self, count: usize, seed: u64) -> anyhow::Result<Vec<Duration>> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let bursts = count.div_ceil(self.burst_size);
        let mut at = 0.0;
        let mut due = Vec::with_capacity(bursts);
        for burst in 0..bursts {
            at += self.gap(self.rate.at(burst, bursts) / self.burst_size as f64, &mut random)?;
            due.push(at);
        }
        if let (Rate::Constant(rate), true) = (self.rate, at > 0.0) {
            let scale = count as f64 / rate / at;
            due.iter_mut().for_each(|at| *at *= scale);
        }
        (0..count)
            .map(|i| Duration::try_from_secs_f64(due[i / self.burst_size]).context("a request would be due too late: raise the rate"))
            .collect()
    }

    fn gap(&self, rate: f64, random: &mut ChaCha8Rng) -> anyhow::Result<f64> {
        if rate.is_infinite() {
            return Ok(0.0);
        }
        if self.burstiness.is_infinite() {
            return Ok(1.0 / rate);
        }
        let gaps = Gamma::new(self.burstiness, 1.0 / (rate * self.burstiness)).context("--burstiness is too extreme")?;
        Ok(gaps.sample(random))
    }
}

impl Rate {
    /// The rate that request `index` of `count` arrives at.
    fn at(self, index: usize, count: usize) -> f64 {
        let progress = index as f64 / count.saturating_sub(1).max(1) as f64;
        match self {
            Self::Constant(rate) => rate,
            Self::Ramp { how: RampUp::Linear, start, end } => start + (end - start) * progress,
            Self::Ramp { how: RampUp::Exponential, start, end } => start * (end / start).powf(progress),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrivals(rate: Rate, burstiness: f64, burst_size: usize) -> Arrivals {
        Arrivals { rate, burstiness, burst_size }
    }

    fn gaps(due: &[Duration]) -> Vec<f64> {
        let mut last = Duration::ZERO;
        due.iter().map(|&at| (at - std::mem::replace(&mut last, at)).as_secs_f64()).collect()
    }

    /// Mean, and standard deviation divided by it.
    fn shape(gaps: &[f64]) -> (f64, f64) {
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        (mean, variance.sqrt() / mean)
    }

    #[test]
    fn gaps_have_the_rate_and_the_spread_that_were_asked_for() {
        // A gamma distribution of shape k has the coefficient of variation 1 / sqrt(k).
        for burstiness in [0.25, 1.0, 4.0, f64::INFINITY] {
            let due = arrivals(Rate::Constant(20.0), burstiness, 1).schedule(20_000, 7).unwrap();
            let (mean, spread) = shape(&gaps(&due));
            assert!((mean - 0.05).abs() < 1e-6, "{burstiness}: a mean gap of {mean}");
            let expected = 1.0 / burstiness.sqrt();
            assert!((spread - expected).abs() < 0.05 * expected.max(0.01), "{burstiness}: {spread} and not {expected}");
        }
    }

    #[test]
    fn the_last_request_is_due_when_the_rate_says() {
        for seed in 0..20 {
            let due = arrivals(Rate::Constant(4.0), 1.0, 1).schedule(100, seed).unwrap();
            assert!((due[99].as_secs_f64() - 25.0).abs() < 1e-6);
            assert!(due.is_sorted());
        }
        let at_once = arrivals(Rate::Constant(f64::INFINITY), 1.0, 1).schedule(100, 1).unwrap();
        assert!(at_once.iter().all(Duration::is_zero));
    }

    #[test]
    fn bursts_arrive_together_at_the_same_rate() {
        let due = arrivals(Rate::Constant(10.0), f64::INFINITY, 5).schedule(100, 1).unwrap();
        assert!(due.chunks(5).all(|burst| burst.iter().all(|at| *at == burst[0])));
        assert!((due[99].as_secs_f64() - 10.0).abs() < 1e-6);
        assert!((due[5] - due[4]).as_secs_f64() > 0.49);
    }

    #[test]
    fn a_ramp_grows_from_its_start_to_its_end() {
        for how in [RampUp::Linear, RampUp::Exponential] {
            let rate = Rate::Ramp { how, start: 2.0, end: 32.0 };
            let gaps = gaps(&arrivals(rate, f64::INFINITY, 1).schedule(101, 1).unwrap());
            assert!((gaps[0] - 1.0 / 2.0).abs() < 1e-6 && (gaps[100] - 1.0 / 32.0).abs() < 1e-6);
            assert!(gaps.windows(2).all(|w| w[1] <= w[0]));
            let middle = if how == RampUp::Linear { 17.0 } else { 8.0 };
            assert!((gaps[50] - 1.0 / middle).abs() < 1e-6);
        }
    }
}
