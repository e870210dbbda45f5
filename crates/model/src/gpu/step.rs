//! What the layers of one forward pass share, brought to the device once.

use candle_core::{Device, Tensor};

use crate::config::LlamaConfig;
use crate::error::ModelError;
#[cfg(feature = "cuda")]
use crate::gpu::launch::Told;
use crate::pass::Chunk;
use crate::rope::{Rotary, Turns};

pub(crate) struct Step<'a> {
    pub(crate) config: &'a LlamaConfig,
    pub(crate) chunks: &'a [Chunk<'a>],
    /// Cosines and sines of each layer, each `[tokens, turned / 2]`; `None` where nothing turns.
    turns: Vec<Option<[Tensor; 2]>>,
    /// What our kernels are told, on a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) told: Option<Told>,
}

impl<'a> Step<'a> {
    pub(crate) fn new(config: &'a LlamaConfig, rotary: &Rotary, chunks: &'a [Chunk<'a>], device: &Device) -> Result<Self, ModelError> {
        let tokens: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let mut turns = Turns::default();
        rotary.at(chunks, &mut turns);
        let mut known: Vec<(_, Option<[Tensor; 2]>)> = Vec::new();
        let mut of_layers = Vec::with_capacity(config.layers.len());
        for layer in &config.layers {
            let turn = match known.iter().find(|(rotation, _)| *rotation == layer.rotation) {
                Some((_, turn)) => turn.clone(),
                None => {
                    let upload = |values: &[f32]| Tensor::from_slice(values, (tokens, values.len() / tokens.max(1)), device);
                    let turn = turns.of(layer.rotation).map(|turn| Ok::<_, ModelError>([upload(&turn.cos)?, upload(&turn.sin)?]));
                    let turn = turn.transpose()?;
                    known.push((layer.rotation, turn.clone()));
                    turn
                }
            };
            of_layers.push(turn);
        }
        Ok(Self {
            config,
            chunks,
            turns: of_layers,
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

    pub(crate) fn turn(&self, layer: usize) -> Option<&[Tensor; 2]> {
        self.turns[layer].as_ref()
    }
}
