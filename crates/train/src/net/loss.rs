//! The losses: cross-entropy with the token that is there, and the divergence from the full model's distribution.
//!
//! Of the full model's distribution its most likely tokens are known; all others are one event of the rest's probability. So
//! the divergence is exact for a distribution that is a little coarser than the true one, and never above the true one.
//! Which divergence is minimised is a choice ([`Divergence`]); KL is told always, so that runs compare.
//!
//! Logits are made for some rows at a time and turned into their gradient where they lie.

use overfill_compress::product::{Multiplier, Onto};
use overfill_compress::vector::{exp, max, sum, vectorised};
use rayon::prelude::*;

use super::divergence::{Divergence, Odds};

/// Numbers of logits that exist at a time: 96 MiB.
const LOGITS: usize = 24 << 20;
/// A rest of the full model's probability below this is rounding.
const NO_REST: f32 = 1e-6;

/// One row's part of the loss: what the token after it is.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The row that the token is predicted from.
    pub row: usize,
    /// The token.
    pub token: u32,
    /// What the full model says there.
    pub teacher: Option<Teacher<'a>>,
}

/// The full model's most likely tokens, most likely first, and the logarithms of their probabilities.
#[derive(Clone, Copy, Debug)]
pub struct Teacher<'a> {
    /// Token ids, none twice.
    pub ids: &'a [u32],
    /// As many.
    pub log_probs: &'a [f32],
    /// Its last hidden state divided by its root mean square, `[full hidden]`; empty where it is not asked.
    pub state: &'a [f32],
}

/// Weights of the losses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    /// Of the cross-entropy.
    pub ce: f32,
    /// Of the divergence from the full model, where it is known.
    pub distill: f32,
    /// Which divergence that is.
    pub divergence: Divergence,
    /// Of the distance from the full model's hidden states, where they are known.
    pub states: f32,
}

/// What one row's loss is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowLoss {
    /// Cross-entropy with the token, in nats.
    pub ce: f32,
    /// KL divergence from the full model, in nats; 0 where it is not known.
    pub kl: f32,
    /// The divergence that is minimised, in nats; 0 where the full model's distribution is not known.
    pub divergence: f32,
    /// Mean square distance from the full model's hidden state, whose mean square is 1; 0 where it is not known.
    pub states: f32,
    /// Whether the most likely token is the full model's; only told where no gradient is asked for.
    pub agrees: bool,
}

impl RowLoss {
    /// What is minimised.
    pub fn mixed(&self, mix: Mix) -> f32 {
        mix.ce * self.ce + mix.distill * self.divergence + mix.states * self.states
    }
}

/// How the head's products become logits: `cap * tanh(factor * x / cap)`, or `factor * x` without a cap.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogitMap {
    pub(super) factor: f32,
    pub(super) cap: Option<f32>,
}

impl LogitMap {
    /// Of all products, in place.
    pub(super) fn apply(self, products: &mut [f32]) {
        if self.factor != 1.0 {
            products.par_chunks_mut(4096).for_each(|part| part.iter_mut().for_each(|x| *x *= self.factor));
        }
        if let Some(cap) = self.cap {
            products.par_chunks_mut(4096).for_each(|part| part.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh()));
        }
    }

    /// From the gradient of `logits` to that of the products, in place.
    fn backward(self, logits: &[f32], gradient: &mut [f32]) {
        if let Some(cap) = self.cap {
            gradient.iter_mut().zip(logits).for_each(|(d, y)| *d *= 1.0 - (y / cap).powi(2));
        }
        if self.factor != 1.0 {
            gradient.iter_mut().for_each(|d| *d *= self.factor);
        }
    }
}

/// The head's part of backward.
pub(super) struct HeadGradients<'a> {
    /// Of the head's weight, `[vocab, hidden]`.
    pub(super) head: &'a mut [f32],
    /// Of the normed rows, `[targets, hidden]`.
    pub(super) normed: &'a mut [f32],
    /// Whether `head` is replaced.
    pub(super) onto: Onto,
    /// What every row's loss is multiplied by.
    pub(super) scale: f32,
}

/// Loss of each target; `normed` has a row for each of them.
#[allow(clippy::too_many_arguments, reason = "what is read, what is wanted of it, and two buffers")]
pub(super) fn head_loss(
    head: &[f32],
    map: LogitMap,
    normed: &[f32],
    targets: &[Target<'_>],
    mix: Mix,
    mut gradients: Option<HeadGradients<'_>>,
    logits: &mut Vec<f32>,
    products: &mut Multiplier,
) -> Vec<RowLoss> {
    let hidden = normed.len() / targets.len().max(1);
    let vocab = head.len() / hidden.max(1);
    let rows = (LOGITS / vocab.max(1)).max(1);
    let scale = gradients.as_ref().map(|g| g.scale);
    let mut losses = Vec::with_capacity(targets.len());
    for (i, targets) in targets.chunks(rows).enumerate() {
        let part = i * rows * hidden..(i * rows + targets.len()) * hidden;
        logits.resize(targets.len() * vocab, 0.0);
        products.linear(logits, &normed[part.clone()], head, hidden, Onto::Replace);
        map.apply(logits);
        let before = if map.cap.is_some() && gradients.is_some() { logits.clone() } else { Vec::new() };
        losses.par_extend(logits.par_chunks_exact_mut(vocab).zip(targets).map(|(logits, target)| row_loss(logits, target, mix, scale)));
        if let Some(gradients) = &mut gradients {
            map.backward(&before, logits);
            let onto = if i == 0 { gradients.onto } else { Onto::Add };
            products.linear_weight(gradients.head, logits, &normed[part.clone()], hidden, onto);
            products.linear_input(&mut gradients.normed[part], logits, head, hidden, Onto::Replace);
        }
    }
    losses
}

/// Loss of one row; with a `scale` its logits become their gradient.
fn row_loss(logits: &mut [f32], target: &Target<'_>, mix: Mix, scale: Option<f32>) -> RowLoss {
    let (ids, log_probs) = target.teacher.map_or((&[][..], &[][..]), |t| (t.ids, t.log_probs));
    let gold = logits[target.token as usize];
    let known: Vec<f32> = ids.iter().map(|id| logits[*id as usize]).collect();
    let most = vectorised(|| max(logits));
    let agrees = scale.is_none() && known.first().is_some_and(|first| *first >= most);
    // Only the rest is summed over, so that its sum is exact however small it is.
    ids.iter().for_each(|id| logits[*id as usize] = f32::NEG_INFINITY);
    let rest = vectorised(|| {
        logits.iter_mut().for_each(|x| *x = exp(*x - most));
        sum(logits.len(), |i| logits[i])
    });
    let total = rest + known.iter().map(|x| f64::from(*x - most).exp()).sum::<f64>();
    let log_total = total.ln() as f32 + most;
    let mut loss = RowLoss { ce: log_total - gold, agrees, ..RowLoss::default() };

    let probabilities: Vec<f32> = log_probs.iter().map(|p| p.exp()).collect();
    let p_rest = 1.0 - probabilities.iter().sum::<f32>();
    let p_rest = if ids.is_empty() || p_rest < NO_REST { 0.0 } else { p_rest };
    let of_known = probabilities.iter().zip(log_probs).zip(&known).map(|((&p, &log_p), x)| {
        let log_q = x - log_total;
        Odds { p, log_p, q: log_q.exp(), log_q }
    });
    let of_rest = Odds { p: p_rest, log_p: p_rest.ln(), q: (rest / total) as f32, log_q: rest.ln() as f32 + most - log_total };
    // Where nothing is known all is rest, and there is no distance.
    let events: Vec<Odds> = if ids.is_empty() { Vec::new() } else { of_known.chain([of_rest]).collect() };
    let parts: Vec<(f32, f32)> = events.iter().map(|odds| mix.divergence.event(*odds)).collect();
    loss.kl = events.iter().map(|odds| Divergence::Kl.event(*odds).0).sum();
    loss.divergence = parts.iter().map(|(distance, _)| distance).sum();
    let Some(scale) = scale else { return loss };

    // By a logit `x` of event `e`: `q_x (slope_e / q_e - sum of slopes)`, where slopes are by `q` times `q`.
    let slopes: f32 = parts.iter().map(|(_, slope)| slope).sum();
    let pull = mix.ce - mix.distill * slopes;
    // Of every exponential of the rest.
    let push = parts.last().map_or(0.0, |(_, slope)| if rest > 0.0 { f64::from(mix.distill * slope) / rest } else { 0.0 });
    let of_rest = (f64::from(pull) / total + push) as f32 * scale;
    vectorised(|| logits.iter_mut().for_each(|x| *x *= of_rest));
    for ((id, x), (_, slope)) in ids.iter().zip(&known).zip(&parts) {
        let q = (f64::from(*x - most).exp() / total) as f32;
        logits[*id as usize] = scale * (pull * q + mix.distill * slope);
    }
    logits[target.token as usize] -= scale * mix.ce;
    loss
}
