//! CPU kernels: products with dense and quantised weights, attention over a paged KV cache, and what lies between.
//!
//! **Invariant:** every output is computed in one fixed order of operations, whatever else is in the batch, however a
//! prompt was cut, on any number of threads and on any vector unit. So a sequence's logits are the same bits alone and in company.
//!
//! Each kernel is written once over the lanes of `simd.rs`; the scalar lanes are the reference that the fast ones are
//! tested against, bit for bit. No candle, no async.

mod activations;
#[cfg(target_arch = "x86_64")]
pub mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod bf16;
mod dense;
mod destination;
mod disjoint;
mod exp;
mod ggml;
#[cfg(test)]
mod guarded;
mod huge_pages;
#[cfg(test)]
mod invariance;
mod kv;
#[cfg(test)]
mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
mod number;
mod packing;
pub mod peak;
mod product;
mod quantised;
mod rows;
mod segment;
mod segment_int8;
mod simd;
mod thread_pool;

pub use activations::{Activations, Reads};
pub use attention::{AttentionScratch, Scores, paged_attention};
pub use bf16::{Bf16Matrix, Line};
pub use dense::DenseMatrix;
pub use destination::Into;
pub use ggml::BlockFormat;
pub use kv::{BLOCK_MULTIPLE, KvFormat, KvLayer, KvShape, Run};
pub use packing::Packer;
pub use product::{Matrix, products};
pub use quantised::QuantisedMatrix;
pub use rows::{Addend, Gate, add, gated, norm_parts, rms_norm, rotate, soft_cap};
pub use simd::{Vectors, use_at_most};
pub use thread_pool::{Placement, ThreadPool};
