//! The pair of a decode node, as it is loaded.

use std::sync::Arc;

use overfill_guide::Guides;
use overfill_model::{KvCache, ModelError, Pair, ThreadPool, Workspace, cache};
use overfill_node::RunError;
use overfill_types::PairManifest;

use crate::compute::DecodeModel;
use crate::config::DecodeConfig;

/// What a decode node serves, and what computes for it.
pub struct Loaded<C> {
    /// The pair's.
    pub manifest: PairManifest,
    /// Its decode model, with a cache of so many blocks.
    pub compute: C,
    /// Blocks of the cache.
    pub blocks: u32,
    /// Compiles what answers have to look like.
    pub guides: Arc<Guides>,
}

/// Loads the decode model.
///
/// # Errors
/// Where the pair cannot be loaded.
pub(crate) async fn load(config: DecodeConfig) -> Result<Loaded<DecodeModel>, RunError> {
    let placement = config.placement();
    let DecodeConfig { node, pair: dir, .. } = config;
    let loading = tokio::task::spawn_blocking(move || {
        let pair = Pair::open(&dir)?;
        let [device] = node.device.as_slice() else {
            let message =
                format!("a decode model is on one device, and --device names {}: start a node on each", node.device.join(" and "));
            return Err(ModelError::Device(message));
        };
        let device = overfill_model::device::parse(device)?;
        let pool = ThreadPool::placed(node.threads(), &placement)
            .map_err(|e| ModelError::Device(format!("{} compute threads cannot be started: {e}", node.threads())))?;
        let model = pair.load_decode(&device, &pool)?;
        let geometry = model.config().kv;
        let formats = pair.manifest.kv_formats;
        let blocks = node.blocks(cache::bytes_per_token(geometry, formats.cache, &device), || {
            overfill_model::free_memory(std::slice::from_ref(&device))
        })?;
        let mut cache = KvCache::new(geometry, formats.cache, blocks as usize, node.block_tokens as usize, &device)?;
        cache.claim(&pool);
        let guides = Guides::open(&pair.dir, &pair.manifest, &node.guides);
        let compute = DecodeModel { model, cache, workspace: Workspace::new(pool) };
        Ok::<_, ModelError>(Loaded { manifest: pair.manifest, compute, blocks, guides })
    });
    Ok(loading.await??)
}
