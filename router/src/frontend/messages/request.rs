//! What a request for a message says. It is read as a chat of OpenAI's: blocks of text, calls and results are the same under other
//! names.

use overfill_text::TextModel;
use overfill_types::ServiceError;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::admission::{ClientRequest, Input};
use crate::frontend::openai::{Calls, ChatPrompt, Object, SamplingFields, Tools, whole};

/// `POST /v1/messages`. `temperature`, `top_p` and `top_k` are as elsewhere ([`SamplingFields`]).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct MessageRequest {
    /// Name of a model, as `/v1/models` gives it. May be absent where there is one only.
    model: Option<String>,
    /// Most tokens of the answer.
    #[serde(deserialize_with = "whole::number")]
    max_tokens: Option<u32>,
    /// What was said, oldest first. Where the assistant spoke last, the answer goes on from there.
    messages: Option<Vec<Map<String, Value>>>,
    /// What the system says: a text, or blocks.
    system: Option<Value>,
    /// The answer ends before the first of these.
    stop_sequences: Option<Vec<String>>,
    /// Send the answer in pieces, as server-sent events.
    stream: Option<bool>,
    /// Tools that the model may call.
    tools: Option<Vec<Map<String, Value>>>,
    /// `auto` (the default), `any`, `none`, or the `tool` to call.
    tool_choice: Option<Object<Choice>>,
}

/// `tool_choice`.
#[derive(Debug, Deserialize)]
struct Choice {
    #[serde(rename = "type")]
    kind: String,
    /// Of the tool, where the type is `tool`.
    name: Option<String>,
    disable_parallel_tool_use: Option<bool>,
}

/// What was read of one.
pub(super) struct Read {
    pub(super) asked: ClientRequest,
    pub(super) calls: Option<Calls>,
    pub(super) stream: bool,
}

fn refuse<T>(field: &str, message: impl Into<String>) -> Result<T, ServiceError> {
    Err(ServiceError::of_field(field, message))
}

impl MessageRequest {
    pub(super) fn model(&self) -> &str {
        self.model.as_deref().unwrap_or_default()
    }

    /// What it asks.
    ///
    /// # Errors
    /// [`overfill_types::Code::InvalidArgument`] naming the field.
    pub(super) fn read(mut self, sampling: SamplingFields, model: &TextModel) -> Result<Read, ServiceError> {
        let max_tokens = match self.max_tokens {
            None => return refuse("max_tokens", "max_tokens is missing: say how many tokens the answer may have"),
            Some(0) => return refuse("max_tokens", "max_tokens is 0: ask for at least 1 token"),
            Some(n) => n as usize,
        };
        let (stream, stop) = (self.stream.unwrap_or(false), self.stop_sequences.take());
        let (input, tools) = self.input(model)?;
        let mut asked = sampling.asked(vec![input], None)?;
        asked.max_tokens = Some(max_tokens);
        asked.stop = stop.unwrap_or_default();
        asked.sampling.guide = tools.guide;
        asked.shown = tools.calls.as_ref().and_then(|calls| calls.shown);
        Ok(Read { asked, calls: tools.calls, stream })
    }

    /// Its prompt, and what its tools mean for the answer.
    ///
    /// # Errors
    /// As [`MessageRequest::read`].
    pub(super) fn input(self, model: &TextModel) -> Result<(Input, Tools), ServiceError> {
        let mut messages = Vec::new();
        if let Some(system) = self.system.filter(|system| !system.is_null()) {
            messages.push(json!({ "role": "system", "content": text(system, "system")? }));
        }
        for message in self.messages.unwrap_or_default() {
            add(message, &mut messages)?;
        }
        let continues = messages.last().is_some_and(|last| last["role"] == "assistant" && last.get("tool_calls").is_none());
        let tools = self.tools.unwrap_or_default().into_iter().map(tool).collect::<Result<Vec<_>, _>>()?;
        let Object(choice) =
            self.tool_choice.unwrap_or(Object(Choice { kind: "auto".into(), name: None, disable_parallel_tool_use: None }));
        let several = choice.disable_parallel_tool_use.map(|one| !one);
        let chosen = match choice.kind.as_str() {
            word @ ("auto" | "none") => json!(word),
            "any" => json!("required"),
            "tool" => json!({ "type": "function", "function": { "name": choice.name } }),
            _ => return refuse("tool_choice", "tool_choice: its type is auto, any, tool or none"),
        };
        let prompt = json!({
            "messages": messages, "tools": tools, "tool_choice": chosen, "parallel_tool_calls": several,
            "continue_final_message": continues,
        });
        let prompt: ChatPrompt =
            serde_json::from_value(prompt).or_else(|e| refuse("messages", format!("the request is not understood: {e}")))?;
        let (chat, tools) = prompt.chat(model, false)?;
        Ok((Input::Chat(chat), tools))
    }
}

/// A message as OpenAI's API has it: calls beside the text, and each result a message of its own.
fn add(mut message: Map<String, Value>, messages: &mut Vec<Value>) -> Result<(), ServiceError> {
    let role = match message.get("role").and_then(Value::as_str) {
        Some(role @ ("user" | "assistant" | "system")) => role.to_owned(),
        other => {
            let message = format!("messages: role '{}' is not known; user and assistant are", other.unwrap_or_default());
            return refuse("messages", message);
        }
    };
    let blocks = match message.remove("content") {
        Some(Value::Array(blocks)) => blocks,
        Some(content @ Value::String(_)) => {
            messages.push(json!({ "role": role, "content": content }));
            return Ok(());
        }
        _ => return refuse("messages", "messages: a content is a text or a list of blocks"),
    };
    let (mut said, mut calls) = (String::new(), Vec::new());
    for mut block in blocks {
        match block["type"].as_str() {
            Some("tool_use") if role == "assistant" => {
                let call = json!({ "name": block["name"], "arguments": block["input"].take() });
                calls.push(json!({ "id": block["id"], "type": "function", "function": call }));
            }
            Some("tool_result") if role == "user" => {
                let content = text(block["content"].take(), "messages")?;
                messages.push(json!({ "role": "tool", "tool_call_id": block["tool_use_id"], "content": content }));
            }
            // What the model thought is no part of what it is asked.
            Some("thinking" | "redacted_thinking") if role == "assistant" => {}
            _ => said += &text(json!([block]), "messages")?,
        }
    }
    if !calls.is_empty() {
        messages.push(json!({ "role": role, "content": said, "tool_calls": calls }));
    } else if !said.is_empty() || messages.last().is_none_or(|last| last["role"] != "tool") {
        messages.push(json!({ "role": role, "content": said }));
    }
    Ok(())
}

/// A text, or blocks of which all are text.
fn text(content: Value, field: &str) -> Result<String, ServiceError> {
    match content {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text),
        Value::Array(blocks) => {
            let of_block = |block: &Value| match (block["type"].as_str(), block["text"].as_str()) {
                (Some("text"), Some(text)) => Ok(text.to_owned()),
                (kind, _) => {
                    let message = format!("{field}: a block of type '{}' was sent here; only text is read", kind.unwrap_or_default());
                    refuse(field, message)
                }
            };
            blocks.iter().map(of_block).collect()
        }
        _ => refuse(field, format!("{field}: a text or a list of blocks is wanted")),
    }
}

/// A tool as OpenAI's API has it.
fn tool(mut tool: Map<String, Value>) -> Result<Value, ServiceError> {
    if let Some(kind) = tool.get("type").and_then(Value::as_str).filter(|kind| *kind != "custom") {
        return refuse("tools", format!("tools: one of type '{kind}' was sent; only those that the client runs itself are known"));
    }
    let mut part = |name: &str| tool.remove(name);
    let mut function = json!({ "name": part("name"), "parameters": part("input_schema") });
    if let Some(description) = part("description") {
        function["description"] = description;
    }
    Ok(json!({ "type": "function", "function": function }))
}
