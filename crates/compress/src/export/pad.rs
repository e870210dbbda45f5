//! Widths that quantised rows can have: a model padded with zeros to a multiple of a block computes the same.
//!
//! The residual stream's new channels are zero in the embedding and stay so, since no matrix writes to them. An RMS norm
//! divides by the wider stream's mean of squares, which is smaller by `h / h'`: its weights and its epsilon carry that
//! factor. New neurons of an MLP have zero gates.

use overfill_model::LlamaConfig;

use crate::checkpoint::LayerWeights;
use crate::matrix::Matrix;

/// Numbers in a block of every format that is written.
pub(crate) const BLOCK: usize = 32;

/// The padding of one model.
pub(crate) struct Padding {
    hidden: usize,
    intermediate: usize,
    /// For the norms' weights.
    scale: f32,
}

impl Padding {
    /// To widths that are multiples of `block`; 1 pads nothing.
    pub(crate) fn of(config: &LlamaConfig, block: usize) -> Self {
        let hidden = config.hidden_size.next_multiple_of(block);
        let scale = (config.hidden_size as f64 / hidden as f64).sqrt() as f32;
        Self { hidden, intermediate: config.intermediate_size.next_multiple_of(block), scale }
    }

    /// The shape of the padded model.
    pub(crate) fn config(&self, config: &LlamaConfig) -> LlamaConfig {
        LlamaConfig {
            hidden_size: self.hidden,
            intermediate_size: self.intermediate,
            rms_norm_eps: config.rms_norm_eps * config.hidden_size as f64 / self.hidden as f64,
            ..config.clone()
        }
    }

    /// A matrix that reads the residual stream, or the embedding.
    pub(crate) fn reads(&self, matrix: &Matrix) -> Matrix {
        resized(matrix, matrix.rows(), self.hidden)
    }

    /// A norm's weights.
    pub(crate) fn norm(&self, weights: &[f32]) -> Vec<f32> {
        if weights.is_empty() {
            return Vec::new();
        }
        let mut padded: Vec<f32> = weights.iter().map(|w| w * self.scale).collect();
        padded.resize(self.hidden, 0.0);
        padded
    }

    /// A layer.
    pub(crate) fn layer(&self, layer: &LayerWeights) -> LayerWeights {
        LayerWeights {
            input_norm: self.norm(&layer.input_norm),
            qkv: layer.qkv.each_ref().map(|matrix| self.reads(matrix)),
            qkv_bias: layer.qkv_bias.clone(),
            query_key_norms: layer.query_key_norms.clone(),
            output: resized(&layer.output, self.hidden, layer.output.columns()),
            attended_norm: self.norm(&layer.attended_norm),
            mlp_norm: self.norm(&layer.mlp_norm),
            down_norm: self.norm(&layer.down_norm),
            gate: resized(&layer.gate, self.intermediate, self.hidden),
            up: resized(&layer.up, self.intermediate, self.hidden),
            down: resized(&layer.down, self.hidden, self.intermediate),
        }
    }
}

fn resized(matrix: &Matrix, rows: usize, columns: usize) -> Matrix {
    if (rows, columns) == (matrix.rows(), matrix.columns()) {
        return matrix.clone();
    }
    let mut padded = Matrix::zeros(rows, columns);
    for (row, target) in (0..matrix.rows()).zip(padded.numbers_mut().chunks_exact_mut(columns)) {
        target[..matrix.columns()].copy_from_slice(matrix.row(row));
    }
    padded
}
