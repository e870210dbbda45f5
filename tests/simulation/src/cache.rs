//! The KV cache of a model of this simulation: blocks of rows, each row a number.
//!
//! **Invariant:** it is no more forgiving than a real one. What lies in a block stays there until it is written over, whoever
//! holds the block; a row that was never written, or that came over the wire out of shape, is [`NO_ROW`].

use bytes::Bytes;
use overfill_kv::{BlockId, wire};
use overfill_model::ModelError;
use overfill_nccl::{Gpu, GpuBytes};
use overfill_prefill_node::{CachedRows, Piece};
use overfill_types::{KvGeometry, WireFormat};

/// What no model computes.
pub const NO_ROW: u64 = 0;

/// Rows of all layers, in blocks.
pub struct Cache {
    geometry: KvGeometry,
    wire: WireFormat,
    block_tokens: usize,
    /// `[blocks, block_tokens, layers]`
    rows: Vec<u64>,
    /// The numbers of the layers: each layer of the one model feeds the same of the other.
    layers: Vec<usize>,
}

impl Cache {
    /// Of so many blocks, in which nothing was written.
    pub fn new(geometry: KvGeometry, wire: WireFormat, blocks: u32, block_tokens: usize) -> Self {
        let rows = vec![NO_ROW; blocks as usize * block_tokens * geometry.layers];
        Self { geometry, wire, block_tokens, rows, layers: (0..geometry.layers).collect() }
    }

    /// How many layers there are.
    pub fn layers(&self) -> usize {
        self.geometry.layers
    }

    /// The row of a position of the sequence that has `blocks`.
    pub fn row(&self, layer: usize, blocks: &[BlockId], position: usize) -> u64 {
        self.rows[self.slot(layer, blocks, position)]
    }

    /// Writes it.
    pub fn set(&mut self, layer: usize, blocks: &[BlockId], position: usize, row: u64) {
        let slot = self.slot(layer, blocks, position);
        self.rows[slot] = row;
    }

    /// Writes keys and values of positions from `start` on as they came over the wire.
    pub fn write(&mut self, layer: usize, blocks: &[BlockId], start: usize, k: &[u8], v: &[u8]) {
        let size = wire::row_bytes(self.wire, &self.geometry);
        for (i, (k, v)) in k.chunks(size).zip(v.chunks(size)).enumerate() {
            let carried = k.first_chunk().map_or(NO_ROW, |bytes| u64::from_le_bytes(*bytes));
            let [keys, values] = self.carried(carried);
            self.set(layer, blocks, start + i, if k == keys && v == values { carried } else { NO_ROW });
        }
    }

    /// The keys and values that carry a row: its bytes again and again, and those of its complement.
    fn carried(&self, row: u64) -> [Vec<u8>; 2] {
        let size = wire::row_bytes(self.wire, &self.geometry);
        [row, !row].map(|number| number.to_le_bytes().into_iter().cycle().take(size).collect())
    }

    fn slot(&self, layer: usize, blocks: &[BlockId], position: usize) -> usize {
        let block = blocks[position / self.block_tokens].0 as usize;
        (block * self.block_tokens + position % self.block_tokens) * self.geometry.layers + layer
    }
}

impl CachedRows for &Cache {
    fn targets(&self, _pair: usize, layer: usize) -> &[usize] {
        &self.layers[layer..=layer]
    }

    fn bytes(&mut self, _pair: usize, blocks: &[BlockId], piece: Piece) -> Result<[Bytes; 2], ModelError> {
        let Piece { layer, start, tokens } = piece;
        let rows = (start..start + tokens).map(|position| self.carried(self.row(layer, blocks, position)));
        let (k, v): (Vec<_>, Vec<_>) = rows.map(|[k, v]| (k, v)).unzip();
        Ok([k.concat().into(), v.concat().into()])
    }

    fn gather(&mut self, gpu: &Gpu, pair: usize, blocks: &[BlockId], piece: Piece) -> Result<GpuBytes, ModelError> {
        let [k, v] = self.bytes(pair, blocks, piece)?;
        Ok(gpu.copy_of(&[&k, &v])?)
    }
}
