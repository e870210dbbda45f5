//! The KV cache: for each layer a run of slots, cut into blocks that sequences hold by their block tables.
//!
//! On the CPU it is plain memory, which kernels and frames read in place. On other devices it is a tensor for the keys
//! and one for the values of each layer.

use candle_core::{DType, Device, Tensor};
use overfill_kv::BlockId;
use overfill_types::KvGeometry;

use crate::error::ModelError;

/// KV cache of one node, all sequences together.
///
/// Slot of token position `p` of a sequence with block table `blocks`: `blocks[p / block_tokens] * block_tokens + p % block_tokens`.
/// A row is `[kv_heads, head_dim]`, keys after the rotary embedding, f32.
pub struct KvCache {
    geometry: KvGeometry,
    blocks: usize,
    block_tokens: usize,
    pub(crate) rows: Rows,
}

/// Keys and values by layer.
pub(crate) enum Rows {
    /// Each `[slots, kv_heads, head_dim]`.
    Host(Vec<Kv<Vec<f32>>>),
    /// Each `[slots, kv_heads, head_dim]`, f32.
    Device(Vec<Kv<Tensor>>),
}

/// One layer's keys and values.
pub(crate) struct Kv<T> {
    pub(crate) k: T,
    pub(crate) v: T,
}

impl KvCache {
    /// Room for `blocks` blocks of `block_tokens` token positions, all zero, on `device`.
    ///
    /// # Errors
    /// Where the device has not the memory.
    pub fn new(geometry: KvGeometry, blocks: usize, block_tokens: usize, device: &Device) -> Result<Self, ModelError> {
        let slots = blocks * block_tokens;
        let rows = if device.is_cpu() {
            let zeros = || vec![0.0; slots * geometry.row()];
            Rows::Host((0..geometry.layers).map(|_| Kv { k: zeros(), v: zeros() }).collect())
        } else {
            Self::on_device(geometry, slots, device)?
        };
        Ok(Self { geometry, blocks, block_tokens, rows })
    }

    fn on_device(geometry: KvGeometry, slots: usize, device: &Device) -> Result<Rows, ModelError> {
        let zeros = || Tensor::zeros((slots, geometry.kv_heads, geometry.head_dim), DType::F32, device);
        Ok(Rows::Device((0..geometry.layers).map(|_| Ok(Kv { k: zeros()?, v: zeros()? })).collect::<Result<_, candle_core::Error>>()?))
    }

    /// The tensor form on the CPU, so that what runs on other devices can be tested without one.
    #[cfg(test)]
    pub(crate) fn in_tensors(geometry: KvGeometry, blocks: usize, block_tokens: usize) -> Self {
        let rows = Self::on_device(geometry, blocks * block_tokens, &Device::Cpu).unwrap();
        Self { geometry, blocks, block_tokens, rows }
    }

    /// Its shape.
    pub fn geometry(&self) -> KvGeometry {
        self.geometry
    }

    /// Token positions in a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Keys and values of positions `start..start + count` of a sequence in one layer, each `[count, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where the layer or a position is not there.
    pub fn read(&self, layer: usize, blocks: &[BlockId], start: usize, count: usize) -> Result<(Vec<f32>, Vec<f32>), ModelError> {
        let row = self.geometry.row();
        let (mut k, mut v) = (Vec::with_capacity(count * row), Vec::with_capacity(count * row));
        let runs = self.runs(layer, blocks, start, count)?;
        match &self.rows {
            Rows::Host(layers) => {
                for (slot, n) in runs {
                    k.extend_from_slice(&layers[layer].k[slot * row..(slot + n) * row]);
                    v.extend_from_slice(&layers[layer].v[slot * row..(slot + n) * row]);
                }
            }
            Rows::Device(layers) => {
                let take = |rows: &Tensor, slot, n| rows.narrow(0, slot, n)?.flatten_all()?.to_vec1::<f32>();
                for (slot, n) in runs {
                    k.extend(take(&layers[layer].k, slot, n)?);
                    v.extend(take(&layers[layer].v, slot, n)?);
                }
            }
        }
        Ok((k, v))
    }

    /// Sets keys and values of positions `start..` of a sequence in one layer; `k` and `v` are `[count, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where sizes do not fit, or the layer or a position is not there.
    pub fn write(&mut self, layer: usize, blocks: &[BlockId], start: usize, k: &[f32], v: &[f32]) -> Result<(), ModelError> {
        let row = self.geometry.row();
        if k.len() != v.len() || !k.len().is_multiple_of(row) {
            return Err(ModelError::Mismatch(format!("{} key and {} value numbers are no rows of {row}", k.len(), v.len())));
        }
        let runs = self.runs(layer, blocks, start, k.len() / row)?;
        let mut from = 0;
        match &mut self.rows {
            Rows::Host(layers) => {
                for (slot, n) in runs {
                    layers[layer].k[slot * row..(slot + n) * row].copy_from_slice(&k[from..from + n * row]);
                    layers[layer].v[slot * row..(slot + n) * row].copy_from_slice(&v[from..from + n * row]);
                    from += n * row;
                }
            }
            Rows::Device(layers) => {
                let KvGeometry { kv_heads, head_dim, .. } = self.geometry;
                for (slot, n) in runs {
                    for (rows, values) in [(&layers[layer].k, k), (&layers[layer].v, v)] {
                        let values = Tensor::from_slice(&values[from..from + n * row], (n, kv_heads, head_dim), rows.device())?;
                        rows.slice_set(&values, 0, slot)?;
                    }
                    from += n * row;
                }
            }
        }
        Ok(())
    }

    /// Runs of consecutive slots `(first, count)` that hold positions `start..start + count`.
    pub(crate) fn runs(&self, layer: usize, blocks: &[BlockId], start: usize, count: usize) -> Result<Vec<(usize, usize)>, ModelError> {
        if layer >= self.geometry.layers {
            return Err(ModelError::Mismatch(format!("layer {layer} is asked for, the KV cache has {}", self.geometry.layers)));
        }
        let size = self.block_tokens;
        let end = start + count;
        if end > blocks.len() * size {
            return Err(ModelError::Mismatch(format!("position {end} is asked for, the block table covers {}", blocks.len() * size)));
        }
        let mut runs: Vec<(usize, usize)> = Vec::new();
        let mut position = start;
        while position < end {
            let block = blocks[position / size].0 as usize;
            if block >= self.blocks {
                return Err(ModelError::Mismatch(format!("block {block} is asked for, the KV cache has {}", self.blocks)));
            }
            let slot = block * size + position % size;
            let n = (size - position % size).min(end - position);
            match runs.last_mut() {
                Some((first, length)) if *first + *length == slot => *length += n,
                _ => runs.push((slot, n)),
            }
            position += n;
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: KvGeometry = KvGeometry { layers: 2, kv_heads: 2, head_dim: 4 };

    #[test]
    fn what_was_written_is_read_across_blocks() {
        let host = KvCache::new(GEOMETRY, 8, 4, &Device::Cpu).unwrap();
        for mut cache in [host, KvCache::in_tensors(GEOMETRY, 8, 4)] {
            let blocks = [BlockId(6), BlockId(1), BlockId(2)];
            let values = |n: usize, from: f32| (0..n * 8).map(|i| from + i as f32).collect::<Vec<_>>();
            cache.write(1, &blocks, 2, &values(9, 1.0), &values(9, 1000.0)).unwrap();
            let (k, v) = cache.read(1, &blocks, 2, 9).unwrap();
            assert_eq!((k, v), (values(9, 1.0), values(9, 1000.0)));
            let (k, _) = cache.read(1, &blocks, 4, 2).unwrap();
            assert_eq!(k, values(9, 1.0)[16..32]);
            let (k, _) = cache.read(0, &blocks, 0, 12).unwrap();
            assert!(k.iter().all(|x| *x == 0.0), "the other layer is untouched");
        }
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let mut cache = KvCache::new(GEOMETRY, 8, 4, &Device::Cpu).unwrap();
        assert!(cache.read(2, &[BlockId(0)], 0, 1).is_err());
        assert!(cache.read(0, &[BlockId(0)], 2, 3).is_err());
        assert!(cache.read(0, &[BlockId(8)], 0, 1).is_err());
        assert!(cache.write(0, &[BlockId(0)], 0, &[0.0; 7], &[0.0; 7]).is_err());
        assert!(cache.write(0, &[BlockId(0)], 0, &[0.0; 8], &[0.0; 16]).is_err());
    }
}
