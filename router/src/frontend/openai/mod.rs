//! The OpenAI API, as JSON: requests (`request`, `guide`), the answers of one request side by side (`choices`), how they
//! look (`answer`) and how they are sent (`reply`), tokens without an answer (`tokens`), errors (`failed`).

mod answer;
mod choices;
mod failed;
mod guide;
mod reply;
mod request;
mod tokens;

pub(crate) use failed::Failed;
pub(crate) use guide::of as guide_of;
pub(crate) use reply::complete;
pub(crate) use request::{ChatRequest, CompletionRequest, GuideFields, SamplingFields};
pub(crate) use tokens::{detokenize, tokenize};

/// What requests are read as: the document has to describe all of it.
#[cfg(test)]
pub(crate) mod schemas {
    pub(crate) use super::guide::{Function, StructuredOutputs, Tool};
    pub(crate) use super::request::{ChatRequest, Common, CompletionRequest, GuideFields, SamplingFields, StreamOptions};
    pub(crate) use super::tokens::{DetokenizeRequest, TokenizeRequest};
}
