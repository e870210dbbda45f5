//! Both halves of a pair in one process, without a network: the plain reference that the cluster must agree with.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use overfill_kv::BlockId;
use overfill_types::{FinishReason, SamplingParams, StopConditions};

use crate::cache::KvCache;
use crate::error::ModelError;
use crate::llama::{Chunk, Llama};
use crate::pair::Pair;
use crate::sample::{Sampled, Sampler};
use crate::threads::Threads;
use crate::transform::Transform;

/// Token positions in a block.
const BLOCK_TOKENS: usize = 16;
/// Prompt tokens in one forward pass.
const CHUNK_TOKENS: usize = 256;

/// A loaded pair that answers one prompt at a time.
pub struct Solo {
    full: Llama,
    decode: Llama,
    transform: Transform,
    eos: Vec<u32>,
    threads: Threads,
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
    /// Loads both models of a pair.
    ///
    /// # Errors
    /// Where a model or the transform cannot be loaded.
    pub fn load(pair: &Pair, device: &candle_core::Device, threads: Threads) -> Result<Self, ModelError> {
        let (full, decode) = threads.run(|| Ok::<_, ModelError>((pair.load_full(device)?, pair.load_decode(device)?)))?;
        Ok(Self { full, decode, transform: pair.load_transform()?, eos: pair.manifest.tokenizer.eos_token_ids.clone(), threads })
    }

    /// Answers `prompt` (not empty, fitting the context together with `max_tokens`: see `overfill_types::Limits`).
    ///
    /// `on_token` is called with each token as it is written and can break the answer off.
    ///
    /// # Errors
    /// Where a forward pass fails.
    pub fn generate(
        &self,
        prompt: &[u32],
        sampling: &SamplingParams,
        stop: &StopConditions,
        mut on_token: impl FnMut(&Sampled) -> ControlFlow<()> + Send,
    ) -> Result<Answer, ModelError> {
        self.threads.run(|| {
            let begun = Instant::now();
            let needed = (prompt.len() + stop.max_tokens).div_ceil(BLOCK_TOKENS);
            let blocks: Vec<BlockId> = (0..needed as u32).map(BlockId).collect();
            let mut sampler = Sampler::new(sampling.clone(), prompt);
            let mut cache = KvCache::new(self.decode.config().kv, needed, BLOCK_TOKENS, self.decode.device())?;
            let mut logits = self.prefill(prompt, &blocks, &mut cache)?;

            let mut written = 0;
            let mut first_at = None;
            loop {
                let sampled = sampler.sample(&mut logits, prompt.len() + written);
                written += 1;
                let first_at = *first_at.get_or_insert_with(Instant::now);
                let broken_off = on_token(&sampled).is_break();
                let finish = stop.after(sampled.token, written, &self.eos);
                if broken_off || finish.is_some() {
                    return Ok(Answer {
                        finish: finish.filter(|_| !broken_off),
                        time_to_first: first_at - begun,
                        time_of_rest: first_at.elapsed(),
                    });
                }
                let start = prompt.len() + written - 1;
                let step = [Chunk { tokens: &[sampled.token], start, blocks: &blocks, logits: true }];
                logits = only(self.decode.forward(&step, &mut cache, &mut |_, _| Ok(()))?)?;
            }
        })
    }

    /// The full model reads the prompt; its KV cache, transformed, goes into the decode model's. Gives the full model's logits.
    fn prefill(&self, prompt: &[u32], blocks: &[BlockId], to: &mut KvCache) -> Result<Vec<f32>, ModelError> {
        let needed = prompt.len().div_ceil(BLOCK_TOKENS);
        let mut cache = KvCache::new(self.full.config().kv, needed, BLOCK_TOKENS, self.full.device())?;
        let mut logits = Vec::new();
        for (i, tokens) in prompt.chunks(CHUNK_TOKENS).enumerate() {
            let start = i * CHUNK_TOKENS;
            let chunk = Chunk { tokens, start, blocks: &blocks[..needed], logits: start + tokens.len() == prompt.len() };
            logits = self.full.forward(&[chunk], &mut cache, &mut |layer, cache| {
                for &target in self.transform.targets(layer) {
                    let (k, v) = cache.read(layer, blocks, start, tokens.len())?;
                    to.write(target, blocks, start, &self.transform.apply(target, k)?, &self.transform.apply(target, v)?)?;
                }
                Ok(())
            })?;
        }
        only(logits)
    }
}

/// The logits of the one chunk that asked for them.
fn only(mut logits: Vec<Vec<f32>>) -> Result<Vec<f32>, ModelError> {
    logits.pop().ok_or_else(|| ModelError::Mismatch("a forward pass gave no logits".into()))
}
