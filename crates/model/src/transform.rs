//! The KV transform, applied layer by layer on the prefill node.

use std::path::Path;

use candle_core::{DType, Device};
use overfill_kernels::{Activations, DenseMatrix, Into, Matrix, Packer, Reads, ThreadPool, products};
use overfill_kv::{BlockId, wire};
use overfill_types::{KvGeometry, KvTransform, WireFormat};

use crate::cache::KvCache;
use crate::error::ModelError;
use crate::values;

/// From the full model's KV rows to the decode model's.
pub struct Transform {
    /// Decode-model layers that each full-model layer feeds.
    targets: Vec<Vec<usize>>,
    /// For each decode-model layer, where rows are projected.
    projections: Vec<Projection>,
}

/// Positions of one sequence that go from one cache to another, in both of which it has the same block table.
#[derive(Clone, Copy, Debug)]
pub struct Passage<'a> {
    /// How rows are written on the wire.
    pub format: WireFormat,
    /// The sequence's blocks.
    pub blocks: &'a [BlockId],
    /// The first position.
    pub start: usize,
    /// How many.
    pub count: usize,
}

/// A linear map of rows, `[kv_dim]` to `[kv_dim']`.
struct Projection {
    weight: Matrix,
    bias: Vec<f32>,
}

impl Transform {
    /// Loads the transform; the projection's file lies in `dir`. Checks that it maps `full` to `decode`.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] naming both geometries where it does not; [`ModelError::Format`] where the file is not whole.
    pub fn load(spec: &KvTransform, dir: &Path, full: KvGeometry, decode: KvGeometry, pool: &ThreadPool) -> Result<Self, ModelError> {
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
            KvTransform::Projection { file, .. } => load_projections(&dir.join(file), decode.layers, full.row(), decode.row(), pool)?,
            _ => Vec::new(),
        };
        Ok(Self { targets, projections })
    }

    /// Decode-model layers that the full model's `layer` feeds, ascending (none for a layer that is cut away).
    pub fn targets(&self, layer: usize) -> &[usize] {
        self.targets.get(layer).map_or(&[], Vec::as_slice)
    }

    /// Turns rows `[tokens, kv_dim]` of the full model's layer into rows `[tokens, kv_dim']` of decode-model layer `target`; keys and values alike.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where `rows` are not rows of the full model.
    pub fn apply(&self, pool: &ThreadPool, target: usize, rows: &mut Vec<f32>) -> Result<(), ModelError> {
        let Some(Projection { weight, bias }) = self.projections.get(target) else {
            return Ok(());
        };
        if !rows.len().is_multiple_of(weight.inputs()) {
            return Err(ModelError::Mismatch(format!("{} numbers are no rows of {}", rows.len(), weight.inputs())));
        }
        let mut input = Activations::new();
        input.set(pool, rows, weight.inputs(), Reads::of(&[weight]));
        rows.clear();
        rows.extend(std::iter::repeat_n(bias, input.rows()).flatten());
        products(pool, &input, &[weight], rows, Into::Sum);
        Ok(())
    }

    /// Carries a layer's rows from the full model's cache into the decode model's, as a handoff would: transformed, and rounded
    /// as on the wire.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where a cache does not hold the positions or is not of the geometry that is meant.
    pub fn carry(&self, pool: &ThreadPool, layer: usize, passage: Passage<'_>, from: &KvCache, to: &mut KvCache) -> Result<(), ModelError> {
        let Passage { format, blocks, start, count } = passage;
        let geometry = to.geometry();
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for &target in self.targets(layer) {
            from.read(layer, blocks, start, count, &mut k, &mut v)?;
            for rows in [&mut k, &mut v] {
                self.apply(pool, target, rows)?;
                let sent = wire::encode(format, &geometry, rows);
                wire::decode(format, &geometry, &sent, rows);
            }
            to.write(pool, target, blocks, start, &k, &v)?;
        }
        Ok(())
    }

    /// Whether rows go over as they are.
    pub fn is_copy(&self) -> bool {
        self.projections.is_empty()
    }
}

fn load_projections(path: &Path, layers: usize, inputs: usize, outputs: usize, pool: &ThreadPool) -> Result<Vec<Projection>, ModelError> {
    let format = |what: String| ModelError::Format { path: path.to_owned(), what };
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).map_err(|e| format(format!("no whole safetensors file: {e}")))?;
    let tensor = |name: String, shape: &[usize]| -> Result<Vec<f32>, ModelError> {
        let tensor = tensors.get(&name).ok_or_else(|| format(format!("tensor {name} is missing")))?;
        if tensor.dims() != shape {
            return Err(format(format!("tensor {name} is {:?}, the geometries want {shape:?}", tensor.dims())));
        }
        values::read(&tensor.to_dtype(DType::F32)?.contiguous()?, <[f32]>::to_vec)
    };
    (0..layers)
        .map(|i| {
            let weight = tensor(format!("embedding_proj.{i}.weight"), &[outputs, inputs])?;
            let bias = tensor(format!("embedding_proj.{i}.bias"), &[outputs])?;
            Ok(Projection { weight: Matrix::Dense(DenseMatrix::from_f32(&Packer::new(pool), &weight, outputs, inputs)), bias })
        })
        .collect()
}
