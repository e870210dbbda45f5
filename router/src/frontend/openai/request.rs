//! What a request asks.
//!
//! Fields that are not known are passed over, as OpenAI's clients expect; `null` is as good as absent. Beside OpenAI's own
//! there are those that vLLM has.

use std::collections::HashMap;

use overfill_text::Chat;
use overfill_types::{Code, GenerationConfig, Quality, SamplingParams, ServiceError};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::admission::{ClientRequest, Input};
use crate::frontend::openai::guide::{self, Calls, GuideFields};
use crate::frontend::openai::object::Object;
use crate::frontend::openai::whole::{self, Whole};

/// Tokens of a completion that does not say how many it wants (the OpenAI API's default).
const COMPLETION_TOKENS: usize = 16;

/// How tokens are chosen: what every front end that speaks JSON takes.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SamplingFields {
    /// 0 is greedy. Default: the model's own, else 1.
    temperature: Option<f32>,
    /// Only the most likely tokens that add up to this. Default: the model's own, else 1: all.
    top_p: Option<f32>,
    /// Only this many of the most likely tokens. Default: the model's own, else 0: all.
    #[serde(deserialize_with = "whole::number")]
    top_k: Option<i64>,
    /// Only tokens at least this times as likely as the most likely one. Default: the model's own, else 0: all.
    min_p: Option<f32>,
    /// Above 1, tokens of prompt and answer become less likely. Default: the model's own, else 1.
    repetition_penalty: Option<f32>,
    /// From -2 to 2: above 0, tokens of the answer become less likely. Default 0.
    presence_penalty: Option<f32>,
    /// From -2 to 2: above 0, tokens become less likely with each time that the answer holds them. Default 0.
    frequency_penalty: Option<f32>,
    /// The same seed gives the same answer. Default: drawn.
    #[serde(deserialize_with = "whole::number")]
    seed: Option<i64>,
    /// From token id to what is added to its logit, from -100 to 100.
    logit_bias: Option<HashMap<String, f32>>,
    /// The answer ends before the first of these.
    stop: Option<OneOrMore>,
    /// The answer ends with the first of these.
    #[serde(deserialize_with = "whole::numbers")]
    stop_token_ids: Option<Vec<u32>>,
    /// Write on past the model's end-of-sequence tokens.
    ignore_eos: Option<bool>,
    /// Most tokens of the answer.
    #[serde(deserialize_with = "whole::number")]
    max_tokens: Option<i64>,
    /// As `max_tokens`, which it overrides.
    #[serde(deserialize_with = "whole::number")]
    max_completion_tokens: Option<i64>,
    /// Which models write: `overfill` (the default), `full` or `decode`.
    quality: Option<Quality>,
    /// Where requests wait: among those of the same key a lower number goes first. Default 0.
    #[serde(deserialize_with = "whole::number")]
    priority: Option<i32>,
    /// KV caches are shared with requests of the same salt only.
    cache_salt: Option<String>,
}

/// What both endpoints take beside.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Common {
    /// Name of a model, as `/v1/models` gives it. May be absent where there is one only.
    model: Option<String>,
    /// Answers to each prompt, from 1 to 128. Default 1.
    #[serde(deserialize_with = "whole::number")]
    n: Option<i64>,
    /// Send the answer in pieces, as server-sent events.
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<Object<StreamOptions>>,
    /// Give token ids beside text.
    pub(super) return_token_ids: Option<bool>,
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StreamOptions {
    /// Send a last piece that counts tokens.
    pub(super) include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// `POST /v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatRequest {
    /// What was said, oldest first.
    messages: Vec<ChatMessage>,
    /// Give the log-probability of each token.
    #[serde(default)]
    logprobs: Option<bool>,
    /// And those of so many most likely tokens, at most 20.
    #[serde(default, deserialize_with = "whole::number")]
    top_logprobs: Option<u32>,
    /// Tools that the model may call.
    #[serde(default)]
    tools: Option<Vec<Object<guide::Tool>>>,
    /// `none`, `auto` (the default), `required`, or the one to call.
    #[serde(default)]
    tool_choice: Option<guide::ToolChoice>,
    /// Whether `required` calls may be several. Default true.
    #[serde(default)]
    parallel_tool_calls: Option<bool>,
    /// Further variables of the chat template.
    #[serde(default)]
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// One message.
#[derive(Debug, Deserialize)]
pub(super) struct ChatMessage {
    /// `system`, `user`, `assistant`, `tool`: what the template knows.
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
enum Content {
    Text(String),
    Parts(Vec<Object<Part>>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    /// Of a part of type `text`.
    text: Option<String>,
}

/// `POST /v1/completions`.
#[derive(Debug, Deserialize)]
pub(crate) struct CompletionRequest {
    /// A text, token ids, or several of either.
    prompt: Prompt,
    /// Give the log-probability of each token and of so many most likely ones, at most 20.
    #[serde(default, deserialize_with = "whole::number")]
    logprobs: Option<u32>,
    /// Give the prompt before the answer, with its log-probabilities if any are given; `max_tokens` may be 0 then.
    #[serde(default)]
    echo: Option<bool>,
    #[serde(default)]
    suffix: Option<String>,
    #[serde(default, deserialize_with = "whole::number")]
    best_of: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Ids(Vec<Whole<u32>>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<Whole<u32>>>),
}

fn refuse<T>(message: impl Into<String>) -> Result<T, ServiceError> {
    Err(ServiceError::new(Code::InvalidArgument, message))
}

impl SamplingFields {
    /// What they ask of `inputs`, for a model that need not be named. `null` where they say nothing: `default_tokens` tokens.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] naming the field.
    pub(crate) fn asked(self, inputs: Vec<Input>, default_tokens: Option<usize>) -> Result<ClientRequest, ServiceError> {
        let max_tokens = match self.max_completion_tokens.or(self.max_tokens) {
            None => default_tokens,
            Some(n) => match usize::try_from(n) {
                Ok(n) => Some(n),
                Err(_) => return refuse(format!("max_tokens is {n}: ask for at least 1 token")),
            },
        };
        // -1 is how other servers spell "off".
        let top_k = match self.top_k {
            None => None,
            Some(-1) => Some(0),
            Some(k) => Some(u32::try_from(k).or_else(|_| refuse(format!("top_k is {k}: it must be 0 (off) or more")))?),
        };
        let mut logit_bias = Vec::new();
        for (token, bias) in self.logit_bias.unwrap_or_default() {
            match token.parse() {
                Ok(token) => logit_bias.push((token, bias)),
                Err(_) => return refuse(format!("logit_bias: '{token}' is no token id")),
            }
        }
        logit_bias.sort_unstable_by_key(|(token, _)| *token);
        let said = GenerationConfig {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        };
        let sampling = SamplingParams {
            // OpenAI's default, where neither the request nor the model says one.
            temperature: 1.0,
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            seed: self.seed.map_or_else(rand::random, |seed| seed as u64),
            logit_bias,
            logprobs: None,
            guide: None,
            prompt_logprobs: None,
            ..SamplingParams::greedy()
        };
        let stop = match self.stop {
            None => Vec::new(),
            Some(OneOrMore::One(stop)) => vec![stop],
            Some(OneOrMore::More(stops)) => stops,
        };
        Ok(ClientRequest {
            model: String::new(),
            inputs,
            n: 1,
            quality: self.quality.unwrap_or_default(),
            sampling,
            said,
            max_tokens,
            stop,
            stop_token_ids: self.stop_token_ids.unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            timeout: None,
            priority: self.priority.unwrap_or(0),
            cache_salt: self.cache_salt.unwrap_or_default(),
        })
    }
}

/// All that was read of one body.
pub(crate) struct Body<R> {
    pub(super) own: R,
    pub(super) common: Common,
    pub(super) sampling: SamplingFields,
    pub(super) guide: GuideFields,
}

/// What a body asks.
pub(crate) struct Parsed {
    pub(super) asked: ClientRequest,
    /// The answer begins with the prompt.
    pub(super) echo: bool,
    /// The answer is the prompt alone: the one token that is written is left out.
    pub(super) prompt_only: bool,
    /// Calls of tools are read out of the answer.
    pub(super) calls: Option<Calls>,
}

/// A request of either endpoint.
pub(crate) trait OpenAiRequest: for<'de> Deserialize<'de> + Send + Sized {
    /// How its answers look.
    const SHAPE: Shape;

    /// What it asks.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] naming the field.
    fn parsed(body: Body<Self>) -> Result<Parsed, ServiceError>;
}

impl OpenAiRequest for ChatRequest {
    const SHAPE: Shape = Shape::Chat;

    fn parsed(body: Body<Self>) -> Result<Parsed, ServiceError> {
        let Body { own, common, sampling, guide } = body;
        let messages = own.messages.into_iter().map(ChatMessage::into_value).collect::<Result<Vec<_>, _>>()?;
        if messages.is_empty() {
            return refuse("messages is empty: send at least one message");
        }
        let tools = guide::tools(own.tools.unwrap_or_default(), own.tool_choice, own.parallel_tool_calls.unwrap_or(true))?;
        let chat = Chat { messages, tools: tools.described, variables: own.chat_template_kwargs.unwrap_or_default() };
        let mut asked = common.named(sampling.asked(vec![Input::Chat(chat)], None)?)?;
        if asked.max_tokens == Some(0) {
            return refuse("max_tokens is 0: ask for at least 1 token");
        }
        if own.logprobs.unwrap_or(false) {
            asked.sampling.logprobs = Some(own.top_logprobs.unwrap_or(0));
        } else if own.top_logprobs.is_some_and(|n| n > 0) {
            return refuse("top_logprobs: set logprobs to true as well");
        }
        asked.sampling.guide = match (tools.guide, guide::of(guide)?) {
            (Some(_), Some(_)) => return refuse("tool_choice: a tool has to be called and the answer to have another form; leave one out"),
            (tools, form) => tools.or(form),
        };
        Ok(Parsed { asked, echo: false, prompt_only: false, calls: tools.calls })
    }
}

impl OpenAiRequest for CompletionRequest {
    const SHAPE: Shape = Shape::Completion;

    fn parsed(body: Body<Self>) -> Result<Parsed, ServiceError> {
        let Body { own, common, sampling, guide } = body;
        if own.suffix.is_some_and(|suffix| !suffix.is_empty()) {
            return refuse("suffix: text is written after the prompt only; leave it out");
        }
        if own.best_of.is_some_and(|best| best != common.n.unwrap_or(1)) {
            return refuse("best_of: answers are not written to be thrown away; ask for n of them");
        }
        let inputs = match own.prompt {
            Prompt::Text(text) => vec![Input::Text(text)],
            Prompt::Ids(ids) => vec![Input::TokenIds(whole::plain(ids))],
            Prompt::Texts(texts) => texts.into_iter().map(Input::Text).collect(),
            Prompt::IdLists(lists) => lists.into_iter().map(|ids| Input::TokenIds(whole::plain(ids))).collect(),
        };
        let mut asked = common.named(sampling.asked(inputs, Some(COMPLETION_TOKENS))?)?;
        let echo = own.echo.unwrap_or(false);
        let prompt_only = asked.max_tokens == Some(0);
        if prompt_only {
            if !echo {
                return refuse("max_tokens is 0: ask for at least 1 token, or for the prompt with echo");
            }
            asked.max_tokens = Some(1);
        }
        asked.sampling.logprobs = own.logprobs;
        asked.sampling.prompt_logprobs = own.logprobs.filter(|_| echo);
        asked.sampling.guide = guide::of(guide)?;
        Ok(Parsed { asked, echo, prompt_only, calls: None })
    }
}

impl Common {
    fn named(&self, asked: ClientRequest) -> Result<ClientRequest, ServiceError> {
        let n = match self.n.unwrap_or(1) {
            n @ 1..=128 => n as usize,
            n => return refuse(format!("n is {n}: it must be from 1 to 128")),
        };
        Ok(ClientRequest { model: self.model.clone().unwrap_or_default(), n, ..asked })
    }
}

impl ChatMessage {
    /// As templates read it: content as one text, arguments of calls as objects.
    pub(super) fn into_value(self) -> Result<Value, ServiceError> {
        let content = match self.content {
            None if self.tool_calls.is_none() => return refuse("messages: a message has no content"),
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let text = |Object(Part { kind, text })| match text.filter(|_| kind == "text") {
                    Some(text) => Ok(text),
                    None if kind == "text" => refuse("messages: a part of type 'text' has no text"),
                    None => refuse(format!("messages: a part of type '{kind}' was sent; only text is read")),
                };
                parts.into_iter().map(text).collect::<Result<_, _>>()?
            }
        };
        let mut message = Map::new();
        message.insert("role".into(), self.role.into());
        message.insert("content".into(), content.into());
        if let Some(mut calls) = self.tool_calls {
            for arguments in calls.iter_mut().filter_map(|call| call.get_mut("function")?.get_mut("arguments")) {
                if let Some(object) = arguments.as_str().and_then(|text| serde_json::from_str(text).ok()) {
                    *arguments = object;
                }
            }
            message.insert("tool_calls".into(), calls.into());
        }
        message.extend(self.rest.into_iter().filter(|(_, value)| !value.is_null()));
        Ok(message.into())
    }
}

/// How answers look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
}
