//! The KV cache as data: blocks and who holds them, frames of a handoff and how they are checked.
//!
//! Pure: no tokio, no candle, no tonic.

pub mod pool;

pub use pool::{BlockId, BlockPool, PoolFull, Reservation};
