//! One answer as it comes, of a request that has one: text and calls of tools, in their order. What APIs that came after
//! completions tell of is this, in their own words.

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
    tools: Option<ToolReader>,
    called: bool,
    written: usize,
    end: Option<End>,
}

/// What an event brings.
#[derive(Debug)]
pub(crate) enum Brought {
    /// The prompt was read.
    Begun,
    /// Text, with the tokens that came with it.
    Text(String, Vec<Token>),
    /// A call of a tool.
    Call { id: String, name: String, arguments: String },
    /// The end.
    Ended,
}

impl Single {
    pub(crate) fn new(prompt: Arc<Vec<u32>>, calls: Option<&Calls>) -> Self {
        let tools = calls.map(|calls| ToolReader::new(calls.format, calls.names.clone()));
        Self { prompt, read: None, tools, called: false, written: 0, end: None }
    }

    /// Takes an event.
    pub(crate) fn take(&mut self, event: Event) -> Vec<Brought> {
        match event {
            Event::PromptRead(read) => {
                self.read = Some(*read);
                vec![Brought::Begun]
            }
            Event::Delta { text, tokens } => {
                self.written += tokens.len();
                match &mut self.tools {
                    None => vec![Brought::Text(text, tokens)],
                    Some(tools) => {
                        let pieces = tools.push(&text);
                        self.brought(pieces)
                    }
                }
            }
            Event::Finished(end) => {
                let pieces = self.tools.as_mut().map(ToolReader::finish).unwrap_or_default();
                let mut brought = self.brought(pieces);
                self.end = Some(*end);
                brought.push(Brought::Ended);
                brought
            }
        }
    }

    fn brought(&mut self, pieces: Vec<ToolPiece>) -> Vec<Brought> {
        let piece = |piece| match piece {
            ToolPiece::Text(text) => Brought::Text(text, Vec::new()),
            ToolPiece::Call { name, arguments } => {
                self.called = true;
                Brought::Call { id: Uuid::new_v4().simple().to_string(), name, arguments }
            }
        };
        pieces.into_iter().map(piece).collect()
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
