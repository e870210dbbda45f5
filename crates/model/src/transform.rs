//! The KV transform, applied layer by layer on the prefill node.

use std::path::Path;

use candle_core::{DType, Device};
use overfill_kernels::PackedMatrix;
use overfill_types::{KvGeometry, KvTransform};

use crate::error::ModelError;
use crate::host;

/// From the full model's KV rows to the decode model's.
pub struct Transform {
    /// Decode-model layers that each full-model layer feeds.
    targets: Vec<Vec<usize>>,
    /// For each decode-model layer, where rows are projected.
    projections: Vec<Projection>,
}

/// A linear map of rows, `[kv_dim]` to `[kv_dim']`.
struct Projection {
    weight: PackedMatrix,
    bias: Vec<f32>,
}

impl Transform {
    /// Loads the transform; the projection's file lies in `dir`. Checks that it maps `full` to `decode`.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] naming both geometries where it does not; [`ModelError::Format`] where the file is not whole.
    pub fn load(spec: &KvTransform, dir: &Path, full: KvGeometry, decode: KvGeometry) -> Result<Self, ModelError> {
        let sources = spec.source_layers(decode.layers);
        let rows_fit = match spec {
            KvTransform::Identity => full == decode,
            KvTransform::Prune { .. } => (full.kv_heads, full.head_dim) == (decode.kv_heads, decode.head_dim),
            KvTransform::Projection { .. } => true,
        };
        let layers_fit = sources.len() == decode.layers && sources.iter().all(|&l| l < full.layers);
        if !rows_fit || !layers_fit {
            return Err(ModelError::Mismatch(format!(
                "the KV transform {spec} does not lead from the full model's {full} to the decode model's {decode}"
            )));
        }
        let mut targets = vec![Vec::new(); full.layers];
        for (target, &source) in sources.iter().enumerate() {
            targets[source].push(target);
        }
        let projections = match spec {
            KvTransform::Projection { file, .. } => load_projections(&dir.join(file), decode.layers, full.row(), decode.row())?,
            _ => Vec::new(),
        };
        Ok(Self { targets, projections })
    }

    /// Decode-model layers that the full model's `layer` feeds, ascending (none for a layer that is cut away).
    pub fn targets(&self, layer: usize) -> &[usize] {
        self.targets.get(layer).map_or(&[], Vec::as_slice)
    }

    /// Rows `[tokens, kv_dim]` of the full model's layer as rows `[tokens, kv_dim']` of decode-model layer `target`; for keys and for values alike.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where `rows` are not rows of the full model.
    pub fn apply(&self, target: usize, rows: Vec<f32>) -> Result<Vec<f32>, ModelError> {
        let Some(Projection { weight, bias }) = self.projections.get(target) else {
            return Ok(rows);
        };
        if !rows.len().is_multiple_of(weight.inputs()) {
            return Err(ModelError::Mismatch(format!("{} numbers are no rows of {}", rows.len(), weight.inputs())));
        }
        let tokens = rows.len() / weight.inputs();
        let mut projected = vec![0.0; tokens * weight.outputs()];
        weight.multiply(&rows, tokens, &mut projected);
        for row in projected.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        Ok(projected)
    }
}

fn load_projections(path: &Path, layers: usize, inputs: usize, outputs: usize) -> Result<Vec<Projection>, ModelError> {
    let format = |what: String| ModelError::Format { path: path.to_owned(), what };
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).map_err(|e| format(format!("no whole safetensors file: {e}")))?;
    let tensor = |name: String, shape: &[usize]| -> Result<Vec<f32>, ModelError> {
        let tensor = tensors.get(&name).ok_or_else(|| format(format!("tensor {name} is missing")))?;
        if tensor.dims() != shape {
            return Err(format(format!("tensor {name} is {:?}, the geometries want {shape:?}", tensor.dims())));
        }
        host::read(&tensor.to_dtype(DType::F32)?.contiguous()?, <[f32]>::to_vec)
    };
    (0..layers)
        .map(|i| {
            let weight = tensor(format!("embedding_proj.{i}.weight"), &[outputs, inputs])?;
            let bias = tensor(format!("embedding_proj.{i}.bias"), &[outputs])?;
            Ok(Projection { weight: PackedMatrix::from_f32(&weight, outputs, inputs), bias })
        })
        .collect()
}
