//! What a user sees of an answer before its content: whether it goes round in circles, how long it is, how often it says the same.

use std::collections::HashSet;

use crate::repeats::{sentence_twice, thrice};

/// Tokens of the runs that are counted for variety.
const RUN: usize = 4;

/// The manner of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Manner {
    /// Tokens, the ending one included.
    pub(crate) tokens: f64,
    /// 1 where a block of four tokens or more stands in it three times in a row, or a sentence of five words or more twice.
    pub(crate) circles: f64,
    /// Runs of four tokens.
    pub(crate) runs: f64,
    /// Different ones among them.
    pub(crate) different: f64,
}

impl Manner {
    /// Of an answer, given as tokens and as text.
    pub(crate) fn of(tokens: &[u32], text: &str) -> Self {
        let different: HashSet<&[u32]> = tokens.windows(RUN).collect();
        Self {
            tokens: tokens.len() as f64,
            circles: f64::from(thrice(tokens) || sentence_twice(text)),
            runs: tokens.windows(RUN).count() as f64,
            different: different.len() as f64,
        }
    }
}

/// Where a token stands in an answer: the first of these that is not below its place, counted from 1.
pub(crate) const PLACES: [usize; 6] = [8, 16, 32, 64, 128, usize::MAX];

/// Which of [`PLACES`] a token counts for; `place` is counted from 0.
pub(crate) fn place(place: usize) -> usize {
    PLACES.iter().take_while(|last| **last <= place).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn circles_and_variety_are_counted() {
        let plain = Manner::of(&[1, 2, 3, 4, 5, 6, 7], "Boil it for ten minutes. Serve it.");
        assert_eq!(plain, Manner { tokens: 7.0, circles: 0.0, runs: 4.0, different: 4.0 });
        let tokens: Vec<u32> = [9, 8, 7, 6].repeat(3);
        assert_eq!(Manner::of(&tokens, "…"), Manner { tokens: 12.0, circles: 1.0, runs: 9.0, different: 4.0 });
        assert_eq!(Manner::of(&[1], "It is a kettle of water. It is a kettle of water.").circles, 1.0);
        assert_eq!(Manner::of(&[], ""), Manner::default());
    }

    #[test]
    fn places_are_counted_from_one() {
        let at: Vec<usize> = [0, 7, 8, 15, 16, 63, 64, 127, 128, 5000].into_iter().map(place).collect();
        assert_eq!(at, [0, 0, 1, 1, 2, 3, 4, 4, 5, 5]);
    }
}
