//! How the rows of one handoff get to their decode node: in its frames, or from GPU to GPU beside them.

use bytes::Bytes;
use overfill_kv::BlockId;
use overfill_model::ModelError;
use overfill_nccl::{Gpu, GpuBytes};
use overfill_transport::push::nccl::{NoWay, Way};

use crate::compute::CachedRows;
use crate::rows::Piece;

/// Chosen when the prompt comes, by what both nodes offer.
#[derive(Clone)]
pub(crate) enum RowsWay {
    /// In the frames, over whatever connection these take; from the memory of this GPU, if they lie there as they travel, or are made so.
    Tcp { gpu: Option<Gpu> },
    /// Over a communicator of NCCL.
    Nccl {
        way: Way,
        /// Of so many frames one is read back from the GPU for its checksum; 0: none is.
        checksum_every: u32,
    },
}

/// Why the rows of a handoff go in its frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhyTcp {
    /// This node is not told to use NCCL.
    NotHere,
    /// The decode node is not, or not for this pair.
    NotThere,
    /// This node cannot have them in a GPU's memory as they travel.
    Format,
    /// The decode node is not known to discovery yet.
    Unknown,
    /// There is no communicator.
    NoWay(NoWay),
}

impl WhyTcp {
    /// Its name among metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::NotHere => "off",
            Self::NotThere => "not_offered",
            Self::Format => "format",
            Self::Unknown => "unknown_node",
            Self::NoWay(NoWay::Joining) => "joining",
            Self::NoWay(NoWay::Failed) => "failed",
            Self::NoWay(NoWay::TooMany) => "too_many",
        }
    }
}

/// Rows of a frame, as they leave the cache.
pub(crate) enum Carried {
    /// Keys and values.
    Host([Bytes; 2]),
    /// Keys before values in a GPU's memory, once what was computed before is.
    Gpu(GpuBytes),
}

impl Carried {
    /// Bytes of keys and values.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Host(rows) => rows.iter().map(Bytes::len).sum(),
            Self::Gpu(rows) => rows.len(),
        }
    }
}

impl RowsWay {
    /// A piece of the rows of a sequence, for this way. Of a GPU's nothing is waited for: they are copied there when they are computed.
    ///
    /// # Errors
    /// Where the cache does not have them, or the GPU fails.
    pub(crate) fn rows<C: CachedRows + ?Sized>(
        &self,
        cached: &mut C,
        pair: usize,
        blocks: &[BlockId],
        piece: Piece,
    ) -> Result<Carried, ModelError> {
        let gpu = match self {
            Self::Tcp { gpu } => gpu.as_ref(),
            Self::Nccl { way, .. } => Some(way.gpu()),
        };
        match gpu {
            Some(gpu) => cached.gather(gpu, pair, blocks, piece).map(Carried::Gpu),
            None => cached.bytes(pair, blocks, piece).map(Carried::Host),
        }
    }
}
