//! Who serves a request, and when: the router's decisions as data. No I/O, no clock of its own, no randomness but a seeded one.
//!
//! `cluster` chooses two nodes for a request (`choice` is what is asked and answered), the best `candidate`s by what is known
//! of them (`node`, `node_pool`) and of what they have read (`prefix_index`);
//! `fair_queue` says whose turn it is where nobody has room; `scheduler` is both together, over `needs`: the node pools that a
//! request wants and those that are held back for others; `rate` bounds what one client gets.
//!
//! **Invariants:** two nodes are chosen together or not at all, and what was counted for them is given back once. The cost of
//! a choice depends neither on the number of nodes nor on that of requests that wait. All memory is bounded.

mod candidate;
mod choice;
mod cluster;
mod fair_queue;
mod needs;
mod node;
mod node_pool;
mod prefix_index;
mod rate;
mod recency;
mod scheduler;

pub use choice::{Absent, Ask, Choice, NodePair, One, Taken, TooLarge};
pub use cluster::Cluster;
pub use fair_queue::Share;
pub use needs::Lacks;
pub use node::Report;
pub use prefix_index::{BLOCK, keys};
pub use rate::Bucket;
pub use scheduler::{Order, QueueLimits, QueueNumber, Refusal, Scheduler, Submitted, Turn};
