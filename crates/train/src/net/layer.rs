//! One layer: attention and MLP, each with its norm before it, forward and backward.
//!
//! A layer's parameters lie in one run of memory, so a model of any size can be run layer by layer with one layer loaded.

use overfill_compress::product::{Multiplier, Onto, Precision};

use super::attention::{Attended, AttentionBuffers, attend, attend_backward};
use super::batch::{KvRows, Packed};
use super::layer_shape::LayerShape;
use super::rows::{add_bias, bias_backward, rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward};

/// A layer's parameters, or their gradients.
macro_rules! parts {
    ($(#[$doc:meta])* $name:ident, $slice:ty, $split:ident) => {
        $(#[$doc])*
        pub struct $name<'a> {
            /// `[hidden]`
            pub input_norm: $slice,
            /// Queries, keys and values one after the other, `[q + 2 kv, hidden]`.
            pub qkv: $slice,
            /// `[q + 2 kv]`, or empty.
            pub qkv_bias: $slice,
            /// `[hidden, q]`
            pub output: $slice,
            /// `[hidden]`
            pub mlp_norm: $slice,
            /// Gate and up one after the other, `[2 mlp, hidden]`.
            pub gate_up: $slice,
            /// `[hidden, mlp]`
            pub down: $slice,
        }

        impl<'a> $name<'a> {
            /// Cuts a layer's run of memory, [`LayerShape::len`] numbers, into its parts.
            ///
            /// # Panics
            /// Where it is shorter.
            pub fn of(shape: &LayerShape, layer: $slice) -> Self {
                let (input_norm, rest) = layer.$split(shape.hidden);
                let (qkv, rest) = rest.$split(shape.qkv() * shape.hidden);
                let (qkv_bias, rest) = rest.$split(if shape.biases { shape.qkv() } else { 0 });
                let (output, rest) = rest.$split(shape.hidden * shape.q());
                let (mlp_norm, rest) = rest.$split(shape.hidden);
                let (gate_up, rest) = rest.$split(2 * shape.mlp * shape.hidden);
                let (down, _) = rest.$split(shape.hidden * shape.mlp);
                Self { input_norm, qkv, qkv_bias, output, mlp_norm, gate_up, down }
            }
        }
    };
}

parts!(
    /// A layer's parameters.
    LayerWeights, &'a [f32], split_at
);
parts!(
    /// Gradients of a layer's parameters.
    LayerGradients, &'a mut [f32], split_at_mut
);

/// What a layer's forward pass leaves behind: what backward needs, and what calibration reads.
#[derive(Default)]
pub struct Saved {
    /// The residual stream that came in, `[rows, hidden]`.
    pub input: Vec<f32>,
    /// Reciprocal root mean squares of `input`, `[rows]`.
    pub input_inverse: Vec<f32>,
    /// What queries, keys and values are made of, `[rows, hidden]`.
    pub normed: Vec<f32>,
    /// Queries, keys (both rotated) and values, `[rows, q + 2 kv]`.
    pub qkv: Vec<f32>,
    /// What the output projection reads, `[rows, q]`.
    pub attended: Vec<f32>,
    /// Logarithms of the softmax's sums.
    pub(super) logs: Vec<f32>,
    /// The residual stream between attention and MLP, `[rows, hidden]`.
    pub middle: Vec<f32>,
    /// Reciprocal root mean squares of `middle`, `[rows]`.
    pub middle_inverse: Vec<f32>,
    /// What gate and up read, `[rows, hidden]`.
    pub mlp_normed: Vec<f32>,
    /// `[rows, 2 mlp]`, a row's gate first.
    pub gate_up: Vec<f32>,
    /// What the down projection reads, `[rows, mlp]`.
    pub activated: Vec<f32>,
}

/// Buffers that are kept from layer to layer.
#[derive(Default)]
pub struct LayerBuffers {
    pub(super) products: Multiplier,
    pub(super) attention: AttentionBuffers,
    /// Gradients: of normed inputs, of queries, keys and values, of `attended`, of `activated`.
    dnormed: Vec<f32>,
    dqkv: Vec<f32>,
    dattended: Vec<f32>,
    dactivated: Vec<f32>,
}

impl LayerBuffers {
    /// With large products of these numbers.
    pub fn new(precision: Precision) -> Self {
        Self { products: Multiplier::new(precision), ..Self::default() }
    }

    /// The first half of a layer: norm and projections. Leaves queries and keys rotated in `saved.qkv`.
    pub fn project(&mut self, shape: &LayerShape, weights: &LayerWeights<'_>, packed: &Packed, x: &[f32], saved: &mut Saved) {
        saved.input.clear();
        saved.input.extend_from_slice(x);
        rms_norm(x, weights.input_norm, shape.eps, &mut saved.normed, &mut saved.input_inverse);
        saved.qkv.resize(packed.rows * shape.qkv(), 0.0);
        self.products.linear(&mut saved.qkv, &saved.normed, weights.qkv, shape.hidden, Onto::Replace);
        if shape.biases {
            add_bias(&mut saved.qkv, weights.qkv_bias);
        }
        rotate(&mut saved.qkv, shape.qkv(), shape.heads + shape.kv_heads, &packed.cos, &packed.sin, false);
    }

    /// Attention over `saved.qkv`: leaves what the output projection reads in `saved.attended`.
    pub fn attend(&mut self, shape: &LayerShape, packed: &Packed, contexts: &[Option<&KvRows>], saved: &mut Saved) {
        attend(shape, packed, contexts, &saved.qkv, &mut saved.attended, &mut saved.logs, &mut self.attention);
    }

    /// Adds the output projection to the residual stream `x`.
    pub fn output(&mut self, shape: &LayerShape, weights: &LayerWeights<'_>, x: &mut [f32], saved: &mut Saved) {
        self.products.linear(x, &saved.attended, weights.output, shape.q(), Onto::Add);
        saved.middle.clear();
        saved.middle.extend_from_slice(x);
    }

    /// Norm, gate and up: leaves what the down projection reads in `saved.activated`.
    pub fn activate(&mut self, shape: &LayerShape, weights: &LayerWeights<'_>, x: &[f32], saved: &mut Saved) {
        rms_norm(x, weights.mlp_norm, shape.eps, &mut saved.mlp_normed, &mut saved.middle_inverse);
        saved.gate_up.resize(x.len() / shape.hidden * 2 * shape.mlp, 0.0);
        self.products.linear(&mut saved.gate_up, &saved.mlp_normed, weights.gate_up, shape.hidden, Onto::Replace);
        swiglu(&saved.gate_up, shape.mlp, &mut saved.activated);
    }

    /// Adds the down projection to the residual stream `x`.
    pub fn down(&mut self, shape: &LayerShape, weights: &LayerWeights<'_>, x: &mut [f32], saved: &Saved) {
        self.products.linear(x, &saved.activated, weights.down, shape.mlp, Onto::Add);
    }

    /// The whole layer: `x`, the residual stream `[rows, hidden]`, goes in and comes out.
    ///
    /// `contexts` has an entry for each sequence: this layer's keys and values of its context.
    pub fn forward(
        &mut self,
        shape: &LayerShape,
        weights: &LayerWeights<'_>,
        packed: &Packed,
        contexts: &[Option<&KvRows>],
        x: &mut [f32],
        saved: &mut Saved,
    ) {
        self.project(shape, weights, packed, x, saved);
        self.attend(shape, packed, contexts, saved);
        self.output(shape, weights, x, saved);
        self.activate(shape, weights, x, saved);
        self.down(shape, weights, x, saved);
    }

    /// Backward of the whole layer: `dx`, the residual stream's gradient, goes in at the layer's end and comes out at its
    /// beginning. Matrices' gradients replace what is there or are added to it, vectors' are always added.
    /// `saved` is used up: its `gate_up` becomes a gradient. The contexts' gradients are put into `dcontexts`, if given.
    #[allow(clippy::too_many_arguments, reason = "a layer's whole state: each is one thing, and a struct of them would have one use")]
    pub(super) fn backward(
        &mut self,
        shape: &LayerShape,
        weights: &LayerWeights<'_>,
        packed: &Packed,
        contexts: &[Option<&KvRows>],
        saved: &mut Saved,
        dx: &mut [f32],
        gradients: LayerGradients<'_>,
        dcontexts: Option<&mut [KvRows]>,
        onto: Onto,
    ) {
        let (hidden, mlp, q) = (shape.hidden, shape.mlp, shape.q());
        self.products.linear_weight(gradients.down, dx, &saved.activated, mlp, onto);
        self.dactivated.resize(packed.rows * mlp, 0.0);
        self.products.linear_input(&mut self.dactivated, dx, weights.down, mlp, Onto::Replace);
        swiglu_backward(&mut saved.gate_up, mlp, &self.dactivated);
        self.products.linear_weight(gradients.gate_up, &saved.gate_up, &saved.mlp_normed, hidden, onto);
        self.dnormed.resize(packed.rows * hidden, 0.0);
        self.products.linear_input(&mut self.dnormed, &saved.gate_up, weights.gate_up, hidden, Onto::Replace);
        rms_norm_backward(&self.dnormed, &saved.middle, weights.mlp_norm, &saved.middle_inverse, dx, gradients.mlp_norm);

        self.products.linear_weight(gradients.output, dx, &saved.attended, q, onto);
        self.dattended.resize(packed.rows * q, 0.0);
        self.products.linear_input(&mut self.dattended, dx, weights.output, q, Onto::Replace);
        self.dqkv.resize(packed.rows * shape.qkv(), 0.0);
        let attended = Attended { qkv: &saved.qkv, attended: &saved.attended, logs: &saved.logs, dattended: &self.dattended };
        attend_backward(shape, packed, contexts, &attended, &mut self.dqkv, dcontexts, &mut self.attention);
        rotate(&mut self.dqkv, shape.qkv(), shape.heads + shape.kv_heads, &packed.cos, &packed.sin, true);
        if shape.biases {
            bias_backward(&self.dqkv, gradients.qkv_bias);
        }
        self.products.linear_weight(gradients.qkv, &self.dqkv, &saved.normed, hidden, onto);
        self.products.linear_input(&mut self.dnormed, &self.dqkv, weights.qkv, hidden, Onto::Replace);
        rms_norm_backward(&self.dnormed, &saved.input, weights.input_norm, &saved.input_inverse, dx, gradients.input_norm);
    }
}
