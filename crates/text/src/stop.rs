//! Stop strings over streamed text.

use overfill_types::ServiceError;

/// Most stop strings of one request.
const MOST: usize = 16;

/// Watches one answer's text for stop strings. Text that may be the beginning of one is held back.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

/// What came of a piece of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matched {
    /// Text that is surely part of the answer.
    pub text: String,
    /// The stop string that ended it, if one did; then nothing may follow.
    pub stop: Option<String>,
}

impl StopMatcher {
    /// Watches for any of `stops`.
    ///
    /// # Errors
    /// [`overfill_types::Code::InvalidArgument`] where there are more than 16, or one is empty.
    pub fn new(stops: Vec<String>) -> Result<Self, ServiceError> {
        if stops.len() > MOST {
            let message = format!("{} stop strings were sent: at most {MOST} are watched for", stops.len());
            return Err(ServiceError::of_field("stop", message));
        }
        if stops.iter().any(String::is_empty) {
            return Err(ServiceError::of_field("stop", "a stop string is empty: leave it out"));
        }
        Ok(Self { stops, held: String::new() })
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> Matched {
        self.held.push_str(text);
        // The earliest match ends the answer; of two that begin together, the longer is the one that is named.
        let found =
            self.stops.iter().filter_map(|s| Some((self.held.find(s.as_str())?, s))).min_by_key(|(at, s)| (*at, usize::MAX - s.len()));
        if let Some((at, stop)) = found {
            let (text, stop) = (self.held[..at].to_owned(), stop.clone());
            self.held.clear();
            return Matched { text, stop: Some(stop) };
        }
        let keep = self.held.len() - self.longest_beginning();
        let rest = self.held.split_off(keep);
        Matched { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// The text that was held back, at the answer's end.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of what is held that a stop string begins with.
    fn longest_beginning(&self) -> usize {
        let longest = |stop: &String| {
            let most = self.held.len().min(stop.len() - 1);
            (1..=most).rev().find(|&n| self.held.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
        };
        // A beginning that ends inside a character cannot match text, which has whole characters: bytes may be compared,
        // and the cut lies on a boundary because the beginning starts with one.
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stop_string_across_pieces_is_found_and_cut_away() {
        let mut matcher = StopMatcher::new(vec!["END".into(), "\n\n".into()]).unwrap();
        assert_eq!(matcher.push("one E"), Matched { text: "one ".into(), stop: None });
        assert_eq!(matcher.push("N"), Matched { text: String::new(), stop: None });
        assert_eq!(matcher.push("D two"), Matched { text: String::new(), stop: Some("END".into()) });
        let mut matcher = StopMatcher::new(vec!["END".into()]).unwrap();
        assert_eq!(matcher.push("EN"), Matched { text: String::new(), stop: None });
        assert_eq!(matcher.push("TER"), Matched { text: "ENTER".into(), stop: None });
        assert_eq!(matcher.push("…E").text, "…");
        assert_eq!(matcher.finish(), "E");
    }

    #[test]
    fn too_many_and_empty_ones_are_refused() {
        assert!(StopMatcher::new(vec!["x".into(); 17]).is_err());
        assert!(StopMatcher::new(vec![String::new()]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn it_finds_what_a_search_of_the_whole_finds(
            text in "[ab€]{0,24}", stops in prop::collection::vec("[ab€]{1,4}", 0..4), cuts in prop::collection::vec(1usize..5, 0..24)
        ) {
            let mut matcher = StopMatcher::new(stops.clone()).unwrap();
            let (mut out, mut hit) = (String::new(), false);
            let mut chars = text.chars().peekable();
            let mut cuts = cuts.into_iter().chain(std::iter::repeat(1));
            while chars.peek().is_some() && !hit {
                let piece: String = chars.by_ref().take(cuts.next().unwrap()).collect();
                let matched = matcher.push(&piece);
                out += &matched.text;
                hit = matched.stop.is_some();
            }
            if !hit {
                out += &matcher.finish();
            }
            // Piece by piece the match that is completed first wins; in the whole it is the one that ends first, of those the one that begins first.
            let first = stops.iter().filter_map(|s| text.find(s.as_str()).map(|at| (at, at + s.len()))).min_by_key(|(_, end)| *end);
            match first {
                None => prop_assert_eq!((out, hit), (text, false)),
                Some(_) => {
                    prop_assert!(hit && text.starts_with(&out));
                    prop_assert!(stops.iter().any(|s| text[out.len()..].starts_with(s.as_str())));
                    prop_assert!(stops.iter().all(|s| !out.contains(s.as_str())));
                }
            }
        }
    }
}
