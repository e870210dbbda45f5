//! Answers of a given form: JSON of a schema, text of an expression or a grammar, or given tokens. llguidance's only home.
//!
//! [`Guides`] knows a pair's tokens as bytes and compiles guides; a [`Matcher`] follows one answer and says which tokens may
//! come next. It depends on the guide and the tokens alone, so an answer that is resumed elsewhere goes on as it would have.
//!
//! Guides are what clients send, and the compiler is not made for hostile ones: some of a few kilobytes overflow the stack or
//! take gigabytes. So each is compiled first in a process of its own (`apart`, which runs `worker`), whose time and memory are
//! bounded and whose end is a refusal. What passed that is compiled here (`compiler`), where it takes no more, and is kept.
//!
//! **Invariant:** no guide ends a process that serves; compiling it and finding the tokens that may follow are bounded, in work
//! and in memory.

mod apart;
mod args;
mod closing;
mod compiler;
mod guides;
mod matcher;
pub mod worker;

pub use args::GuideArgs;
pub use guides::Guides;
pub use matcher::Matcher;
