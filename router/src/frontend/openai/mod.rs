//! The OpenAI API, as JSON: requests (`request`, `prompt`, `guide`), the answers of one request side by side (`choices`), how
//! they look (`answer`, `token_names`), the way from the one to the other (`handler`), tokens without an answer (`tokens`), errors
//! (`failed`), what JSON's numbers and objects are (`whole`, `object`).

mod answer;
mod choices;
mod failed;
mod guide;
mod handler;
mod object;
mod prompt;
mod request;
mod token_names;
mod tokens;
pub(crate) mod whole;

pub(crate) use choices::{NumberedEvents, start};
pub(crate) use failed::Failed;
pub(crate) use guide::{Calls, GuideFields, Tools, of as guide_of};
pub(crate) use handler::complete;
pub(crate) use object::Object;
pub(crate) use prompt::ChatPrompt;
pub(crate) use request::{ChatRequest, CompletionRequest, SamplingFields};
pub(crate) use token_names::TokenNames;
pub(crate) use tokens::{detokenize, tokenize};

/// What requests are read as: the document has to describe all of it.
#[cfg(test)]
pub(crate) mod schemas {
    pub(crate) use super::guide::{Function, GuideFields, StructuredOutputs, Tool};
    pub(crate) use super::prompt::ChatPrompt;
    pub(crate) use super::request::{ChatRequest, Common, CompletionRequest, SamplingFields, StreamOptions};
    pub(crate) use super::tokens::{DetokenizeRequest, TokenizeRequest};
}
