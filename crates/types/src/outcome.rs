//! How a request ends, and what is said of each token.

/// Why the answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model ended it (end-of-sequence or a stop token id), or a stop string matched.
    Stop,
    /// It has `max_tokens` tokens, or the context is full.
    Length,
}

impl FinishReason {
    /// The word of the OpenAI API.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// Log-probability of one token id under the model's own distribution (before temperature and truncation, after penalties).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopLogprob {
    /// Token id.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// Log-probability of the token that was chosen, and of the most likely ones beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Natural logarithm of the chosen token's probability.
    pub logprob: f32,
    /// The most likely tokens, most likely first; as many as were asked for.
    pub top: Vec<TopLogprob>,
}
