//! The forward pass of a Llama and its kin ([`Family`](crate::Family)).
//!
//! One pass reads any mix of prompt chunks and single tokens of any sequences. Their tokens are rows of one matrix in all
//! but the attention, so weights are read once for all of them.

use std::path::Path;

use candle_core::Device;
use overfill_kernels::ThreadPool;
use overfill_types::pair::WeightFormat;

use crate::cache::KvCache;
use crate::config::LlamaConfig;
use crate::cpu::CpuLlama;
use crate::error::ModelError;
use crate::gpu::GpuLlama;
use crate::pass::{Chunk, OnLayer, Pass};
use crate::rope::Rotary;
use crate::weights::Weights;
use crate::workspace::{Logits, Workspace};

/// A Llama, or one of its kin, on one device or split over several.
pub struct Llama {
    config: LlamaConfig,
    device: Device,
    rotary: Rotary,
    weights: Form,
}

enum Form {
    /// Packed for our kernels.
    Cpu(CpuLlama),
    /// Tensors of another device.
    Gpu(GpuLlama),
}

impl Llama {
    /// Loads a Hugging Face folder or a `.gguf` file; `pool` packs the weights.
    ///
    /// # Errors
    /// [`ModelError::Read`] and [`ModelError::Format`] where the files are not there or not whole, naming the tensor.
    pub fn load(path: &Path, format: WeightFormat, device: &Device, pool: &ThreadPool) -> Result<Self, ModelError> {
        Self::of(&Weights::open(path)?, format, device, pool)
    }

    /// Of opened weights; `pool` packs them.
    ///
    /// # Errors
    /// [`ModelError::Read`] and [`ModelError::Format`] where a tensor cannot be read.
    pub fn of(weights: &Weights, format: WeightFormat, device: &Device, pool: &ThreadPool) -> Result<Self, ModelError> {
        let form = if device.is_cpu() {
            Form::Cpu(CpuLlama::load(weights, format, pool)?)
        } else {
            Form::Gpu(GpuLlama::load(weights, format, std::slice::from_ref(device))?)
        };
        Ok(Self::new(weights, device, form))
    }

    /// Loads it split over several GPUs of this machine, which compute a pass together.
    ///
    /// # Errors
    /// As [`Llama::load`], and where it cannot be split so, or the GPUs are not connected.
    pub fn split(path: &Path, format: WeightFormat, devices: &[Device]) -> Result<Self, ModelError> {
        let Some(first) = devices.first() else { return Err(ModelError::Device("a model is on one device at least".into())) };
        let weights = Weights::open(path)?;
        let form = Form::Gpu(GpuLlama::load(&weights, format, devices)?);
        Ok(Self::new(&weights, first, form))
    }

    fn new(weights: &Weights, device: &Device, form: Form) -> Self {
        let config = weights.config().clone();
        let rotary = Rotary::new(&config);
        Self { config, device: device.clone(), rotary, weights: form }
    }

    /// The form for GPUs on the CPU, so that it can be tested without one.
    #[cfg(test)]
    pub(crate) fn of_gpu(weights: &Weights, form: GpuLlama) -> Self {
        Self::new(weights, &Device::Cpu, Form::Gpu(form))
    }

    /// Its shape.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The device that it computes on; of several, the first.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Reads all chunks, appending to the cache.
    ///
    /// `on_layer(layer, cache, pool)` is called as soon as a layer's keys and values of all chunks lie in the cache.
    /// Returns the logits of the chunks that want them, in their order: `[wanted, vocab]`. Unless they are read they stay where they
    /// were computed, for [`Workspace::sample`].
    ///
    /// **Invariant:** on the CPU a sequence's logits and cache rows are the same bits whatever else is in `chunks`,
    /// however its tokens were cut into them, and on any number of threads.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] where a chunk is empty, or a token id, the cache or a block table does not fit; whatever
    /// `on_layer` returns.
    pub fn forward<'w>(
        &self,
        chunks: &[Chunk<'_>],
        cache: &mut KvCache,
        workspace: &'w mut Workspace,
        on_layer: OnLayer<'_>,
    ) -> Result<Logits<'w>, ModelError> {
        let ends = chunks.iter().scan(0, |end, chunk| {
            *end += chunk.tokens.len();
            Some((*end, chunk.logits))
        });
        let rows: Vec<usize> = ends.filter(|(end, logits)| *logits && *end > 0).map(|(end, _)| end - 1).collect();
        self.forward_rows(chunks, &rows, cache, workspace, on_layer)
    }

    /// As [`Llama::forward`], but with the logits after every token of the chunks that want them: `[wanted tokens, vocab]`.
    ///
    /// # Errors
    /// As [`Llama::forward`].
    pub fn forward_each<'w>(
        &self,
        chunks: &[Chunk<'_>],
        cache: &mut KvCache,
        workspace: &'w mut Workspace,
    ) -> Result<Logits<'w>, ModelError> {
        let mut end = 0;
        let rows = chunks.iter().flat_map(|chunk| {
            end += chunk.tokens.len();
            if chunk.logits { end - chunk.tokens.len()..end } else { 0..0 }
        });
        let rows: Vec<usize> = rows.collect();
        self.forward_rows(chunks, &rows, cache, workspace, &mut |_, _, _| Ok(()))
    }

    /// As [`Llama::forward`], but gives the logits after those tokens whose numbers are in `rows`, whatever the chunks say:
    /// `[rows, vocab]`. The numbers ascend and are counted over all chunks.
    ///
    /// # Errors
    /// As [`Llama::forward`], and where a number is that of no token.
    pub fn forward_rows<'w>(
        &self,
        chunks: &[Chunk<'_>],
        rows: &[usize],
        cache: &mut KvCache,
        workspace: &'w mut Workspace,
        on_layer: OnLayer<'_>,
    ) -> Result<Logits<'w>, ModelError> {
        self.check(chunks, cache)?;
        let tokens: usize = chunks.iter().map(|c| c.tokens.len()).sum();
        if !rows.is_sorted_by(|a, b| a < b) || rows.last().is_some_and(|row| *row >= tokens) {
            return Err(ModelError::Mismatch(format!("logits are wanted of rows {rows:?} of {tokens} tokens")));
        }
        let pass = Pass { chunks, rows };
        match &self.weights {
            Form::Cpu(weights) => weights.forward(&self.config, &self.rotary, pass, cache, workspace, on_layer)?,
            Form::Gpu(weights) => {
                let pool = &workspace.pool;
                let on_layer = &mut |layer, cache: &KvCache| on_layer(layer, cache, pool);
                workspace.unread = weights.forward(&self.config, &self.rotary, pass, cache, on_layer)?;
                workspace.logits.clear();
            }
        }
        Ok(Logits { workspace })
    }

    fn check(&self, chunks: &[Chunk<'_>], cache: &KvCache) -> Result<(), ModelError> {
        if cache.geometry() != self.config.kv {
            let (have, want) = (cache.geometry(), self.config.kv);
            return Err(ModelError::Mismatch(format!("the KV cache has {have}, the model {want}")));
        }
        for chunk in chunks {
            if chunk.tokens.is_empty() {
                return Err(ModelError::Mismatch("a chunk without tokens".into()));
            }
            if let Some(id) = chunk.tokens.iter().find(|id| **id as usize >= self.config.vocab_size) {
                return Err(ModelError::Mismatch(format!("token id {id} is out of the vocabulary of {}", self.config.vocab_size)));
            }
            cache.check(chunk.blocks, chunk.start + chunk.tokens.len())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use overfill_kv::BlockId;
    use overfill_types::KvFormat;

    use super::*;

    /// What runs on a GPU (candle's operations, tensors for the cache), on the CPU.
    #[test]
    fn the_gpu_form_gives_the_same_logits() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/wide");
        let mut workspace = Workspace::new(ThreadPool::new(2, &[]).unwrap());
        let model = Llama::load(&folder, WeightFormat::F32, &Device::Cpu, workspace.pool()).unwrap();
        let weights = Weights::open(&folder).unwrap();
        let gpu = GpuLlama::load(&weights, WeightFormat::F32, &[Device::Cpu]).unwrap();
        let gpu = Llama::of_gpu(&weights, gpu);
        let geometry = model.config().kv;
        let tables: [Vec<BlockId>; 2] = [vec![BlockId(7), BlockId(2), BlockId(3)], vec![BlockId(0), BlockId(9)]];
        let mut run = |model: &Llama, mut cache: KvCache| {
            let mut all = Vec::new();
            let steps: [&[(&[u32], usize, usize)]; 3] =
                [&[(&[5, 9, 1, 80, 3], 0, 0), (&[4, 4], 0, 1)], &[(&[77; 14], 5, 0)], &[(&[1], 19, 0), (&[8], 2, 1)]];
            for step in steps {
                let chunks: Vec<Chunk<'_>> = step
                    .iter()
                    .map(|&(tokens, start, sequence)| Chunk { tokens, start, blocks: &tables[sequence], logits: true })
                    .collect();
                all.extend_from_slice(model.forward(&chunks, &mut cache, &mut workspace, &mut |_, _, _| Ok(())).unwrap().read().unwrap());
            }
            all
        };
        // The same sequence once more, in one piece: after each token what was there when it was read by itself, bit for bit.
        let tokens: Vec<u32> = [&[5, 9, 1, 80, 3][..], &[77; 14], &[1]].concat();
        let mut one_by_one = Vec::new();
        let new = || KvCache::new(geometry, KvFormat::F32, 12, 16, &Device::Cpu).unwrap();
        let (mut cache, mut scratch) = (new(), Workspace::new(ThreadPool::new(1, &[]).unwrap()));
        for start in 0..tokens.len() {
            let chunk = Chunk { tokens: &tokens[start..=start], start, blocks: &tables[0], logits: true };
            one_by_one.extend_from_slice(model.forward(&[chunk], &mut cache, &mut scratch, &mut |_, _, _| Ok(())).unwrap().read().unwrap());
        }
        let quiet = Chunk { tokens: &[4, 4, 8], start: 0, blocks: &tables[1], logits: false };
        let whole = Chunk { tokens: &tokens, start: 0, blocks: &tables[0], logits: true };
        let each = model.forward_each(&[quiet, whole], &mut new(), &mut scratch).unwrap().read().unwrap();
        assert_eq!(each, one_by_one);

        let cpu = run(&model, KvCache::new(geometry, KvFormat::F32, 12, 16, &Device::Cpu).unwrap());
        let gpu = run(&gpu, KvCache::in_tensors(geometry, KvFormat::F32, 12, 16));
        assert_eq!(cpu.len(), gpu.len());
        let difference = cpu.iter().zip(gpu).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-4, "{difference}");
    }
}
