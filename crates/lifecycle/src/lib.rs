//! How a process starts, is observed, drains and stops.

pub mod advertise;
pub mod calls;
pub mod deadline;
pub mod drain;
pub mod gathering;
pub mod grpc;
pub mod metrics;
pub mod node_args;
pub mod status;
pub mod telemetry;
pub mod trace;

pub use advertise::AdvertiseError;
pub use drain::Drain;
pub use metrics::NodeListeners;
pub use node_args::NodeArgs;
pub use trace::{Trace, TraceHeaders};
