//! The project's words as Rust types.
//!
//! Every file is one entry of `docs/GLOSSARY.md`, but for `flags`: how sizes and times are written.
//! Nothing here does I/O, spawns a task or knows a transport, so every other crate may depend on it.

pub mod address;
pub mod error;
pub mod flags;
pub mod generation;
pub mod id;
pub mod kv;
pub mod node;
pub mod outcome;
pub mod pair;
pub mod pair_files;
pub mod prompt;
pub mod quality;
pub mod quarantine;
pub mod sampling;

pub use address::{AddressError, PeerAddress};
pub use error::{Blame, Code, Retry, ServiceError};
pub use generation::GenerationConfig;
pub use id::{Epoch, Fingerprint, NodeId, RequestId, Ticket};
pub use kv::{KvFormat, KvFormats, KvGeometry, KvTransform, PruneStrategy, WireFormat};
pub use node::{Endpoint, NodeInfo, Role, ServedPair};
pub use outcome::{FinishReason, TokenLogprob, TopLogprob};
pub use pair::PairManifest;
pub use prompt::{PromptDigest, prompt_digest};
pub use quality::Quality;
pub use quarantine::Quarantine;
pub use sampling::{Guide, Limits, SamplingParams, StopConditions};
