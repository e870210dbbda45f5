//! Distance of hidden states: a linear map of the decode model's last normed states is to be the full model's.
//!
//! The full model's states are divided by their root mean square, so a distance of 1 is as far as knowing nothing. The map is
//! trained beside the model and belongs to no model: residual streams of other widths, or rotated ones, have other directions.

use overfill_compress::product::{Multiplier, Onto};
use rayon::prelude::*;

use super::loss::{RowLoss, Target};

/// Backward's part.
pub(super) struct StateGradients<'a> {
    /// Of the map, `[full hidden, hidden]`.
    pub(super) map: &'a mut [f32],
    /// Of the normed rows, `[targets, hidden]`: added to.
    pub(super) normed: &'a mut [f32],
    /// Whether `map` is replaced.
    pub(super) onto: Onto,
    /// What every row's distance is multiplied by.
    pub(super) scale: f32,
}

/// Tells each target's distance in `losses`: the mean square of what lies between the mapped row of `normed` and the full
/// model's state, 0 where that is not known. `mapped` is a buffer.
pub(super) fn state_loss(
    map: &[f32],
    normed: &[f32],
    targets: &[Target<'_>],
    losses: &mut [RowLoss],
    mapped: &mut Vec<f32>,
    gradients: Option<StateGradients<'_>>,
    products: &mut Multiplier,
) {
    let hidden = normed.len() / targets.len().max(1);
    let width = map.len() / hidden.max(1);
    mapped.resize(targets.len() * width, 0.0);
    products.linear(mapped, normed, map, hidden, Onto::Replace);
    let scale = gradients.as_ref().map_or(0.0, |g| g.scale);
    mapped.par_chunks_exact_mut(width).zip(targets).zip(losses).for_each(|((row, target), loss)| {
        let state = target.teacher.map_or(&[][..], |t| t.state);
        if state.is_empty() {
            return row.fill(0.0);
        }
        row.iter_mut().zip(state).for_each(|(x, full)| *x -= full);
        loss.states = row.iter().map(|x| x * x).sum::<f32>() / width as f32;
        row.iter_mut().for_each(|x| *x *= 2.0 * scale / width as f32);
    });
    if let Some(gradients) = gradients {
        products.linear_weight(gradients.map, mapped, normed, hidden, gradients.onto);
        products.linear_input(gradients.normed, mapped, map, hidden, Onto::Add);
    }
}
