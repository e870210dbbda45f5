//! How answers look, whole and in pieces.

use std::sync::Arc;

use overfill_proto::v1::{ServedBy, Token, TokenLogprob};
use overfill_text::{Detokenizer, ToolPiece, ToolReader};
use overfill_types::FinishReason;
use serde_json::{Map, Value, json};

use crate::frontend::openai::guide::Calls;
use crate::frontend::openai::request::Shape;
use crate::frontend::openai::token_names::TokenNames;
use crate::relay::{End, PromptRead};

/// What all answers to one request share.
pub(super) struct Frame {
    pub(super) shape: Shape,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) names: TokenNames,
    pub(super) token_ids: bool,
    /// Log-probabilities were asked for.
    pub(super) logprobs: bool,
    /// A last piece of a stream counts tokens; those before it say that they do not.
    pub(super) include_usage: bool,
    pub(super) echo: bool,
    pub(super) prompt_only: bool,
    pub(super) calls: Option<Calls>,
    /// The prompts as they were sent, where they were texts.
    pub(super) prompts: Vec<String>,
    /// What the tokenizer puts before every text stands before them.
    pub(super) special_tokens: bool,
}

/// One answer, as far as it has come.
pub(super) struct Choice {
    index: usize,
    /// The number of its prompt.
    of: usize,
    prompt: Arc<Vec<u32>>,
    text: String,
    tokens: Vec<Token>,
    read: Option<PromptRead>,
    end: Option<End>,
    tools: Option<ToolReader>,
    calls: Vec<Value>,
    /// Where in the text the tokens stand whose log-probabilities are given, if any are.
    places: Option<Places>,
}

/// Where in a text its tokens begin, in characters.
struct Places {
    detokenizer: Detokenizer,
    at: usize,
}

impl Places {
    /// Where this one does, the next of the text.
    fn next(&mut self, token: u32) -> usize {
        let at = self.at;
        // Of a character of several tokens, all but the last begin where it does.
        self.at += self.detokenizer.push(token).chars().count();
        at
    }
}

/// A call of a tool, or text, that a piece of the answer brought.
struct Brought {
    text: String,
    calls: Vec<Value>,
}

impl Choice {
    pub(super) fn new(index: usize, of: usize, prompt: Arc<Vec<u32>>, frame: &Frame) -> Self {
        let places = frame.logprobs.then(|| Places { detokenizer: frame.names.model.detokenizer(&prompt), at: 0 });
        Self {
            index,
            of,
            prompt,
            text: String::new(),
            tokens: Vec::new(),
            read: None,
            end: None,
            tools: frame.calls.as_ref().map(|calls| ToolReader::new(calls.format, calls.names.clone())),
            calls: Vec::new(),
            places,
        }
    }

    pub(super) fn ended(&self) -> bool {
        self.end.is_some()
    }

    /// Which models and nodes serve it, as far as that is known.
    pub(super) fn served_by(&self) -> Option<&ServedBy> {
        self.end.as_ref().map(|end| &end.served_by).or_else(|| self.read.as_ref().map(|read| &read.served_by))
    }

    fn take(&mut self, text: &str) -> Brought {
        let pieces = match &mut self.tools {
            Some(tools) => tools.push(text),
            None => vec![ToolPiece::Text { at: 0, text: text.to_owned() }],
        };
        self.brought(pieces)
    }

    fn brought(&mut self, pieces: Vec<ToolPiece>) -> Brought {
        let mut brought = Brought { text: String::new(), calls: Vec::new() };
        for piece in pieces {
            match piece {
                ToolPiece::Text { text, .. } => brought.text += &text,
                ToolPiece::Call { name, arguments } => {
                    let id = format!("call_{}", uuid::Uuid::new_v4().simple());
                    let call = json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
                    self.calls.push(call.clone());
                    brought.calls.push(call);
                }
            }
        }
        self.text += &brought.text;
        brought
    }

    fn finish_reason(&self, calls: Option<&Calls>) -> Value {
        match &self.end {
            Some(end) if end.reason == FinishReason::Stop && calls.is_some_and(|calls| !calls.named) && !self.calls.is_empty() => {
                json!("tool_calls")
            }
            Some(end) => json!(end.reason.as_str()),
            None => Value::Null,
        }
    }
}

impl Frame {
    /// The prompt was read.
    pub(super) fn read(&self, choice: &mut Choice, read: PromptRead) {
        choice.read = Some(read);
    }

    /// New text and tokens, for a whole answer.
    pub(super) fn grow(&self, choice: &mut Choice, text: &str, tokens: Vec<Token>) {
        if !self.prompt_only {
            choice.take(text);
            choice.tokens.extend(tokens);
        }
    }

    /// The end of an answer. Gives what was held back of it, as a piece.
    pub(super) fn end(&self, choice: &mut Choice, end: End) -> Option<Value> {
        choice.end = Some(end);
        let pieces = choice.tools.as_mut()?.finish();
        let brought = choice.brought(pieces);
        (!brought.text.is_empty() || !brought.calls.is_empty()).then(|| self.piece(choice, &brought, &[]))
    }

    /// All answers, whole.
    pub(super) fn whole(&self, choices: &mut [Choice], n: usize) -> Value {
        let list: Vec<Value> = choices.iter_mut().map(|choice| self.whole_choice(choice)).collect();
        let object = if self.shape == Shape::Chat { "chat.completion" } else { "text_completion" };
        let mut answer = self.envelope(object, list.into());
        answer["usage"] = self.usage(choices, n);
        if let Some(by) = choices.first().and_then(Choice::served_by) {
            answer["served_by"] = served_by(by);
        }
        // vLLM has it beside the choices for chats, within them for completions.
        if self.token_ids && self.shape == Shape::Chat {
            answer["prompt_token_ids"] = choices.first().map(|c| json!(*c.prompt)).unwrap_or_default();
        }
        answer
    }

    fn whole_choice(&self, choice: &mut Choice) -> Value {
        let stop = choice.end.as_ref().and_then(|end| end.matched_stop.clone());
        let mut value = json!({ "index": choice.index, "finish_reason": choice.finish_reason(self.calls.as_ref()), "stop_reason": stop });
        match self.shape {
            Shape::Chat => {
                let mut message = json!({ "role": "assistant", "content": choice.text });
                if !choice.calls.is_empty() {
                    message["tool_calls"] = std::mem::take(&mut choice.calls).into();
                    if choice.text.trim().is_empty() {
                        message["content"] = Value::Null;
                    }
                }
                value["message"] = message;
            }
            Shape::Completion if self.echo => value["text"] = json!(self.prompt_text(choice) + &choice.text),
            Shape::Completion => value["text"] = json!(choice.text),
        }
        let tokens = std::mem::take(&mut choice.tokens);
        value["logprobs"] = self.logprobs(choice, &tokens, self.echo);
        if self.token_ids {
            value["token_ids"] = ids(&tokens);
            if self.shape == Shape::Completion {
                value["prompt_token_ids"] = json!(*choice.prompt);
            }
        }
        if let Some(by) = choice.served_by() {
            value["served_by"] = served_by(by);
        }
        value
    }

    /// The first piece of a streamed answer: who speaks, or the prompt.
    pub(super) fn opening(&self, choice: &mut Choice) -> Option<Value> {
        match self.shape {
            Shape::Chat => {
                let mut chunk = self.chunk(choice, json!({ "role": "assistant", "content": "" }), Value::Null);
                if self.token_ids {
                    chunk["prompt_token_ids"] = json!(*choice.prompt);
                }
                Some(chunk)
            }
            Shape::Completion if self.echo || self.token_ids => {
                let mut chunk = self.chunk(choice, Value::Null, Value::Null);
                if self.echo {
                    chunk["choices"][0]["text"] = json!(self.prompt_text(choice));
                    chunk["choices"][0]["logprobs"] = self.logprobs(choice, &[], true);
                }
                if self.token_ids {
                    chunk["choices"][0]["prompt_token_ids"] = json!(*choice.prompt);
                }
                Some(chunk)
            }
            Shape::Completion => None,
        }
    }

    /// A piece of a streamed answer; none where it brings nothing.
    pub(super) fn delta(&self, choice: &mut Choice, text: &str, tokens: &[Token]) -> Option<Value> {
        if self.prompt_only {
            return None;
        }
        let brought = choice.take(text);
        // A call is being read: there is nothing to tell until it is whole.
        let silent = choice.tools.is_some() && brought.text.is_empty() && brought.calls.is_empty() && !self.logprobs && !self.token_ids;
        (!silent).then(|| self.piece(choice, &brought, tokens))
    }

    fn piece(&self, choice: &mut Choice, brought: &Brought, tokens: &[Token]) -> Value {
        let before = choice.calls.len() - brought.calls.len();
        let mut delta = json!({});
        if !brought.text.is_empty() || brought.calls.is_empty() {
            delta["content"] = json!(brought.text);
        }
        if !brought.calls.is_empty() {
            let numbered = brought.calls.iter().enumerate().map(|(i, call)| {
                let mut call = call.clone();
                call["index"] = json!(before + i);
                call
            });
            delta["tool_calls"] = numbered.collect();
        }
        let mut chunk = self.chunk(choice, delta, Value::Null);
        if self.shape == Shape::Completion {
            chunk["choices"][0]["text"] = json!(brought.text);
        }
        chunk["choices"][0]["logprobs"] = self.logprobs(choice, tokens, false);
        if self.token_ids {
            chunk["choices"][0]["token_ids"] = ids(tokens);
        }
        chunk
    }

    /// The last piece of a streamed answer.
    pub(super) fn closing(&self, choice: &Choice) -> Value {
        let mut chunk = self.chunk(choice, json!({}), choice.finish_reason(self.calls.as_ref()));
        chunk["choices"][0]["stop_reason"] = json!(choice.end.as_ref().and_then(|end| end.matched_stop.as_deref()));
        if let Some(by) = choice.served_by() {
            chunk["served_by"] = served_by(by);
        }
        chunk
    }

    /// The piece after the last, if `stream_options.include_usage` is set.
    pub(super) fn usage_chunk(&self, choices: &[Choice], n: usize) -> Value {
        let mut chunk = self.envelope(self.chunk_object(), json!([]));
        chunk["usage"] = self.usage(choices, n);
        chunk
    }

    fn chunk_object(&self) -> &'static str {
        if self.shape == Shape::Chat { "chat.completion.chunk" } else { "text_completion" }
    }

    fn chunk(&self, choice: &Choice, delta: Value, finish: Value) -> Value {
        let index = choice.index;
        let choice = match self.shape {
            Shape::Chat => json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": finish }),
            Shape::Completion => json!({ "index": index, "text": "", "logprobs": null, "finish_reason": finish }),
        };
        let mut chunk = self.envelope(self.chunk_object(), json!([choice]));
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.names.model.manifest.name, "choices": choices })
    }

    /// Each prompt counts once, however many answers it has.
    fn usage(&self, choices: &[Choice], n: usize) -> Value {
        let prompt: usize = choices.iter().step_by(n).map(|c| c.prompt.len()).sum();
        let cached: u32 = choices.iter().step_by(n).filter_map(|c| c.read.as_ref()).map(|read| read.cached_tokens).sum();
        let written = |end: &End| if self.prompt_only { 0 } else { end.completion_tokens };
        let completion: usize = choices.iter().filter_map(|c| c.end.as_ref()).map(written).sum();
        json!({
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": { "cached_tokens": cached },
        })
    }

    /// The prompt as it was sent, special tokens and all.
    fn prompt_text(&self, choice: &Choice) -> String {
        self.prompts.get(choice.of).cloned().unwrap_or_else(|| self.names.model.decode(&choice.prompt, true))
    }

    /// Where in its text the prompt's tokens begin. What the tokenizer put before the text is no part of it.
    fn prompt_places(&self, choice: &mut Choice) -> Vec<usize> {
        let before = match self.prompts.get(choice.of) {
            Some(_) if self.special_tokens => self.names.model.encode("").map_or(0, |ids| ids.len()),
            _ => 0,
        };
        let (before, said) = choice.prompt.split_at(before.min(choice.prompt.len()));
        let mut places = Places { detokenizer: self.names.model.detokenizer_of_all(), at: 0 };
        let places = before.iter().map(|_| 0).chain(said.iter().map(|id| places.next(*id))).collect();
        let length = self.prompt_text(choice).chars().count();
        choice.places.iter_mut().for_each(|places| places.at = length);
        places
    }

    /// Of `tokens`, and before them of the prompt's if `prompt` is set.
    fn logprobs(&self, choice: &mut Choice, tokens: &[Token], prompt: bool) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let mut offsets = if prompt { self.prompt_places(choice) } else { Vec::new() };
        if let Some(places) = &mut choice.places {
            offsets.extend(tokens.iter().filter(|t| t.logprob.is_some()).map(|t| places.next(t.id)));
        }
        let mut known: Vec<(u32, Option<&TokenLogprob>)> = Vec::new();
        if prompt {
            let read = choice.read.as_ref().map(|read| read.prompt_logprobs.as_slice()).unwrap_or_default();
            // Nothing tells of the first token.
            known.extend(choice.prompt.iter().copied().zip(std::iter::once(None).chain(read.iter().map(Some))));
        }
        known.extend(tokens.iter().filter_map(|t| Some((t.id, Some(t.logprob.as_ref()?)))));
        if self.shape == Shape::Chat {
            return json!({ "content": known.into_iter().filter_map(|(id, l)| Some(self.names.logprob(id, l?))).collect::<Vec<_>>() });
        }
        let (mut texts, mut logprobs, mut top) = (Vec::new(), Vec::new(), Vec::new());
        for (id, logprob) in known {
            let text = self.names.name(id);
            texts.push(text.clone());
            logprobs.push(logprob.map(|l| l.logprob));
            top.push(logprob.map(|l| {
                let mut most: Map<String, Value> = l.top.iter().map(|t| (self.names.name(t.token_id), json!(t.logprob))).collect();
                if !l.top.is_empty() {
                    most.entry(text).or_insert(json!(l.logprob));
                }
                most
            }));
        }
        json!({ "tokens": texts, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets })
    }
}

fn ids(tokens: &[Token]) -> Value {
    tokens.iter().map(|t| t.id).collect()
}

fn served_by(by: &ServedBy) -> Value {
    json!({ "fingerprint": by.fingerprint, "mode": by.mode, "prefill_node": by.prefill_node, "decode_node": by.decode_node })
}
