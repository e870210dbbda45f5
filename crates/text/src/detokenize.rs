//! Tokens to text as they come, never splitting a character.
//!
//! A token may end in the middle of a UTF-8 character, and how it reads may depend on the one before it (a leading space
//! that only the first token loses). So a token is decoded together with the piece before it, and held back while the
//! text ends in a replacement character, which is what an unfinished character decodes to. Where tokens are single bytes, these
//! tell an unfinished character from a replacement character that is meant.

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
        let written = before.iter().rev().filter(|id| !is_special(&tokenizer, **id));
        let mut context: Vec<u32> = written.take(CONTEXT).copied().collect();
        context.reverse();
        let text = tokenizer.decode(&context, true).unwrap_or_default();
        if text.contains(char::REPLACEMENT_CHARACTER) {
            // A cut through a character, of which the answer may be the rest: it is read by itself.
            return Self { tokenizer, window: Vec::new(), given: 0, given_text: String::new(), special: false };
        }
        Self { tokenizer, given: context.len(), window: context, given_text: text, special: false }
    }

    /// Of a text by itself, with its special tokens.
    pub(crate) fn of_all(tokenizer: Arc<Tokenizer>) -> Self {
        Self { special: true, ..Self::new(tokenizer, &[]) }
    }

    /// Takes the next token; gives the text that is whole now, often empty in scripts whose characters are several tokens.
    pub fn push(&mut self, token: u32) -> String {
        if !self.special && is_special(&self.tokenizer, token) {
            // It has no text, and what follows is read with the text before it.
            return String::new();
        }
        self.window.push(token);
        let text = self.decode(0..self.window.len());
        if !text.ends_with(char::REPLACEMENT_CHARACTER) {
            return self.give(self.window.len(), text);
        }
        if let Some(bytes) = self.last_bytes() {
            if std::str::from_utf8(&bytes).is_err_and(|e| e.error_len().is_none()) {
                // More bytes may make it whole.
                return String::new();
            }
            // By themselves: bytes before them, given as what they were, would be read as none together with some that are no text.
            let text = self.given_text.clone() + &self.decode(self.given..self.window.len());
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

    /// The bytes that the last tokens are, as far back as they were not given; `None` where the last one is no byte.
    fn last_bytes(&self) -> Option<Vec<u8>> {
        let mut bytes: Vec<u8> = self.window[self.given..].iter().rev().map_while(|id| byte(&self.tokenizer, *id)).collect();
        bytes.reverse();
        (!bytes.is_empty()).then_some(bytes)
    }

    fn decode(&self, tokens: Range<usize>) -> String {
        // Ids were checked against the vocabulary; one without text decodes to none.
        self.tokenizer.decode(&self.window[tokens], !self.special).unwrap_or_default()
    }
}

fn is_special(tokenizer: &Tokenizer, id: u32) -> bool {
    tokenizer.id_to_token(id).is_some_and(|token| tokenizer.get_added_vocabulary().is_special_token(&token))
}

/// The byte that a token is, of those that SentencePiece has for what has no token: `<0xE9>`.
fn byte(tokenizer: &Tokenizer, id: u32) -> Option<u8> {
    let token = tokenizer.id_to_token(id)?;
    u8::from_str_radix(token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?, 16).ok()
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

    #[test]
    fn a_replacement_character_that_is_meant_is_no_unfinished_one() {
        for tokenizer in [byte_level(), sentence_piece()] {
            let ids = tokenizer.encode("a\u{FFFD}🦀\u{FFFD}", false).unwrap().get_ids().to_vec();
            check(&Arc::new(tokenizer), &ids);
        }
    }

    #[test]
    fn special_tokens_have_no_text_and_part_none() {
        let tokenizer = Arc::new(sentence_piece());
        let ids = tokenizer.encode("ab<s> abc</s>🦀", false).unwrap().get_ids().to_vec();
        check(&tokenizer, &ids);
        // An answer after a prompt that ends with many of them is read with the words before.
        let prompt = tokenizer.encode("ab<s><s><s><s><s>", false).unwrap().get_ids().to_vec();
        let answer = tokenizer.token_to_id("▁ab").unwrap();
        assert_eq!(Detokenizer::new(tokenizer, &prompt).push(answer), " ab");
    }

    #[test]
    fn bytes_that_never_make_a_character_are_not_held() {
        let tokenizer = Arc::new(sentence_piece());
        let byte = |byte: u8| tokenizer.token_to_id(&format!("<0x{byte:02X}>")).unwrap();
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), &[]);
        let pieces: Vec<String> = [0xC3, 0xA9, 0xFF, 0xC3, 0xA9].map(|b| detokenizer.push(byte(b))).to_vec();
        assert_eq!(pieces, ["", "é", "\u{FFFD}", "", "é"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn all_pieces_are_the_whole(ids in prop::collection::vec(0u32..270, 0..60)) {
            check(&Arc::new(byte_level()), &ids);
        }

        #[test]
        fn real_text_in_any_script(text in "(\\PC|\u{FFFD}){0,40}") {
            for tokenizer in [byte_level(), sentence_piece()] {
                let tokenizer = Arc::new(tokenizer);
                let ids = tokenizer.encode(text.as_str(), false).unwrap().get_ids().to_vec();
                check(&tokenizer, &ids);
            }
        }
    }
}
