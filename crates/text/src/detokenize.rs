//! Tokens to text as they come, never splitting a character.
//!
//! A token may end in the middle of a UTF-8 character, and how it reads may depend on the one before it (a leading space
//! that only the first token loses). So a token is decoded together with the piece before it, and held back while the
//! text ends in a replacement character, which is what an unfinished character decodes to.

use std::ops::Range;
use std::sync::Arc;

use tokenizers::Tokenizer;

/// Unfinished characters have at most three bytes, a token at least one: what lies this far back cannot change any more.
const SETTLED: usize = 4;
/// Tokens of what stands before an answer that it is read with.
const CONTEXT: usize = 4;

/// Writes one answer's text. The texts that it gives, put together, are what the answer's tokens add to the decoding of those
/// before it.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// The last piece that was given, and the tokens after it.
    window: Vec<u32>,
    /// How many tokens of `window` were given.
    given: usize,
    /// The text of those.
    given_text: String,
    /// Special tokens are text too.
    special: bool,
}

impl Detokenizer {
    /// Of what follows `before`: some tokenizers take a space from the first word of a text, which an answer is not.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, before: &[u32]) -> Self {
        let context = &before[before.len().saturating_sub(CONTEXT)..];
        let text = tokenizer.decode(context, true).unwrap_or_default();
        if text.contains(char::REPLACEMENT_CHARACTER) {
            // A cut through a character, of which the answer may be the rest: it is read by itself.
            return Self { tokenizer, window: Vec::new(), given: 0, given_text: String::new(), special: false };
        }
        Self { tokenizer, window: context.to_vec(), given: context.len(), given_text: text, special: false }
    }

    /// Of a text by itself, with its special tokens.
    pub(crate) fn of_all(tokenizer: Arc<Tokenizer>) -> Self {
        Self { special: true, ..Self::new(tokenizer, &[]) }
    }

    /// Takes the next token; gives the text that is whole now, often empty in scripts whose characters are several tokens.
    pub fn push(&mut self, token: u32) -> String {
        self.window.push(token);
        let text = self.decode(0..self.window.len());
        if !text.ends_with(char::REPLACEMENT_CHARACTER) {
            return self.give(self.window.len(), text);
        }
        // Bytes that are no text at all: give what cannot change any more.
        let settled = self.window.len().saturating_sub(SETTLED);
        for end in (self.given + 1..=settled).rev() {
            // A cut within a character would give two replacement characters where the whole has one.
            let (part, rest) = (self.decode(0..end), self.decode(end..self.window.len()));
            if text.strip_prefix(part.as_str()) == Some(rest.as_str()) {
                return self.give(end, part);
            }
        }
        String::new()
    }

    /// The rest, at the answer's end: an unfinished character becomes a replacement character.
    pub fn finish(&mut self) -> String {
        if self.given == self.window.len() {
            return String::new();
        }
        let text = self.decode(0..self.window.len());
        self.give(self.window.len(), text)
    }

    /// Gives the window's first `end` tokens, whose text is `text`.
    fn give(&mut self, end: usize, text: String) -> String {
        let new = text.strip_prefix(self.given_text.as_str()).unwrap_or_default().to_owned();
        if end > self.given {
            // The piece that was just given is all that the next one needs to be read with.
            self.window.drain(..self.given);
            let first = self.given == 0;
            self.given = end - self.given;
            self.given_text = if first { text } else { self.decode(0..self.given) };
        }
        new
    }

    fn decode(&self, tokens: Range<usize>) -> String {
        // Ids were checked against the vocabulary; one without text decodes to none.
        self.tokenizer.decode(&self.window[tokens], !self.special).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::gguf::tests::{byte_level, sentence_piece};

    fn check(tokenizer: &Arc<Tokenizer>, ids: &[u32]) {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), &[]);
        let mut text: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
        text += &detokenizer.finish();
        assert_eq!(text, tokenizer.decode(ids, true).unwrap(), "{ids:?}");
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn a_character_of_several_tokens_comes_whole() {
        let tokenizer = Arc::new(byte_level());
        let ids = tokenizer.encode("né 🦀!", false).unwrap().get_ids().to_vec();
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), &[]);
        let pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        assert!(pieces.len() > pieces.iter().filter(|p| !p.is_empty()).count(), "{pieces:?}");
        assert!(pieces.iter().all(|p| !p.contains(char::REPLACEMENT_CHARACTER)), "{pieces:?}");
        assert_eq!(pieces.concat(), "né 🦀!");
    }

    #[test]
    fn an_answer_is_read_with_what_stands_before_it() {
        let tokenizer = Arc::new(sentence_piece());
        let ids = tokenizer.encode("ab abc", true).unwrap().get_ids().to_vec();
        for cut in 1..ids.len() {
            let (before, answer) = ids.split_at(cut);
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), before);
            let text: String = answer.iter().map(|id| detokenizer.push(*id)).collect();
            let prompt = tokenizer.decode(before, true).unwrap();
            assert_eq!(prompt + &text + &detokenizer.finish(), "ab abc", "cut at {cut}");
        }
        // The second half of a character is no text by itself, and is not lost.
        let tokenizer = Arc::new(byte_level());
        let crab = tokenizer.encode("🦀!", false).unwrap().get_ids().to_vec();
        let mut detokenizer = Detokenizer::new(tokenizer, &crab[..2]);
        let text: String = crab[2..].iter().map(|id| detokenizer.push(*id)).collect();
        assert!(text.ends_with('!') && text.contains(char::REPLACEMENT_CHARACTER), "{text}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn all_pieces_are_the_whole(ids in prop::collection::vec(0u32..270, 0..60)) {
            check(&Arc::new(byte_level()), &ids);
        }

        #[test]
        fn real_text_in_any_script(text in "\\PC{0,40}") {
            // A replacement character that is really meant looks like an unfinished one.
            let text = text.replace(char::REPLACEMENT_CHARACTER, "");
            for tokenizer in [byte_level(), sentence_piece()] {
                let tokenizer = Arc::new(tokenizer);
                let ids = tokenizer.encode(text.as_str(), false).unwrap().get_ids().to_vec();
                check(&tokenizer, &ids);
            }
        }
    }
}
