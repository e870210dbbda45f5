//! The pairs of a prefill node, as they are loaded.

use std::sync::Arc;

use overfill_guide::Guides;
use overfill_model::{KvCache, ModelError, ThreadPool, Workspace, cache};
use overfill_node::RunError;
use overfill_types::PairManifest;

use crate::compute::FullModel;
use crate::config::PrefillConfig;
use crate::pairs;

/// What a prefill node serves, and what computes for it.
pub struct Loaded<C> {
    /// Those of the pairs; at least one.
    pub manifests: Vec<PairManifest>,
    /// Their full model, with a cache of so many blocks.
    pub compute: C,
    /// Blocks of the cache.
    pub blocks: u32,
    /// Compiles what answers have to look like.
    pub guides: Arc<Guides>,
}

/// Loads the full model.
///
/// # Errors
/// Where the pairs cannot be loaded, or do not have one full model.
pub(crate) async fn load(config: PrefillConfig) -> Result<Loaded<FullModel>, RunError> {
    let placement = config.placement();
    let PrefillConfig { node, pair: dirs, .. } = config;
    let loading = tokio::task::spawn_blocking(move || {
        let pairs = pairs::open(&dirs)?;
        let Some(first) = pairs.first() else { return Err(ModelError::Mismatch("no pair is named: give at least one".into())) };
        let devices = overfill_model::device::parse_all(&node.device)?;
        let pool = ThreadPool::placed(node.threads(), &placement)
            .map_err(|e| ModelError::Device(format!("{} compute threads cannot be started: {e}", node.threads())))?;
        let model = first.load_full_over(&devices, &pool)?;
        let rows = pairs::rows(&pairs, &pool)?;
        let geometry = model.config().kv;
        let format = first.manifest.kv_formats.cache;
        let blocks = node.blocks(cache::bytes_per_token(geometry, format, &devices[0]), || overfill_model::free_memory(&devices))?;
        let mut cache = KvCache::split(geometry, format, blocks as usize, node.block_tokens as usize, &devices)?;
        cache.claim(&pool);
        let guides = Guides::open(&first.dir, &first.manifest, &node.guides);
        let compute = FullModel { model, cache, workspace: Workspace::new(pool), rows };
        Ok::<_, ModelError>(Loaded { manifests: pairs.into_iter().map(|pair| pair.manifest).collect(), compute, blocks, guides })
    });
    Ok(loading.await??)
}
