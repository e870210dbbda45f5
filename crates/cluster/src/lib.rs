//! How nodes find each other: registration and a watched, cached view. The only home of etcd.
//!
//! **Invariant:** nobody asks the source on the way of a request; whoever picks a node reads the last view. While the
//! source is away, that view stays.

pub mod args;
mod discovery;
mod etcd;
mod fixed;
mod memory;
mod snapshot;

pub use args::DiscoveryArgs;
pub use discovery::{Discovery, Registration};
pub use etcd::EtcdSettings;
pub use snapshot::Snapshot;
