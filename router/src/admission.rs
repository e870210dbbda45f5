//! From what a client asks to what the cluster can serve: token ids, bounds, a deadline, its permit. Text ends here.

use std::sync::Arc;
use std::time::Duration;

use overfill_lifecycle::Trace;
use overfill_schedule::Share;
use overfill_text::{Chat, StopMatcher, TextModel};
use overfill_types::{Code, Fingerprint, GenerationConfig, Limits, Quality, RequestId, SamplingParams, ServiceError, StopConditions};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tracing::Instrument;

use crate::Router;
use crate::clients::{Allowance, Client};
use crate::metrics::OfModel;

/// Most answers of one request, over all its prompts.
const MOST_ANSWERS: usize = 256;
/// Most log-probabilities of one prompt's tokens: what a message between two of our servers holds, and to spare.
const MOST_PROMPT_LOGPROBS: usize = 400_000;

/// Longest `cache_salt`, in bytes: it travels with each attempt.
const LONGEST_SALT: usize = 256;

/// What is to be continued.
pub(crate) enum Input {
    Text {
        text: String,
        /// What the tokenizer puts before every text stands before it.
        special_tokens: bool,
    },
    Chat(Chat),
    TokenIds(Vec<u32>),
}

/// What a client asks, as its front end has read it.
pub(crate) struct ClientRequest {
    pub(crate) inputs: Vec<Input>,
    /// Answers to each input, from 1.
    pub(crate) n: usize,
    /// Which models write.
    pub(crate) quality: Quality,
    pub(crate) sampling: SamplingParams,
    /// What of it the client has said itself: the rest is as the model has it.
    pub(crate) said: GenerationConfig,
    /// `None` for the router's default.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    /// The client's own deadline, if it has one.
    pub(crate) timeout: Option<Duration>,
    /// Where requests wait: among the client's own, less is earlier.
    pub(crate) priority: i32,
    /// KV caches are shared with requests of the same; empty where the client does not care.
    pub(crate) cache_salt: String,
    /// A special token that is written in the answer's text, as no other is.
    pub(crate) shown: Option<u32>,
}

/// A request that may be served.
pub(crate) struct ValidRequest {
    pub(crate) id: RequestId,
    pub(crate) model: Arc<TextModel>,
    /// Of the model.
    pub(crate) counters: Arc<OfModel>,
    pub(crate) prompt: Arc<Vec<u32>>,
    pub(crate) quality: Quality,
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: StopConditions,
    pub(crate) stop_strings: StopMatcher,
    /// Stop strings that are special tokens, with these.
    pub(crate) stop_tokens: Arc<[(u32, String)]>,
    /// A special token that is written in the answer's text.
    pub(crate) shown: Option<u32>,
    pub(crate) deadline: Instant,
    /// When it came.
    pub(crate) arrived: Instant,
    pub(crate) trace: Trace,
    pub(crate) priority: i32,
    /// KV caches are shared with requests of the same.
    pub(crate) cache_salt: String,
    /// Its client's part where requests wait.
    pub(crate) share: Share,
    /// To be among the requests under way; given back before the client is told of the end, so that a quick one finds it.
    pub(crate) permit: Option<RequestPermit>,
}

/// A request may be under way, in the router and among its client's own.
pub(crate) struct RequestPermit {
    _router: OwnedSemaphorePermit,
    pub(crate) allowance: Allowance,
}

impl Router {
    /// The model that answers a request which names it so.
    ///
    /// # Errors
    /// [`Code::NotFound`] naming those that are here.
    pub(crate) fn model(&self, name: &str) -> Result<Arc<TextModel>, ServiceError> {
        let able = |pair: &Fingerprint| self.pairing.has_all(pair);
        self.models.draw(name, able).inspect_err(|error| self.metrics.refused(error))
    }

    /// Checks and tokenises what is asked of `model`. Gives `n` requests for each input, in their order; the first of an input has the seed
    /// that was asked for, the others have seeds that follow from it.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`], [`Code::ResourceExhausted`] where the client is over its limits, [`Code::Unavailable`] where too
    /// many requests are under way, and at a drain.
    pub(crate) async fn admit(
        &self,
        client: &Arc<Client>,
        model: &Arc<TextModel>,
        asked: ClientRequest,
        trace: &Trace,
    ) -> Result<Vec<ValidRequest>, ServiceError> {
        let span = tracing::debug_span!(parent: trace.span(), "admit");
        let admitted = self.check(client, model, asked, trace).instrument(span).await;
        admitted.inspect_err(|error| self.metrics.refused(error))
    }

    async fn check(
        &self,
        client: &Arc<Client>,
        model: &Arc<TextModel>,
        mut asked: ClientRequest,
        trace: &Trace,
    ) -> Result<Vec<ValidRequest>, ServiceError> {
        let arrived = Instant::now();
        if self.drain.draining() {
            return Err(ServiceError::new(Code::Unavailable, "the router is draining: send the request to another"));
        }
        let answers = asked.inputs.len().saturating_mul(asked.n);
        if answers > MOST_ANSWERS {
            let message = format!("{answers} answers were asked for: one request has at most {MOST_ANSWERS}; send several");
            return Err(ServiceError::new(Code::InvalidArgument, message));
        }
        let mut permits = self.permits.clone().try_acquire_many_owned(answers as u32).map_err(|_| {
            let message = format!("{} requests are under way, this router's most: try again later", self.config.max_requests);
            ServiceError::new(Code::Unavailable, message).retry_after(Duration::from_secs(1))
        })?;
        let mut allowances = client.begin(answers)?.into_iter();
        let counters = self.metrics.of(&model.manifest)?;
        asked.sampling = asked.said.or(model.manifest.generation).fill(asked.sampling);
        asked.sampling.validate()?;
        // Special tokens are no part of the text that stop strings are looked for in.
        let stop_tokens: Arc<[(u32, String)]> =
            asked.stop.iter().filter_map(|stop| Some((model.special_token(stop)?, stop.clone()))).collect();
        asked.stop_token_ids.extend(stop_tokens.iter().map(|(token, _)| *token));
        let stop_strings = StopMatcher::new(asked.stop)?;
        let limits = Limits { max_context: self.max_context(model), vocab_size: model.manifest.vocab_size() };
        limits.check_sampling(&asked.sampling)?;
        if asked.quality == Quality::Decode && asked.sampling.prompt_logprobs.is_some() {
            let message = "log-probabilities of the prompt are the full model's: ask for quality overfill or full, or leave them out";
            return Err(ServiceError::of_field("quality", message));
        }
        let deadline = {
            let longest = Duration::from_secs(self.config.request_timeout);
            arrived + asked.timeout.map_or(longest, |t| t.min(longest))
        };
        if asked.cache_salt.len() > LONGEST_SALT {
            let message = format!("cache_salt has {} bytes: at most {LONGEST_SALT} are taken", asked.cache_salt.len());
            return Err(ServiceError::of_field("cache_salt", message));
        }
        if let Some(guide) = &asked.sampling.guide {
            // The nodes compile it too; here one that cannot be followed is told of before any node is asked.
            let guides = self.models.guides(model)?;
            let checked = async {
                let _turn = client.turn_to_compile().await;
                guides.check(guide).await
            };
            tokio::time::timeout_at(deadline, checked)
                .await
                .map_err(|_| ServiceError::new(Code::DeadlineExceeded, "the request's deadline passed while its guide was compiled"))??;
        }
        let id = uuid::Uuid::new_v4();
        trace.span().record("request_id", tracing::field::display(&id)).record("model", &model.manifest.name);
        let cache_salt = self.config.prefix_sharing.salt(client, &asked.cache_salt);
        let mut requests = Vec::with_capacity(answers);
        for input in asked.inputs {
            let prompt = Arc::new(self.tokens(model, input).await?);
            self.suspicions.check(&prompt).inspect_err(|_| self.metrics.quarantined(&prompt))?;
            let left = limits.max_context.saturating_sub(prompt.len());
            let max_tokens = asked.max_tokens.unwrap_or_else(|| self.config.default_max_tokens.min(left).max(1));
            let stop = StopConditions { max_tokens, stop_token_ids: asked.stop_token_ids.clone(), ignore_eos: asked.ignore_eos };
            limits.check(&prompt, &stop)?;
            let reported = asked.sampling.prompt_logprobs.map_or(0, |top| prompt.len() * (top as usize + 1));
            if reported > MOST_PROMPT_LOGPROBS {
                let message =
                    format!("{reported} log-probabilities of the prompt were asked for: at most {MOST_PROMPT_LOGPROBS} are given");
                return Err(ServiceError::new(Code::InvalidArgument, message));
            }
            // Answers to the same prompt read it once.
            client.spend(prompt.len(), max_tokens * asked.n)?;
            for answer in 0..asked.n {
                let number = requests.len();
                let (Some(router), Some(mut allowance)) = (permits.split(1), allowances.next()) else {
                    return Err(ServiceError::new(Code::Internal, "a permit for each answer was taken, and one is missing"));
                };
                allowance.may_write(max_tokens);
                requests.push(ValidRequest {
                    // Nodes tell requests apart by it.
                    id: RequestId::new(if number == 0 { id.to_string() } else { format!("{id}-{number}") }),
                    model: model.clone(),
                    counters: counters.clone(),
                    prompt: prompt.clone(),
                    quality: asked.quality,
                    sampling: SamplingParams { seed: seed(asked.sampling.seed, answer), ..asked.sampling.clone() },
                    stop: stop.clone(),
                    stop_strings: stop_strings.clone(),
                    stop_tokens: stop_tokens.clone(),
                    shown: asked.shown,
                    deadline,
                    arrived,
                    trace: trace.clone(),
                    priority: asked.priority,
                    cache_salt: cache_salt.clone(),
                    share: client.share,
                    permit: Some(RequestPermit { _router: router, allowance }),
                });
            }
        }
        Ok(requests)
    }

    /// Token ids of an input.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where the template or the tokenizer refuses it.
    pub(crate) async fn tokens(&self, model: &Arc<TextModel>, input: Input) -> Result<Vec<u32>, ServiceError> {
        let model = model.clone();
        let bytes = match &input {
            Input::Text { text, .. } => text.len(),
            Input::Chat(chat) => chat.bytes(),
            Input::TokenIds(_) => 0,
        };
        match input {
            Input::Text { text, special_tokens } => {
                let encode = move || if special_tokens { model.encode(&text) } else { model.encode_plain(&text) };
                self.tokenising.run(bytes, encode).await
            }
            Input::Chat(chat) => self.tokenising.run(bytes, move || model.encode_whole_chat(&chat)).await,
            Input::TokenIds(ids) => Ok(ids),
        }
    }

    /// As [`Router::admit`], for one input with one answer.
    ///
    /// # Errors
    /// As [`Router::admit`].
    pub(crate) async fn admit_one(
        &self,
        client: &Arc<Client>,
        model: &Arc<TextModel>,
        asked: ClientRequest,
        trace: &Trace,
    ) -> Result<ValidRequest, ServiceError> {
        let first = self.admit(client, model, asked, trace).await?.into_iter().next();
        first.ok_or_else(|| ServiceError::new(Code::InvalidArgument, "the input is missing"))
    }
}

/// The seed of a prompt's `answer`th answer, from 0: steps of 2^64 over the golden ratio keep seeds that are close apart.
fn seed(first: u64, answer: usize) -> u64 {
    first.wrapping_add((answer as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
