//! How a response looks: items, whole or as they come.

use axum::http::StatusCode;
use overfill_proto::v1::{ServedBy, Token};
use serde_json::{Map, Value, json};

use crate::frontend::openai::{Failed, TokenNames};
use crate::frontend::respond::{Form, Piece};
use crate::frontend::single::{Brought, Single};
use crate::relay::Event;

/// A response, as far as it has come.
pub(super) struct Answer {
    id: String,
    created: u64,
    single: Single,
    names: TokenNames,
    /// Log-probabilities were asked for.
    logprobs: bool,
    /// What it repeats of the request.
    said: Map<String, Value>,
    /// Items that are whole.
    output: Vec<Value>,
    /// The message that is being written.
    open: Option<Message>,
    /// Events that were sent.
    sent: u64,
}

/// A message that is being written.
struct Message {
    id: String,
    text: String,
    logprobs: Vec<Value>,
}

impl Message {
    fn part(&self) -> Value {
        json!({ "type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs })
    }

    fn item(&self, status: &str, content: Vec<Value>) -> Value {
        json!({ "type": "message", "id": self.id, "status": status, "role": "assistant", "content": content })
    }
}

impl Answer {
    pub(super) fn new(id: String, created: u64, single: Single, names: TokenNames, logprobs: bool, said: Map<String, Value>) -> Self {
        Self { id, created, single, names, logprobs, said, output: Vec::new(), open: None, sent: 0 }
    }

    /// The response as it stands.
    fn response(&self) -> Value {
        let status = match (self.single.ended(), self.single.cut()) {
            (false, _) => "in_progress",
            (true, false) => "completed",
            (true, true) => "incomplete",
        };
        let (read, cached, written) = self.single.usage();
        let usage = self.single.ended().then(|| {
            json!({
                "input_tokens": read, "input_tokens_details": { "cached_tokens": cached }, "output_tokens": written,
                "output_tokens_details": { "reasoning_tokens": 0 }, "total_tokens": read + written,
            })
        });
        let mut response = json!({
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": null,
            "incomplete_details": self.single.cut().then(|| json!({ "reason": "max_output_tokens" })),
            "model": self.names.model.manifest.name, "output": self.output, "previous_response_id": null, "store": false, "background": false,
            "truncation": "disabled", "reasoning": { "effort": null, "summary": null }, "usage": usage,
        });
        if let Some(fields) = response.as_object_mut() {
            fields.extend(self.said.clone());
        }
        response
    }

    /// Takes an event; gives what a stream tells of it.
    fn take(&mut self, event: Event) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for brought in self.single.take(event) {
            match brought {
                Brought::Begun => {
                    for event in ["response.created", "response.in_progress"] {
                        let response = self.response();
                        self.tell(&mut pieces, event, json!({ "response": response }));
                    }
                }
                Brought::Text(text, tokens) => self.text(&mut pieces, &text, &tokens),
                Brought::Call { id, name, arguments } => self.call(&mut pieces, &id, &name, &arguments),
                Brought::Ended => {
                    if self.open.is_none() && self.output.is_empty() {
                        // An answer without a word is a message all the same.
                        self.open(&mut pieces);
                    }
                    self.close(&mut pieces);
                    let event = if self.single.cut() { "response.incomplete" } else { "response.completed" };
                    let response = self.response();
                    self.tell(&mut pieces, event, json!({ "response": response }));
                }
            }
        }
        pieces
    }

    fn text(&mut self, pieces: &mut Vec<Piece>, text: &str, tokens: &[Token]) {
        let logprobs: Vec<Value> = if self.logprobs {
            tokens.iter().filter_map(|token| Some(self.names.logprob(token.id, token.logprob.as_ref()?))).collect()
        } else {
            Vec::new()
        };
        if text.is_empty() && logprobs.is_empty() {
            return;
        }
        self.open(pieces);
        let place = self.place();
        if let Some(message) = &mut self.open {
            message.text += text;
            message.logprobs.extend(logprobs.iter().cloned());
        }
        self.tell(pieces, "response.output_text.delta", with(place, json!({ "delta": text, "logprobs": logprobs })));
    }

    /// Where the message that is being written stands.
    fn place(&self) -> Value {
        json!({ "item_id": self.open.as_ref().map(|message| &message.id), "output_index": self.output.len(), "content_index": 0 })
    }

    /// Begins a message, unless one is begun.
    fn open(&mut self, pieces: &mut Vec<Piece>) {
        if self.open.is_some() {
            return;
        }
        let message = Message { id: format!("msg_{}", uuid::Uuid::new_v4().simple()), text: String::new(), logprobs: Vec::new() };
        let (item, part) = (message.item("in_progress", Vec::new()), message.part());
        self.open = Some(message);
        self.tell(pieces, "response.output_item.added", json!({ "output_index": self.output.len(), "item": item }));
        self.tell(pieces, "response.content_part.added", with(self.place(), json!({ "part": part })));
    }

    /// Ends the message that is being written.
    fn close(&mut self, pieces: &mut Vec<Piece>) {
        let place = self.place();
        let Some(message) = self.open.take() else { return };
        let status = if self.single.cut() { "incomplete" } else { "completed" };
        let item = message.item(status, vec![message.part()]);
        let done = json!({ "text": message.text, "logprobs": message.logprobs });
        self.tell(pieces, "response.output_text.done", with(place.clone(), done));
        self.tell(pieces, "response.content_part.done", with(place, json!({ "part": message.part() })));
        self.done(pieces, item);
    }

    fn call(&mut self, pieces: &mut Vec<Piece>, id: &str, name: &str, arguments: &str) {
        self.close(pieces);
        let (item_id, index) = (format!("fc_{id}"), self.output.len());
        let item = |status: &str, arguments: &str| {
            json!({
                "type": "function_call", "id": item_id, "call_id": format!("call_{id}"), "name": name, "arguments": arguments,
                "status": status,
            })
        };
        let place = json!({ "item_id": item_id, "output_index": index });
        self.tell(pieces, "response.output_item.added", json!({ "output_index": index, "item": item("in_progress", "") }));
        self.tell(pieces, "response.function_call_arguments.delta", with(place.clone(), json!({ "delta": arguments })));
        self.tell(pieces, "response.function_call_arguments.done", with(place, json!({ "name": name, "arguments": arguments })));
        self.done(pieces, item("completed", arguments));
    }

    /// An item is whole.
    fn done(&mut self, pieces: &mut Vec<Piece>, item: Value) {
        self.tell(pieces, "response.output_item.done", json!({ "output_index": self.output.len(), "item": item }));
        self.output.push(item);
    }

    fn tell(&mut self, pieces: &mut Vec<Piece>, event: &'static str, mut data: Value) {
        data["sequence_number"] = self.sent.into();
        self.sent += 1;
        pieces.push(Piece::typed(event, data));
    }
}

/// Both objects' fields.
fn with(mut place: Value, more: Value) -> Value {
    if let (Value::Object(fields), Value::Object(more)) = (&mut place, more) {
        fields.extend(more);
    }
    place
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
        self.response()
    }

    fn served_by(&self) -> Option<&ServedBy> {
        self.single.served_by()
    }

    fn failure_piece(&mut self, failed: &Failed) -> Piece {
        let code = if failed.status == StatusCode::TOO_MANY_REQUESTS { "rate_limit_exceeded" } else { failed.error.code.as_str() };
        let error = json!({ "code": code, "message": failed.error.message, "param": failed.error.field, "sequence_number": self.sent });
        Piece::typed("error", error)
    }
}
