//! How a process starts, is observed, drains and stops.

pub mod drain;
pub mod flags;
pub mod metrics;
pub mod parts;
pub mod profile;
pub mod telemetry;
pub mod trace;

pub use drain::Drain;
pub use parts::{PartEnded, Parts};
pub use trace::{Trace, TraceHeaders};
