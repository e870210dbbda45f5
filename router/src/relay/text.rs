//! Tokens to text, with stop strings cut away.

use overfill_text::{Detokenizer, StopMatcher};

use crate::admission::ValidRequest;

pub(super) struct Text {
    detokenizer: Detokenizer,
    stops: StopMatcher,
}

impl Text {
    pub(super) fn new(request: &ValidRequest) -> Self {
        Self { detokenizer: request.model.detokenizer(), stops: request.stop_strings.clone() }
    }

    /// A token's text, and the stop string that it completed.
    pub(super) fn push(&mut self, token: u32) -> (String, Option<String>) {
        let matched = self.stops.push(&self.detokenizer.push(token));
        (matched.text, matched.stop)
    }

    /// What was held back.
    pub(super) fn finish(&mut self) -> (String, Option<String>) {
        let matched = self.stops.push(&self.detokenizer.finish());
        match matched.stop {
            Some(stop) => (matched.text, Some(stop)),
            None => (matched.text + &self.stops.finish(), None),
        }
    }
}
