//! What is said in a chat: messages and tools. `/v1/chat/completions` and `/tokenize` read it alike, so that what the one counts
//! the other reads.

use overfill_text::{Chat, TextModel};
use overfill_types::ServiceError;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::frontend::openai::guide::{self, Tools};
use crate::frontend::openai::object::Object;

/// The fields that make up a chat's prompt.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ChatPrompt {
    /// What was said, oldest first.
    pub(super) messages: Option<Vec<ChatMessage>>,
    /// Tools that the model may call.
    tools: Option<Vec<Object<guide::Tool>>>,
    /// `none`, `auto` (the default), `required`, or the one to call.
    tool_choice: Option<guide::ToolChoice>,
    /// Whether `required` calls may be several. Default true.
    parallel_tool_calls: Option<bool>,
    /// Whether the prompt goes up to where the assistant's answer begins. Default true.
    add_generation_prompt: Option<bool>,
    /// Whether the answer goes on where the last message ends. Default false.
    continue_final_message: Option<bool>,
    /// Further variables of the chat template.
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// One message.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant`, `tool`: what the template knows.
    role: String,
    content: Option<Content>,
    #[serde(default)]
    tool_calls: Option<Vec<Map<String, Value>>>,
    /// Whatever else the template may read.
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// A text, or parts of which all are text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Object<Part>>),
}

/// A part of a content.
#[derive(Debug, Deserialize)]
pub(crate) struct Part {
    #[serde(rename = "type")]
    kind: String,
    /// Of a part of type `text`.
    text: Option<String>,
}

fn refuse<T>(message: impl Into<String>) -> Result<T, ServiceError> {
    Err(ServiceError::of_field("messages", message))
}

impl ChatPrompt {
    /// The chat, and what its tools mean for the answer. `special_tokens`: what the tokenizer puts before every text stands before
    /// the chat too.
    ///
    /// # Errors
    /// [`overfill_types::Code::InvalidArgument`] naming the field.
    pub(crate) fn chat(self, model: &TextModel, special_tokens: bool) -> Result<(Chat, Tools), ServiceError> {
        let Some(messages) = self.messages else { return refuse("messages is missing: send at least one message") };
        if messages.is_empty() {
            return refuse("messages is empty: send at least one message");
        }
        let messages = messages.into_iter().map(ChatMessage::into_value).collect::<Result<Vec<_>, _>>()?;
        let format = model.tool_format();
        let mark = format.mark().and_then(|mark| model.special_token(mark));
        let several = self.parallel_tool_calls.unwrap_or(true);
        let mut tools = guide::tools(self.tools.unwrap_or_default(), self.tool_choice, several, format, mark)?;
        let mut variables = self.chat_template_kwargs.unwrap_or_default();
        if let Some(add) = self.add_generation_prompt {
            variables.insert("add_generation_prompt".into(), add.into());
        }
        let continues = self.continue_final_message.unwrap_or(false);
        if continues {
            if self.add_generation_prompt == Some(true) {
                let message = "continue_final_message: the answer begins anew with add_generation_prompt; leave one of them out";
                return Err(ServiceError::of_field("continue_final_message", message));
            }
            variables.insert("add_generation_prompt".into(), false.into());
        }
        let chat = Chat { messages, tools: std::mem::take(&mut tools.described), variables, special_tokens, continues };
        Ok((chat, tools))
    }
}

impl ChatMessage {
    /// As templates read it: content as one text, arguments of calls as objects.
    fn into_value(self) -> Result<Value, ServiceError> {
        let content = match self.content {
            None if self.tool_calls.is_none() => return refuse("messages: a message has no content"),
            None => String::new(),
            Some(content) => content.text()?,
        };
        let mut message = Map::new();
        message.insert("role".into(), self.role.into());
        message.insert("content".into(), content.into());
        // Clients send an empty list where nothing was called; templates look whether there is one.
        if let Some(calls) = self.tool_calls.filter(|calls| !calls.is_empty()) {
            let calls = calls.into_iter().map(call).collect::<Result<Vec<_>, _>>()?;
            message.insert("tool_calls".into(), calls.into());
        }
        message.extend(self.rest.into_iter().filter(|(_, value)| !value.is_null()));
        Ok(message.into())
    }
}

impl Content {
    /// All of it.
    ///
    /// # Errors
    /// [`overfill_types::Code::InvalidArgument`] where a part is no text.
    fn text(self) -> Result<String, ServiceError> {
        let parts = match self {
            Self::Text(text) => return Ok(text),
            Self::Parts(parts) => parts,
        };
        let text = |Object(Part { kind, text })| match text.filter(|_| kind == "text") {
            Some(text) => Ok(text),
            None if kind == "text" => refuse("messages: a part of type 'text' has no text"),
            None => refuse(format!("messages: a part of type '{kind}' was sent; only text is read")),
        };
        parts.into_iter().map(text).collect()
    }
}

/// A call of the history, its arguments an object.
fn call(mut call: Map<String, Value>) -> Result<Value, ServiceError> {
    let Some(Value::Object(function)) = call.get_mut("function") else {
        return refuse("messages: a call in tool_calls has no function");
    };
    if function.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
        return refuse("messages: a function in tool_calls has no name");
    }
    let arguments = match function.get("arguments") {
        None => Value::Object(Map::new()),
        Some(Value::String(text)) if text.trim().is_empty() => Value::Object(Map::new()),
        Some(Value::String(text)) => serde_json::from_str(text).unwrap_or(Value::Null),
        Some(value) => value.clone(),
    };
    if !arguments.is_object() {
        return refuse("messages: arguments in tool_calls are no JSON object; send one, or leave them out");
    }
    function.insert("arguments".into(), arguments);
    Ok(call.into())
}
