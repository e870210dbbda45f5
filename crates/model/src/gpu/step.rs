//! What the layers of one forward pass share, brought to the device once.

use candle_core::{Device, Tensor};

use crate::config::{LlamaConfig, Rotation};
use crate::error::ModelError;
#[cfg(feature = "cuda")]
use crate::gpu::launch::Told;
use crate::pass::Chunk;
use crate::rope::{Rotary, Turns};

pub(crate) struct Step<'a> {
    /// Of the part of the model that is on the device.
    pub(crate) config: &'a LlamaConfig,
    /// Its number.
    pub(crate) part: usize,
    pub(crate) chunks: &'a [Chunk<'a>],
    /// Cosines and sines of each rotary embedding that layers have, each `[tokens, turned / 2]`.
    turns: Vec<(Rotation, [Tensor; 2])>,
    /// What our kernels are told, on a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) told: Option<Told>,
}

impl<'a> Step<'a> {
    /// For one part of a model.
    pub(crate) fn new(
        config: &'a LlamaConfig,
        rotary: &Rotary,
        (chunks, part): (&'a [Chunk<'a>], usize),
        device: &Device,
    ) -> Result<Self, ModelError> {
        let tokens: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let mut at = Turns::default();
        rotary.at(chunks, &mut at);
        let upload = |values: &[f32]| Tensor::from_slice(values, (tokens, values.len() / tokens.max(1)), device);
        let mut turns: Vec<(Rotation, [Tensor; 2])> = Vec::new();
        for layer in &config.layers {
            if let Some(turn) = at.of(layer.rotation)
                && turns.iter().all(|(known, _)| *known != layer.rotation)
            {
                turns.push((layer.rotation, [upload(&turn.cos)?, upload(&turn.sin)?]));
            }
        }
        Ok(Self {
            config,
            part,
            chunks,
            turns,
            #[cfg(feature = "cuda")]
            told: None,
        })
    }

    /// With what our kernels are told of a cache of such blocks.
    #[cfg(feature = "cuda")]
    pub(crate) fn with_told(mut self, block_tokens: usize, device: &Device) -> Result<Self, ModelError> {
        if let Device::Cuda(device) = device {
            self.told = Some(Told::of(self.chunks, self.config, block_tokens, device)?);
        }
        Ok(self)
    }

    /// Of a layer; `None` where nothing turns.
    pub(crate) fn turn(&self, layer: usize) -> Option<&[Tensor; 2]> {
        let rotation = self.config.layers[layer].rotation;
        self.turns.iter().find(|(of, _)| *of == rotation).map(|(_, turn)| turn)
    }
}
