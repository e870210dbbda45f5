//! What a full model's weights are worth: measured while it reads the samples, layer by layer.

use crate::calibrate::Sample;
use crate::checkpoint::{Checkpoint, LayerWeights};
use crate::error::CompressError;
use crate::matrix::{Matrix, Products};
use crate::prune::Progress;
use crate::prune::stream::{Batch, Reads, Shape, batches};

/// Importance of all that can be cut. Larger is more important; numbers compare within one list only.
pub(crate) struct Statistics {
    /// The reference's, of the residual stream's channels: of each norm's output the mean over a sample's tokens, its absolute
    /// value summed over the layers' norms, L2 over samples.
    pub(crate) channels: Vec<f64>,
    /// Sum of `x̂ x̂ᵀ` over the rows that the decode model will read and over all norms' places; x̂ is the residual stream
    /// divided by its root mean square.
    pub(crate) components: Products,
    /// Of each layer.
    pub(crate) layers: Vec<LayerStatistics>,
}

/// Importance within one layer.
pub(crate) struct LayerStatistics {
    /// The reference's, of the MLP's neurons: of what the down projection reads the mean over a sample's tokens, L2 over samples.
    pub(crate) neurons_as_reference: Vec<f64>,
    /// Of the MLP's neurons: mean absolute activation times the length of what it writes.
    pub(crate) neurons_by_output: Vec<f64>,
    /// Of KV heads with their queries: root mean square of what they write.
    pub(crate) kv_heads: Vec<f64>,
}

impl Statistics {
    /// Reads the samples with the full model. `reads` says which rows the decode model will read.
    ///
    /// # Errors
    /// As [`Checkpoint::layer`].
    pub(crate) fn measure(full: &Checkpoint, samples: &[Sample], reads: Reads, progress: Progress<'_>) -> Result<Self, CompressError> {
        let config = full.config();
        let (shape, hidden_size, layers) = (Shape::of(config), config.hidden_size, config.kv.layers);
        let (batches, read) = (batches(samples, Reads::Everything), batches(samples, reads));
        let embedding = full.embedding()?;
        let mut hidden: Vec<Matrix> = batches.iter().map(|b| shape.embed(&embedding, b)).collect();
        drop(embedding);
        let mut channels = BySample::new(samples.len(), hidden_size);
        let mut components = Products::new(hidden_size, hidden_size);
        let mut measured = Vec::with_capacity(layers);
        for i in 0..layers {
            progress("reading the samples", i, layers);
            let layer = full.layer(i)?;
            let (input_norm, mlp_norm) = (layer.input_norm.clone(), layer.mlp_norm.clone());
            let layer = layer.folded();
            let mut neurons = BySample::new(samples.len(), config.intermediate_size);
            let mut activity = vec![0.0; config.intermediate_size];
            let mut kv_heads = vec![0.0; config.kv.kv_heads];
            let mut first = 0;
            for ((batch, read), hidden) in batches.iter().zip(&read).zip(&mut hidden) {
                let rows: Vec<usize> = read.rows_of_everything().collect();
                let normed = shape.normed(hidden);
                channels.add(first, batch, &normed, Some(&input_norm));
                let seen = normed.select_rows(rows.iter().copied());
                components.add(&seen, &seen);
                let qkv = shape.qkv(i, &layer, &normed, batch);
                let attended = shape.attention(i, &qkv, None, &batch.spans);
                heads(&layer, &shape, &attended.select_rows(rows.iter().copied()), &mut kv_heads);
                shape.add_through(hidden, &attended, &layer.output, &layer.attended_norm);

                let normed = shape.normed(hidden);
                channels.add(first, batch, &normed, Some(&mlp_norm));
                let seen = normed.select_rows(rows.iter().copied());
                components.add(&seen, &seen);
                let active = shape.activations(&layer, &normed);
                neurons.add(first, batch, &active, None);
                for &row in &rows {
                    activity.iter_mut().zip(active.row(row)).for_each(|(sum, a)| *sum += f64::from(a.abs()));
                }
                shape.add_through(hidden, &active, &layer.down, &layer.down_norm);
                first += batch.spans.len();
            }
            measured.push(LayerStatistics {
                neurons_as_reference: neurons.l2(),
                neurons_by_output: activity.iter().zip(column_lengths(&layer.down)).map(|(a, l)| a * l).collect(),
                kv_heads: kv_heads.into_iter().map(f64::sqrt).collect(),
            });
        }
        for (read, hidden) in read.iter().zip(&hidden) {
            let seen = shape.normed(hidden).select_rows(read.rows_of_everything());
            components.add(&seen, &seen);
        }
        Ok(Self { channels: channels.l2(), components, layers: measured })
    }
}

/// Adds the squares of what each KV head's queries write.
fn heads(layer: &LayerWeights, shape: &Shape, attended: &Matrix, sums: &mut [f64]) {
    let width = shape.heads / shape.kv_heads * shape.head_dim;
    for (head, sum) in sums.iter_mut().enumerate() {
        let columns: Vec<usize> = (head * width..(head + 1) * width).collect();
        let written = attended.select_columns(&columns).through(&layer.output.select_columns(&columns));
        *sum += written.numbers().iter().map(|x| f64::from(x * x)).sum::<f64>();
    }
}

fn column_lengths(matrix: &Matrix) -> Vec<f64> {
    let mut squares = vec![0.0; matrix.columns()];
    for i in 0..matrix.rows() {
        squares.iter_mut().zip(matrix.row(i)).for_each(|(s, x)| *s += f64::from(*x) * f64::from(*x));
    }
    squares.into_iter().map(f64::sqrt).collect()
}

/// The reference's sum: |mean over a sample's tokens|, summed over the places where it is looked at; then L2 over samples.
struct BySample {
    samples: usize,
    sums: Vec<f64>,
}

impl BySample {
    fn new(samples: usize, width: usize) -> Self {
        Self { samples, sums: vec![0.0; samples * width] }
    }

    /// `first` is the number of the batch's first sample; `norm` are factors of the columns.
    fn add(&mut self, first: usize, batch: &Batch, values: &Matrix, norm: Option<&[f32]>) {
        let width = values.columns();
        for (i, span) in batch.spans.iter().enumerate() {
            let mut mean = vec![0.0; width];
            for row in span.rows.clone() {
                mean.iter_mut().zip(values.row(row)).for_each(|(m, v)| *m += f64::from(*v));
            }
            let sums = &mut self.sums[(first + i) * width..(first + i + 1) * width];
            for (column, (sum, mean)) in sums.iter_mut().zip(mean).enumerate() {
                *sum += (mean * norm.map_or(1.0, |n| f64::from(n[column]))).abs() / span.rows.len() as f64;
            }
        }
    }

    fn l2(&self) -> Vec<f64> {
        let width = self.sums.len() / self.samples.max(1);
        let mut squares = vec![0.0; width];
        for sample in self.sums.chunks_exact(width) {
            squares.iter_mut().zip(sample).for_each(|(q, s)| *q += s * s);
        }
        squares.into_iter().map(f64::sqrt).collect()
    }
}
