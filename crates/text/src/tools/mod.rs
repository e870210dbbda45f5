//! Calls of tools within an answer. A model writes them as its chat template taught it: [`ToolFormat`] says how,
//! [`ToolReader`] reads them out of an answer as it comes.

mod format;
mod reader;

pub use format::ToolFormat;
pub use reader::{ToolPiece, ToolReader};
