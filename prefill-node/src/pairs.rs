//! The pairs that this node prefills for: one full model, and a decode model and a KV transform of each pair.
//!
//! What the full model reads is the same for all of them, so they share its weights, its cache and what is kept of prompts.

use std::path::PathBuf;

use overfill_kv::{BlockHash, block_hashes};
use overfill_model::{ModelError, Pair, ThreadPool};
use overfill_nccl::Gpu;
use overfill_types::{Code, Fingerprint, KvGeometry, PairManifest, ServedPair, ServiceError, WireFormat};

use crate::rows::RowProjector;

/// What is to be known of a pair for a handoff to its decode nodes.
#[derive(Clone)]
pub(crate) struct Offer {
    pub(crate) pair: ServedPair,
    /// Of the decode model.
    pub(crate) geometry: KvGeometry,
    pub(crate) wire: WireFormat,
    /// In whose memory its rows lie as they travel, or are made so.
    pub(crate) gpu: Option<Gpu>,
}

/// All pairs, in the order of their flags.
#[derive(Clone)]
pub(crate) struct Offers {
    offers: Vec<Offer>,
    /// Stands for the full model and the format of its cache in the names of blocks.
    full: Fingerprint,
}

/// Opens the pairs; at least one.
///
/// # Errors
/// [`ModelError::Mismatch`] naming two that do not have the same full model, tokenizer and cache format, or that are the same pair.
pub(crate) fn open(dirs: &[PathBuf]) -> Result<Vec<Pair>, ModelError> {
    let pairs = dirs.iter().map(|dir| Pair::open(dir)).collect::<Result<Vec<_>, _>>()?;
    for (i, pair) in pairs.iter().enumerate() {
        let (first, other) = (&pairs[0].manifest, &pair.manifest);
        let same = |m: &PairManifest| (m.full.sha256.clone(), m.full.weights, m.full.kv, m.tokenizer.clone(), m.kv_formats.cache);
        if same(first) != same(other) {
            return Err(ModelError::Mismatch(format!(
                "{} and {} do not have the same full model, tokenizer and cache format, so one prefill node cannot serve both: start one for each",
                first.name, other.name
            )));
        }
        if let Some(twice) = pairs[..i].iter().find(|p| p.manifest.fingerprint == other.fingerprint || p.manifest.name == other.name) {
            return Err(ModelError::Mismatch(format!(
                "{} ({}) and {} ({}) are named alike or are the same pair: leave one out, or give it another name",
                twice.manifest.name,
                twice.manifest.fingerprint.short(),
                other.name,
                other.fingerprint.short()
            )));
        }
    }
    Ok(pairs)
}

/// What makes the full model's rows into those of each pair.
///
/// # Errors
/// Where a transform cannot be loaded.
pub(crate) fn rows(pairs: &[Pair], pool: &ThreadPool) -> Result<Vec<RowProjector>, ModelError> {
    let rows = |pair: &Pair| {
        let PairManifest { full, decode, kv_formats, .. } = &pair.manifest;
        Ok(RowProjector::new(pair.load_transform(pool)?, full.kv.layers, decode.kv, kv_formats.wire))
    };
    pairs.iter().map(rows).collect()
}

impl Offers {
    /// Of these pairs; `gpu` says of each, by its number, in which GPU's memory its rows lie as they travel, or are made so.
    pub(crate) fn new(manifests: &[PairManifest], gpu: impl Fn(usize) -> Option<Gpu>) -> Self {
        let full = manifests.first().map(|m| format!("{} {:?}", m.full.sha256, m.kv_formats.cache));
        let offer = |(number, m): (usize, &PairManifest)| Offer {
            pair: ServedPair { model: m.name.clone(), fingerprint: m.fingerprint.clone() },
            geometry: m.decode.kv,
            wire: m.kv_formats.wire,
            gpu: gpu(number),
        };
        Self { offers: manifests.iter().enumerate().map(offer).collect(), full: Fingerprint::new(full.unwrap_or_default()) }
    }

    /// The names under which peers know them.
    pub(crate) fn served(&self) -> Vec<ServedPair> {
        self.offers.iter().map(|o| o.pair.clone()).collect()
    }

    /// The pair of this fingerprint, and its number.
    ///
    /// # Errors
    /// [`Code::Mismatch`] naming both sides.
    pub(crate) fn find(&self, fingerprint: &Fingerprint) -> Result<(usize, &Offer), ServiceError> {
        self.offers.iter().enumerate().find(|(_, o)| o.pair.fingerprint == *fingerprint).ok_or_else(|| {
            let ours: Vec<&str> = self.offers.iter().map(|o| o.pair.fingerprint.short()).collect();
            let message = format!(
                "the router's pair is {}, this prefill node serves {}: every node needs the same pair",
                fingerprint.short(),
                ours.join(" and ")
            );
            ServiceError::of_node(Code::Mismatch, message)
        })
    }

    /// Names of the blocks that a prompt fills: the same for all pairs.
    pub(crate) fn names(&self, salt: &str, prompt: &[u32], block_tokens: usize) -> Vec<BlockHash> {
        block_hashes(&self.full, salt, prompt, block_tokens)
    }
}
