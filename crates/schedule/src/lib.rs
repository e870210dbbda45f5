//! Who serves a request, and when: the router's decisions as data. No I/O, no clock of its own, no randomness but a seeded one.
//!
//! `cluster` chooses two nodes for a request (`choice` is what is asked and answered), the best `candidate`s by what is known
//! of them (`node`) and of what they have read (`prefix`);
//! `line` says whose turn it is where nobody has room; `scheduler` is both together; `rate` bounds what one client gets.
//!
//! **Invariants:** a pair of nodes is chosen whole or not at all, and what was counted for it is given back once. The cost of
//! a choice does not depend on the number of nodes. All memory is bounded.

mod candidate;
mod choice;
mod cluster;
mod line;
mod node;
mod prefix;
mod rate;
mod recency;
mod scheduler;

pub use choice::{Absent, Ask, Choice, One, Pair, Taken, TooLarge};
pub use cluster::Cluster;
pub use line::{Bounds, Refusal, Share};
pub use node::Report;
pub use prefix::{BLOCK, keys};
pub use rate::Bucket;
pub use scheduler::{Order, Scheduler, Submitted, Ticket, Turn};
