//! How a process starts, is observed, drains and stops.

pub mod drain;
pub mod grpc;
pub mod node_args;
pub mod status;
pub mod telemetry;

pub use drain::Drain;
pub use node_args::NodeArgs;
