//! The KV cache: for each layer a run of slots, cut into blocks that sequences hold by their block tables.
//!
//! On the CPU it is plain memory in the layout that the attention kernel reads. On other devices it is a tensor for the
//! keys and one for the values of each layer.

use candle_core::{DType, Device, Tensor};
use overfill_kernels::{BLOCK_MULTIPLE, KvLayer, KvShape, Run, ThreadPool};
use overfill_kv::{BlockId, wire};
use overfill_nccl::Gpu;
use overfill_types::{KvFormat, KvGeometry, WireFormat};

use crate::error::ModelError;
use crate::gpu::transfer;

/// KV cache of one node, all sequences together.
///
/// Token position `p` of a sequence with block table `blocks` lies in `blocks[p / block_tokens]`. A row is
/// `[kv_heads, head_dim]`, keys after the rotary embedding. What is stored is rounded to the cache's format; attention
/// computes in f32.
pub struct KvCache {
    geometry: KvGeometry,
    format: KvFormat,
    blocks: usize,
    block_tokens: usize,
    rows: Storage,
    /// The one that it lies on, for copies to and from it.
    gpu: Option<Gpu>,
    /// Rows off the wire on their way to another format, kept so that none allocates.
    decoded: [Vec<f32>; 2],
}

/// Rows `[tokens, kv_heads, head_dim]` of one layer as they came over the wire: keys, and values.
#[derive(Clone, Copy)]
pub struct WireRows<'a> {
    /// How they are written.
    pub format: WireFormat,
    /// Position of the first in their sequence.
    pub start: usize,
    /// Keys.
    pub k: &'a [u8],
    /// Values.
    pub v: &'a [u8],
}

enum Storage {
    Host(Vec<KvLayer>),
    /// Of each layer what each device has of its KV heads.
    Devices(Vec<Vec<KvTensors>>),
}

/// One layer's keys and values on a device, of the KV heads that it has, each `[slots, kv_heads, head_dim]`.
pub(crate) struct KvTensors {
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
}

impl KvCache {
    /// Room for `blocks` blocks of `block_tokens` token positions, all zero, on `device`.
    ///
    /// # Errors
    /// Where the device has not the memory, or `block_tokens` is not a multiple of 16.
    pub fn new(geometry: KvGeometry, format: KvFormat, blocks: usize, block_tokens: usize, device: &Device) -> Result<Self, ModelError> {
        if block_tokens == 0 || !block_tokens.is_multiple_of(BLOCK_MULTIPLE) {
            return Err(ModelError::Mismatch(format!(
                "blocks of {block_tokens} token positions: a multiple of {BLOCK_MULTIPLE} is needed"
            )));
        }
        let format = held_as(format, device);
        let gpu = transfer::gpu(device)?;
        let rows = if device.is_cpu() {
            let stored = kernel_format(format);
            Storage::Host((0..geometry.layers).map(|_| KvLayer::new(shape(geometry, blocks, block_tokens), stored)).collect())
        } else {
            Self::on_devices(geometry, format, blocks * block_tokens, std::slice::from_ref(device))?
        };
        Ok(Self { geometry, format, blocks, block_tokens, rows, gpu, decoded: Default::default() })
    }

    /// The same, of a model that is split over several devices: each has as many of the KV heads.
    ///
    /// # Errors
    /// As [`KvCache::new`], and where the heads do not come out even.
    pub fn split(
        geometry: KvGeometry,
        format: KvFormat,
        blocks: usize,
        block_tokens: usize,
        devices: &[Device],
    ) -> Result<Self, ModelError> {
        if let [device] = devices {
            return Self::new(geometry, format, blocks, block_tokens, device);
        }
        if block_tokens == 0 || !block_tokens.is_multiple_of(BLOCK_MULTIPLE) || !geometry.kv_heads.is_multiple_of(devices.len()) {
            return Err(ModelError::Mismatch(format!(
                "blocks of {block_tokens} token positions, {} KV heads over {} devices: a multiple of {BLOCK_MULTIPLE} and as many for \
                 each are needed",
                geometry.kv_heads,
                devices.len()
            )));
        }
        let format = if format == KvFormat::Int8 { KvFormat::F16 } else { format };
        let gpu = None;
        let rows = Self::on_devices(geometry, format, blocks * block_tokens, devices)?;
        Ok(Self { geometry, format, blocks, block_tokens, rows, gpu, decoded: Default::default() })
    }

    fn on_devices(geometry: KvGeometry, format: KvFormat, slots: usize, devices: &[Device]) -> Result<Storage, ModelError> {
        let dtype = match format {
            KvFormat::F32 => DType::F32,
            KvFormat::F16 => DType::F16,
            KvFormat::Int8 => return Err(ModelError::Device("no kernel of a GPU reads int8 rows: they are held in f16 there".into())),
        };
        let zeros = |device| Tensor::zeros((slots, geometry.kv_heads / devices.len(), geometry.head_dim), dtype, device);
        let layer = || devices.iter().map(|device| Ok(KvTensors { k: zeros(device)?, v: zeros(device)? })).collect();
        Ok(Storage::Devices((0..geometry.layers).map(|_| layer()).collect::<Result<_, candle_core::Error>>()?))
    }

    /// The tensor form on the CPU, so that what runs on other devices can be tested without one.
    #[cfg(test)]
    pub(crate) fn in_tensors(geometry: KvGeometry, format: KvFormat, blocks: usize, block_tokens: usize) -> Self {
        Self::over_tensors(geometry, format, blocks, block_tokens, 1)
    }

    /// The same, split over so many devices, each of which is the CPU.
    #[cfg(test)]
    pub(crate) fn over_tensors(geometry: KvGeometry, format: KvFormat, blocks: usize, block_tokens: usize, parts: usize) -> Self {
        let rows = Self::on_devices(geometry, format, blocks * block_tokens, &vec![Device::Cpu; parts]).unwrap();
        let gpu = None;
        Self { geometry, format, blocks, block_tokens, rows, gpu, decoded: Default::default() }
    }

    /// Has the system give all of its memory now, while it is still empty, rather than as sequences first write to it.
    pub fn claim(&mut self, pool: &ThreadPool) {
        if let Storage::Host(layers) = &mut self.rows {
            layers.iter_mut().for_each(|layer| layer.claim(pool));
        }
    }

    /// Its shape.
    pub fn geometry(&self) -> KvGeometry {
        self.geometry
    }

    /// Token positions in a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Bytes of one token position in all layers.
    pub fn bytes_per_token(&self) -> usize {
        bytes_held(self.geometry, self.format)
    }

    /// Whether a block table covers `end` positions with blocks that are there.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] that names what is missing.
    pub(crate) fn check(&self, blocks: &[BlockId], end: usize) -> Result<(), ModelError> {
        let size = self.block_tokens;
        if end > blocks.len() * size {
            return Err(ModelError::Mismatch(format!("position {end} is asked for, the block table covers {}", blocks.len() * size)));
        }
        match blocks[..end.div_ceil(size)].iter().find(|b| b.0 as usize >= self.blocks) {
            Some(block) => Err(ModelError::Mismatch(format!("block {} is asked for, the KV cache has {}", block.0, self.blocks))),
            None => Ok(()),
        }
    }

    /// Keys and values of positions `start..start + count` of a sequence in one layer, each `[count, kv_heads, head_dim]`,
    /// put into `k` and `v`.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where the layer or a position is not there.
    pub fn read(
        &self,
        layer: usize,
        blocks: &[BlockId],
        start: usize,
        count: usize,
        k: &mut Vec<f32>,
        v: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        self.check_layer(layer)?;
        self.check(blocks, start + count)?;
        match &self.rows {
            Storage::Host(layers) => {
                k.resize(count * self.geometry.row(), 0.0);
                v.resize(count * self.geometry.row(), 0.0);
                layers[layer].read(Run { blocks: BlockId::numbers(blocks), start, tokens: count }, k, v);
            }
            Storage::Devices(layers) => {
                k.clear();
                v.clear();
                // `[n, kv_heads of all devices, head_dim]`
                let take = |rows: &[&Tensor], slot, n| {
                    let parts = rows.iter().map(|rows| rows.narrow(0, slot, n)?.to_dtype(DType::F32)?.to_device(&Device::Cpu));
                    Tensor::cat(&parts.collect::<Result<Vec<_>, candle_core::Error>>()?, 1)?.flatten_all()?.to_vec1::<f32>()
                };
                let (keys, values): (Vec<&Tensor>, Vec<&Tensor>) = layers[layer].iter().map(|rows| (&rows.k, &rows.v)).unzip();
                for (slot, n) in self.runs(layer, blocks, start, count)? {
                    k.extend(take(&keys, slot, n)?);
                    v.extend(take(&values, slot, n)?);
                }
            }
        }
        Ok(())
    }

    /// The same rows as [`wire::encode`] would give them in `format`, without converting a number;
    /// `None` where the cache does not hold them in that format in main memory.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where the layer or a position is not there.
    pub fn copy(
        &self,
        pool: &ThreadPool,
        format: WireFormat,
        layer: usize,
        blocks: &[BlockId],
        start: usize,
        count: usize,
    ) -> Result<Option<[Vec<u8>; 2]>, ModelError> {
        self.check_layer(layer)?;
        self.check(blocks, start + count)?;
        let Storage::Host(layers) = &self.rows else { return Ok(None) };
        if !is_same(self.format, format) {
            return Ok(None);
        }
        let bytes = count * wire::row_bytes(format, &self.geometry);
        let (mut k, mut v) = (vec![0; bytes], vec![0; bytes]);
        layers[layer].copy(pool, Run { blocks: BlockId::numbers(blocks), start, tokens: count }, &mut k, &mut v);
        Ok(Some([k, v]))
    }

    /// Sets keys and values of positions `start..` of a sequence in one layer; `k` and `v` are `[count, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where sizes do not fit, or the layer or a position is not there.
    pub fn write(
        &mut self,
        pool: &ThreadPool,
        layer: usize,
        blocks: &[BlockId],
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), ModelError> {
        let row = self.geometry.row();
        if k.len() != v.len() || !k.len().is_multiple_of(row) {
            return Err(ModelError::Mismatch(format!("{} key and {} value numbers are no rows of {row}", k.len(), v.len())));
        }
        self.check_layer(layer)?;
        let tokens = k.len() / row;
        self.check(blocks, start + tokens)?;
        let runs = self.runs(layer, blocks, start, tokens)?;
        match &mut self.rows {
            Storage::Host(layers) => layers[layer].write(pool, &[Run { blocks: BlockId::numbers(blocks), start, tokens }], k, v, row),
            Storage::Devices(layers) => {
                let KvGeometry { kv_heads, head_dim, .. } = self.geometry;
                let each = kv_heads / layers[layer].len();
                let mut from = 0;
                for (slot, n) in runs {
                    for (number, rows) in layers[layer].iter().enumerate() {
                        for (rows, values) in [(&rows.k, k), (&rows.v, v)] {
                            let values = Tensor::from_slice(&values[from..from + n * row], (n, kv_heads, head_dim), &Device::Cpu)?;
                            let values = values.narrow(1, number * each, each)?.contiguous()?.to_device(rows.device())?;
                            rows.slice_set(&values.to_dtype(rows.dtype())?, 0, slot)?;
                        }
                    }
                    from += n * row;
                }
            }
        }
        Ok(())
    }

    /// Sets keys and values of a sequence in one layer to rows off the wire: those of the cache's own format as they are.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where they are no whole rows, or the layer or a position is not there.
    pub fn write_wire(&mut self, pool: &ThreadPool, layer: usize, blocks: &[BlockId], rows: WireRows<'_>) -> Result<(), ModelError> {
        let WireRows { format, start, k, v } = rows;
        let row = wire::row_bytes(format, &self.geometry);
        if k.len() != v.len() || !k.len().is_multiple_of(row) {
            return Err(ModelError::Mismatch(format!("{} key and {} value bytes are no rows of {row}", k.len(), v.len())));
        }
        if is_same(self.format, format) && matches!(self.rows, Storage::Host(_)) {
            let tokens = k.len() / row;
            self.check_layer(layer)?;
            self.check(blocks, start + tokens)?;
            self.host_mut(layer)?.write_bytes(pool, Run { blocks: BlockId::numbers(blocks), start, tokens }, k, v);
            return Ok(());
        }
        if let Some(gpu) = self.gpu(format) {
            return self.put(format, layer, blocks, start, &mut gpu.copy_of(&[k, v])?);
        }
        let [mut keys, mut values] = std::mem::take(&mut self.decoded);
        wire::decode(format, &self.geometry, k, &mut keys);
        wire::decode(format, &self.geometry, v, &mut values);
        let written = self.write(pool, layer, blocks, start, &keys, &values);
        self.decoded = [keys, values];
        written
    }

    /// The GPU in whose memory rows lie as this format has them, or can be made so; `None` where they cannot, or lie on several.
    pub fn gpu(&self, format: WireFormat) -> Option<&Gpu> {
        self.gpu.as_ref().filter(|_| is_same(self.format, format) || format == WireFormat::Int8)
    }

    /// Runs of consecutive slots `(first, count)` that hold positions `start..start + count`.
    pub(crate) fn runs(&self, layer: usize, blocks: &[BlockId], start: usize, count: usize) -> Result<Vec<(usize, usize)>, ModelError> {
        self.check_layer(layer)?;
        let (size, end) = (self.block_tokens, start + count);
        self.check(blocks, end)?;
        let mut runs: Vec<(usize, usize)> = Vec::new();
        let mut position = start;
        while position < end {
            let slot = blocks[position / size].0 as usize * size + position % size;
            let n = (size - position % size).min(end - position);
            match runs.last_mut() {
                Some((first, length)) if *first + *length == slot => *length += n,
                _ => runs.push((slot, n)),
            }
            position += n;
        }
        Ok(runs)
    }

    /// One layer in main memory.
    pub(crate) fn host(&self, layer: usize) -> Result<&KvLayer, ModelError> {
        match &self.rows {
            Storage::Host(layers) => Ok(&layers[layer]),
            Storage::Devices(_) => Err(elsewhere("in main memory", "on a device")),
        }
    }

    /// One layer in main memory.
    pub(crate) fn host_mut(&mut self, layer: usize) -> Result<&mut KvLayer, ModelError> {
        match &mut self.rows {
            Storage::Host(layers) => Ok(&mut layers[layer]),
            Storage::Devices(_) => Err(elsewhere("in main memory", "on a device")),
        }
    }

    /// What the device of a part of the model has of a layer.
    pub(crate) fn tensors(&self, layer: usize, part: usize) -> Result<&KvTensors, ModelError> {
        match &self.rows {
            Storage::Devices(layers) => layers[layer].get(part).ok_or_else(|| elsewhere("split over devices", "over fewer of them")),
            Storage::Host(_) => Err(elsewhere("on a device", "in main memory")),
        }
    }

    fn check_layer(&self, layer: usize) -> Result<(), ModelError> {
        if layer < self.geometry.layers {
            return Ok(());
        }
        Err(ModelError::Mismatch(format!("layer {layer} is asked for, the KV cache has {}", self.geometry.layers)))
    }
}

/// Bytes of one token position in all layers of a pair's cache on `device`.
pub fn bytes_per_token(geometry: KvGeometry, format: KvFormat, device: &Device) -> usize {
    bytes_held(geometry, held_as(format, device))
}

/// What a device holds the cache of a pair in: GPUs, whose kernels read no int8 rows, hold them in f16.
fn held_as(format: KvFormat, device: &Device) -> KvFormat {
    match format {
        KvFormat::Int8 if !device.is_cpu() => KvFormat::F16,
        format => format,
    }
}

fn bytes_held(geometry: KvGeometry, format: KvFormat) -> usize {
    geometry.layers * KvLayer::bytes_per_token(shape(geometry, 1, BLOCK_MULTIPLE), kernel_format(format))
}

fn shape(geometry: KvGeometry, blocks: usize, block_tokens: usize) -> KvShape {
    KvShape { kv_heads: geometry.kv_heads, head_dim: geometry.head_dim, block_tokens, blocks }
}

fn kernel_format(format: KvFormat) -> overfill_kernels::KvFormat {
    match format {
        KvFormat::F32 => overfill_kernels::KvFormat::F32,
        KvFormat::F16 => overfill_kernels::KvFormat::F16,
        KvFormat::Int8 => overfill_kernels::KvFormat::Int8,
    }
}

/// Whether the wire has the cache's own numbers.
fn is_same(cache: KvFormat, wire: WireFormat) -> bool {
    matches!((cache, wire), (KvFormat::F32, WireFormat::F32) | (KvFormat::F16, WireFormat::F16) | (KvFormat::Int8, WireFormat::Int8))
}

fn elsewhere(model: &str, cache: &str) -> ModelError {
    ModelError::Mismatch(format!("the model is {model}, the KV cache {cache}"))
}

#[cfg(test)]
mod tests {
    use overfill_kv::wire::encode;

    use super::*;

    const GEOMETRY: KvGeometry = KvGeometry { layers: 2, kv_heads: 2, head_dim: 4 };

    #[test]
    fn what_was_written_is_read_across_blocks() {
        let pool = ThreadPool::new(1, &[]).unwrap();
        for format in [KvFormat::F32, KvFormat::F16] {
            let host = KvCache::new(GEOMETRY, format, 8, 16, &Device::Cpu).unwrap();
            for mut cache in [host, KvCache::in_tensors(GEOMETRY, format, 8, 16)] {
                let blocks = [BlockId(6), BlockId(1), BlockId(2)];
                let values = |n: usize, from: f32| (0..n * 8).map(|i| from + i as f32).collect::<Vec<_>>();
                let (mut k, mut v) = (Vec::new(), Vec::new());
                cache.write(&pool, 1, &blocks, 10, &values(29, 1.0), &values(29, 1000.0)).unwrap();
                cache.read(1, &blocks, 10, 29, &mut k, &mut v).unwrap();
                assert!(k == values(29, 1.0) && v == values(29, 1000.0), "{format:?}");
                cache.read(1, &blocks, 15, 2, &mut k, &mut v).unwrap();
                assert_eq!(k, values(29, 1.0)[40..56]);
                cache.read(0, &blocks, 0, 48, &mut k, &mut v).unwrap();
                assert!(k.iter().all(|x| *x == 0.0), "the other layer is untouched");
            }
        }
    }

    #[test]
    fn a_copy_is_what_would_be_encoded() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        let blocks = [BlockId(6), BlockId(1), BlockId(2)];
        let values = |from: f32| (0..29 * 8).map(|i| from + i as f32 / 7.0).collect::<Vec<_>>();
        for (format, wire) in [(KvFormat::F32, WireFormat::F32), (KvFormat::F16, WireFormat::F16)] {
            let mut cache = KvCache::new(GEOMETRY, format, 8, 16, &Device::Cpu).unwrap();
            cache.write(&pool, 1, &blocks, 10, &values(-9.0), &values(1000.0)).unwrap();
            let (mut k, mut v) = (Vec::new(), Vec::new());
            cache.read(1, &blocks, 12, 25, &mut k, &mut v).unwrap();
            let copied = cache.copy(&pool, wire, 1, &blocks, 12, 25).unwrap().unwrap();
            assert_eq!(copied, [k, v].map(|rows| encode(wire, &GEOMETRY, &rows).to_vec()));
            for other in [WireFormat::F32, WireFormat::F16, WireFormat::Bf16, WireFormat::Int8] {
                assert_eq!(cache.copy(&pool, other, 1, &blocks, 12, 25).unwrap().is_some(), other == wire);
            }
            assert!(cache.copy(&pool, wire, 2, &blocks, 12, 25).is_err());
            assert!(cache.copy(&pool, wire, 1, &blocks, 47, 2).is_err());
        }
        let tensors = KvCache::in_tensors(GEOMETRY, KvFormat::F32, 8, 16);
        assert!(tensors.copy(&pool, WireFormat::F32, 1, &blocks, 12, 25).unwrap().is_none());
    }

    #[test]
    fn int8_rows_travel_as_they_are() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        let blocks = [BlockId(6), BlockId(1), BlockId(2)];
        let numbers: Vec<f32> = (0..29 * 8).map(|i| (i * 7919 % 1013) as f32 * 0.37 - 180.0).collect();
        let other: Vec<f32> = numbers.iter().map(|x| x * -0.71).collect();
        let new = || KvCache::new(GEOMETRY, KvFormat::Int8, 8, 16, &Device::Cpu).unwrap();
        let (mut here, mut there) = (new(), new());
        here.write(&pool, 1, &blocks, 10, &numbers, &other).unwrap();
        let copied = here.copy(&pool, WireFormat::Int8, 1, &blocks, 10, 29).unwrap().unwrap();
        assert_eq!(copied, [&numbers, &other].map(|rows| encode(WireFormat::Int8, &GEOMETRY, rows).to_vec()));
        there.write_wire(&pool, 1, &blocks, WireRows { format: WireFormat::Int8, start: 3, k: &copied[0], v: &copied[1] }).unwrap();
        assert_eq!(there.copy(&pool, WireFormat::Int8, 1, &blocks, 3, 29).unwrap().unwrap(), copied);
    }

    #[test]
    fn rows_off_the_wire_are_what_they_are_decoded_to() {
        let pool = ThreadPool::new(2, &[]).unwrap();
        let blocks = [BlockId(6), BlockId(1), BlockId(2)];
        let numbers: Vec<f32> = (0..29 * 8).map(|i| (i * 7919 % 1013) as f32 * 0.37 - 180.0).collect();
        let other: Vec<f32> = numbers.iter().map(|x| x * -0.71).collect();
        for cached in [KvFormat::F32, KvFormat::F16] {
            for format in [WireFormat::F32, WireFormat::F16, WireFormat::Bf16, WireFormat::Int8] {
                let host = || KvCache::new(GEOMETRY, cached, 8, 16, &Device::Cpu).unwrap();
                let (k, v) = (wire::encode(format, &GEOMETRY, &numbers), wire::encode(format, &GEOMETRY, &other));
                let (mut keys, mut values) = (Vec::new(), Vec::new());
                assert!(wire::decode(format, &GEOMETRY, &k, &mut keys) && wire::decode(format, &GEOMETRY, &v, &mut values));
                let mut want = host();
                want.write(&pool, 1, &blocks, 10, &keys, &values).unwrap();
                for mut got in [host(), KvCache::in_tensors(GEOMETRY, cached, 8, 16)] {
                    got.write_wire(&pool, 1, &blocks, WireRows { format, start: 10, k: &k, v: &v }).unwrap();
                    let read = |cache: &KvCache| {
                        let (mut k, mut v) = (Vec::new(), Vec::new());
                        cache.read(1, &blocks, 0, 48, &mut k, &mut v).unwrap();
                        k.into_iter().chain(v).map(f32::to_bits).collect::<Vec<_>>()
                    };
                    assert_eq!(read(&got), read(&want), "{format} into {cached:?}");
                    assert!(got.write_wire(&pool, 1, &blocks, WireRows { format, start: 10, k: &k[1..], v: &v[1..] }).is_err());
                    assert!(got.write_wire(&pool, 1, &blocks, WireRows { format, start: 20, k: &k, v: &v }).is_err());
                    assert!(got.write_wire(&pool, 2, &blocks, WireRows { format, start: 0, k: &k, v: &v }).is_err());
                }
            }
        }
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let pool = ThreadPool::new(1, &[]).unwrap();
        let mut cache = KvCache::new(GEOMETRY, KvFormat::F32, 8, 16, &Device::Cpu).unwrap();
        let (mut k, mut v) = (Vec::new(), Vec::new());
        assert!(cache.read(2, &[BlockId(0)], 0, 1, &mut k, &mut v).is_err());
        assert!(cache.read(0, &[BlockId(0)], 14, 3, &mut k, &mut v).is_err());
        assert!(cache.read(0, &[BlockId(8)], 0, 1, &mut k, &mut v).is_err());
        assert!(cache.write(&pool, 0, &[BlockId(0)], 0, &[0.0; 7], &[0.0; 7]).is_err());
        assert!(cache.write(&pool, 0, &[BlockId(0)], 0, &[0.0; 8], &[0.0; 16]).is_err());
        assert!(KvCache::new(GEOMETRY, KvFormat::F32, 8, 20, &Device::Cpu).is_err());
    }
}
