//! What a request for a response says. It is read as a chat of the completions API: messages, calls and results are the same
//! under other names.

use overfill_text::TextModel;
use overfill_types::ServiceError;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::admission::{ClientRequest, Input};
use crate::frontend::openai::{Calls, ChatPrompt, GuideFields, SamplingFields, guide_of, whole};

/// `POST /v1/responses`. How tokens are chosen is said as elsewhere ([`SamplingFields`]), but for `max_output_tokens`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ResponseRequest {
    /// Name of a model, as `/v1/models` gives it. May be absent where there is one only.
    model: Option<String>,
    /// A text, or items: messages, `function_call`, `function_call_output`.
    input: Option<Value>,
    /// What the system says, before all else.
    instructions: Option<String>,
    /// Most tokens of the answer.
    #[serde(deserialize_with = "whole::number")]
    max_output_tokens: Option<u32>,
    /// Send the answer in pieces, as server-sent events.
    stream: Option<bool>,
    /// `format`: what the text has to look like.
    text: Option<Map<String, Value>>,
    /// Functions that the model may call.
    tools: Option<Vec<Map<String, Value>>>,
    /// `none`, `auto` (the default), `required`, or the function to call.
    tool_choice: Option<Value>,
    /// Whether `required` calls may be several. Default true.
    parallel_tool_calls: Option<bool>,
    /// `message.output_text.logprobs` is known.
    include: Option<Vec<String>>,
    /// Log-probabilities of so many most likely tokens, at most 20.
    #[serde(deserialize_with = "whole::number")]
    top_logprobs: Option<u32>,
    /// Given back.
    metadata: Option<Map<String, Value>>,
    previous_response_id: Option<String>,
    conversation: Option<Value>,
    prompt: Option<Value>,
    background: Option<bool>,
}

/// What was read of one.
pub(super) struct Read {
    pub(super) asked: ClientRequest,
    pub(super) calls: Option<Calls>,
    pub(super) stream: bool,
    pub(super) logprobs: bool,
    /// What the response repeats of the request.
    pub(super) said: Map<String, Value>,
}

fn refuse<T>(field: &str, message: impl Into<String>) -> Result<T, ServiceError> {
    Err(ServiceError::of_field(field, message))
}

impl ResponseRequest {
    pub(super) fn model(&self) -> &str {
        self.model.as_deref().unwrap_or_default()
    }

    /// What it asks.
    ///
    /// # Errors
    /// [`overfill_types::Code::InvalidArgument`] naming the field.
    pub(super) fn read(self, sampling: SamplingFields, model: &TextModel) -> Result<Read, ServiceError> {
        let stored = "nothing is stored here: send the whole chat as input";
        if self.previous_response_id.is_some() {
            return refuse("previous_response_id", format!("previous_response_id: {stored}"));
        }
        if self.conversation.is_some() {
            return refuse("conversation", format!("conversation: {stored}"));
        }
        if self.prompt.is_some() {
            return refuse("prompt", format!("prompt: {stored}"));
        }
        if self.background == Some(true) {
            return refuse("background", "background: answers are not kept for later; leave it out");
        }
        let said = self.said();
        let mut messages: Vec<Value> = self.instructions.iter().map(|text| json!({ "role": "system", "content": text })).collect();
        match self.input {
            None => return refuse("input", "input is missing: send a text, or items"),
            Some(Value::String(text)) => messages.push(json!({ "role": "user", "content": text })),
            Some(Value::Array(items)) => {
                for item in items {
                    add(item, &mut messages)?;
                }
            }
            Some(_) => return refuse("input", "input: a text or a list of items is wanted"),
        }
        let tools = self.tools.unwrap_or_default().into_iter().map(tool).collect::<Result<Vec<_>, _>>()?;
        let choice = match self.tool_choice {
            Some(Value::Object(choice)) if choice.get("type") == Some(&json!("function")) => {
                json!({ "type": "function", "function": { "name": choice.get("name") } })
            }
            other => other.unwrap_or_default(),
        };
        let prompt =
            json!({ "messages": messages, "tools": tools, "tool_choice": choice, "parallel_tool_calls": self.parallel_tool_calls });
        let prompt: ChatPrompt =
            serde_json::from_value(prompt).or_else(|e| refuse("input", format!("the request is not understood: {e}")))?;
        let of_input = |e: ServiceError| match e.field.as_deref() {
            Some("messages") => ServiceError { message: e.message.replacen("messages", "input", 1), field: Some("input".into()), ..e },
            _ => e,
        };
        let (chat, tools) = prompt.chat(model, false).map_err(of_input)?;
        let mut asked = sampling.asked(vec![Input::Chat(chat)], None)?;
        asked.max_tokens = self.max_output_tokens.map(|n| n as usize);
        if asked.max_tokens == Some(0) {
            return refuse("max_output_tokens", "max_output_tokens is 0: ask for at least 1 token");
        }
        let logprobs = self.include.is_some_and(|include| include.iter().any(|what| what == "message.output_text.logprobs"));
        if logprobs || self.top_logprobs.is_some() {
            asked.sampling.logprobs = Some(self.top_logprobs.unwrap_or(0));
        }
        asked.sampling.guide = match (tools.guide, form(self.text)?) {
            (Some(_), Some(_)) => {
                let message = "tool_choice: a tool has to be called and the answer to have another form; leave one out";
                return refuse("tool_choice", message);
            }
            (tools, form) => tools.or(form),
        };
        asked.shown = tools.calls.as_ref().and_then(|calls| calls.shown);
        let logprobs = asked.sampling.logprobs.is_some();
        Ok(Read { asked, calls: tools.calls, stream: self.stream.unwrap_or(false), logprobs, said })
    }

    fn said(&self) -> Map<String, Value> {
        let said = json!({
            "instructions": self.instructions, "max_output_tokens": self.max_output_tokens, "metadata": self.metadata.clone().unwrap_or_default(),
            "parallel_tool_calls": self.parallel_tool_calls.unwrap_or(true), "tools": self.tools.clone().unwrap_or_default(),
            "tool_choice": self.tool_choice.clone().unwrap_or_else(|| "auto".into()), "top_logprobs": self.top_logprobs.unwrap_or(0),
            "text": self.text.clone().unwrap_or_else(|| Map::from_iter([("format".to_owned(), json!({ "type": "text" }))])),
        });
        match said {
            Value::Object(said) => said,
            _ => Map::new(),
        }
    }
}

/// An item of the input as a message.
fn add(item: Value, messages: &mut Vec<Value>) -> Result<(), ServiceError> {
    let Value::Object(mut item) = item else { return refuse("input", "input: an item is no object") };
    let kind = item.get("type").and_then(Value::as_str).unwrap_or("message").to_owned();
    let mut part = |name: &str| item.remove(name).unwrap_or_default();
    match kind.as_str() {
        "message" => messages.push(json!({ "role": part("role"), "content": content(part("content"))? })),
        "function_call" => {
            let (id, name, arguments) = (part("call_id"), part("name"), part("arguments"));
            let arguments = if arguments.is_null() { json!("") } else { arguments };
            let call = json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
            // Several calls in a row are one message of the assistant's.
            match messages.last_mut().and_then(|last| last.get_mut("tool_calls")?.as_array_mut()) {
                Some(calls) => calls.push(call),
                None => messages.push(json!({ "role": "assistant", "content": null, "tool_calls": [call] })),
            }
        }
        "function_call_output" => {
            messages.push(json!({ "role": "tool", "tool_call_id": part("call_id"), "content": content(part("output"))? }));
        }
        // What the model thought is no part of what it is asked.
        "reasoning" => {}
        other => {
            return refuse(
                "input",
                format!("input: an item of type '{other}' was sent; messages, calls of functions and their output are read"),
            );
        }
    }
    Ok(())
}

/// A content as chats have it: parts have a type of their own for each side here.
fn content(content: Value) -> Result<Value, ServiceError> {
    let Value::Array(parts) = content else { return Ok(content) };
    let part = |part: Value| match part["type"].as_str() {
        Some("input_text" | "output_text" | "text") => Ok(json!({ "type": "text", "text": part["text"] })),
        Some("refusal") => Ok(json!({ "type": "text", "text": part["refusal"] })),
        other => refuse("input", format!("input: a part of type '{}' was sent; only text is read", other.unwrap_or_default())),
    };
    parts.into_iter().map(part).collect()
}

/// A tool as chats have it.
fn tool(mut tool: Map<String, Value>) -> Result<Value, ServiceError> {
    match tool.remove("type").as_ref().and_then(Value::as_str) {
        Some("function") => Ok(json!({ "type": "function", "function": tool })),
        other => refuse("tools", format!("tools: one of type '{}' was sent; only functions are known", other.unwrap_or_default())),
    }
}

/// What the text has to look like, if that is said.
fn form(text: Option<Map<String, Value>>) -> Result<Option<overfill_types::Guide>, ServiceError> {
    let Some(format) = text.and_then(|mut text| text.remove("format")).filter(|format| !format.is_null()) else { return Ok(None) };
    let format = match format["type"].as_str() {
        Some("json_schema") => json!({ "type": "json_schema", "json_schema": format }),
        _ => format,
    };
    let fields: GuideFields =
        serde_json::from_value(json!({ "response_format": format })).or_else(|e| refuse("text.format", format!("text.format: {e}")))?;
    guide_of(fields)
}
