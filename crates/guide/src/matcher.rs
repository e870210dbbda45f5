//! One answer's way through its guide.

use llguidance::toktrie::{SimpleVob, TokEnv};
use overfill_types::{Code, ServiceError};

use crate::closing;

/// What llguidance writes for the inner state that it leaves out of an error.
pub(crate) const NOT_TOLD: &str = "<non-verbose/>";

/// Follows one answer and says which tokens may come next.
pub struct Matcher {
    way: Way,
    /// Why it cannot go on; the answer is to end with it.
    failure: Option<ServiceError>,
}

enum Way {
    /// Of what is matched byte by byte.
    Form { matcher: Box<llguidance::Matcher>, vocabulary: TokEnv },
    /// These tokens, of which so many are written; then anything.
    Forced { ids: Vec<u32>, written: usize },
}

impl Matcher {
    pub(crate) fn new(matcher: llguidance::Matcher, vocabulary: TokEnv) -> Self {
        Self { way: Way::Form { matcher: Box::new(matcher), vocabulary }, failure: None }
    }

    pub(crate) fn forcing(ids: Vec<u32>) -> Self {
        Self { way: Way::Forced { ids, written: 0 }, failure: None }
    }

    /// One of the same guide, of which nothing is written.
    pub(crate) fn begin_again(&self) -> Self {
        let way = match &self.way {
            Way::Form { matcher, vocabulary } => Way::Form { matcher: Box::new(matcher.deep_clone()), vocabulary: vocabulary.clone() },
            Way::Forced { ids, .. } => Way::Forced { ids: ids.clone(), written: 0 },
        };
        Self { way, failure: None }
    }

    /// Whether `token` may come next. Much cheaper than [`Matcher::mask`].
    pub fn allows(&mut self, token: u32) -> bool {
        let allowed = match &mut self.way {
            Way::Forced { ids, written } => return ids.get(*written).is_none_or(|due| *due == token),
            Way::Form { matcher, vocabulary } => {
                let ends = vocabulary.tok_trie().eos_tokens().contains(&token);
                if matcher.is_stopped() {
                    return ends;
                }
                match ends {
                    true => matcher.is_accepting(),
                    false => matcher.validate_tokens(&[token]).map(|valid| valid == 1),
                }
            }
        };
        self.noted(allowed).unwrap_or(false)
    }

    /// Sets the logits of all tokens that may not come next to negative infinity. `logits` is `[vocab]`.
    pub fn mask(&mut self, logits: &mut [f32]) {
        match &mut self.way {
            Way::Forced { ids, written } => {
                if let Some(&due) = ids.get(*written) {
                    let others = logits.iter_mut().enumerate().filter(|(id, _)| *id != due as usize);
                    others.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
                }
            }
            Way::Form { matcher, .. } => {
                let mask = matcher.compute_mask_or_eos();
                let Some(mask) = self.noted(mask) else { return };
                keep(&mask, logits);
            }
        }
    }

    /// The token to write where `token` was chosen and only `left` more may be written, it among them: another, where there would
    /// be no time left to end the answer as it has to look.
    pub fn in_time(&mut self, token: u32, left: usize) -> u32 {
        let Way::Form { matcher, vocabulary } = &self.way else { return token };
        let trie = vocabulary.tok_trie();
        if left > closing::HORIZON || matcher.is_stopped() || trie.eos_tokens().contains(&token) {
            return token;
        }
        let mut after = matcher.deep_clone();
        let written = after.consume_token(token).is_ok();
        let whole = written && (after.is_stopped() || after.is_accepting().unwrap_or(false));
        // Where it is not whole, there has to be room for the way to its end and for the token that says so.
        if whole || written && closing::way(after, trie).is_some_and(|way| way.len() + 2 <= left) {
            return token;
        }
        match closing::way(matcher.deep_clone(), trie) {
            Some(way) => way.first().copied().unwrap_or_else(|| trie.eos_token()),
            None => token,
        }
    }

    /// Goes on after `token`, which was written.
    pub fn observe(&mut self, token: u32) {
        match &mut self.way {
            Way::Forced { ids, written } => {
                let due = ids.get(*written).copied();
                *written += 1;
                if let Some(due) = due.filter(|due| *due != token) {
                    let message = format!("the guide asks for token {due}, and token {token} was written");
                    self.failure.get_or_insert(ServiceError::new(Code::InvalidArgument, message));
                }
            }
            // What follows the end is no longer looked at.
            Way::Form { matcher, .. } if matcher.is_stopped() => {}
            Way::Form { matcher, .. } => {
                let gone_on = matcher.consume_token(token);
                let _ = self.noted(gone_on);
            }
        }
    }

    /// Why the answer cannot go on, if it cannot: a token was written that breaks the guide, or the next one took too much work to find.
    pub fn failure(&self) -> Option<&ServiceError> {
        self.failure.as_ref()
    }

    fn noted<T>(&mut self, result: anyhow::Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(e) => {
                let e = e.to_string();
                let message = format!("the guide cannot be followed any further: {}; simplify it", e.trim_end_matches(NOT_TOLD).trim_end());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_tokens_come_first_and_then_anything() {
        let mut matcher = Matcher::forcing(vec![7, 256, 260]);
        for forced in [7, 256, 260] {
            let mut logits = [0.0; 261];
            matcher.mask(&mut logits);
            for id in 0..261 {
                assert!(matcher.allows(id) == (id == forced) && logits[id as usize].is_finite() == (id == forced));
            }
            matcher.observe(forced);
        }
        let mut logits = [0.0; 261];
        matcher.mask(&mut logits);
        assert!((0..261).all(|id| matcher.allows(id)) && logits == [0.0; 261]);
        matcher.observe(3);
        assert_eq!(matcher.failure(), None);
        let mut broken = Matcher::forcing(vec![7, 8]);
        broken.observe(9);
        assert!(broken.failure().unwrap().message.contains("token 9"));
    }
}
