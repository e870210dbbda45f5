//! Making pairs: a full model is pruned to a decode model, which is trained to answer from the full model's KV cache.
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
pub mod net;
pub mod prune;
mod read;
pub mod score;
pub mod train;

pub use answer::{Asked, Writing, answer};
pub use data::{Conversation, Example};
pub use error::CompressError;
pub use read::Arm;
pub use score::{Scored, score};
