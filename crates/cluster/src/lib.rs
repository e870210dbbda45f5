//! How nodes find each other: registration and a watched, cached view. The only home of etcd.
//!
//! **Invariants:** nobody asks the source on the way of a request; whoever picks a node reads the last view. A node that
//! answers its status is in the view whatever the source says, and one that neither is listed nor answers is not.

pub mod args;
mod discovery;
mod etcd;
mod fixed;
mod membership;
mod memory;
mod probe;
mod snapshot;

pub use args::DiscoveryArgs;
pub use discovery::{Discovery, Registration};
pub use etcd::{EtcdSecurity, EtcdSettings};
pub use snapshot::Snapshot;
