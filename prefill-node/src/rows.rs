//! Rows on their way out: from the full model's cache, through the KV transform, to the bytes of a frame.

use bytes::Bytes;
use overfill_kv::{BlockId, wire};
use overfill_model::{KvCache, ModelError, ThreadPool, Transform};
use overfill_nccl::{Gpu, GpuBytes};
use overfill_types::{Code, KvGeometry, ServiceError, WireFormat};

/// Rows of one decode-model layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Layer of the decode model.
    pub layer: usize,
    /// Position of the first token.
    pub start: usize,
    /// How many there are.
    pub tokens: usize,
}

/// Makes rows of the full model's cache into rows of the decode model, as they travel.
pub(crate) struct RowProjector {
    transform: Transform,
    /// The full model's layer that feeds each of the decode model's.
    sources: Vec<usize>,
    /// The decode model's.
    geometry: KvGeometry,
    wire: WireFormat,
    /// Rows that have to be converted, kept so that none allocates.
    k: Vec<f32>,
    v: Vec<f32>,
}

impl RowProjector {
    /// From a full model with `layers` layers to a decode model of this geometry.
    pub(crate) fn new(transform: Transform, layers: usize, geometry: KvGeometry, wire: WireFormat) -> Self {
        let mut sources = vec![0; geometry.layers];
        for source in 0..layers {
            transform.targets(source).iter().for_each(|&target| sources[target] = source);
        }
        Self { transform, sources, geometry, wire, k: Vec::new(), v: Vec::new() }
    }

    /// Decode-model layers that the full model's `layer` feeds.
    pub(crate) fn targets(&self, layer: usize) -> &[usize] {
        self.transform.targets(layer)
    }

    /// The GPU in whose memory rows lie as they travel, or are made so.
    pub(crate) fn gpu<'c>(&self, cache: &'c KvCache) -> Option<&'c Gpu> {
        if self.transform.is_copy() { cache.gpu(self.wire) } else { None }
    }

    /// As [`Self::bytes`], keys before values in memory of `gpu`.
    ///
    /// # Errors
    /// Where the cache does not have them, or not there.
    pub(crate) fn gather(&self, cache: &KvCache, gpu: &Gpu, blocks: &[BlockId], piece: Piece) -> Result<GpuBytes, ModelError> {
        cache.gather(gpu, self.wire, self.sources[piece.layer], blocks, piece.start, piece.tokens)
    }

    /// Keys and values of a piece of the sequence that has `blocks`, each `[tokens, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// Where the cache does not have them.
    pub(crate) fn bytes(&mut self, cache: &KvCache, pool: &ThreadPool, blocks: &[BlockId], piece: Piece) -> Result<[Bytes; 2], ModelError> {
        let Piece { layer, start, tokens } = piece;
        let source = self.sources[layer];
        if self.transform.is_copy()
            && let Some(rows) = cache.copy(pool, self.wire, source, blocks, start, tokens)?
        {
            return Ok(rows.map(Bytes::from));
        }
        cache.read(source, blocks, start, tokens, &mut self.k, &mut self.v)?;
        self.transform.apply(pool, layer, &mut self.k)?;
        self.transform.apply(pool, layer, &mut self.v)?;
        Ok([&self.k, &self.v].map(|rows| wire::encode(self.wire, &self.geometry, rows)))
    }
}

/// Rows of a GPU, with what they are once they are computed. Waits beside the threads that serve.
///
/// # Errors
/// Where the GPU fails.
pub(crate) async fn read(rows: GpuBytes) -> Result<(GpuBytes, Vec<u8>), ServiceError> {
    let failed = |why: String| ServiceError::of_node(Code::Internal, format!("rows cannot be read from the GPU: {why}"));
    let reading = tokio::task::spawn_blocking(move || {
        let mut rows = rows;
        rows.read().map(|read| (rows, read))
    });
    reading.await.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))
}

/// Keys and values, of keys before values.
pub(crate) fn halves(mut both: Bytes) -> [Bytes; 2] {
    let values = both.split_off(both.len() / 2);
    [both, values]
}
