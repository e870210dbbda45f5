//! The KV cache as data: blocks and who holds them, frames of a handoff and how they are checked.
//!
//! Pure: no tokio, no candle, no tonic.

pub mod assembler;
pub mod frame;
pub mod pool;
pub mod prefix;
pub mod wire;

pub use assembler::{Assembler, Commit, Expected, FrameError, Payload};
pub use frame::{HandoffDigest, RowsHeader};
pub use pool::{BlockId, BlockPool, PoolFull, ReservedBlocks};
pub use prefix::{BlockHash, block_hashes};
