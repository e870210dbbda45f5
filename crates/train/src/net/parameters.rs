//! All parameters of a model in one run of memory, under Hugging Face's names.

use std::ops::Range;
use std::path::Path;

use overfill_model::config::LayerAttention;
use overfill_model::{LlamaConfig, ModelError, Weights};

use super::layer_shape::LayerShape;

/// Name of the map to the full model's hidden states.
pub(crate) const STATE_MAP: &str = "state_map.weight";

/// What a model is made of, and where each part lies among its parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Rows of the embedding.
    pub vocab: usize,
    /// Layers.
    pub layers: usize,
    /// Sizes of each layer.
    pub layer: LayerShape,
    /// What each layer sees, and how it turns queries and keys.
    pub sees: Vec<LayerAttention>,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Values of the full model's key rows, where a trainable projection maps them to this model's.
    pub projected: Option<usize>,
    /// Width of the full model's hidden states, where a map to them is trained (`super::states`).
    pub taught: Option<usize>,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `model.layers.0.self_attn.q_proj.weight`; `embedding_proj.0.weight` for projections of keys and values;
    /// `state_map.weight` for the map to the full model's hidden states.
    pub name: String,
    /// `[outputs, inputs]`, or `[n]`.
    pub shape: Vec<usize>,
    /// Where it lies.
    pub range: Range<usize>,
}

impl Entry {
    /// Whether it is a part of the model itself, as its checkpoint has it.
    pub fn of_model(&self) -> bool {
        !self.of_projection() && self.name != STATE_MAP
    }

    /// Whether it is a part of the projections of keys and values.
    pub fn of_projection(&self) -> bool {
        self.name.starts_with("embedding_proj.")
    }
}

impl Shape {
    /// Of a checkpoint.
    ///
    /// # Errors
    /// [`ModelError::Format`] where it has biases that are not trained here.
    pub fn of(weights: &Weights, path: &Path) -> Result<Self, ModelError> {
        let config = weights.config();
        let biases = weights.has("model.layers.0.self_attn.q_proj.bias");
        for part in ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
            let name = format!("model.layers.0.{part}.bias");
            if weights.has(&name) {
                return Err(ModelError::Format {
                    path: path.to_owned(),
                    what: format!("{name} is there: only biases of q, k and v are known"),
                });
            }
        }
        Ok(Self::new(config, biases, config.tied_embeddings || !weights.has("lm_head.weight")))
    }

    /// Of a model's configuration, without a projection or a map of states.
    pub fn new(config: &LlamaConfig, biases: bool, tied: bool) -> Self {
        Self {
            vocab: config.vocab_size,
            layers: config.kv.layers,
            layer: LayerShape::of(config, biases),
            sees: config.layers.clone(),
            tied,
            projected: None,
            taught: None,
        }
    }

    /// What a layer is like.
    pub(super) fn layer(&self, layer: usize) -> LayerShape {
        LayerShape { sees: self.sees[layer], ..self.layer }
    }

    /// Every parameter, in their order in memory, without gaps.
    pub fn entries(&self) -> Vec<Entry> {
        let hidden = self.layer.hidden;
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, hidden])];
        for layer in 0..self.layers {
            all.extend(self.layer.parameters().into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
        }
        all.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab, hidden]));
        }
        if let Some(inputs) = self.projected {
            let outputs = self.layer.kv_row();
            for layer in 0..self.layers {
                all.push((format!("embedding_proj.{layer}.weight"), vec![outputs, inputs]));
                all.push((format!("embedding_proj.{layer}.bias"), vec![outputs]));
            }
        }
        if let Some(outputs) = self.taught {
            all.push((STATE_MAP.to_owned(), vec![outputs, hidden]));
        }
        let mut end = 0;
        let place = |(name, shape): (String, Vec<usize>)| {
            let start = end;
            end += shape.iter().product::<usize>();
            Entry { name, shape, range: start..end }
        };
        all.into_iter().map(place).collect()
    }

    /// Parameters in numbers.
    pub fn len(&self) -> usize {
        let head = if self.tied { 0 } else { self.embedding() };
        self.embedding() + self.layers * self.layer.len() + self.layer.hidden + head + self.layers * self.projection() + self.state_map()
    }

    /// Never: a model has parameters.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn embedding(&self) -> usize {
        self.vocab * self.layer.hidden
    }

    fn projection(&self) -> usize {
        self.projected.map_or(0, |inputs| self.layer.kv_row() * (inputs + 1))
    }

    fn state_map(&self) -> usize {
        self.taught.map_or(0, |outputs| outputs * self.layer.hidden)
    }

    /// Where the embedding lies.
    pub fn embedding_range(&self) -> Range<usize> {
        0..self.embedding()
    }

    /// Where a layer lies.
    pub fn layer_range(&self, layer: usize) -> Range<usize> {
        let len = self.layer.len();
        let start = self.embedding() + layer * len;
        start..start + len
    }

    /// Where the last norm lies.
    pub fn norm_range(&self) -> Range<usize> {
        let start = self.embedding() + self.layers * self.layer.len();
        start..start + self.layer.hidden
    }

    /// Where the output head lies.
    pub fn head_range(&self) -> Range<usize> {
        if self.tied {
            return self.embedding_range();
        }
        let start = self.norm_range().end;
        start..start + self.embedding()
    }

    /// Where a layer's projection of keys and values lies, weight and bias; empty where there is none.
    pub(super) fn projection_range(&self, layer: usize) -> Range<usize> {
        let start = if self.tied { self.norm_range().end } else { self.head_range().end } + layer * self.projection();
        start..start + self.projection()
    }

    /// Where the map to the full model's hidden states lies; empty where there is none.
    pub(super) fn state_map_range(&self) -> Range<usize> {
        self.len() - self.state_map()..self.len()
    }

    /// Reads the model's own parameters from a checkpoint; the projections' and the map's stay 0.
    ///
    /// # Errors
    /// [`ModelError::Format`] naming a tensor that is missing or has another shape; `path` is what it says.
    pub fn read(&self, weights: &Weights, path: &Path) -> Result<Vec<f32>, ModelError> {
        let mut all = vec![0.0; self.len()];
        for entry in self.entries().iter().filter(|e| e.of_model()) {
            let (numbers, shape) = weights.numbers(&entry.name)?;
            if shape != entry.shape {
                let what = format!("tensor {} is {shape:?}, the configuration wants {:?}", entry.name, entry.shape);
                return Err(ModelError::Format { path: path.to_owned(), what });
            }
            all[entry.range.clone()].copy_from_slice(&numbers);
        }
        Ok(all)
    }
}
