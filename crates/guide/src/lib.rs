//! Answers of a given form: JSON of a schema, text of an expression or a grammar, or given tokens. llguidance's only home.
//!
//! [`Guides`] knows a pair's tokens as bytes and compiles guides; a [`Matcher`] follows one answer and says which tokens may
//! come next. It depends on the guide and the tokens alone, so an answer that is resumed elsewhere goes on as it would have.
//!
//! **Invariant:** compiling a guide and finding the tokens that may follow are bounded, in work and in memory.

mod matcher;
mod vocabulary;

pub use matcher::Matcher;
pub use vocabulary::Guides;
