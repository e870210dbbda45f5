//! Many sequences read at once: what scoring and answering in bulk share.
//!
//! All sequences of a batch lie in one cache for each model, under the same block tables in all of them.

use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama, ModelError, Passage, Transform, Workspace};
use overfill_types::WireFormat;

/// Token positions in a block.
pub(crate) const BLOCK_TOKENS: usize = 16;
/// Prompt tokens in one forward pass: from some hundreds on a pass is bound by arithmetic, and more only take memory.
const PASS_TOKENS: usize = 512;

/// Who answers, with the models that it takes besides the full one.
#[derive(Clone, Copy)]
pub enum Arm<'m> {
    /// The full model itself.
    Full,
    /// A decode model that goes on from the full model's KV cache of the prompt.
    Overfill {
        /// Writes the answer.
        decode: &'m Llama,
        /// From the full model's cache to its own.
        transform: &'m Transform,
    },
    /// A model that reads the prompt itself: the decode model by itself, or a baseline.
    Alone(&'m Llama),
}

/// A prompt, and where its keys and values go.
#[derive(Clone, Copy)]
pub(crate) struct Prompt<'a> {
    pub(crate) tokens: &'a [u32],
    pub(crate) blocks: &'a [BlockId],
}

/// Where the full model's keys and values go besides its own cache.
pub(crate) struct Handoff<'a> {
    pub(crate) transform: &'a Transform,
    pub(crate) format: WireFormat,
    pub(crate) to: &'a mut KvCache,
}

/// A block table for each length, no block in two of them; and how many blocks there are.
pub(crate) fn tables(lengths: impl IntoIterator<Item = usize>) -> (Vec<Vec<BlockId>>, usize) {
    let mut next = 0;
    let tables = lengths.into_iter().map(|length| {
        let first = next;
        next += length.div_ceil(BLOCK_TOKENS);
        (first as u32..next as u32).map(BlockId).collect()
    });
    (tables.collect(), next)
}

/// Reads whole prompts into `cache`, and hands them over. No logits are computed.
pub(crate) fn read(
    model: &Llama,
    prompts: &[Prompt<'_>],
    cache: &mut KvCache,
    workspace: &mut Workspace,
    handoffs: &mut [Handoff<'_>],
) -> Result<(), ModelError> {
    let mut pass = Vec::new();
    let mut room = PASS_TOKENS;
    for prompt in prompts {
        let mut start = 0;
        while start < prompt.tokens.len() {
            let count = room.min(prompt.tokens.len() - start);
            pass.push(Chunk { tokens: &prompt.tokens[start..start + count], start, blocks: prompt.blocks, logits: false });
            start += count;
            room -= count;
            if room == 0 {
                run(model, &pass, cache, workspace, handoffs)?;
                pass.clear();
                room = PASS_TOKENS;
            }
        }
    }
    if pass.is_empty() { Ok(()) } else { run(model, &pass, cache, workspace, handoffs) }
}

fn run(
    model: &Llama,
    pass: &[Chunk<'_>],
    cache: &mut KvCache,
    workspace: &mut Workspace,
    handoffs: &mut [Handoff<'_>],
) -> Result<(), ModelError> {
    model.forward(pass, cache, workspace, &mut |layer, cache, pool| {
        for chunk in pass {
            for Handoff { transform, format, to } in handoffs.iter_mut() {
                let passage = Passage { format: *format, blocks: chunk.blocks, start: chunk.start, count: chunk.tokens.len() };
                transform.carry(pool, layer, passage, cache, to)?;
            }
        }
        Ok(())
    })?;
    Ok(())
}
