//! What both kinds of node have: flags and sockets, what those are answered who run it, the sign of life of an engine, and their own life from ready to ended.

pub mod admin;
mod advertise;
mod cores;
mod error;
pub mod faults;
mod flags;
mod kv_memory;
mod life;
mod nccl;
mod pulse;
mod refusals;
mod streak;

pub use advertise::AdvertiseError;
pub use cores::{Board, CoreArgs, Cores, CoresError, Prefer, Turn};
pub use error::RunError;
pub use faults::Faults;
pub use flags::{ListenError, NodeArgs, NodeListeners};
pub use kv_memory::KvMemory;
pub use life::Life;
pub use nccl::{NcclArgs, NcclUnusable};
pub use pulse::Pulse;
pub use refusals::Refusals;
pub use streak::Streak;
