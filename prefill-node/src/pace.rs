//! How fast prompts are read, and so how many tokens are to lie ready: more would wait here, where nobody's turn is kept.

use std::time::Duration;

/// Steps of fewer tokens are bound by memory, and tell nothing of how fast prompts are read.
const TELLING: usize = 32;
/// What is left of an earlier step's weight after another one.
const KEPT: f64 = 0.9;

/// Tokens and seconds of the last steps.
#[derive(Debug)]
pub(crate) struct Pace {
    tokens: f64,
    seconds: f64,
    /// For how long what lies ready is to keep the engine busy.
    ready: f64,
}

impl Pace {
    /// What lies ready is to keep the engine busy for `ready` seconds; 0 where any number of tokens may.
    pub(crate) fn new(ready: f64) -> Self {
        Self { tokens: 0.0, seconds: 0.0, ready }
    }

    /// Most tokens that are to lie ready as long as nothing was read: those of a step; 0 is any number.
    pub(crate) fn at_first(&self, step: usize) -> usize {
        if self.ready > 0.0 { step } else { 0 }
    }

    /// After a step over `tokens`: most tokens that are to lie ready, at least 1; `None` as long as that is not known.
    pub(crate) fn after(&mut self, tokens: usize, took: Duration) -> Option<usize> {
        if tokens >= TELLING {
            self.tokens = self.tokens * KEPT + tokens as f64;
            self.seconds = self.seconds * KEPT + took.as_secs_f64();
        }
        let most = self.tokens / self.seconds * self.ready;
        (self.ready > 0.0 && most.is_finite()).then_some((most as usize).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_the_steps_that_tell() {
        let mut pace = Pace::new(0.25);
        assert_eq!((pace.at_first(256), pace.after(1, Duration::from_millis(20))), (256, None));
        assert_eq!(pace.after(256, Duration::from_millis(500)), Some(128));
        // A token of an answer that the full model writes.
        assert_eq!(pace.after(1, Duration::from_millis(20)), Some(128));
        let slower = (0..60).filter_map(|_| pace.after(256, Duration::from_secs(1))).last();
        assert!(slower.is_some_and(|most| (63..=65).contains(&most)), "{slower:?}");
        assert_eq!(Pace::new(0.25).after(32, Duration::from_secs(60)), Some(1));
    }

    #[test]
    fn without_a_bound_it_is_none() {
        let mut pace = Pace::new(0.0);
        assert_eq!((pace.at_first(256), pace.after(256, Duration::from_secs(1))), (0, None));
    }
}
