//! Rows that go from GPU to GPU by NCCL: what they are of, and that they are whole, is told by frames as ever (`PushKv`); the bytes
//! themselves go over a communicator of the two nodes, made on first use.
//!
//! NCCL matches what one end sends with what the other receives by order alone. So each communicator has a call beside it
//! (`JoinNccl`), over which the prefill node tells what it sends, in the order in which it does, and the decode node receives in
//! that order whatever it is for, also what nobody waits for any more: a handoff that is given up leaves the others in step.
//!
//! **Invariant:** the call and the communicator live and die together. Whichever end sees either of them fail drops both, so a
//! node that is gone holds up no other longer than five seconds.

mod joined;
mod ways;

use std::time::Duration;

pub use joined::{Joined, LiveTickets};
pub use ways::{NoWay, Way, Ways};

/// How long the making of a communicator may take, and each piece from the moment that NCCL was asked for it: both ends ask
/// within a round trip of each other.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a node that ends waits for its communicators to end.
const CLOSING: Duration = Duration::from_secs(1);
/// Pieces that are on their way over one communicator, or wait at the decode node for their frame.
const PIECES: usize = 32;
