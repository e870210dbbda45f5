//! One answer as it comes, of a request that has one: text and calls of tools, in their order. What APIs that came after
//! completions tell of is this, in their own words.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use overfill_proto::v1::{ServedBy, Token};
use overfill_text::{ToolPiece, ToolReader};
use overfill_types::FinishReason;
use uuid::Uuid;

use crate::frontend::openai::Calls;
use crate::relay::{End, Event, PromptRead};

/// An answer, as far as it has come.
pub(crate) struct Single {
    prompt: Arc<Vec<u32>>,
    read: Option<PromptRead>,
    tools: Option<ReadApart>,
    called: bool,
    written: usize,
    end: Option<End>,
}

/// Text read apart from calls of tools, and the tokens of it.
struct ReadApart {
    reader: ToolReader,
    /// Bytes of the answer's text, as far as it has come.
    length: usize,
    /// Tokens with log-probabilities that came with these bytes, whose text is not yet known to be text or a call.
    pending: VecDeque<(Range<usize>, Vec<Token>)>,
    /// Where the last text ended.
    text_end: usize,
}

/// What an event brings.
#[derive(Debug)]
pub(crate) enum Brought {
    /// The prompt was read.
    Begun,
    /// Text, with its tokens. Where there are tools, those without log-probabilities are left out.
    Text(String, Vec<Token>),
    /// A call of a tool.
    Call { id: String, name: String, arguments: String },
    /// The end.
    Ended,
}

impl Single {
    pub(crate) fn new(prompt: Arc<Vec<u32>>, calls: Option<&Calls>) -> Self {
        let tools = calls.map(|calls| ReadApart {
            reader: ToolReader::new(calls.format, calls.names.clone()),
            length: 0,
            pending: VecDeque::new(),
            text_end: 0,
        });
        Self { prompt, read: None, tools, called: false, written: 0, end: None }
    }

    /// Takes an event.
    pub(crate) fn take(&mut self, event: Event) -> Vec<Brought> {
        let brought = self.brought(event);
        self.called |= brought.iter().any(|brought| matches!(brought, Brought::Call { .. }));
        brought
    }

    fn brought(&mut self, event: Event) -> Vec<Brought> {
        match event {
            Event::PromptRead(read) => {
                self.read = Some(*read);
                vec![Brought::Begun]
            }
            Event::Delta { text, tokens } => {
                self.written += tokens.len();
                match &mut self.tools {
                    None => vec![Brought::Text(text, tokens)],
                    Some(tools) => tools.push(&text, tokens),
                }
            }
            Event::Finished(end) => {
                let mut brought = self.tools.as_mut().map(ReadApart::finish).unwrap_or_default();
                self.end = Some(*end);
                brought.push(Brought::Ended);
                brought
            }
        }
    }

    pub(crate) fn ended(&self) -> bool {
        self.end.is_some()
    }

    /// Whether it ended since it was long enough.
    pub(crate) fn cut(&self) -> bool {
        self.end.as_ref().is_some_and(|end| end.reason == FinishReason::Length)
    }

    /// Whether a tool was called.
    pub(crate) fn called(&self) -> bool {
        self.called
    }

    /// The stop string that ended it, if one did.
    pub(crate) fn stop(&self) -> Option<&str> {
        self.end.as_ref()?.matched_stop.as_deref()
    }

    /// Tokens of the prompt, those of it that were in a cache, and tokens written.
    pub(crate) fn usage(&self) -> (usize, u32, usize) {
        let cached = self.read.as_ref().map_or(0, |read| read.cached_tokens);
        (self.prompt.len(), cached, self.end.as_ref().map_or(self.written, |end| end.completion_tokens))
    }

    pub(crate) fn served_by(&self) -> Option<&ServedBy> {
        self.end.as_ref().map(|end| &end.served_by).or_else(|| self.read.as_ref().map(|read| &read.served_by))
    }
}

impl ReadApart {
    fn push(&mut self, text: &str, tokens: Vec<Token>) -> Vec<Brought> {
        let place = self.length..self.length + text.len();
        self.length = place.end;
        let tokens: Vec<Token> = tokens.into_iter().filter(|token| token.logprob.is_some()).collect();
        if !tokens.is_empty() {
            self.pending.push_back((place, tokens));
        }
        let pieces = self.reader.push(text);
        self.brought(pieces)
    }

    fn finish(&mut self) -> Vec<Brought> {
        let pieces = self.reader.finish();
        let mut brought = self.brought(pieces);
        if self.text_end == self.length {
            // What ends the answer has no text of its own, and belongs to what it ends.
            let last: Vec<Token> = self.pending.drain(..).flat_map(|(_, tokens)| tokens).collect();
            if !last.is_empty() {
                brought.push(Brought::Text(String::new(), last));
            }
        }
        brought
    }

    fn brought(&mut self, pieces: Vec<ToolPiece>) -> Vec<Brought> {
        let piece = |piece| match piece {
            ToolPiece::Text { at, text } => {
                self.text_end = at + text.len();
                let tokens = self.tokens(at);
                Brought::Text(text, tokens)
            }
            ToolPiece::Call { name, arguments } => Brought::Call { id: Uuid::new_v4().simple().to_string(), name, arguments },
        };
        pieces.into_iter().map(piece).collect()
    }

    /// Takes the tokens of the text from `at` to where the last text ended; those before it wrote calls. One on both sides of a border
    /// counts for the text. One without text of its own, such as the first part of a character, stands before the text that it began.
    fn tokens(&mut self, at: usize) -> Vec<Token> {
        let mut tokens = Vec::new();
        while let Some((place, written)) = self.pending.pop_front_if(|(place, _)| place.start < self.text_end) {
            if place.end > at || place.start >= at {
                tokens.extend(written);
            }
        }
        tokens
    }
}

#[cfg(test)]
mod tests {
    use overfill_proto::v1::TokenLogprob;
    use overfill_text::ToolFormat;

    use super::*;

    fn end() -> Event {
        Event::Finished(Box::new(End {
            reason: FinishReason::Stop,
            matched_stop: None,
            completion_tokens: 0,
            served_by: ServedBy::default(),
        }))
    }

    /// What an answer brings whose pieces are these texts, each of one token; its texts put together, with the tokens' numbers.
    fn read(format: ToolFormat, answer: &[&str]) -> Vec<(String, Vec<u32>)> {
        let calls = Calls { named: false, format, names: vec!["f".into()], shown: None };
        let mut single = Single::new(Arc::new(Vec::new()), Some(&calls));
        let token = |id: usize| Token { id: id as u32, logprob: Some(TokenLogprob::default()), ..Token::default() };
        let deltas = answer.iter().enumerate().map(|(id, text)| Event::Delta { text: (*text).into(), tokens: vec![token(id)] });
        let mut read: Vec<(String, Vec<u32>)> = Vec::new();
        let mut between = true;
        for brought in deltas.chain([end()]).collect::<Vec<_>>().into_iter().flat_map(|event| single.take(event)) {
            match brought {
                Brought::Text(text, tokens) => {
                    if std::mem::take(&mut between) {
                        read.push(Default::default());
                    }
                    let last = read.last_mut().unwrap();
                    last.0 += &text;
                    last.1.extend(tokens.iter().map(|token| token.id));
                }
                Brought::Call { .. } => {
                    read.push(("call".into(), Vec::new()));
                    between = true;
                }
                Brought::Begun | Brought::Ended => {}
            }
        }
        read
    }

    #[test]
    fn each_text_has_its_own_tokens_whatever_lies_between() {
        let text = |text: &str, tokens: &[u32]| (text.to_owned(), tokens.to_vec());
        let call = || text("call", &[]);
        let hermes = |answer: &[&str]| read(ToolFormat::Hermes, answer);
        // The end of an answer is a token without text.
        assert_eq!(hermes(&["So", " it is", ""]), [text("So it is", &[0, 1, 2])]);
        assert_eq!(hermes(&[""]), [text("", &[0])]);
        // What looked like a call, and a character of three tokens.
        assert_eq!(hermes(&["a <", "tool", "_x> ", "", "", "漢", "."]), [text("a <tool_x> 漢.", &[0, 1, 2, 3, 4, 5, 6])]);
        let body = "{\"name\": \"f\"}";
        assert_eq!(hermes(&["Let me", " see", "<tool_call>", body, "</tool_call>", "\n", ""]), [text("Let me see", &[0, 1]), call()]);
        // On both sides of a border.
        assert_eq!(hermes(&["a<tool_", "call>", body, "</tool_call>b", "c"]), [text("a", &[0]), call(), text("bc", &[3, 4])]);
        // A call that is none.
        assert_eq!(
            hermes(&["a", "<tool_call>", "nothing", "</tool_call>", "b"]),
            [text("a<tool_call>nothing</tool_call>b", &[0, 1, 2, 3, 4])]
        );
        let llama = |answer: &[&str]| read(ToolFormat::Llama, answer);
        assert_eq!(llama(&["{\"name\"", ": \"f\",", "\"parameters\": {}}", ""]), [call()]);
        assert_eq!(llama(&["{\"name\"", ": 5}", ""]), [text("{\"name\": 5}", &[0, 1, 2])]);
    }
}
