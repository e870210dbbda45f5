//! How many nodes of each role a load needs: a cluster simulated with the router's own scheduler, over measured costs of reading a
//! prompt and of a decode step.
//!
//! `costs` are fitted to what `overfill bench engine` has measured, `load` draws requests, `nodes` are what a prefill and a decode
//! node do with time, `simulate` runs a cluster of them, and `search` looks for the cheapest that meets its goals.
//!
//! **Invariants:** the same seed gives the same figures. What a run costs grows with its requests, not with its nodes or their steps.

pub mod costs;
pub mod load;
mod nodes;
pub mod search;
pub mod simulate;

pub use costs::{ReadCost, StepCost};
pub use load::{Arrival, Lengths, Load};
pub use search::{Goals, Plan, Prices, cheapest};
pub use simulate::{Bounds, Cluster, Served, simulate};

/// Something that cannot be planned with, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub String);
