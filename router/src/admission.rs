//! From what a client asks to what the cluster can serve: token ids, bounds, a deadline. Text ends here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_text::{Message, StopMatcher, TextModel};
use overfill_types::{Code, Limits, RequestId, SamplingParams, ServiceError, StopConditions};
use tokio::sync::OwnedSemaphorePermit;

use crate::Router;

/// What is to be continued.
pub(crate) enum Input {
    Text(String),
    Chat(Vec<Message>),
    TokenIds(Vec<u32>),
}

/// What a client asks, as its front end has read it.
pub(crate) struct Asked {
    /// Empty where the client named none.
    pub(crate) model: String,
    pub(crate) input: Input,
    pub(crate) sampling: SamplingParams,
    /// `None` for the router's default.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    /// The client's own deadline, if it has one.
    pub(crate) timeout: Option<Duration>,
}

/// A request that may be served.
pub(crate) struct ValidRequest {
    pub(crate) id: RequestId,
    pub(crate) model: Arc<TextModel>,
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: StopConditions,
    pub(crate) stop_strings: StopMatcher,
    pub(crate) deadline: Instant,
    /// Its place among the requests under way.
    pub(crate) _place: OwnedSemaphorePermit,
}

impl Router {
    /// Checks and tokenises what is asked.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`], [`Code::NotFound`] for an unknown model, [`Code::ResourceExhausted`] where too many
    /// requests are under way, [`Code::Unavailable`] at a drain.
    pub(crate) fn admit(&self, asked: Asked) -> Result<ValidRequest, ServiceError> {
        if self.drain.draining() {
            return Err(ServiceError::new(Code::Unavailable, "the router is draining: send the request to another"));
        }
        let place = self.places.clone().try_acquire_owned().map_err(|_| {
            let message = format!("{} requests are under way, this router's most: try again later", self.config.max_requests);
            ServiceError::new(Code::ResourceExhausted, message)
        })?;
        let model = self.model(&asked.model)?;
        asked.sampling.validate()?;
        let stop_strings = StopMatcher::new(asked.stop)?;
        let prompt = match asked.input {
            Input::Text(text) => model.encode(&text)?,
            Input::Chat(messages) if messages.is_empty() => {
                return Err(ServiceError::new(Code::InvalidArgument, "messages is empty: send at least one message"));
            }
            Input::Chat(messages) => model.encode_chat(&messages)?,
            Input::TokenIds(ids) => ids,
        };
        let limits = Limits { max_context: self.max_context(&model), vocab_size: model.manifest.vocab_size() };
        let left = limits.max_context.saturating_sub(prompt.len());
        let max_tokens = asked.max_tokens.unwrap_or_else(|| self.config.default_max_tokens.min(left).max(1));
        let stop = StopConditions { max_tokens, stop_token_ids: asked.stop_token_ids, ignore_eos: asked.ignore_eos };
        limits.check(&prompt, &stop)?;
        let longest = Duration::from_secs(self.config.request_timeout);
        Ok(ValidRequest {
            id: RequestId::new(uuid::Uuid::new_v4().to_string()),
            model,
            prompt,
            sampling: asked.sampling,
            stop,
            stop_strings,
            deadline: Instant::now() + asked.timeout.map_or(longest, |t| t.min(longest)),
            _place: place,
        })
    }

    fn model(&self, name: &str) -> Result<Arc<TextModel>, ServiceError> {
        let found = match self.models.as_slice() {
            [only] if name.is_empty() => Some(only),
            models => models.iter().find(|m| m.manifest.name == name),
        };
        found.cloned().ok_or_else(|| {
            ServiceError::new(
                Code::NotFound,
                format!("model '{name}' is not served here: ask for one of {}", self.model_names().join(", ")),
            )
        })
    }
}
