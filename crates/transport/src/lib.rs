//! How our processes talk: connections and servers of gRPC as we set them up, and what goes over them.
//!
//! `server` is what every server has, over `connections` that are bounded, `connection` a connection to a peer, `peers` those that a router keeps. A router asks a
//! node by `calls` on one stream and hears its `status` on another; a prefill node `push`es KV caches to decode nodes.
//! `security` says who may talk to whom. `gathering` makes one system call of many small writes, `deadline` keeps what a client's `grpc-timeout` says, and a node's
//! `fault` ends all its calls with why.
//!
//! **Invariant:** both halves of a protocol are here, so what one says the other knows. What a call holds is free when its
//! stream breaks, when it is cancelled, and when it ends.

pub mod calls;
pub mod connection;
pub mod connections;
pub mod deadline;
pub mod fault;
mod gathering;
pub mod node_status;
pub mod peers;
pub mod push;
pub mod security;
pub mod server;

pub use connection::Connector;
pub use fault::Fault;
pub use peers::Peers;
pub use security::{PeerSecurity, PeerSecurityArgs};
