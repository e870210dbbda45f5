//! Training a pair: the decode model learns to write responses after prompts that the full model has read.
//!
//! The full model is frozen and runs on the engine that serves, so its keys and values are those of a handoff; the decode
//! model trains on [`net`]. What the full model said can be kept on disk and read again.
//!
//! **Invariant:** a run that was stopped, at any moment, and started again computes the same weights, bit for bit, as one
//! that was not: everything that is drawn comes from seed, epoch and example, and every sum has one order.

pub mod adam;
pub mod batches;
pub mod cache;
pub mod curve;
mod error;
pub mod lesson;
pub mod log;
pub mod net;
pub mod options;
mod rollout;
mod rounding;
mod run;
pub mod schedule;
mod state;

pub use adam::AdamOptions;
pub use batches::Reading;
pub use cache::LessonCache;
pub use error::TrainError;
pub use lesson::{Carry, FullModel, Question};
pub use log::{Record, Validation};
pub use net::Divergence;
pub use options::{Set, TrainOptions};
pub use rollout::{OnPolicy, Written};
pub use run::{Event, Materials, Outcome, train};
pub use schedule::Schedule;
