//! How nodes find each other: registration and a watched, cached view. The only home of etcd and of
//! the Kubernetes API.
//!
//! **Invariants:** nobody asks the source on the way of a request; whoever picks a node reads the last view. A node that
//! answers its status is in the view whatever the source says, and one that neither is listed nor answers is not.

pub mod args;
mod asking;
mod discovery;
mod etcd;
mod fixed;
mod kubernetes;
mod membership;
mod memory;
mod pause;
mod places;
mod probe;
mod snapshot;

pub use args::DiscoveryArgs;
pub use discovery::{Discovery, Registration};
pub use etcd::{EtcdSecurity, EtcdSettings};
pub use kubernetes::{CLUSTER_LABEL, KubernetesSettings, PORT_NAME, ROLE_LABEL};
pub use snapshot::Snapshot;
