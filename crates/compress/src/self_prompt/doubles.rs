//! Near-doubles, found without comparing each with all: MinHash (Broder 1997) of runs of words, in bands.

use std::collections::HashSet;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Words of a run.
const RUN: usize = 3;
/// Bands, and hashes of a band. Two texts of which a part `s` of the runs is common are taken for doubles with the probability
/// `1 - (1 - s^4)^8`: 0.40 at s = 0.5, 0.89 at 0.7, and 0.06 at 0.3.
const BANDS: usize = 8;
const ROWS: usize = 4;

/// What was there. Memory: 64 bytes and what a set takes beside for each text.
#[derive(Clone, Debug, Default)]
pub struct Doubles {
    seen: HashSet<(usize, u64)>,
}

impl Doubles {
    /// Whether one that is nearly the same was there, or it was itself.
    pub fn has(&self, text: &str) -> bool {
        bands(text).iter().any(|band| self.seen.contains(band))
    }

    /// Takes a text down; false where one that is nearly the same was there.
    pub fn take(&mut self, text: &str) -> bool {
        let new = !self.has(text);
        if new {
            self.seen.extend(bands(text));
        }
        new
    }
}

/// Its bands, each with what its least hashes come to.
fn bands(text: &str) -> [(usize, u64); BANDS] {
    let plain: String = text.to_lowercase().chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    let words: Vec<&str> = plain.split_whitespace().collect();
    let runs: Vec<u64> = words.windows(RUN.min(words.len()).max(1)).map(|run| xxh3_64(run.join(" ").as_bytes())).collect();
    std::array::from_fn(|band| {
        let least =
            |row: usize| runs.iter().map(|run| xxh3_64_with_seed(&run.to_le_bytes(), (band * ROWS + row) as u64)).min().unwrap_or(0);
        let rows: [[u8; 8]; ROWS] = std::array::from_fn(|row| least(row).to_le_bytes());
        (band, xxh3_64(rows.as_flattened()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_nearly_the_same_is_taken_once() {
        let mut doubles = Doubles::default();
        let one =
            "I am writing a short story about a young girl who discovers that she can talk to the animals in the forest near her home.";
        assert!(doubles.take(one));
        assert!(!doubles.take(one));
        assert!(!doubles.take(&one.to_uppercase().replace('.', "!")));
        assert!(!doubles.take(&one.replace("a young girl", "a young boy")), "three runs of 23 differ");
        assert!(
            doubles
                .take("I am writing a short story about an old man who lives by the sea and has never caught a fish. How might it begin?")
        );
        assert!(doubles.take("What are some good recipes for a dinner with friends?"));
        assert!(doubles.take("Hello") && !doubles.take("hello!"));
    }
}
