//! Calls: how a router asks a node, both halves of one protocol (`node.proto`).

mod node;
mod router;

pub use node::{EventReceiver, EventSender, NodeService, Serving, Signals};
pub use router::{CallEvents, Calls};
