//! The requests of a load: when they come, how long their prompts and answers are.

use std::str::FromStr;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp, LogNormal};
use serde::Deserialize;

use crate::Unusable;

/// The standard normal distribution's 95th percentile.
const P95: f64 = 1.644_853_6;
/// Longest prompt or answer.
const LONGEST: usize = 1 << 20;

/// A request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    /// Seconds from the beginning.
    pub at: f64,
    /// Tokens of its prompt.
    pub prompt: usize,
    /// Tokens of its answer, at least 1.
    pub answer: usize,
}

/// Lengths in tokens, each at least 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    /// All the same.
    Fixed(usize),
    /// Any from the first to the second alike.
    Uniform(usize, usize),
    /// Their logarithms are normally distributed: by median and 95th percentile.
    LogNormal(f64, f64),
}

impl Lengths {
    fn draw(self, rng: &mut SmallRng) -> usize {
        match self {
            Self::Fixed(tokens) => tokens,
            Self::Uniform(least, most) => rng.random_range(least..=most),
            Self::LogNormal(median, p95) => {
                let drawn = LogNormal::new(median.ln(), (p95 / median).ln() / P95).map_or(median, |lengths| lengths.sample(rng));
                (drawn.round() as usize).clamp(1, LONGEST)
            }
        }
    }
}

impl FromStr for Lengths {
    type Err = Unusable;

    fn from_str(text: &str) -> Result<Self, Unusable> {
        let wrong = || {
            let forms = "256, 100..900, or lognormal:MEDIAN:P95 as in lognormal:200:1500";
            Unusable(format!("'{text}' is no length in tokens: write {forms}, from 1 to {LONGEST}"))
        };
        let length = |text: &str| text.parse().ok().filter(|tokens| (1..=LONGEST).contains(tokens)).ok_or_else(wrong);
        if let Some(of) = text.strip_prefix("lognormal:") {
            let (median, p95) = of.split_once(':').ok_or_else(wrong)?;
            let (median, p95) = (length(median)? as f64, length(p95)? as f64);
            return if p95 >= median { Ok(Self::LogNormal(median, p95)) } else { Err(wrong()) };
        }
        if let Some((least, most)) = text.split_once("..") {
            let (least, most) = (length(least)?, length(most)?);
            return if least <= most { Ok(Self::Uniform(least, most)) } else { Err(wrong()) };
        }
        length(text).map(Self::Fixed)
    }
}

/// What a cluster is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Load {
    /// A Poisson process.
    Drawn {
        /// Requests a second.
        rate: f64,
        /// Tokens of prompts.
        prompt: Lengths,
        /// Tokens of answers.
        answer: Lengths,
    },
    /// As they came once, in order.
    Trace(Vec<Arrival>),
}

/// A line of a trace, in the form that Mooncake published: milliseconds, tokens.
#[derive(Deserialize)]
struct TraceLine {
    timestamp: f64,
    input_length: usize,
    output_length: usize,
}

impl Load {
    /// A trace of lines of JSON with `timestamp` (milliseconds), `input_length` and `output_length` (tokens); at `rate` requests a
    /// second, or at its own.
    ///
    /// # Errors
    /// Where a line is none, or there are fewer than two.
    pub fn trace(text: &str, rate: Option<f64>) -> Result<Self, Unusable> {
        let mut arrivals = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let line: TraceLine = serde_json::from_str(line)
                .map_err(|error| Unusable(format!("line {}: timestamp, input_length and output_length are wanted: {error}", number + 1)))?;
            let length = |tokens: usize| tokens.clamp(1, LONGEST);
            arrivals.push(Arrival { at: line.timestamp / 1e3, prompt: length(line.input_length), answer: length(line.output_length) });
        }
        arrivals.sort_by(|a, b| a.at.total_cmp(&b.at));
        let (Some(first), Some(last)) = (arrivals.first(), arrivals.last()) else {
            return Err(Unusable("the trace has no requests".into()));
        };
        let (begin, own) = (first.at, (arrivals.len() - 1) as f64 / (last.at - first.at));
        if !own.is_finite() || own <= 0.0 {
            return Err(Unusable("the trace's requests all come at once: its timestamps have to differ".into()));
        }
        let stretch = rate.map_or(1.0, |rate| own / rate);
        arrivals.iter_mut().for_each(|arrival| arrival.at = (arrival.at - begin) * stretch);
        Ok(Self::Trace(arrivals))
    }

    /// At most so many requests, in order of time.
    pub fn draw(&self, most: usize, seed: u64) -> Vec<Arrival> {
        match self {
            Self::Trace(arrivals) => arrivals.iter().copied().take(most).collect(),
            Self::Drawn { rate, prompt, answer } => {
                let (mut rng, mut at) = (SmallRng::seed_from_u64(seed), 0.0);
                let Ok(gaps) = Exp::new(*rate) else { return Vec::new() };
                let one = |_| {
                    at += gaps.sample(&mut rng);
                    Arrival { at, prompt: prompt.draw(&mut rng), answer: answer.draw(&mut rng) }
                };
                (0..most).map(one).collect()
            }
        }
    }

    /// Requests a second.
    pub fn rate(&self) -> f64 {
        match self {
            Self::Drawn { rate, .. } => *rate,
            Self::Trace(arrivals) => arrivals.last().map_or(0.0, |last| (arrivals.len() - 1) as f64 / last.at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_as_they_are_written() {
        let drawn = |text: &str| {
            let lengths: Lengths = text.parse().unwrap();
            let mut rng = SmallRng::seed_from_u64(1);
            let mut drawn: Vec<usize> = (0..10_001).map(|_| lengths.draw(&mut rng)).collect();
            drawn.sort_unstable();
            [0, 5_000, 9_500, 10_000].map(|place| drawn[place])
        };
        assert_eq!(drawn("256"), [256; 4]);
        let [least, median, p95, most] = drawn("100..900");
        assert!(least == 100 && most == 900 && (480..520).contains(&median) && (850..870).contains(&p95));
        let [_, median, p95, _] = drawn("lognormal:200:1500");
        assert!((190..210).contains(&median) && (1400..1600).contains(&p95), "{median} {p95}");
        for wrong in ["", "0", "x", "9..3", "lognormal:5", "lognormal:9:3", "-1", "2000000"] {
            assert!(wrong.parse::<Lengths>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn requests_come_at_their_rate() {
        let load = Load::Drawn { rate: 20.0, prompt: Lengths::Fixed(3), answer: Lengths::Fixed(2) };
        let drawn = load.draw(20_000, 7);
        assert_eq!(drawn, load.draw(20_000, 7));
        assert!((drawn[19_999].at - 1000.0).abs() < 30.0);
        let trace = "{\"timestamp\": 1000, \"input_length\": 5, \"output_length\": 6, \"hash_ids\": [1]}\n\n{\"timestamp\": 3000, \"input_length\": 7, \"output_length\": 0}";
        let own = Load::trace(trace, None).unwrap();
        assert_eq!(own.draw(9, 0), [Arrival { at: 0.0, prompt: 5, answer: 6 }, Arrival { at: 2.0, prompt: 7, answer: 1 }]);
        assert_eq!((own.rate(), Load::trace(trace, Some(5.0)).unwrap().rate()), (0.5, 5.0));
        for wrong in ["", "{}", "{\"timestamp\": 0, \"input_length\": 1, \"output_length\": 1}"] {
            assert!(Load::trace(wrong, None).is_err(), "{wrong}");
        }
    }
}
