//! How a message looks: blocks, whole or as they come.

use axum::response::Response;
use overfill_proto::v1::ServedBy;
use serde_json::{Value, json};

use crate::frontend::messages::failed;
use crate::frontend::openai::Failed;
use crate::frontend::respond::{Form, Piece};
use crate::frontend::single::{Brought, Single};
use crate::relay::Event;

/// A message, as far as it has come.
pub(super) struct Answer {
    id: String,
    model: String,
    single: Single,
    /// Blocks; the last may be a text that is being written.
    content: Vec<Value>,
    /// It is.
    open: bool,
}

impl Answer {
    pub(super) fn new(id: String, model: String, single: Single) -> Self {
        Self { id, model, single, content: Vec::new(), open: false }
    }

    /// The message as it stands.
    fn message(&self) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": self.content,
            "stop_reason": self.stop_reason(), "stop_sequence": self.single.stop(), "usage": self.usage(),
        })
    }

    fn stop_reason(&self) -> Option<&'static str> {
        match &self.single {
            single if !single.ended() => None,
            single if single.cut() => Some("max_tokens"),
            single if single.called() => Some("tool_use"),
            single if single.stop().is_some() => Some("stop_sequence"),
            _ => Some("end_turn"),
        }
    }

    fn usage(&self) -> Value {
        let (read, cached, written) = self.single.usage();
        json!({
            "input_tokens": read - cached as usize, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0,
            "output_tokens": written,
        })
    }

    /// Takes an event; gives what a stream tells of it.
    fn take(&mut self, event: Event) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for brought in self.single.take(event) {
            match brought {
                Brought::Begun => pieces.push(Piece::typed("message_start", json!({ "message": self.message() }))),
                Brought::Text(text, _) if text.is_empty() => {}
                Brought::Text(text, _) => self.text(&mut pieces, &text),
                Brought::Call { id, name, arguments } => self.call(&mut pieces, &id, &name, &arguments),
                Brought::Ended => {
                    if self.content.is_empty() {
                        // An answer without a word is a block all the same.
                        self.text(&mut pieces, "");
                    }
                    self.close(&mut pieces);
                    let delta = json!({ "stop_reason": self.stop_reason(), "stop_sequence": self.single.stop() });
                    pieces.push(Piece::typed("message_delta", json!({ "delta": delta, "usage": self.usage() })));
                    pieces.push(Piece::typed("message_stop", json!({})));
                }
            }
        }
        pieces
    }

    fn text(&mut self, pieces: &mut Vec<Piece>, text: &str) {
        if !self.open {
            self.open = true;
            self.begin(pieces, json!({ "type": "text", "text": "" }));
        }
        let index = self.content.len() - 1;
        if let Some(Value::String(written)) = self.content.last_mut().and_then(|block| block.get_mut("text")) {
            written.push_str(text);
        }
        if !text.is_empty() {
            let delta = json!({ "type": "text_delta", "text": text });
            pieces.push(Piece::typed("content_block_delta", json!({ "index": index, "delta": delta })));
        }
    }

    fn call(&mut self, pieces: &mut Vec<Piece>, id: &str, name: &str, arguments: &str) {
        self.close(pieces);
        self.begin(pieces, json!({ "type": "tool_use", "id": format!("toolu_{id}"), "name": name, "input": {} }));
        let index = self.content.len() - 1;
        let delta = json!({ "type": "input_json_delta", "partial_json": arguments });
        pieces.push(Piece::typed("content_block_delta", json!({ "index": index, "delta": delta })));
        pieces.push(Piece::typed("content_block_stop", json!({ "index": index })));
        // It was read as an object, and written as one.
        self.content[index]["input"] = serde_json::from_str(arguments).unwrap_or_else(|_| json!({}));
    }

    fn begin(&mut self, pieces: &mut Vec<Piece>, block: Value) {
        pieces.push(Piece::typed("content_block_start", json!({ "index": self.content.len(), "content_block": block })));
        self.content.push(block);
    }

    /// Ends the text that is being written, if one is.
    fn close(&mut self, pieces: &mut Vec<Piece>) {
        if std::mem::take(&mut self.open) {
            pieces.push(Piece::typed("content_block_stop", json!({ "index": self.content.len() - 1 })));
        }
    }
}

impl Form for Answer {
    fn id(&self) -> &str {
        &self.id
    }

    fn pieces(&mut self, _: usize, event: Event) -> Vec<Piece> {
        self.take(event)
    }

    fn ended(&self) -> bool {
        self.single.ended()
    }

    fn whole(&mut self) -> Value {
        self.message()
    }

    fn served_by(&self) -> Option<&ServedBy> {
        self.single.served_by()
    }

    fn failure(failed: Failed) -> Response {
        failed::refused(&failed)
    }

    fn failure_piece(&mut self, failed: &Failed) -> Piece {
        Piece::typed("error", failed::body(failed))
    }
}
