//! Making pairs: conversations, pruning a full model to a decode model, evaluating what came of it, exporting it. Training,
//! which stands between pruning and evaluation, is a crate of its own above this one.
//!
//! No network, and nothing that serves: what this crate makes are checkpoints that every node can load.

pub mod answer;
pub mod calibrate;
pub mod checkpoint;
pub mod data;
pub mod error;
pub mod eval;
pub mod export;
#[cfg(test)]
mod fixture;
pub mod matrix;
pub mod product;
pub mod prune;
mod read;
pub mod repeats;
pub mod score;
pub mod self_prompt;
mod shape_json;
pub mod vector;

pub use answer::{Question, Writing, answer};
pub use data::{Conversation, Example};
pub use error::CompressError;
pub use read::Arm;
pub use score::{Scored, score};
