//! Trainable projections of a context's keys and values: one linear map a layer, shared by keys and values.

use overfill_compress::product::{Multiplier, Onto};

use super::batch::{KvRows, Sequence};
use super::rows::{add_bias, bias_backward};

/// Maps every sequence's context of one layer; `parameters` are the weight `[outputs, inputs]` and the bias `[outputs]`.
pub(super) fn project(
    sequences: &[Sequence<'_>],
    layer: usize,
    parameters: &[f32],
    outputs: usize,
    to: &mut Vec<KvRows>,
    products: &mut Multiplier,
) {
    to.resize(sequences.len(), KvRows::default());
    let (weight, bias) = parameters.split_at(parameters.len() - outputs);
    for (sequence, to) in sequences.iter().zip(to) {
        let from = sequence.context.map(|c| &c.layers[layer]);
        for (to, from) in [(&mut to.k, from.map(|f| &f.k)), (&mut to.v, from.map(|f| &f.v))] {
            let from = from.map_or(&[][..], Vec::as_slice);
            let inputs = weight.len() / outputs;
            to.resize(from.len() / inputs * outputs, 0.0);
            if !from.is_empty() {
                products.linear(to, from, weight, inputs, Onto::Replace);
                add_bias(to, bias);
            }
        }
    }
}

/// Adds the gradients of a layer's projection to `gradients`, given those of what it made.
pub(super) fn project_backward(
    sequences: &[Sequence<'_>],
    layer: usize,
    dprojected: &[KvRows],
    outputs: usize,
    gradients: &mut [f32],
    products: &mut Multiplier,
) {
    let (dweight, dbias) = gradients.split_at_mut(gradients.len() - outputs);
    for (sequence, d) in sequences.iter().zip(dprojected) {
        let Some(context) = sequence.context.filter(|c| c.tokens > 0) else { continue };
        let from = &context.layers[layer];
        for (d, from) in [(&d.k, &from.k), (&d.v, &from.v)] {
            let inputs = dweight.len() / outputs;
            products.linear_weight(dweight, d, from, inputs, Onto::Add);
            bias_backward(d, dbias);
        }
    }
}
