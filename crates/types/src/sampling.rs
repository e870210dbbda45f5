//! How a token is chosen and when an answer ends.

use crate::error::{Code, ServiceError};
use crate::outcome::FinishReason;

/// How the next token is chosen from the logits. Absent filters are off.
///
/// Order of application: logit bias; repetition, presence and frequency penalties; guide; temperature; top-k; top-p; min-p; draw.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; else logits are divided by it. From 0 to 100.
    pub temperature: f32,
    /// Keep the smallest set of most likely tokens whose probabilities add up to this. In (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this times as likely as the most likely one. In [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Logits of tokens seen in prompt or answer are divided by it where positive, multiplied where negative. Above 0; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token that the answer holds. In [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted from a token's logit as often as the answer holds it. In [-2, 2].
    pub frequency_penalty: f32,
    /// Key of the counter-based generator; the counter is the token's position, so a resumed sequence draws the same.
    pub seed: u64,
    /// How many most likely tokens to report with each token; `None` reports no log-probabilities. At most 20.
    pub logprobs: Option<u32>,
    /// Added to the logits of these token ids, each from -100 to 100; at most [`MOST_BIASES`].
    pub logit_bias: Vec<(u32, f32)>,
    /// What the answer has to look like.
    pub guide: Option<Guide>,
    /// How many most likely tokens to report with each token of the prompt after the first; `None` reports nothing of the prompt.
    /// At most 20.
    pub prompt_logprobs: Option<u32>,
}

/// Most token ids that one request may bias.
pub const MOST_BIASES: usize = 1024;
/// Longest guide, in bytes.
pub const LONGEST_GUIDE: usize = 256 << 10;

/// What an answer has to look like: tokens that would break it are not chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guide {
    /// JSON of this schema (a JSON text).
    JsonSchema(String),
    /// Text that the whole of this expression matches.
    Regex(String),
    /// Text of this grammar, in llguidance's variant of Lark.
    Grammar(String),
    /// These tokens, and then anything: how likely a given answer is, or an answer that goes on from a given beginning.
    Tokens(Vec<u32>),
}

impl Guide {
    /// Bytes that it takes.
    pub fn size(&self) -> usize {
        match self {
            Guide::JsonSchema(text) | Guide::Regex(text) | Guide::Grammar(text) => text.len(),
            Guide::Tokens(ids) => size_of_val(ids.as_slice()),
        }
    }
}

impl SamplingParams {
    /// Greedy choice, nothing reported.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logprobs: None,
            logit_bias: Vec::new(),
            guide: None,
            prompt_logprobs: None,
        }
    }

    /// Refuses what is out of range or not a number, naming the field, its value and its range.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`].
    pub fn validate(&self) -> Result<(), ServiceError> {
        let check = |ok: bool, name: &str, value: f32, range: &str| {
            if ok { Ok(()) } else { Err(ServiceError::of_field(name, format!("{name} is {value}: it must be {range}"))) }
        };
        // Ranges are written so that NaN fails every one of them.
        check((0.0..=100.0).contains(&self.temperature), "temperature", self.temperature, "from 0 to 100")?;
        check((0.0..=1.0).contains(&self.top_p), "top_p", self.top_p, "from 0 to 1")?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "from 0 to 1")?;
        check((0.01..=10.0).contains(&self.repetition_penalty), "repetition_penalty", self.repetition_penalty, "from 0.01 to 10")?;
        check((-2.0..=2.0).contains(&self.presence_penalty), "presence_penalty", self.presence_penalty, "from -2 to 2")?;
        check((-2.0..=2.0).contains(&self.frequency_penalty), "frequency_penalty", self.frequency_penalty, "from -2 to 2")?;
        for n in [self.logprobs, self.prompt_logprobs].into_iter().flatten() {
            if n > 20 {
                return Err(ServiceError::of_field("logprobs", format!("{n} logprobs were asked for: at most 20 are given")));
            }
        }
        let refuse = |message: String| Err(ServiceError::of_field("logit_bias", message));
        if self.logit_bias.len() > MOST_BIASES {
            return refuse(format!("logit_bias names {} token ids: at most {MOST_BIASES} may be", self.logit_bias.len()));
        }
        if let Some((token, bias)) = self.logit_bias.iter().find(|(_, bias)| !(-100.0..=100.0).contains(bias)) {
            return refuse(format!("logit_bias is {bias} for token id {token}: it must be from -100 to 100"));
        }
        if let Some(bytes) = self.guide.as_ref().map(Guide::size).filter(|&bytes| bytes > LONGEST_GUIDE) {
            let message = format!("the guide has {bytes} bytes: at most {LONGEST_GUIDE} are taken");
            return Err(ServiceError::new(Code::InvalidArgument, message));
        }
        Ok(())
    }
}

/// When an answer ends, as far as token ids can tell. (Stop strings are the router's: nodes see no text.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopConditions {
    /// Most tokens to write; at least 1.
    pub max_tokens: usize,
    /// The client's own stop token ids.
    pub stop_token_ids: Vec<u32>,
    /// Write on past the model's end-of-sequence tokens.
    pub ignore_eos: bool,
}

impl StopConditions {
    /// Why the answer ends with `token`, its `written`th token (from 1); `None` if it goes on. `eos` are the model's own
    /// end-of-sequence tokens.
    pub fn after(&self, token: u32, written: usize, eos: &[u32]) -> Option<FinishReason> {
        if self.stop_token_ids.contains(&token) || (!self.ignore_eos && eos.contains(&token)) {
            Some(FinishReason::Stop)
        } else if written >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

/// Bounds on what one request may bring, checked by the router and again by the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest sequence, prompt and answer together, in tokens.
    pub max_context: usize,
    /// Token ids are below it.
    pub vocab_size: usize,
}

impl Limits {
    /// Refuses an empty prompt, one that leaves no room for `max_tokens`, and token ids out of range.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] with a sentence that names the figure and the bound.
    pub fn check(&self, prompt: &[u32], stop: &StopConditions) -> Result<(), ServiceError> {
        let refuse = |field, message: String| Err(ServiceError::of_field(field, message));
        if prompt.is_empty() {
            return refuse("prompt", "the prompt is empty: send at least one token".into());
        }
        if stop.max_tokens == 0 {
            return refuse("max_tokens", "max_tokens is 0: ask for at least 1 token".into());
        }
        if prompt.len().saturating_add(stop.max_tokens) > self.max_context {
            return Err(ServiceError::new(
                Code::InvalidArgument,
                format!(
                    "the prompt has {} tokens and max_tokens is {}: together more than the context of {} tokens; shorten the prompt or ask for less",
                    prompt.len(),
                    stop.max_tokens,
                    self.max_context
                ),
            ));
        }
        for (field, ids) in [("prompt", prompt), ("stop_token_ids", &stop.stop_token_ids)] {
            if let Some((i, id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= self.vocab_size) {
                let message =
                    format!("token id {id} at place {i} of {field} is out of range: the vocabulary has {} tokens", self.vocab_size);
                return refuse(field, message);
            }
        }
        Ok(())
    }

    /// Refuses tokens of an answer that is to go on, if it has reached its end or they are out of range.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`].
    pub fn check_written(&self, written: &[u32], stop: &StopConditions) -> Result<(), ServiceError> {
        let refuse = |message: String| Err(ServiceError::new(Code::InvalidArgument, message));
        if !written.is_empty() && written.len() >= stop.max_tokens {
            return refuse(format!("{} tokens are written and max_tokens is {}: nothing is left to write", written.len(), stop.max_tokens));
        }
        match written.iter().enumerate().find(|(_, id)| **id as usize >= self.vocab_size) {
            Some((i, id)) => {
                refuse(format!("token id {id} at place {i} of written is out of range: the vocabulary has {} tokens", self.vocab_size))
            }
            None => Ok(()),
        }
    }

    /// Refuses a bias for a token id out of range, and a guide that asks for one.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`].
    pub fn check_sampling(&self, sampling: &SamplingParams) -> Result<(), ServiceError> {
        let biased = sampling.logit_bias.iter().map(|(token, _)| ("logit_bias", *token));
        let forced = match &sampling.guide {
            Some(Guide::Tokens(ids)) => ids.as_slice(),
            _ => &[],
        };
        let mut named = biased.chain(forced.iter().map(|token| ("forced_token_ids", *token)));
        match named.find(|(_, token)| *token as usize >= self.vocab_size) {
            Some((field, token)) => {
                let message = format!("token id {token} of {field} is out of range: the vocabulary has {} tokens", self.vocab_size);
                Err(ServiceError::of_field(field, message))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_a_number_is_refused_in_every_field() {
        let set: [fn(&mut SamplingParams); 7] = [
            |p| p.temperature = f32::NAN,
            |p| p.top_p = f32::NAN,
            |p| p.min_p = f32::NAN,
            |p| p.repetition_penalty = f32::NAN,
            |p| p.presence_penalty = f32::NAN,
            |p| p.frequency_penalty = f32::INFINITY,
            |p| p.logit_bias = vec![(1, f32::NAN)],
        ];
        for set in set {
            let mut params = SamplingParams::greedy();
            assert_eq!(params.validate(), Ok(()));
            set(&mut params);
            assert_eq!(params.validate().unwrap_err().code, Code::InvalidArgument);
        }
    }

    #[test]
    fn an_answer_ends_as_it_was_asked_to() {
        let mut stop = StopConditions { max_tokens: 3, stop_token_ids: vec![7], ignore_eos: false };
        assert_eq!(stop.after(5, 2, &[2]), None);
        assert_eq!(stop.after(5, 3, &[2]), Some(FinishReason::Length));
        assert_eq!(stop.after(2, 1, &[2]), Some(FinishReason::Stop));
        assert_eq!(stop.after(7, 3, &[2]), Some(FinishReason::Stop));
        stop.ignore_eos = true;
        assert_eq!(stop.after(2, 1, &[2]), None);
        assert_eq!(stop.after(7, 1, &[2]), Some(FinishReason::Stop));
    }

    #[test]
    fn limits_name_the_figure_and_the_bound() {
        let limits = Limits { max_context: 8, vocab_size: 10 };
        let stop = |max_tokens| StopConditions { max_tokens, stop_token_ids: vec![], ignore_eos: false };
        assert_eq!(limits.check(&[1, 2, 3], &stop(5)), Ok(()));
        for (prompt, max_tokens, word) in
            [(&[][..], 1, "empty"), (&[1, 2], 0, "max_tokens"), (&[1, 2, 3], 6, "context of 8"), (&[1, 10], 1, "token id 10")]
        {
            let error = limits.check(prompt, &stop(max_tokens)).unwrap_err();
            assert!(error.message.contains(word), "{error}");
        }
        assert!(limits.check(&[1], &stop(usize::MAX)).is_err());
    }
}
