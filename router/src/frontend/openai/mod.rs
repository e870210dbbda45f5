//! The OpenAI API, as JSON: requests (`request`, `guide`), the answers of one request side by side (`choices`), how they
//! look (`answer`) and how they are sent (`handler`), tokens without an answer (`tokens`), errors (`failed`), what JSON's
//! numbers and objects are (`whole`, `object`).

mod answer;
mod choices;
mod failed;
mod guide;
mod handler;
mod object;
mod request;
mod tokens;
mod whole;

pub(crate) use failed::Failed;
pub(crate) use guide::{GuideFields, of as guide_of};
pub(crate) use handler::complete;
pub(crate) use request::{ChatRequest, CompletionRequest, SamplingFields};
pub(crate) use tokens::{detokenize, tokenize};

/// What requests are read as: the document has to describe all of it.
#[cfg(test)]
pub(crate) mod schemas {
    pub(crate) use super::guide::{Function, GuideFields, StructuredOutputs, Tool};
    pub(crate) use super::request::{ChatRequest, Common, CompletionRequest, SamplingFields, StreamOptions};
    pub(crate) use super::tokens::{DetokenizeRequest, TokenizeRequest};
}
