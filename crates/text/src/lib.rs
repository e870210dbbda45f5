//! Text on one side, token ids on the other: tokenizer, chat template, incremental detokenisation, stop strings.
//!
//! Text ends here: nodes see token ids only. No candle, no network.

pub mod detokenize;
pub mod gguf;
mod plain;
pub mod probe;
pub mod stop;
pub mod template;
pub mod tokenizer;
pub mod tools;

pub use detokenize::Detokenizer;
pub use stop::StopMatcher;
pub use template::{Chat, ChatTemplate, Message};
pub use tokenizer::{ModelText, TextModel};
pub use tools::{ToolFormat, ToolPiece, ToolReader};
