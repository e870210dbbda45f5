//! The whole network: embedding, layers, last norm, head; forward, loss and backward.

use overfill_compress::product::{Onto, Precision};
use overfill_model::LlamaConfig;
use overfill_model::rope::Frequencies;

use super::batch::{KvRows, Packed, Sequence};
use super::divergence::Divergence;
use super::layer::{LayerBuffers, LayerGradients, LayerWeights, Saved};
use super::loss::{HeadGradients, LogitMap, Mix, RowLoss, Target, head_loss};
use super::parameters::Shape;
use super::projection::{project, project_backward};
use super::rows::{rms_norm, rms_norm_backward};
use super::states::{StateGradients, state_loss};

/// A network's shape; its parameters are the caller's.
pub struct Net {
    /// What it is made of.
    pub shape: Shape,
    global: Frequencies,
    local: Option<Frequencies>,
}

/// What a forward pass leaves behind, and buffers that are kept from batch to batch.
#[derive(Default)]
pub struct State {
    /// Where the sequences lie.
    pub packed: Packed,
    /// The residual stream after the last layer, `[rows, hidden]`.
    pub x: Vec<f32>,
    /// Layer by layer, after [`Net::forward`]; one for all after [`Net::run`].
    pub saved: Vec<Saved>,
    /// Contexts after the projection: layer by layer, after [`Net::run`] the last one's.
    projected: Vec<Vec<KvRows>>,
    dprojected: Vec<KvRows>,
    layer: LayerBuffers,
    head: HeadBuffers,
    dx: Vec<f32>,
}

impl State {
    /// Of passes whose large products are of these numbers.
    pub fn new(precision: Precision) -> Self {
        Self { layer: LayerBuffers::new(precision), ..Self::default() }
    }
}

/// What the head computes with; a row for each target.
#[derive(Default)]
struct HeadBuffers {
    selected: Vec<f32>,
    normed: Vec<f32>,
    inverse: Vec<f32>,
    dnormed: Vec<f32>,
    dselected: Vec<f32>,
    logits: Vec<f32>,
    mapped: Vec<f32>,
}

impl Net {
    /// Of this shape; the rotary embedding is the configuration's.
    pub fn new(shape: Shape, config: &LlamaConfig) -> Self {
        Self { shape, global: Frequencies::new(&config.rope), local: config.local_rope.as_ref().map(Frequencies::new) }
    }

    /// Forward, keeping what backward needs: the residual stream in `state.x`, everything else in `state.saved`.
    ///
    /// # Panics
    /// Where a token id or a context does not fit the shape.
    pub fn forward(&self, parameters: &[f32], sequences: &[Sequence<'_>], state: &mut State) {
        self.pass(parameters, sequences, state, true, &mut |_, _, _| {});
    }

    /// Forward, keeping nothing: `on_layer(layer, saved, x)` sees what each layer leaves behind, and the residual stream after it.
    ///
    /// # Panics
    /// Where a token id or a context does not fit the shape.
    pub fn run(&self, parameters: &[f32], sequences: &[Sequence<'_>], state: &mut State, on_layer: &mut dyn FnMut(usize, &Saved, &[f32])) {
        self.pass(parameters, sequences, state, false, on_layer);
    }

    fn pass(
        &self,
        parameters: &[f32],
        sequences: &[Sequence<'_>],
        state: &mut State,
        keep: bool,
        on_layer: &mut dyn FnMut(usize, &Saved, &[f32]),
    ) {
        let shape = &self.shape;
        let hidden = shape.layer.hidden;
        state.packed = Packed::new(sequences, &self.global, self.local.as_ref());
        let embedding = &parameters[shape.embedding_range()];
        state.x.clear();
        for token in sequences.iter().flat_map(|s| s.tokens) {
            state.x.extend_from_slice(&embedding[*token as usize * hidden..][..hidden]);
        }
        let factor = shape.layer.scalars.embedding as f32;
        if factor != 1.0 {
            state.x.iter_mut().for_each(|x| *x *= factor);
        }
        let kept = if keep { shape.layers } else { 1 };
        state.saved.resize_with(kept, Saved::default);
        state.projected.resize_with(kept, Vec::new);
        for layer in 0..shape.layers {
            let at = if keep { layer } else { 0 };
            if shape.projected.is_some() {
                let projection = &parameters[shape.projection_range(layer)];
                project(sequences, layer, projection, shape.layer.kv_row(), &mut state.projected[at], &mut state.layer.products);
            }
            let contexts = self.contexts(sequences, layer, &state.projected[at]);
            let weights = LayerWeights::of(&shape.layer, &parameters[shape.layer_range(layer)]);
            state.layer.forward(&shape.layer(layer), &weights, &state.packed, &contexts, &mut state.x, &mut state.saved[at]);
            on_layer(layer, &state.saved[at], &state.x);
        }
    }

    /// What a layer attends to before each sequence's own tokens.
    fn contexts<'a>(&self, sequences: &'a [Sequence<'a>], layer: usize, projected: &'a [KvRows]) -> Vec<Option<&'a KvRows>> {
        let sequences = sequences.iter().enumerate();
        sequences
            .map(|(i, s)| s.context.map(|context| if self.shape.projected.is_some() { &projected[i] } else { &context.layers[layer] }))
            .collect()
    }

    /// Loss of each target after a forward pass.
    pub fn loss(&self, parameters: &[f32], targets: &[Target<'_>], divergence: Divergence, state: &mut State) -> Vec<RowLoss> {
        self.select(parameters, targets, state);
        let (head, mix) = (&parameters[self.shape.head_range()], Mix { ce: 1.0, distill: 1.0, divergence, states: 1.0 });
        let mut losses =
            head_loss(head, self.logit_map(), &state.head.normed, targets, mix, None, &mut state.head.logits, &mut state.layer.products);
        if self.shape.taught.is_some() {
            let map = &parameters[self.shape.state_map_range()];
            state_loss(map, &state.head.normed, targets, &mut losses, &mut state.head.mapped, None, &mut state.layer.products);
        }
        losses
    }

    /// Logits after each of `rows`, `[rows, vocab]`, after a forward pass.
    pub fn logits(&self, parameters: &[f32], rows: &[usize], state: &mut State) -> Vec<f32> {
        let targets: Vec<Target<'_>> = rows.iter().map(|&row| Target { row, token: 0, teacher: None }).collect();
        self.select(parameters, &targets, state);
        let mut logits = vec![0.0; rows.len() * self.shape.vocab];
        let head = &parameters[self.shape.head_range()];
        state.layer.products.linear(&mut logits, &state.head.normed, head, self.shape.layer.hidden, Onto::Replace);
        self.logit_map().apply(&mut logits);
        logits
    }

    fn logit_map(&self) -> LogitMap {
        let scalars = &self.shape.layer.scalars;
        LogitMap { factor: scalars.logits as f32, cap: scalars.logits_cap.map(|cap| cap as f32) }
    }

    /// The targets' rows of the residual stream, normed.
    fn select(&self, parameters: &[f32], targets: &[Target<'_>], state: &mut State) {
        let hidden = self.shape.layer.hidden;
        let head = &mut state.head;
        head.selected.clear();
        for target in targets {
            head.selected.extend_from_slice(&state.x[target.row * hidden..][..hidden]);
        }
        let norm = &parameters[self.shape.norm_range()];
        rms_norm(&head.selected, norm, self.shape.layer.eps, &mut head.normed, &mut head.inverse);
    }

    /// Forward, loss and backward of one batch. Gradients of the sum over targets of `scale` times the mixed loss replace
    /// `gradients`, or are added to them where `add` is set. Returns each target's loss.
    ///
    /// # Panics
    /// Where there is no target, or a token id or a context does not fit the shape.
    pub fn train(
        &self,
        parameters: &[f32],
        batch: &Batch<'_>,
        objective: Objective,
        state: &mut State,
        gradients: &mut [f32],
        add: bool,
    ) -> Vec<RowLoss> {
        let Batch { sequences, targets } = batch;
        assert!(!targets.is_empty(), "a batch without a target");
        let shape = &self.shape;
        let hidden = shape.layer.hidden;
        let onto = Onto::adding(add);
        if !add {
            self.clear_vectors(gradients);
        }
        self.forward(parameters, sequences, state);

        // The head.
        self.select(parameters, targets, state);
        let head = &mut state.head;
        head.dnormed.resize(targets.len() * hidden, 0.0);
        let into = HeadGradients { head: &mut gradients[shape.head_range()], normed: &mut head.dnormed, onto, scale: objective.scale };
        let mut losses = head_loss(
            &parameters[shape.head_range()],
            self.logit_map(),
            &head.normed,
            targets,
            objective.mix,
            Some(into),
            &mut head.logits,
            &mut state.layer.products,
        );
        if shape.taught.is_some() {
            let scale = objective.scale * objective.mix.states;
            let into = StateGradients { map: &mut gradients[shape.state_map_range()], normed: &mut head.dnormed, onto, scale };
            state_loss(
                &parameters[shape.state_map_range()],
                &head.normed,
                targets,
                &mut losses,
                &mut head.mapped,
                Some(into),
                &mut state.layer.products,
            );
        }
        head.dselected.clear();
        head.dselected.resize(targets.len() * hidden, 0.0);
        let norm = &parameters[shape.norm_range()];
        let dnorm = &mut gradients[shape.norm_range()];
        rms_norm_backward(&head.dnormed, &head.selected, norm, &head.inverse, &mut head.dselected, dnorm);
        state.dx.clear();
        state.dx.resize(state.x.len(), 0.0);
        for (target, row) in targets.iter().zip(head.dselected.chunks_exact(hidden)) {
            state.dx[target.row * hidden..][..hidden].iter_mut().zip(row).for_each(|(d, x)| *d += x);
        }

        // The layers, last to first.
        for layer in (0..shape.layers).rev() {
            let contexts = self.contexts(sequences, layer, &state.projected[layer]);
            let weights = LayerWeights::of(&shape.layer, &parameters[shape.layer_range(layer)]);
            let into = LayerGradients::of(&shape.layer, &mut gradients[shape.layer_range(layer)]);
            let saved = &mut state.saved[layer];
            let dcontexts = shape.projected.is_some().then(|| {
                state.dprojected.resize(sequences.len(), KvRows::default());
                state.dprojected.as_mut_slice()
            });
            state.layer.backward(&shape.layer(layer), &weights, &state.packed, &contexts, saved, &mut state.dx, into, dcontexts, onto);
            if shape.projected.is_some() {
                let into = &mut gradients[shape.projection_range(layer)];
                project_backward(sequences, layer, &state.dprojected, shape.layer.kv_row(), into, &mut state.layer.products);
            }
        }

        let factor = shape.layer.scalars.embedding as f32;
        let dembedding = &mut gradients[shape.embedding_range()];
        for (token, row) in sequences.iter().flat_map(|s| s.tokens).zip(state.dx.chunks_exact(hidden)) {
            dembedding[*token as usize * hidden..][..hidden].iter_mut().zip(row).for_each(|(d, x)| *d += factor * x);
        }
        losses
    }

    /// Sets to 0 what a batch's backward only adds to.
    fn clear_vectors(&self, gradients: &mut [f32]) {
        let shape = &self.shape;
        for layer in 0..shape.layers {
            let of = LayerGradients::of(&shape.layer, &mut gradients[shape.layer_range(layer)]);
            let norms = [of.input_norm, of.query_norm, of.key_norm, of.attended_norm, of.mlp_norm, of.down_norm];
            norms.into_iter().chain([of.qkv_bias]).for_each(|v| v.fill(0.0));
            gradients[shape.projection_range(layer)].fill(0.0);
        }
        gradients[shape.norm_range()].fill(0.0);
        if !shape.tied {
            gradients[shape.embedding_range()].fill(0.0);
        }
    }
}

/// What is trained on at once.
pub struct Batch<'a> {
    /// Read together.
    pub sequences: &'a [Sequence<'a>],
    /// Their rows that count.
    pub targets: &'a [Target<'a>],
}

/// What is minimised: `scale` times the sum of the targets' mixed losses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// Weights of the losses.
    pub mix: Mix,
    /// One over the number of targets, for their mean.
    pub scale: f32,
}
