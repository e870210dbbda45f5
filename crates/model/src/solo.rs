//! Both halves of a pair in one process, without a network: the plain reference that the cluster must agree with.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use overfill_kernels::ThreadPool;
use overfill_kv::BlockId;
use overfill_types::{FinishReason, KvFormats, Quality, SamplingParams, StopConditions};

use crate::cache::KvCache;
use crate::error::ModelError;
use crate::llama::Llama;
use crate::pair::Pair;
use crate::pass::Chunk;
use crate::sample::{Sampled, Sampler};
use crate::transform::{Passage, Transform};
use crate::workspace::Workspace;

/// Token positions in a block.
const BLOCK_TOKENS: usize = 16;
/// Prompt tokens in one forward pass.
const CHUNK_TOKENS: usize = 256;

/// A loaded pair that answers one prompt at a time.
pub struct Solo {
    full: Llama,
    decode: Llama,
    transform: Transform,
    formats: KvFormats,
    quality: Quality,
    eos: Vec<u32>,
    workspace: Workspace,
}

/// How an answer came to be.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// Why it ended; `None` if the caller broke it off.
    pub finish: Option<FinishReason>,
    /// From the call to the first token.
    pub time_to_first: Duration,
    /// From the first token to the last.
    pub time_of_rest: Duration,
}

impl Solo {
    /// Loads both models of a pair; `pool` computes.
    ///
    /// # Errors
    /// Where a model or the transform cannot be loaded.
    pub fn load(pair: &Pair, device: &candle_core::Device, pool: ThreadPool) -> Result<Self, ModelError> {
        Ok(Self {
            full: pair.load_full(device, &pool)?,
            decode: pair.load_decode(device, &pool)?,
            transform: pair.load_transform(&pool)?,
            formats: pair.manifest.kv_formats,
            quality: Quality::default(),
            eos: pair.manifest.tokenizer.eos_token_ids.clone(),
            workspace: Workspace::new(pool),
        })
    }

    /// The same, with answers that these models write.
    #[must_use]
    pub fn writing(mut self, quality: Quality) -> Self {
        self.quality = quality;
        self
    }

    /// Answers `prompt` (not empty, fitting the context together with `max_tokens`: see `overfill_types::Limits`).
    ///
    /// `on_token` is called with each token as it is written and can break the answer off.
    ///
    /// # Errors
    /// Where a forward pass fails.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        sampling: &SamplingParams,
        stop: &StopConditions,
        mut on_token: impl FnMut(&Sampled) -> ControlFlow<()>,
    ) -> Result<Answer, ModelError> {
        let begun = Instant::now();
        let needed = (prompt.len() + stop.max_tokens).div_ceil(BLOCK_TOKENS);
        let blocks: Vec<BlockId> = (0..needed as u32).map(BlockId).collect();
        let mut sampler = Sampler::new(sampling.clone(), prompt);
        let alone = self.quality != Quality::Overfill;
        let kv = if self.quality == Quality::Full { self.full.config().kv } else { self.decode.config().kv };
        let mut cache = KvCache::new(kv, self.formats.cache, needed, BLOCK_TOKENS, self.decode.device())?;
        if !alone {
            self.prefill(prompt, &blocks, &mut cache)?;
        }
        let Self { full, decode, workspace, eos, .. } = self;
        let writer = if self.quality == Quality::Full { full } else { decode };
        for (i, tokens) in prompt.chunks(CHUNK_TOKENS).enumerate().filter(|_| alone) {
            let start = i * CHUNK_TOKENS;
            let chunk = Chunk { tokens, start, blocks: &blocks, logits: start + tokens.len() == prompt.len() };
            writer.forward(&[chunk], &mut cache, workspace, &mut |_, _, _| Ok(()))?;
        }

        let mut written = 0;
        let mut first_at = None;
        loop {
            let sampled = workspace.sample([(&mut sampler, prompt.len() + written)]).pop().flatten().ok_or(ModelError::Sampling)?;
            written += 1;
            let first_at = *first_at.get_or_insert_with(Instant::now);
            let broken_off = on_token(&sampled).is_break();
            let finish = stop.after(sampled.token, written, eos);
            if broken_off || finish.is_some() {
                return Ok(Answer {
                    finish: finish.filter(|_| !broken_off),
                    time_to_first: first_at - begun,
                    time_of_rest: first_at.elapsed(),
                });
            }
            let start = prompt.len() + written - 1;
            let step = [Chunk { tokens: &[sampled.token], start, blocks: &blocks, logits: true }];
            writer.forward(&step, &mut cache, workspace, &mut |_, _, _| Ok(()))?;
        }
    }

    /// The full model reads the prompt; its KV cache goes into the decode model's, transformed, as it would over the wire.
    /// Leaves the full model's logits in the workspace.
    fn prefill(&mut self, prompt: &[u32], blocks: &[BlockId], to: &mut KvCache) -> Result<(), ModelError> {
        let needed = prompt.len().div_ceil(BLOCK_TOKENS);
        let mut cache = KvCache::new(self.full.config().kv, self.formats.cache, needed, BLOCK_TOKENS, self.full.device())?;
        for (i, tokens) in prompt.chunks(CHUNK_TOKENS).enumerate() {
            let start = i * CHUNK_TOKENS;
            let chunk = Chunk { tokens, start, blocks: &blocks[..needed], logits: start + tokens.len() == prompt.len() };
            self.full.forward(&[chunk], &mut cache, &mut self.workspace, &mut |layer, cache, pool| {
                let passage = Passage { format: self.formats.wire, blocks, start, count: tokens.len() };
                self.transform.carry(pool, layer, passage, cache, to)
            })?;
        }
        Ok(())
    }
}
