//! Tokens to text, with stop strings cut away.

use std::sync::Arc;

use overfill_text::{Detokenizer, StopMatcher, TextModel};

use crate::admission::ValidRequest;

pub(super) struct Text {
    model: Arc<TextModel>,
    /// A special token that is written.
    shown: Option<u32>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
}

impl Text {
    pub(super) fn new(request: &ValidRequest) -> Self {
        let detokenizer = request.model.detokenizer(&request.prompt);
        Self { model: request.model.clone(), shown: request.shown, detokenizer, stops: request.stop_strings.clone() }
    }

    /// A token's text, and the stop string that it completed.
    pub(super) fn push(&mut self, token: u32) -> (String, Option<String>) {
        let text = if self.shown == Some(token) {
            // What follows is read by itself.
            let before = std::mem::replace(&mut self.detokenizer, self.model.detokenizer(&[])).finish();
            before + &self.model.token_text(token)
        } else {
            self.detokenizer.push(token)
        };
        let matched = self.stops.push(&text);
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
