//! `pca`: the residual stream is rotated, its first components are kept, and every matrix is fitted again by least squares.
//!
//! The rotation is one for the whole model, so that residual sums stay sums (SliceGPT, Ashkboos et al. 2024, has one per
//! block and keeps the difference as matrices of its own, which no plain Llama has). Two streams go through the layers side
//! by side: the full model's, and that of the decode model as far as it is made. Each matrix is fitted to what it really
//! reads, so it corrects the error that has built up before it:
//! - what reads a norm (queries, keys, values; gate and up; the head) gets the linear map that leads from the decode model's
//!   normed state to the full model's, and then reads as the full model does;
//! - what writes (the attention's output, down) is fitted to the difference between where the decode model's stream is and
//!   the projection of the full model's.
//!
//! The ridge pulls to the rotated weights, not to zero: where nothing is cut away, nothing changes.

use serde::Serialize;

use crate::calibrate::Sample;
use crate::checkpoint::{Checkpoint, LayerWeights, Writer};
use crate::error::CompressError;
use crate::matrix::{Matrix, Products, ridge};
use crate::prune::Progress;
use crate::prune::kept::{Kept, kv_columns};
use crate::prune::stream::{Batch, Reads, Shape, batches};

/// How `pca` fits its matrices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// Not at all: rotated, cut, and the norms' scale corrected.
    None,
    /// To answers that are written with the full model's keys and values of the prompt.
    Overfill,
    /// To samples that the decode model reads alone.
    Decode,
}

impl std::str::FromStr for Fit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "overfill" => Ok(Self::Overfill),
            "decode" => Ok(Self::Decode),
            other => Err(format!("'{other}' is no way to fit: use overfill, decode or none")),
        }
    }
}

impl Fit {
    /// What the decode model reads.
    pub(crate) fn reads(self) -> Reads {
        match self {
            Self::Decode => Reads::Everything,
            Self::None | Self::Overfill => Reads::Answers,
        }
    }
}

/// What is made.
pub(crate) struct Rotated<'a> {
    pub(crate) full: &'a Checkpoint,
    pub(crate) kept: &'a Kept,
    /// Orthonormal columns, `[hidden, hidden']`.
    pub(crate) basis: &'a Matrix,
    /// Share of the residual stream's energy that they hold.
    pub(crate) energy: f64,
    /// Whether the head is fitted too; else last norm and head are the full model's.
    pub(crate) fits_head: bool,
    pub(crate) fit: Fit,
    pub(crate) ridge: f64,
}

impl Rotated<'_> {
    /// Makes the decode model's weights and writes them.
    ///
    /// # Errors
    /// As [`Checkpoint::layer`] and [`Writer::layer`]; [`CompressError::Numbers`].
    pub(crate) fn write(&self, samples: &[Sample], writer: &mut Writer, progress: Progress<'_>) -> Result<(), CompressError> {
        let layers = self.full.config().kv.layers;
        let embedding = self.full.embedding()?;
        let rotated = embedding.times(self.basis);
        writer.embedding(&rotated)?;
        let mut streams = match self.fit {
            Fit::None => None,
            Fit::Overfill | Fit::Decode => Some(Streams::new(self, &embedding, &rotated, samples)),
        };
        drop((embedding, rotated));
        for i in 0..layers {
            progress("fitting", i, layers);
            let layer = self.full.layer(i)?.folded();
            let mut made = self.kept.within(i, &layer, self.full.config());
            made.input_norm = vec![1.0; self.basis.columns()];
            made.mlp_norm = made.input_norm.clone();
            let written = self.basis.transposed_times(&made.output);
            made.output = written;
            made.down = self.basis.transposed_times(&made.down);
            match &mut streams {
                None => {
                    let map = self.rotated_norm();
                    read_through(&mut made.qkv, &map);
                    read_through([&mut made.gate, &mut made.up], &map);
                }
                Some(streams) => streams.fit_layer(i, &layer, &mut made)?,
            }
            writer.layer(i, &made)?;
        }
        if !self.fits_head {
            let head = if self.full.tied() { None } else { Some(self.full.head()?) };
            return writer.head(&self.full.norm()?, head.as_ref());
        }
        let map = match &streams {
            None => self.rotated_norm(),
            Some(streams) => streams.fit_norm()?,
        };
        let mut head = self.full.head()?;
        head.scale_columns(&self.full.norm()?);
        writer.head(&vec![1.0; self.basis.columns()], Some(&head.times(&map)))
    }

    /// From the kept components' norm back to the full stream's: rotated, and scaled because a mean over fewer components,
    /// of which the large ones are kept, is larger.
    fn rotated_norm(&self) -> Matrix {
        let scale = (self.energy * self.basis.rows() as f64 / self.basis.columns() as f64).sqrt();
        let mut map = self.basis.clone();
        map.numbers_mut().iter_mut().for_each(|x| *x *= scale as f32);
        map
    }
}

fn read_through<'m>(matrices: impl IntoIterator<Item = &'m mut Matrix>, map: &Matrix) {
    matrices.into_iter().for_each(|m| *m = m.times(map));
}

/// Both models' hidden states.
struct Streams<'a> {
    rotated: &'a Rotated<'a>,
    shape: Shape,
    made_shape: Shape,
    /// The full model's rows, and the decode model's.
    batches: Vec<Batch>,
    read: Vec<Batch>,
    /// For each batch, which of the full model's rows the decode model's are.
    rows: Vec<Vec<usize>>,
    full: Vec<Matrix>,
    made: Vec<Matrix>,
}

impl<'a> Streams<'a> {
    fn new(rotated: &'a Rotated<'a>, embedding: &Matrix, embedding_made: &Matrix, samples: &[Sample]) -> Self {
        let config = rotated.full.config();
        let shape = Shape::of(config);
        let mut made_config = config.clone();
        made_config.kv.kv_heads = rotated.kept.kv_heads.first().map_or(config.kv.kv_heads, Vec::len);
        made_config.heads = config.heads / config.kv.kv_heads * made_config.kv.kv_heads;
        let batches = batches(samples, Reads::Everything);
        let read = super::stream::batches(samples, rotated.fit.reads());
        let made_shape = Shape::of(&made_config);
        Self {
            rotated,
            full: batches.iter().map(|b| shape.embed(embedding, b)).collect(),
            made: read.iter().map(|b| made_shape.embed(embedding_made, b)).collect(),
            rows: read.iter().map(|b| b.rows_of_everything().collect()).collect(),
            shape,
            made_shape,
            batches,
            read,
        }
    }

    /// Fits the matrices of `made`, whose writing ones are rotated already; both streams go through the layer.
    fn fit_layer(&mut self, i: usize, layer: &LayerWeights, made: &mut LayerWeights) -> Result<(), CompressError> {
        let map = self.fit_norm()?;
        read_through(&mut made.qkv, &map);
        let context = self.full_attention(i, layer);
        let mut attended = Vec::with_capacity(self.made.len());
        let mut sums = Sums::new(made.output.columns(), made.output.rows());
        for (b, batch) in self.read.iter().enumerate() {
            let qkv = self.made_shape.qkv(i, made, &self.made_shape.normed(&self.made[b]), batch);
            let context = (self.rotated.fit == Fit::Overfill).then(|| &context[b]);
            let rows = self.made_shape.attention(i, &qkv, context, &batch.spans);
            sums.add(&rows, &self.distance(b));
            attended.push(rows);
        }
        drop(context);
        made.output = sums.solve(&made.output, self.rotated.ridge)?;
        for (hidden, rows) in self.made.iter_mut().zip(&attended) {
            self.made_shape.add_through(hidden, rows, &made.output, &[]);
        }
        drop(attended);

        let map = self.fit_norm()?;
        read_through([&mut made.gate, &mut made.up], &map);
        for hidden in &mut self.full {
            let active = self.shape.activations(layer, &self.shape.normed(hidden));
            self.shape.add_through(hidden, &active, &layer.down, &[]);
        }
        let mut sums = Sums::new(made.down.columns(), made.down.rows());
        for (b, hidden) in self.made.iter().enumerate() {
            sums.add(&self.made_shape.activations(made, &self.made_shape.normed(hidden)), &self.distance(b));
        }
        made.down = sums.solve(&made.down, self.rotated.ridge)?;
        for hidden in &mut self.made {
            // Computed twice, since the activations of all samples may be more than memory holds.
            let active = self.made_shape.activations(made, &self.made_shape.normed(hidden));
            self.made_shape.add_through(hidden, &active, &made.down, &[]);
        }
        Ok(())
    }

    /// The full model's attention; gives the keys and values that the decode model's heads find in its cache.
    fn full_attention(&mut self, i: usize, layer: &LayerWeights) -> Vec<(Matrix, Matrix)> {
        let heads = &self.rotated.kept.kv_heads[i];
        let columns = (heads.len() < self.shape.kv_heads).then(|| kv_columns(heads, self.shape.head_dim));
        let mut context = Vec::with_capacity(self.full.len());
        for (batch, hidden) in self.batches.iter().zip(&mut self.full) {
            let qkv = self.shape.qkv(i, layer, &self.shape.normed(hidden), batch);
            let attended = self.shape.attention(i, &qkv, None, &batch.spans);
            self.shape.add_through(hidden, &attended, &layer.output, &[]);
            let [_, k, v] = qkv;
            context.push(match &columns {
                None => (k, v),
                Some(columns) => (k.select_columns(columns), v.select_columns(columns)),
            });
        }
        context
    }

    /// From the decode model's normed state to the full model's, `[hidden, hidden']`.
    fn fit_norm(&self) -> Result<Matrix, CompressError> {
        let basis = self.rotated.basis;
        let mut sums = Sums::new(basis.columns(), basis.rows());
        for (b, hidden) in self.made.iter().enumerate() {
            let wanted = self.shape.normed(&self.full[b].select_rows(self.rows[b].iter().copied()));
            sums.add(&self.made_shape.normed(hidden), &wanted);
        }
        let mut prior = basis.clone();
        let scale = sums.scale(basis);
        prior.numbers_mut().iter_mut().for_each(|x| *x *= scale as f32);
        sums.solve(&prior, self.rotated.ridge)
    }

    /// From where the decode model's stream is to the projection of the full model's, as a matrix has to write it.
    fn distance(&self, b: usize) -> Matrix {
        let mut wanted = self.full[b].select_rows(self.rows[b].iter().copied()).times(self.rotated.basis);
        wanted.numbers_mut().iter_mut().zip(self.made[b].numbers()).for_each(|(w, m)| *w -= m);
        let residual = self.made_shape.residual() as f32;
        if residual != 1.0 {
            wanted.numbers_mut().iter_mut().for_each(|w| *w /= residual);
        }
        wanted
    }
}

/// The sums of one least-squares fit.
struct Sums {
    gram: Products,
    cross: Products,
}

impl Sums {
    fn new(inputs: usize, outputs: usize) -> Self {
        Self { gram: Products::new(inputs, inputs), cross: Products::new(inputs, outputs) }
    }

    fn add(&mut self, x: &Matrix, y: &Matrix) {
        self.gram.add(x, x);
        self.cross.add(x, y);
    }

    /// The factor of `map` `[out, in]` that fits best.
    fn scale(&self, map: &Matrix) -> f64 {
        self.cross.inner_with_transposed(map) / self.gram.trace()
    }

    fn solve(&self, prior: &Matrix, factor: f64) -> Result<Matrix, CompressError> {
        ridge(&self.gram, &self.cross, prior, factor)
    }
}
