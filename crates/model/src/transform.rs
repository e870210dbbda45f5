//! The KV transform, applied layer by layer on the prefill node.

use std::path::Path;

use overfill_types::{KvGeometry, KvTransform};

use crate::error::ModelError;

/// From the full model's KV rows to the decode model's.
pub struct Transform {}

#[allow(unused_variables)]
impl Transform {
    /// Loads the transform; the projection's file lies in `dir`. Checks that it maps `full` to `decode`.
    pub fn load(spec: &KvTransform, dir: &Path, full: KvGeometry, decode: KvGeometry) -> Result<Self, ModelError> {
        todo!()
    }

    /// Decode-model layers that the full model's `layer` feeds, ascending (none for a layer that is cut away).
    pub fn targets(&self, layer: usize) -> &[usize] {
        todo!()
    }

    /// Rows `[tokens, kv_dim]` of the full model's layer as rows `[tokens, kv_dim']` of decode-model layer `target`; for keys and for values alike.
    pub fn apply(&self, target: usize, rows: Vec<f32>) -> Result<Vec<f32>, ModelError> {
        todo!()
    }
}
