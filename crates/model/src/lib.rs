//! Models: loading them, running them, choosing tokens. The only home of candle.
//!
//! A forward pass takes its KV cache as an argument ([`KvCache`]), so that one can be read layer by layer, moved to
//! another process, injected there, and continued by another model from any position.

pub mod cache;
pub mod config;
mod config_json;
mod cpu;
pub mod device;
pub mod error;
pub mod family;
#[cfg(test)]
mod family_tests;
mod fp8;
mod free_memory;
pub mod gguf;
mod gguf_config;
mod gguf_header;
mod gguf_parts;
pub mod gguf_write;
mod gpu;
pub mod hugging_face;
mod known;
pub mod llama;
pub mod making;
pub mod names;
pub mod pair;
pub mod pair_files;
pub mod pair_make;
pub mod pass;
pub mod profile;
pub mod reference;
pub mod rope;
mod rounding;
pub mod sample;
pub mod solo;
mod stored;
mod torch;
pub mod transform;
mod values;
pub mod weight;
pub mod weights;
pub mod workspace;

pub use cache::KvCache;
pub use candle_core::Device;
pub use candle_core::quantized::GgmlDType;
pub use config::LlamaConfig;
pub use error::ModelError;
pub use family::Family;
pub use free_memory::free_memory;
pub use gguf_write::GgufWriter;
pub use llama::Llama;
pub use overfill_kernels::{Placement, ThreadPool};
pub use pair::Pair;
pub use pair_make::{KvSpec, MakePair, TokenizerFiles};
pub use pass::Chunk;
pub use reference::Reference;
pub use rounding::round_to_blocks;
pub use sample::{Sampled, Sampler};
pub use transform::{Passage, Transform};
pub use weights::Weights;
pub use workspace::{Logits, Row, Workspace};
