//! One layer: attention and MLP, each with its norm before it, forward and backward.
//!
//! A layer's parameters lie in one run of memory, so a model of any size can be run layer by layer with one layer loaded.

use std::ops::Range;

use overfill_compress::product::{Multiplier, Onto, Precision};

use super::attention::{Attended, AttentionBuffers, attend, attend_backward};
use super::batch::{KvRows, Packed};
use super::layer_shape::LayerShape;
use super::rows::{add_bias, bias_backward, gated, gated_backward, rms_norm, rms_norm_backward, rotate};

/// A layer's parameters, or their gradients.
macro_rules! parts {
    ($(#[$doc:meta])* $name:ident, $slice:ty, $split:ident) => {
        $(#[$doc])*
        pub struct $name<'a> {
            /// `[hidden]`; empty, as all that follow, where the family has none.
            pub input_norm: $slice,
            /// Queries, keys and values one after the other, `[q + 2 kv, hidden]`.
            pub qkv: $slice,
            /// `[q + 2 kv]`, or empty.
            pub qkv_bias: $slice,
            /// Of queries and of keys, `[head_dim]` or as wide as all heads.
            pub query_norm: $slice,
            /// See `query_norm`.
            pub key_norm: $slice,
            /// `[hidden, q]`
            pub output: $slice,
            /// Of what attention adds, `[hidden]`.
            pub attended_norm: $slice,
            /// `[hidden]`
            pub mlp_norm: $slice,
            /// Gate and up one after the other, `[2 mlp, hidden]`.
            pub gate_up: $slice,
            /// `[hidden, mlp]`
            pub down: $slice,
            /// Of what the MLP adds, `[hidden]`.
            pub down_norm: $slice,
        }

        impl<'a> $name<'a> {
            /// Cuts a layer's run of memory, [`LayerShape::len`] numbers, into its parts.
            ///
            /// # Panics
            /// Where it is shorter.
            pub fn of(shape: &LayerShape, layer: $slice) -> Self {
                let norms = shape.family.norms();
                let [queries, keys] = shape.query_key_norms();
                let (input_norm, rest) = layer.$split(shape.norm(norms.before_attention));
                let (qkv, rest) = rest.$split(shape.qkv() * shape.hidden);
                let (qkv_bias, rest) = rest.$split(if shape.biases { shape.qkv() } else { 0 });
                let (query_norm, rest) = rest.$split(queries);
                let (key_norm, rest) = rest.$split(keys);
                let (output, rest) = rest.$split(shape.hidden * shape.q());
                let (attended_norm, rest) = rest.$split(shape.norm(norms.after_attention));
                let (mlp_norm, rest) = rest.$split(shape.norm(norms.before_mlp));
                let (gate_up, rest) = rest.$split(2 * shape.mlp * shape.hidden);
                let (down, rest) = rest.$split(shape.hidden * shape.mlp);
                let (down_norm, _) = rest.$split(shape.norm(norms.after_mlp));
                Self { input_norm, qkv, qkv_bias, query_norm, key_norm, output, attended_norm, mlp_norm, gate_up, down, down_norm }
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
    /// Queries and keys before their norms.
    heads: [Normed; 2],
    /// What the output projection reads, `[rows, q]`.
    pub attended: Vec<f32>,
    /// What attention adds, before its norm.
    written: Normed,
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
    /// What the MLP adds, before its norm.
    made: Normed,
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
    /// What goes into a norm or comes out of it, and its gradient.
    part: Vec<f32>,
    dpart: Vec<f32>,
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
        read(x, weights.input_norm, shape.eps, &mut saved.normed, &mut saved.input_inverse);
        saved.qkv.resize(packed.rows * shape.qkv(), 0.0);
        self.products.linear(&mut saved.qkv, &saved.normed, weights.qkv, shape.hidden, Onto::Replace);
        if shape.biases {
            add_bias(&mut saved.qkv, weights.qkv_bias);
        }
        for (part, (weights, saved_heads)) in
            shape.head_parts().into_iter().zip([weights.query_norm, weights.key_norm].into_iter().zip(&mut saved.heads))
        {
            if weights.is_empty() {
                continue;
            }
            gather(&saved.qkv, shape.qkv(), part.clone(), &mut saved_heads.rows);
            rms_norm(&saved_heads.rows, weights, shape.eps, &mut self.part, &mut saved_heads.inverse);
            scatter(&self.part, &mut saved.qkv, shape.qkv(), part);
        }
        if let Some((cos, sin)) = packed.turn(shape.sees.rotation) {
            rotate(&mut saved.qkv, shape.qkv(), shape.heads + shape.kv_heads, shape.head_dim, cos, sin, false);
        }
    }

    /// Attention over `saved.qkv`: leaves what the output projection reads in `saved.attended`.
    pub fn attend(&mut self, shape: &LayerShape, packed: &Packed, contexts: &[Option<&KvRows>], saved: &mut Saved) {
        attend(shape, packed, contexts, &saved.qkv, &mut saved.attended, &mut saved.logs, &mut self.attention);
    }

    /// Adds the output projection to the residual stream `x`.
    pub fn output(&mut self, shape: &LayerShape, weights: &LayerWeights<'_>, x: &mut [f32], saved: &mut Saved) {
        self.add(shape, &saved.attended, weights.output, weights.attended_norm, x, &mut saved.written);
        saved.middle.clear();
        saved.middle.extend_from_slice(x);
    }

    /// Norm, gate and up: leaves what the down projection reads in `saved.activated`.
    pub fn activate(&mut self, shape: &LayerShape, weights: &LayerWeights<'_>, x: &[f32], saved: &mut Saved) {
        read(x, weights.mlp_norm, shape.eps, &mut saved.mlp_normed, &mut saved.middle_inverse);
        saved.gate_up.resize(x.len() / shape.hidden * 2 * shape.mlp, 0.0);
        self.products.linear(&mut saved.gate_up, &saved.mlp_normed, weights.gate_up, shape.hidden, Onto::Replace);
        gated(shape.family.gate(), &saved.gate_up, shape.mlp, &mut saved.activated);
    }

    /// Adds the down projection to the residual stream `x`.
    pub fn down(&mut self, shape: &LayerShape, weights: &LayerWeights<'_>, x: &mut [f32], saved: &mut Saved) {
        self.add(shape, &saved.activated, weights.down, weights.down_norm, x, &mut saved.made);
    }

    /// Adds what `map` makes of `input` to the residual stream: through a norm, and multiplied, where the family does so.
    fn add(&mut self, shape: &LayerShape, input: &[f32], map: &[f32], norm: &[f32], x: &mut [f32], saved: &mut Normed) {
        let (width, factor) = (map.len() / shape.hidden, shape.scalars.residual as f32);
        if norm.is_empty() && factor == 1.0 {
            return self.products.linear(x, input, map, width, Onto::Add);
        }
        saved.rows.resize(x.len(), 0.0);
        self.products.linear(&mut saved.rows, input, map, width, Onto::Replace);
        let added = if norm.is_empty() {
            &saved.rows
        } else {
            rms_norm(&saved.rows, norm, shape.eps, &mut self.part, &mut saved.inverse);
            &self.part
        };
        x.iter_mut().zip(added).for_each(|(x, y)| *x += factor * y);
    }

    /// The gradient of what `map` made, from that of the residual stream, `dx`; in `self.dpart`, or `dx` itself where it is added as it
    /// comes (then `false`).
    fn add_backward(&mut self, shape: &LayerShape, norm: &[f32], saved: &Normed, dx: &[f32], dnorm: &mut [f32]) -> bool {
        let factor = shape.scalars.residual as f32;
        if norm.is_empty() && factor == 1.0 {
            return false;
        }
        self.part.clear();
        self.part.extend(dx.iter().map(|d| factor * d));
        if norm.is_empty() {
            std::mem::swap(&mut self.part, &mut self.dpart);
            return true;
        }
        self.dpart.clear();
        self.dpart.resize(dx.len(), 0.0);
        rms_norm_backward(&self.part, &saved.rows, norm, &saved.inverse, &mut self.dpart, dnorm);
        true
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
        let apart = self.add_backward(shape, weights.down_norm, &saved.made, dx, gradients.down_norm);
        let dmade: &[f32] = if apart { &self.dpart } else { dx };
        self.products.linear_weight(gradients.down, dmade, &saved.activated, mlp, onto);
        self.dactivated.resize(packed.rows * mlp, 0.0);
        self.products.linear_input(&mut self.dactivated, dmade, weights.down, mlp, Onto::Replace);
        gated_backward(shape.family.gate(), &mut saved.gate_up, mlp, &self.dactivated);
        self.products.linear_weight(gradients.gate_up, &saved.gate_up, &saved.mlp_normed, hidden, onto);
        self.dnormed.resize(packed.rows * hidden, 0.0);
        self.products.linear_input(&mut self.dnormed, &saved.gate_up, weights.gate_up, hidden, Onto::Replace);
        read_backward(&self.dnormed, &saved.middle, weights.mlp_norm, &saved.middle_inverse, dx, gradients.mlp_norm);

        let apart = self.add_backward(shape, weights.attended_norm, &saved.written, dx, gradients.attended_norm);
        let dwritten: &[f32] = if apart { &self.dpart } else { dx };
        self.products.linear_weight(gradients.output, dwritten, &saved.attended, q, onto);
        self.dattended.resize(packed.rows * q, 0.0);
        self.products.linear_input(&mut self.dattended, dwritten, weights.output, q, Onto::Replace);
        self.dqkv.resize(packed.rows * shape.qkv(), 0.0);
        let attended = Attended { qkv: &saved.qkv, attended: &saved.attended, logs: &saved.logs, dattended: &self.dattended };
        attend_backward(shape, packed, contexts, &attended, &mut self.dqkv, dcontexts, &mut self.attention);
        if let Some((cos, sin)) = packed.turn(shape.sees.rotation) {
            rotate(&mut self.dqkv, shape.qkv(), shape.heads + shape.kv_heads, shape.head_dim, cos, sin, true);
        }
        let of_norms = [(weights.query_norm, gradients.query_norm), (weights.key_norm, gradients.key_norm)];
        for ((part, (norm, dnorm)), saved) in shape.head_parts().into_iter().zip(of_norms).zip(&saved.heads) {
            if norm.is_empty() {
                continue;
            }
            gather(&self.dqkv, shape.qkv(), part.clone(), &mut self.part);
            self.dpart.clear();
            self.dpart.resize(self.part.len(), 0.0);
            rms_norm_backward(&self.part, &saved.rows, norm, &saved.inverse, &mut self.dpart, dnorm);
            scatter(&self.dpart, &mut self.dqkv, shape.qkv(), part);
        }
        if shape.biases {
            bias_backward(&self.dqkv, gradients.qkv_bias);
        }
        self.products.linear_weight(gradients.qkv, &self.dqkv, &saved.normed, hidden, onto);
        self.products.linear_input(&mut self.dnormed, &self.dqkv, weights.qkv, hidden, Onto::Replace);
        read_backward(&self.dnormed, &saved.input, weights.input_norm, &saved.input_inverse, dx, gradients.input_norm);
    }
}

/// Rows that went into a norm, and their reciprocal root mean squares.
#[derive(Default)]
struct Normed {
    rows: Vec<f32>,
    inverse: Vec<f32>,
}

/// What a sublayer reads of the residual stream: normed, unless the family has no norm there.
fn read(x: &[f32], norm: &[f32], eps: f32, normed: &mut Vec<f32>, inverse: &mut Vec<f32>) {
    if norm.is_empty() {
        normed.clear();
        normed.extend_from_slice(x);
    } else {
        rms_norm(x, norm, eps, normed, inverse);
    }
}

/// Adds the gradient of the residual stream to `dx`, from that of what was read.
fn read_backward(dnormed: &[f32], x: &[f32], norm: &[f32], inverse: &[f32], dx: &mut [f32], dnorm: &mut [f32]) {
    if norm.is_empty() {
        dx.iter_mut().zip(dnormed).for_each(|(d, n)| *d += n);
    } else {
        rms_norm_backward(dnormed, x, norm, inverse, dx, dnorm);
    }
}

/// Columns `part` of rows of `stride` numbers, put one after the other.
fn gather(from: &[f32], stride: usize, part: Range<usize>, to: &mut Vec<f32>) {
    to.clear();
    from.chunks_exact(stride).for_each(|row| to.extend_from_slice(&row[part.clone()]));
}

/// The other way.
fn scatter(from: &[f32], to: &mut [f32], stride: usize, part: Range<usize>) {
    let rows = to.chunks_exact_mut(stride).zip(from.chunks_exact(part.len()));
    rows.for_each(|(row, from)| row[part.clone()].copy_from_slice(from));
}
