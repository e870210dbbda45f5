//! What a request asks.
//!
//! Fields that are not known are passed over, as OpenAI's clients expect; `null` is as good as absent. Beside OpenAI's own
//! there are those that vLLM has.

use std::collections::HashMap;

use overfill_text::TextModel;
use overfill_types::{GenerationConfig, Quality, SamplingParams, ServiceError};
use serde::Deserialize;

use crate::admission::{ClientRequest, Input};
use crate::frontend::openai::guide::{self, Calls, GuideFields};
use crate::frontend::openai::object::Object;
use crate::frontend::openai::prompt::ChatPrompt;
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
    /// The same seed gives the same answer. Default: drawn, as with -1.
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
    /// Give the log-probability of each token.
    #[serde(default)]
    logprobs: Option<bool>,
    /// And those of so many most likely tokens, at most 20.
    #[serde(default, deserialize_with = "whole::number")]
    top_logprobs: Option<u32>,
    /// Whether what the tokenizer puts before every text stands before the chat, too. Default false: the template writes it.
    #[serde(default)]
    add_special_tokens: Option<bool>,
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
    /// Whether what the tokenizer puts before every text stands before a prompt that is a text. Default true.
    #[serde(default)]
    add_special_tokens: Option<bool>,
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

fn refuse<T>(field: &str, message: impl Into<String>) -> Result<T, ServiceError> {
    Err(ServiceError::of_field(field, message))
}

impl SamplingFields {
    /// What they ask of `inputs`, for a model that need not be named. `null` where they say nothing: `default_tokens` tokens.
    ///
    /// # Errors
    /// [`overfill_types::Code::InvalidArgument`] naming the field.
    pub(crate) fn asked(self, inputs: Vec<Input>, default_tokens: Option<usize>) -> Result<ClientRequest, ServiceError> {
        let max_tokens = match self.max_completion_tokens.or(self.max_tokens) {
            None => default_tokens,
            Some(n) => match usize::try_from(n) {
                Ok(n) => Some(n),
                Err(_) => return refuse("max_tokens", format!("max_tokens is {n}: ask for at least 1 token")),
            },
        };
        // -1 is how other servers spell "off".
        let top_k = match self.top_k {
            None => None,
            Some(-1) => Some(0),
            Some(k) => Some(u32::try_from(k).or_else(|_| refuse("top_k", format!("top_k is {k}: it must be 0 (off) or more")))?),
        };
        let mut logit_bias = Vec::new();
        for (token, bias) in self.logit_bias.unwrap_or_default() {
            match token.parse() {
                Ok(token) => logit_bias.push((token, bias)),
                Err(_) => return refuse("logit_bias", format!("logit_bias: '{token}' is no token id")),
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
            // -1 is how other servers spell "drawn".
            seed: self.seed.filter(|seed| *seed != -1).map_or_else(rand::random, |seed| seed as u64),
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
            shown: None,
        })
    }
}

/// All that was read of one body.
pub(crate) struct Body<R> {
    pub(super) own: R,
    pub(super) prompt: ChatPrompt,
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
    /// The prompts as they were sent, where they were texts.
    pub(super) prompts: Vec<String>,
    /// What the tokenizer puts before every text stands before them.
    pub(super) special_tokens: bool,
}

/// A request of either endpoint.
pub(crate) trait OpenAiRequest: for<'de> Deserialize<'de> + Send + Sized {
    /// How its answers look.
    const SHAPE: Shape;

    /// What it asks.
    ///
    /// # Errors
    /// [`overfill_types::Code::InvalidArgument`] naming the field.
    fn parsed(body: Body<Self>, model: &TextModel) -> Result<Parsed, ServiceError>;
}

impl OpenAiRequest for ChatRequest {
    const SHAPE: Shape = Shape::Chat;

    fn parsed(body: Body<Self>, model: &TextModel) -> Result<Parsed, ServiceError> {
        let Body { own, prompt, common, sampling, guide } = body;
        let (chat, tools) = prompt.chat(model, own.add_special_tokens.unwrap_or(false))?;
        let mut asked = common.answers(sampling.asked(vec![Input::Chat(chat)], None)?)?;
        if asked.max_tokens == Some(0) {
            return refuse("max_tokens", "max_tokens is 0: ask for at least 1 token");
        }
        if own.logprobs.unwrap_or(false) {
            asked.sampling.logprobs = Some(own.top_logprobs.unwrap_or(0));
        } else if own.top_logprobs.is_some_and(|n| n > 0) {
            return refuse("top_logprobs", "top_logprobs: set logprobs to true as well");
        }
        asked.sampling.guide = match (tools.guide, guide::of(guide)?) {
            (Some(_), Some(_)) => {
                return refuse("tool_choice", "tool_choice: a tool has to be called and the answer to have another form; leave one out");
            }
            (tools, form) => tools.or(form),
        };
        asked.shown = tools.calls.as_ref().and_then(|calls| calls.shown);
        Ok(Parsed { asked, echo: false, prompt_only: false, calls: tools.calls, prompts: Vec::new(), special_tokens: false })
    }
}

impl OpenAiRequest for CompletionRequest {
    const SHAPE: Shape = Shape::Completion;

    fn parsed(body: Body<Self>, _: &TextModel) -> Result<Parsed, ServiceError> {
        let Body { own, common, sampling, guide, .. } = body;
        if own.suffix.is_some_and(|suffix| !suffix.is_empty()) {
            return refuse("suffix", "suffix: text is written after the prompt only; leave it out");
        }
        if own.best_of.is_some_and(|best| best != common.n.unwrap_or(1)) {
            return refuse("best_of", "best_of: answers are not written to be thrown away; ask for n of them");
        }
        let special_tokens = own.add_special_tokens.unwrap_or(true);
        let (mut inputs, mut prompts) = (Vec::new(), Vec::new());
        match own.prompt {
            Prompt::Text(text) => prompts.push(text),
            Prompt::Texts(texts) => prompts = texts,
            Prompt::Ids(ids) => inputs.push(Input::TokenIds(whole::plain(ids))),
            Prompt::IdLists(lists) => inputs.extend(lists.into_iter().map(|ids| Input::TokenIds(whole::plain(ids)))),
        }
        inputs.extend(prompts.iter().map(|text| Input::Text { text: text.clone(), special_tokens }));
        let mut asked = common.answers(sampling.asked(inputs, Some(COMPLETION_TOKENS))?)?;
        let echo = own.echo.unwrap_or(false);
        let prompt_only = asked.max_tokens == Some(0);
        if prompt_only {
            if !echo {
                return refuse("max_tokens", "max_tokens is 0: ask for at least 1 token, or for the prompt with echo");
            }
            asked.max_tokens = Some(1);
        }
        asked.sampling.logprobs = own.logprobs;
        asked.sampling.prompt_logprobs = own.logprobs.filter(|_| echo);
        asked.sampling.guide = guide::of(guide)?;
        Ok(Parsed { asked, echo, prompt_only, calls: None, prompts, special_tokens })
    }
}

impl Common {
    /// The model that is asked for; empty where none is named.
    pub(super) fn model(&self) -> &str {
        self.model.as_deref().unwrap_or_default()
    }

    fn answers(&self, asked: ClientRequest) -> Result<ClientRequest, ServiceError> {
        let n = match self.n.unwrap_or(1) {
            n @ 1..=128 => n as usize,
            n => return refuse("n", format!("n is {n}: it must be from 1 to 128")),
        };
        Ok(ClientRequest { n, ..asked })
    }
}

/// How answers look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
}
