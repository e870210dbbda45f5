//! How the rows of one handoff get to their decode node: in its frames, or from GPU to GPU beside them.

use bytes::Bytes;
use overfill_kv::BlockId;
use overfill_model::ModelError;
use overfill_nccl::GpuBytes;
use overfill_transport::push::nccl::{NoWay, Way};

use crate::compute::CachedRows;
use crate::rows::Piece;

/// Chosen when the prompt comes, by what both nodes offer.
#[derive(Clone)]
pub(crate) enum RowsWay {
    /// In the frames, over whatever connection these take.
    Tcp,
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
    /// This node does not have them in a GPU's memory as they travel.
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

/// Rows of a frame, as its way takes them.
pub(crate) enum Carried {
    /// Keys and values.
    Host([Bytes; 2]),
    /// Both in a GPU's memory; `seen` is what lies there, where the frame has a checksum of it.
    Gpu { rows: GpuBytes, seen: Option<Vec<u8>> },
}

impl RowsWay {
    /// The communicator's name in frames; empty where there is none.
    pub(crate) fn communicator(&self) -> &str {
        match self {
            Self::Tcp => "",
            Self::Nccl { way, .. } => way.communicator(),
        }
    }

    /// A piece of the rows of a sequence, for this way.
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
        let Self::Nccl { way, checksum_every } = self else { return cached.bytes(pair, blocks, piece).map(Carried::Host) };
        let mut rows = cached.gather(way.gpu(), pair, blocks, piece)?;
        let chosen = *checksum_every > 0 && rand::random_ratio(1, *checksum_every);
        let seen = if chosen { Some(rows.read()?) } else { None };
        Ok(Carried::Gpu { rows, seen })
    }
}
