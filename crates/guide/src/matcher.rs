//! One answer's way through its guide.

use llguidance::toktrie::{SimpleVob, TokEnv};
use overfill_types::{Code, ServiceError};

/// Follows one answer and says which tokens may come next.
pub struct Matcher {
    matcher: llguidance::Matcher,
    vocabulary: TokEnv,
    /// Why it cannot go on; the answer is to end with it.
    failure: Option<ServiceError>,
}

impl Matcher {
    pub(crate) fn new(matcher: llguidance::Matcher, vocabulary: TokEnv) -> Self {
        Self { matcher, vocabulary, failure: None }
    }

    /// Whether `token` may come next. Much cheaper than [`Matcher::mask`].
    pub fn allows(&mut self, token: u32) -> bool {
        let ends = self.vocabulary.tok_trie().eos_tokens().contains(&token);
        if self.matcher.is_stopped() {
            return ends;
        }
        let allowed = match ends {
            true => self.matcher.is_accepting(),
            false => self.matcher.validate_tokens(&[token]).map(|valid| valid == 1),
        };
        self.noted(allowed).unwrap_or(false)
    }

    /// Sets the logits of all tokens that may not come next to negative infinity. `logits` is `[vocab]`.
    pub fn mask(&mut self, logits: &mut [f32]) {
        let mask = self.matcher.compute_mask_or_eos();
        let Some(mask) = self.noted(mask) else { return };
        keep(&mask, logits);
    }

    /// Goes on after `token`, which was written.
    pub fn observe(&mut self, token: u32) {
        // What follows the end is no longer looked at.
        if self.matcher.is_stopped() {
            return;
        }
        let gone_on = self.matcher.consume_token(token);
        let _ = self.noted(gone_on);
    }

    /// Why the answer cannot go on, if it cannot: a token was written that breaks the guide, or the next one took too much work to find.
    pub fn failure(&self) -> Option<&ServiceError> {
        self.failure.as_ref()
    }

    fn noted<T>(&mut self, result: anyhow::Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(e) => {
                let message = format!("the guide cannot be followed any further: {e}; simplify it");
                self.failure.get_or_insert(ServiceError::new(Code::InvalidArgument, message));
                None
            }
        }
    }
}

fn keep(mask: &SimpleVob, logits: &mut [f32]) {
    let words = mask.as_slice();
    for (i, logits) in logits.chunks_mut(u32::BITS as usize).enumerate() {
        match words.get(i).copied().unwrap_or(0) {
            u32::MAX => {}
            word => logits.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0).for_each(|(_, l)| *l = f32::NEG_INFINITY),
        }
    }
}
