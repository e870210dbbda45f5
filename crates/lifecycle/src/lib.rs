//! How a process starts, is observed, drains and stops.

pub mod drain;
pub mod telemetry;

pub use drain::Drain;
