//! The OpenAI API's requests and answers, as JSON.

use overfill_proto::v1::Token;
use overfill_text::{Message, TextModel};
use overfill_types::{Code, SamplingParams, ServiceError};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::admission::{Asked, Input};
use crate::relay::End;

/// Tokens of a completion that does not say how many it wants (the OpenAI API's default).
const COMPLETION_TOKENS: usize = 16;

/// What both endpoints take. Fields that are not known are passed over, as OpenAI's clients expect.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Common {
    model: String,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    seed: Option<i64>,
    stop: Option<OneOrMore>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    n: Option<u64>,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) return_token_ids: Option<bool>,
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// `POST /v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatRequest {
    messages: Vec<ChatMessage>,
    #[serde(default)]
    logprobs: Option<bool>,
    #[serde(default)]
    top_logprobs: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct ChatMessage {
    role: String,
    content: Content,
}

/// A text, or parts of which all are text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: String,
}

/// `POST /v1/completions`.
#[derive(Debug, Deserialize)]
pub(crate) struct CompletionRequest {
    prompt: Prompt,
    #[serde(default)]
    logprobs: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<u32>>),
}

fn refuse<T>(message: impl Into<String>) -> Result<T, ServiceError> {
    Err(ServiceError::new(Code::InvalidArgument, message))
}

impl Common {
    fn asked(&mut self, input: Input, default_tokens: Option<usize>, logprobs: Option<u32>) -> Result<Asked, ServiceError> {
        if self.n.is_some_and(|n| n != 1) {
            return refuse("n: one answer is given for each request; send it several times");
        }
        let max_tokens = match self.max_completion_tokens.or(self.max_tokens) {
            None => default_tokens,
            Some(n) => match usize::try_from(n) {
                Ok(n) if n > 0 => Some(n),
                _ => return refuse(format!("max_tokens is {n}: ask for at least 1 token")),
            },
        };
        // -1 is how other servers spell "off".
        let top_k = match self.top_k.unwrap_or(0) {
            -1 => 0,
            k => u32::try_from(k).or_else(|_| refuse(format!("top_k is {k}: it must be 0 (off) or more")))?,
        };
        let sampling = SamplingParams {
            temperature: self.temperature.unwrap_or(1.0),
            top_p: self.top_p.unwrap_or(1.0),
            top_k,
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            seed: self.seed.map_or_else(rand::random, |seed| seed as u64),
            logprobs,
        };
        let stop = match self.stop.take() {
            None => Vec::new(),
            Some(OneOrMore::One(stop)) => vec![stop],
            Some(OneOrMore::More(stops)) => stops,
        };
        Ok(Asked {
            model: std::mem::take(&mut self.model),
            input,
            sampling,
            max_tokens,
            stop,
            stop_token_ids: self.stop_token_ids.take().unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            timeout: None,
        })
    }
}

/// A request of either endpoint.
pub(crate) trait OpenAiRequest: for<'de> Deserialize<'de> + Send {
    /// How its answers look.
    const SHAPE: Shape;

    /// What it asks; `common` is what was read of the same body.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] naming the field.
    fn asked(self, common: &mut Common) -> Result<Asked, ServiceError>;
}

impl OpenAiRequest for ChatRequest {
    const SHAPE: Shape = Shape::Chat;

    fn asked(self, common: &mut Common) -> Result<Asked, ServiceError> {
        let messages = self.messages.into_iter().map(ChatMessage::into_message).collect::<Result<_, _>>()?;
        let logprobs = if self.logprobs.unwrap_or(false) { Some(self.top_logprobs.unwrap_or(0)) } else { None };
        common.asked(Input::Chat(messages), None, logprobs)
    }
}

impl OpenAiRequest for CompletionRequest {
    const SHAPE: Shape = Shape::Completion;

    fn asked(self, common: &mut Common) -> Result<Asked, ServiceError> {
        let several = |n: usize| refuse(format!("prompt: {n} prompts were sent; send each in a request of its own"));
        let input = match self.prompt {
            Prompt::Text(text) => Input::Text(text),
            Prompt::Ids(ids) => Input::TokenIds(ids),
            Prompt::Texts(mut texts) => match (texts.pop(), texts.len()) {
                (Some(text), 0) => Input::Text(text),
                (_, rest) => return several(rest + 1),
            },
            Prompt::IdLists(mut lists) => match (lists.pop(), lists.len()) {
                (Some(ids), 0) => Input::TokenIds(ids),
                (_, rest) => return several(rest + 1),
            },
        };
        common.asked(input, Some(COMPLETION_TOKENS), self.logprobs)
    }
}

impl ChatMessage {
    fn into_message(self) -> Result<Message, ServiceError> {
        let content = match self.content {
            Content::Text(text) => text,
            Content::Parts(parts) => {
                if let Some(part) = parts.iter().find(|p| p.kind != "text") {
                    return refuse(format!("messages: a part of type '{}' was sent; only text is read", part.kind));
                }
                parts.into_iter().map(|p| p.text).collect()
            }
        };
        Ok(Message { role: self.role, content })
    }
}

/// How answers look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
}

/// What all parts of one answer share.
pub(crate) struct Frame {
    pub(crate) shape: Shape,
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: std::sync::Arc<TextModel>,
    pub(crate) prompt: Vec<u32>,
    pub(crate) token_ids: bool,
    pub(crate) logprobs: bool,
}

impl Frame {
    /// A whole answer.
    pub(crate) fn whole(&self, text: &str, tokens: &[Token], end: &End) -> Value {
        let mut choice = json!({ "index": 0, "finish_reason": end.reason.as_str(), "stop_reason": end.matched_stop });
        match self.shape {
            Shape::Chat => choice["message"] = json!({ "role": "assistant", "content": text }),
            Shape::Completion => choice["text"] = json!(text),
        }
        choice["logprobs"] = self.logprobs(tokens);
        if self.token_ids {
            choice["token_ids"] = ids(tokens);
        }
        let object = if self.shape == Shape::Chat { "chat.completion" } else { "text_completion" };
        let mut answer = self.envelope(object, json!([choice]));
        answer["usage"] = self.usage(end.completion_tokens);
        answer["served_by"] = served_by(end);
        if self.token_ids {
            // vLLM has it beside the choices for chats, within them for completions.
            match self.shape {
                Shape::Chat => answer["prompt_token_ids"] = json!(self.prompt),
                Shape::Completion => answer["choices"][0]["prompt_token_ids"] = json!(self.prompt),
            }
        }
        answer
    }

    /// The first piece of a streamed chat: who speaks.
    pub(crate) fn opening(&self) -> Option<Value> {
        (self.shape == Shape::Chat).then(|| {
            let mut chunk = self.chunk(json!({ "role": "assistant", "content": "" }), Value::Null);
            if self.token_ids {
                chunk["prompt_token_ids"] = json!(self.prompt);
            }
            chunk
        })
    }

    /// A piece of a streamed answer; `first` is the first with tokens.
    pub(crate) fn delta(&self, text: &str, tokens: &[Token], first: bool) -> Value {
        let mut chunk = self.chunk(json!({ "content": text }), Value::Null);
        if self.shape == Shape::Completion {
            chunk["choices"][0]["text"] = json!(text);
            if self.token_ids && first {
                chunk["choices"][0]["prompt_token_ids"] = json!(self.prompt);
            }
        }
        chunk["choices"][0]["logprobs"] = self.logprobs(tokens);
        if self.token_ids {
            chunk["choices"][0]["token_ids"] = ids(tokens);
        }
        chunk
    }

    /// The last piece of a streamed answer.
    pub(crate) fn closing(&self, end: &End) -> Value {
        let mut chunk = self.chunk(json!({}), json!(end.reason.as_str()));
        chunk["choices"][0]["stop_reason"] = json!(end.matched_stop);
        chunk["served_by"] = served_by(end);
        chunk
    }

    /// The piece after the last, if `stream_options.include_usage` is set.
    pub(crate) fn usage_chunk(&self, end: &End) -> Value {
        let mut chunk = self.envelope(self.chunk_object(), json!([]));
        chunk["usage"] = self.usage(end.completion_tokens);
        chunk
    }

    fn chunk_object(&self) -> &'static str {
        if self.shape == Shape::Chat { "chat.completion.chunk" } else { "text_completion" }
    }

    fn chunk(&self, delta: Value, finish: Value) -> Value {
        let choice = match self.shape {
            Shape::Chat => json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish }),
            Shape::Completion => json!({ "index": 0, "text": "", "logprobs": null, "finish_reason": finish }),
        };
        self.envelope(self.chunk_object(), json!([choice]))
    }

    fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model.manifest.name, "choices": choices })
    }

    fn usage(&self, completion: usize) -> Value {
        let prompt = self.prompt.len();
        json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
    }

    fn logprobs(&self, tokens: &[Token]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let name = |id: u32| self.model.token_text(id);
        let entry = |id: u32, logprob: f32| {
            let text = name(id);
            json!({ "token": text, "logprob": logprob, "bytes": text.as_bytes() })
        };
        let known = tokens.iter().filter_map(|t| Some((t.id, t.logprob.as_ref()?)));
        match self.shape {
            Shape::Chat => {
                let content: Vec<Value> = known
                    .map(|(id, l)| {
                        let mut token = entry(id, l.logprob);
                        token["top_logprobs"] = l.top.iter().map(|t| entry(t.token_id, t.logprob)).collect();
                        token
                    })
                    .collect();
                json!({ "content": content })
            }
            Shape::Completion => {
                let (mut texts, mut logprobs, mut top) = (Vec::new(), Vec::new(), Vec::new());
                for (id, l) in known {
                    texts.push(name(id));
                    logprobs.push(l.logprob);
                    let most: serde_json::Map<String, Value> = l.top.iter().map(|t| (name(t.token_id), json!(t.logprob))).collect();
                    top.push(most);
                }
                let offsets: Vec<usize> = texts
                    .iter()
                    .scan(0, |at, t| {
                        let here = *at;
                        *at += t.len();
                        Some(here)
                    })
                    .collect();
                json!({ "tokens": texts, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets })
            }
        }
    }
}

fn ids(tokens: &[Token]) -> Value {
    tokens.iter().map(|t| t.id).collect()
}

fn served_by(end: &End) -> Value {
    let by = &end.served_by;
    json!({ "fingerprint": by.fingerprint, "mode": by.mode, "prefill_node": by.prefill_node, "decode_node": by.decode_node })
}
