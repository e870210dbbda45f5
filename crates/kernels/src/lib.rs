//! CPU kernels: products with dense and quantised weights, and attention over a paged KV cache.
//!
//! **Invariant:** every output is computed in one fixed order of operations, whatever else is in the batch, however a
//! prompt was cut, on any number of threads. So a sequence's logits are the same bits alone and in company.
//!
//! Each kernel is written once over the eight lanes of `simd.rs`; the scalar lanes are the reference that the fast
//! ones are tested against, bit for bit. No candle, no async.

mod attention;
mod exp;
mod ggml;
mod output;
mod packed;
mod quantised;
mod simd;
mod split;

pub use attention::{KvLayer, Span, paged_attention};
pub use ggml::BlockFormat;
pub use packed::PackedMatrix;
pub use quantised::QuantisedMatrix;
