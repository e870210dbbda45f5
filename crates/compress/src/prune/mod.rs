//! Pruning: from any checkpoint that is read here to a smaller plain one of the same family.
//!
//! - `minitron` cuts channels and neurons by the importance of their activations; what is kept are the original's weights.
//! - `pca` rotates the residual stream, keeps its first components and fits every matrix again ([`Fit`]).
//! - `depth` keeps some layers as they are.
//! - [`quantise`] keeps everything, in fewer bits.
//!
//! The first two also cut KV heads with their queries. The full model is streamed: its weights are read layer by layer, once
//! for the statistics and once for the fit.

#[cfg(test)]
mod family_tests;
mod fit;
mod kept;
mod loss;
mod quantise;
mod statistics;
mod stream;

use std::path::{Path, PathBuf};

use overfill_model::{LlamaConfig, making};
use overfill_text::ModelText;
use overfill_types::{KvTransform, PruneStrategy};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use crate::calibrate::{Calibration, Sample, Samples};
use crate::checkpoint::{Checkpoint, Format, Writer};
use crate::error::CompressError;
use crate::matrix::Matrix;
use crate::prune::fit::Rotated;
use crate::prune::kept::most_important;
use crate::prune::loss::KvSource;
use crate::prune::statistics::Statistics;
pub use fit::Fit;
pub use kept::{Keep, Kept, Sizes};
pub use loss::Losses;
pub use quantise::quantise;

/// Name of the file, in the decode model's folder, that `overfill pair --kv projection:FILE` asks for where KV heads were cut.
pub const PROJECTION_FILE: &str = "projection.safetensors";

/// Called with what is being done, and how many of how many layers are through.
pub type Progress<'a> = &'a mut dyn FnMut(&str, usize, usize);

/// How a full model is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// By the importance of activations, as the reference does.
    Minitron,
    /// Rotated and fitted, with this ridge.
    Pca {
        /// In which mode.
        fit: Fit,
        /// Strength of the pull to the rotated weights, relative to the mean of the Gram matrix's diagonal.
        ridge: f64,
    },
    /// Whole layers.
    Depth(PruneStrategy),
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Prune {
    /// A Hugging Face folder or a GGUF file.
    pub full: PathBuf,
    /// How it is cut.
    pub method: Method,
    /// What is kept.
    pub sizes: Sizes,
    /// A text file or JSON lines; `depth` works without one, but measures no losses then.
    pub calibration: Option<PathBuf>,
    /// What is taken of it.
    pub samples: Calibration,
    /// What the weights are stored as.
    pub format: Format,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Report {
    /// The full model's shape.
    pub full: LlamaConfig,
    /// The decode model's shape.
    pub decode: LlamaConfig,
    /// Samples that it was fitted to, and that were held out; `None` where it was not calibrated.
    pub samples: Option<(usize, usize)>,
    /// Losses on the samples held out, unless none were.
    pub losses: Option<Losses>,
    /// The KV transform that a pair needs, as `overfill pair --kv` spells it.
    pub kv: String,
}

impl Prune {
    /// Makes the decode model in `out`, which must not exist; it appears whole or not at all.
    ///
    /// # Errors
    /// [`CompressError::Refused`] for what is not possible; where files cannot be read or written, or numbers are not finite.
    pub fn run(&self, out: &Path, progress: Progress<'_>) -> Result<Report, CompressError> {
        let full = Checkpoint::open(&self.full)?;
        let shape = self.shape(&full)?;
        let samples = match (&self.calibration, self.method) {
            (Some(path), _) => read(&full, &self.samples, path)?,
            (None, Method::Depth(_)) => Samples { fit: Vec::new(), held_out: Vec::new(), provenance: Value::Null },
            (None, method) => {
                return Err(CompressError::Refused(format!("{} needs --calibration, a file of text or conversations", method.name())));
            }
        };
        self.make(&full, &shape, &samples, out, progress)
    }

    /// Whether the residual stream gets another basis. One that is kept whole does not: embedding and head then stay the full
    /// model's, and one matrix where they were one, which for a small model is a third of its weights.
    fn rotates(&self, full: &LlamaConfig) -> bool {
        matches!(self.method, Method::Pca { .. }) && ![Keep::All, Keep::Exactly(full.hidden_size)].contains(&self.sizes.hidden)
    }

    /// The decode model's shape; refuses what the method cannot cut.
    fn shape(&self, full: &Checkpoint) -> Result<LlamaConfig, CompressError> {
        let Sizes { hidden, intermediate, kv_heads, layers } = self.sizes;
        let family = full.config().family;
        let widths_are_cut = !matches!(self.method, Method::Depth(_));
        if widths_are_cut && family.norms().after_attention.is_some() {
            return Err(CompressError::Refused(format!(
                "{family} models have norms after attention and MLP, through which {} cannot see what a width is worth: only the method depth \
                 prunes them",
                self.method.name()
            )));
        }
        if family.is_gemma() && hidden != Keep::All {
            return Err(CompressError::Refused(format!(
                "{family} models multiply embeddings by the root of the hidden size, so it cannot be cut: cut the MLP (--mlp-ratio) or KV heads"
            )));
        }
        let widths = [hidden, intermediate, kv_heads];
        match self.method {
            Method::Depth(_) if widths.iter().any(|w| *w != Keep::All) => {
                Err(CompressError::Refused("depth keeps whole layers: a width cannot be cut with it".into()))
            }
            Method::Depth(_) if layers == Keep::All => Err(CompressError::Refused("depth needs --layers, the number to keep".into())),
            Method::Minitron | Method::Pca { .. } if layers != Keep::All => {
                Err(CompressError::Refused("only the method depth cuts layers".into()))
            }
            Method::Depth(strategy) => {
                let mut shape = self.sizes.shape(full.config())?;
                let kept = strategy.kept(full.config().kv.layers, shape.kv.layers).unwrap_or_default();
                shape.layers = kept.into_iter().map(|layer| full.config().layers[layer]).collect();
                Ok(shape)
            }
            _ => self.sizes.shape(full.config()),
        }
    }

    fn make(
        &self,
        full: &Checkpoint,
        shape: &LlamaConfig,
        samples: &Samples,
        out: &Path,
        progress: Progress<'_>,
    ) -> Result<Report, CompressError> {
        let mut shape = shape.clone();
        shape.tied_embeddings = full.tied() && !self.rotates(full.config());
        let mut writer = Writer::create(out, self.format, &shape)?;
        let mut provenance = Map::new();
        provenance.insert("full_sha256".into(), overfill_model::pair::weights_sha256(&self.full)?.into());
        provenance.insert("calibration".into(), samples.provenance.clone());
        provenance.insert("asked".into(), json!(self.sizes));
        let sizes = |c: &LlamaConfig| json!({ "hidden": c.hidden_size, "intermediate": c.intermediate_size, "kv_heads": c.kv.kv_heads, "layers": c.kv.layers });
        provenance.insert("sizes".into(), json!({ "full": sizes(full.config()), "decode": sizes(&shape) }));
        let kept = match self.method {
            Method::Depth(strategy) => {
                let layers = strategy.kept(full.config().kv.layers, shape.kv.layers).unwrap_or_default();
                provenance.insert("method".into(), json!({ "name": "depth", "strategy": strategy }));
                let kept = everything(full.config(), layers);
                write_kept(full, &kept, &mut writer, progress)?;
                kept
            }
            Method::Minitron => {
                let found = Statistics::measure(full, &samples.fit, stream::Reads::Everything, progress)?;
                let mut kept = within_layers(&found, &shape, full.config(), |l| &l.neurons_as_reference);
                kept.channels = Some(most_important(&found.channels, shape.hidden_size));
                provenance.insert("method".into(), json!({ "name": "minitron" }));
                write_kept(full, &kept, &mut writer, progress)?;
                kept
            }
            Method::Pca { fit, ridge } => {
                enough(&samples.fit, fit, &shape)?;
                let found = Statistics::measure(full, settled(&samples.fit, fit, shape.hidden_size), fit.reads(), progress)?;
                let kept = within_layers(&found, &shape, full.config(), |l| &l.neurons_by_output);
                let rotates = self.rotates(full.config());
                let (basis, energy) = if rotates {
                    let (basis, energies) = found.components.principal(shape.hidden_size)?;
                    (basis, energies[..shape.hidden_size].iter().sum::<f64>() / energies.iter().sum::<f64>())
                } else {
                    (Matrix::identity(shape.hidden_size), 1.0)
                };
                provenance.insert("method".into(), json!({ "name": "pca", "fit": fit, "ridge": ridge, "kept_energy": energy }));
                let rotated = Rotated { full, kept: &kept, basis: &basis, energy, fits_head: rotates, fit, ridge };
                rotated.write(&samples.fit, &mut writer, progress)?;
                kept
            }
        };
        let kv = self.kv_transform(full.config(), &shape, &kept, writer.folder())?;
        provenance.insert("kv".into(), kv.clone().into());
        provenance.insert("kept".into(), serde_json::to_value(&kept).unwrap_or_default());
        // Measured where it was made, so that the losses are part of what appears.
        let folder = writer.close(full)?;
        let losses = match samples.held_out.as_slice() {
            [] => None,
            held_out => {
                let source = KvSource { layers: &kept.layers, kv_heads: &kept.kv_heads };
                Some(Losses::measure(full, &Checkpoint::open(folder.path())?, &source, held_out, progress)?)
            }
        };
        provenance.insert("losses".into(), json!(losses));
        folder.appear(&provenance)?;
        let counts = (samples.fit.len(), samples.held_out.len());
        Ok(Report { full: full.config().clone(), decode: shape, samples: Some(counts).filter(|counts| *counts != (0, 0)), losses, kv })
    }

    /// The KV transform's name; where heads were cut, its file is written.
    fn kv_transform(&self, full: &LlamaConfig, shape: &LlamaConfig, kept: &Kept, folder: &Path) -> Result<String, CompressError> {
        match self.method {
            Method::Depth(strategy) => Ok(format!("prune:{}", format!("{strategy:?}").to_lowercase())),
            _ if shape.kv == full.kv => Ok("identity".into()),
            _ => {
                write_projection(&folder.join(PROJECTION_FILE), full, kept)?;
                Ok(format!("projection:{PROJECTION_FILE}"))
            }
        }
    }
}

/// Samples as the full model's tokenizer reads them.
fn read(full: &Checkpoint, calibration: &Calibration, path: &Path) -> Result<Samples, CompressError> {
    let files = full.tokenizer()?;
    let config = serde_json::to_vec(&files.config).unwrap_or_default();
    let text = ModelText::from_files("this one", &files.tokenizer, &config)?;
    calibration.read(path, &text, text.eos().or(full.config().eos_token_ids.first().copied()))
}

/// A fit needs as many rows as it has unknowns a row.
fn enough(samples: &[Sample], fit: Fit, shape: &LlamaConfig) -> Result<(), CompressError> {
    let rows: usize = stream::batches(samples, fit.reads()).iter().map(|b| b.tokens.len()).sum();
    let needed = shape.hidden_size.max(shape.intermediate_size);
    if fit == Fit::None || rows >= needed {
        return Ok(());
    }
    Err(CompressError::Refused(format!(
        "the calibration has {rows} tokens that the decode model reads, a fit of this width needs {needed} at least and is good from \
         ten times as many on: give more samples, longer ones, or --fit none"
    )))
}

/// As many of the samples as directions and neurons are chosen by: both settle long before the fit does.
fn settled(samples: &[Sample], fit: Fit, hidden: usize) -> &[Sample] {
    const ROWS_PER_DIRECTION: usize = 16;
    let mut rows = 0;
    let enough = samples.iter().position(|s| {
        rows += if fit == Fit::Decode { s.tokens.len() } else { s.tokens.len() - s.prompt };
        rows >= ROWS_PER_DIRECTION * hidden
    });
    &samples[..enough.map_or(samples.len(), |last| last + 1)]
}

fn everything(full: &LlamaConfig, layers: Vec<usize>) -> Kept {
    let all = |n: usize| vec![(0..n).collect::<Vec<usize>>(); layers.len()];
    Kept { kv_heads: all(full.kv.kv_heads), neurons: all(full.intermediate_size), layers, channels: None }
}

fn within_layers(
    found: &Statistics,
    shape: &LlamaConfig,
    full: &LlamaConfig,
    neurons: impl Fn(&statistics::LayerStatistics) -> &[f64],
) -> Kept {
    Kept {
        layers: (0..full.kv.layers).collect(),
        channels: None,
        kv_heads: found.layers.iter().map(|l| most_important(&l.kv_heads, shape.kv.kv_heads)).collect(),
        neurons: found.layers.iter().map(|l| most_important(neurons(l), shape.intermediate_size)).collect(),
    }
}

/// Writes what is kept of the full model's weights, as they are.
fn write_kept(full: &Checkpoint, kept: &Kept, writer: &mut Writer, progress: Progress<'_>) -> Result<(), CompressError> {
    let channels = kept.channels.as_deref();
    let reading = |m: Matrix| match channels {
        None => m,
        Some(c) => m.select_columns(c),
    };
    let norm = |n: Vec<f32>| match channels {
        None => n,
        Some(c) => c.iter().map(|&i| n[i]).collect(),
    };
    writer.embedding(&reading(full.embedding()?))?;
    for (j, &i) in kept.layers.iter().enumerate() {
        progress("writing", j, kept.layers.len());
        let mut layer = kept.within(j, &full.layer(i)?, full.config());
        if let Some(channels) = channels {
            layer.qkv = layer.qkv.map(|m| m.select_columns(channels));
            layer.gate = layer.gate.select_columns(channels);
            layer.up = layer.up.select_columns(channels);
            layer.output = layer.output.select_rows(channels.iter().copied());
            layer.down = layer.down.select_rows(channels.iter().copied());
            layer.input_norm = norm(layer.input_norm);
            layer.mlp_norm = norm(layer.mlp_norm);
        }
        writer.layer(j, &layer)?;
    }
    let head = if full.tied() { None } else { Some(reading(full.head()?)) };
    writer.head(&norm(full.norm()?), head.as_ref())
}

/// The linear map that picks the kept heads out of the full model's keys and values.
fn write_projection(path: &Path, full: &LlamaConfig, kept: &Kept) -> Result<(), CompressError> {
    debug_assert_eq!(kept.layers, KvTransform::projection_layers(full.kv.layers, kept.layers.len()));
    let mut tensors = Vec::new();
    for (i, heads) in kept.kv_heads.iter().enumerate() {
        let columns = kept::kv_columns(heads, full.kv.head_dim);
        let mut map = Matrix::zeros(columns.len(), full.kv.row());
        for (row, column) in columns.iter().enumerate() {
            map.numbers_mut()[row * full.kv.row() + column] = 1.0;
        }
        let bytes = |numbers: &[f32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        tensors.push((format!("embedding_proj.{i}.weight"), vec![columns.len(), full.kv.row()], bytes(map.numbers())));
        tensors.push((format!("embedding_proj.{i}.bias"), vec![columns.len()], bytes(&vec![0.0; columns.len()])));
    }
    let failed = |e: safetensors::SafeTensorError| CompressError::File { path: path.to_owned(), source: std::io::Error::other(e) };
    let views = tensors.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    safetensors::serialize_to_file(views, None, path).map_err(failed)?;
    making::as_its_folder(path).map_err(|source| CompressError::File { path: path.to_owned(), source })
}

/// Names for people: what the provenance and the command call a method.
impl Method {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Minitron => "minitron",
            Self::Pca { .. } => "pca",
            Self::Depth(_) => "depth",
        }
    }
}
