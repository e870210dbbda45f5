//! The forward pass on the CPU: our kernels on plain memory, no tensor and no allocation in a step.

use bytemuck::AnyBitPattern;
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use overfill_kernels::{
    Activations, Addend, Bf16Matrix, DenseMatrix, Into, Matrix, Packer, QuantisedMatrix, Reads, Run, Scores, ThreadPool, add, gated,
    norm_parts, paged_attention, products, rms_norm, rotate, soft_cap,
};
use overfill_kv::BlockId;
use overfill_types::pair::WeightFormat;

use crate::cache::KvCache;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gguf::block_format;
use crate::pass::{OnLayer, Pass};
use crate::profile::Part;
use crate::rope::Rotary;
use crate::values;
use crate::weight::Weight;
use crate::weights::{InPlace, StoredAs, Weights};
use crate::workspace::Workspace;

/// A Llama's weights, packed for our kernels.
pub(crate) struct CpuLlama {
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// `None` where the embedding serves.
    head: Option<Matrix>,
}

struct Layer {
    /// Of what attention reads, if there is one.
    attention_norm: Option<Vec<f32>>,
    /// Queries, keys, values.
    qkv: Linear<3>,
    /// Of queries and of keys, if there are any: `[head_dim]` or as wide as all heads.
    query_key_norms: Option<[Vec<f32>; 2]>,
    output: Linear<1>,
    /// Of what attention adds, if there is one.
    attended_norm: Option<Vec<f32>>,
    /// Of what the MLP reads, if there is one.
    mlp_norm: Option<Vec<f32>>,
    gate_up: Linear<2>,
    down: Linear<1>,
    /// Of what the MLP adds, if there is one.
    down_norm: Option<Vec<f32>>,
}

/// Linear maps of the same input, whose results lie side by side.
struct Linear<const N: usize> {
    matrices: [Matrix; N],
    /// Of all of them; empty where none has one.
    bias: Vec<f32>,
}

impl CpuLlama {
    pub(crate) fn load(weights: &Weights, format: WeightFormat, pool: &ThreadPool) -> Result<Self, ModelError> {
        let (config, packer) = (weights.config(), &Packer::in_huge_pages(pool));
        let embedding = matrix(weights, "model.embed_tokens.weight", format, packer)?;
        let head = if config.tied_embeddings || !weights.has("lm_head.weight") {
            None
        } else {
            Some(matrix(weights, "lm_head.weight", format, packer)?)
        };
        let layers = (0..config.kv.layers).map(|i| Layer::load(weights, i, format, packer)).collect::<Result<_, _>>()?;
        Ok(Self { embedding, layers, norm: vector(weights, "model.norm.weight")?, head })
    }

    fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Reads all chunks; leaves the logits of the rows that are wanted in the workspace.
    pub(crate) fn forward(
        &self,
        config: &LlamaConfig,
        rotary: &Rotary,
        Pass { chunks, rows }: Pass<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        on_layer: OnLayer<'_>,
    ) -> Result<(), ModelError> {
        let Workspace { pool, profile, x, input, qkv, attended, gate_up, added, turns, logits, unread, attention } = workspace;
        *unread = None;
        let pool = &*pool;
        let (hidden, head_dim, eps) = (config.hidden_size, config.kv.head_dim, config.rms_norm_eps as f32);
        let (q, kv) = (config.heads * head_dim, config.kv.row());
        let stride = q + 2 * kv;
        let mut runs: Vec<Run<'_>> =
            chunks.iter().map(|c| Run { blocks: BlockId::numbers(c.blocks), start: c.start, tokens: c.tokens.len() }).collect();
        let mut tokens: usize = runs.iter().map(|r| r.tokens).sum();

        let started = profile.start();
        rotary.at(chunks, turns);
        x.resize(tokens * hidden, 0.0);
        let ids = chunks.iter().flat_map(|c| c.tokens);
        x.chunks_exact_mut(hidden).zip(ids).for_each(|(row, id)| self.embedding.row(*id as usize, row));
        let scalars = &config.scalars;
        if scalars.embedding != 1.0 {
            let factor = scalars.embedding as f32;
            x.iter_mut().for_each(|x| *x *= factor);
        }
        qkv.resize(tokens * stride, 0.0);
        attended.resize(tokens * q, 0.0);
        gate_up.resize(tokens * 2 * config.intermediate_size, 0.0);
        profile.stop(Part::Embedding, started, 0, 0);

        for (i, (layer, sees)) in self.layers.iter().zip(&config.layers).enumerate() {
            let started = profile.start();
            normed(pool, x, hidden, layer.attention_norm.as_deref(), eps, layer.qkv.reads(), input);
            profile.stop(Part::Norm, started, 0, 0);

            let started = profile.start();
            layer.qkv.apply(pool, input, qkv, Into::Place);
            profile.stop(Part::Qkv, started, layer.qkv.bytes(), layer.qkv.operations(tokens));

            let started = profile.start();
            if let Some([queries, keys]) = &layer.query_key_norms {
                norm_parts(pool, qkv, stride, 0..q, queries, eps);
                norm_parts(pool, qkv, stride, q..q + kv, keys, eps);
            }
            if let Some(turn) = turns.of(sees.rotation) {
                rotate(pool, qkv, stride, config.heads + config.kv.kv_heads, head_dim, &turn.cos, &turn.sin);
            }
            cache.host_mut(i)?.write(pool, &runs, &qkv[q..], &qkv[q + kv..], stride);
            profile.stop(Part::Append, started, 0, 0);

            let started = profile.start();
            on_layer(i, cache, pool)?;
            profile.stop(Part::OnLayer, started, 0, 0);

            // From here on the last layer makes nothing but what the logits are made of.
            if i + 1 == self.layers.len() && rows.len() < tokens {
                tokens = rows.len();
                runs = runs_of(&runs, rows);
                move_to_front(x, hidden, rows);
                move_to_front(qkv, stride, rows);
                attended.truncate(tokens * q);
                gate_up.truncate(tokens * 2 * config.intermediate_size);
                if tokens == 0 {
                    break;
                }
            }

            let started = profile.start();
            let how = Scores { scale: scalars.attention as f32, cap: scalars.attention_cap.map(|cap| cap as f32), window: sees.window };
            paged_attention(pool, cache.host(i)?, qkv, stride, config.heads, how, &runs, attended, attention);
            let context: usize = runs.iter().map(|r| r.start + r.tokens).sum();
            // Each token attends to all before it and to itself.
            let pairs: usize = runs.iter().map(|r| r.tokens * r.start + r.tokens * (r.tokens + 1) / 2).sum();
            profile.stop(Part::Attention, started, context * cache.bytes_per_token() / config.kv.layers, 4 * q * pairs);

            let started = profile.start();
            input.set(pool, attended, q, layer.output.reads());
            layer.output.add(pool, input, x, added, addend(layer.attended_norm.as_deref(), eps, scalars.residual));
            profile.stop(Part::Output, started, layer.output.bytes(), layer.output.operations(tokens));

            let started = profile.start();
            normed(pool, x, hidden, layer.mlp_norm.as_deref(), eps, layer.gate_up.reads(), input);
            profile.stop(Part::Norm, started, 0, 0);

            let started = profile.start();
            layer.gate_up.apply(pool, input, gate_up, Into::Place);
            profile.stop(Part::GateUp, started, layer.gate_up.bytes(), layer.gate_up.operations(tokens));

            let started = profile.start();
            gated(pool, gate_up, config.intermediate_size, config.family.gate(), layer.down.reads(), input);
            profile.stop(Part::Gate, started, 0, 0);

            let started = profile.start();
            layer.down.add(pool, input, x, added, addend(layer.down_norm.as_deref(), eps, scalars.residual));
            profile.stop(Part::Down, started, layer.down.bytes(), layer.down.operations(tokens));
        }

        let wanted = rows.len();
        logits.resize(wanted * config.vocab_size, 0.0);
        if wanted > 0 {
            let started = profile.start();
            rms_norm(pool, &x[..wanted * hidden], &self.norm, eps, Reads::of(&[self.head()]), input);
            profile.stop(Part::Norm, started, 0, 0);
            let started = profile.start();
            products(pool, input, &[self.head()], logits, Into::Place);
            if scalars.logits != 1.0 {
                let factor = scalars.logits as f32;
                logits.iter_mut().for_each(|logit| *logit *= factor);
            }
            if let Some(cap) = scalars.logits_cap {
                soft_cap(pool, logits, config.vocab_size, cap as f32);
            }
            profile.stop(Part::Head, started, self.head().bytes(), 2 * wanted * hidden * config.vocab_size);
        }
        Ok(())
    }
}

impl Layer {
    fn load(weights: &Weights, layer: usize, format: WeightFormat, packer: &Packer<'_>) -> Result<Self, ModelError> {
        let name = |name: &str| format!("model.layers.{layer}.{name}");
        let attention = |which: &str| name(&format!("self_attn.{which}_proj"));
        let mlp = |which: &str| name(&format!("mlp.{which}_proj"));
        let norm = |which: Option<&str>| which.map(|which| vector(weights, &name(&format!("{which}.weight")))).transpose();
        let family = weights.config().family;
        let norms = family.norms();
        let query_key_norms = match family.query_key_norm() {
            Some(_) => Some([vector(weights, &name("self_attn.q_norm.weight"))?, vector(weights, &name("self_attn.k_norm.weight"))?]),
            None => None,
        };
        Ok(Self {
            attention_norm: norm(norms.before_attention)?,
            query_key_norms,
            attended_norm: norm(norms.after_attention)?,
            down_norm: norm(norms.after_mlp)?,
            qkv: Linear::load(weights, ["q", "k", "v"].map(attention), format, packer)?,
            output: Linear::load(weights, [attention("o")], format, packer)?,
            mlp_norm: norm(norms.before_mlp)?,
            gate_up: Linear::load(weights, ["gate", "up"].map(mlp), format, packer)?,
            down: Linear::load(weights, [mlp("down")], format, packer)?,
        })
    }
}

impl<const N: usize> Linear<N> {
    /// Loads `{name}.weight` of each, and `{name}.bias` where the file has one.
    fn load(weights: &Weights, names: [String; N], format: WeightFormat, packer: &Packer<'_>) -> Result<Self, ModelError> {
        let mut matrices = Vec::with_capacity(N);
        let mut bias = Vec::new();
        for name in &names {
            let matrix = matrix(weights, &format!("{name}.weight"), format, packer)?;
            let (name, before) = (format!("{name}.bias"), matrices.iter().map(Matrix::outputs).sum());
            if weights.has(&name) {
                bias.resize(before, 0.0);
                bias.extend(vector(weights, &name)?);
            }
            matrices.push(matrix);
        }
        if !bias.is_empty() {
            bias.resize(matrices.iter().map(Matrix::outputs).sum(), 0.0);
        }
        let unfit = |_| ModelError::Mismatch(format!("{} linear maps", names.len()));
        Ok(Self { matrices: matrices.try_into().map_err(unfit)?, bias })
    }

    fn apply(&self, pool: &ThreadPool, x: &Activations, y: &mut [f32], into: Into) {
        let matrices = self.matrices.each_ref();
        if self.bias.is_empty() {
            return products(pool, x, &matrices, y, into);
        }
        for row in y.chunks_exact_mut(self.bias.len()) {
            for (y, bias) in row.iter_mut().zip(&self.bias) {
                *y = if into == Into::Sum { *y + bias } else { *bias };
            }
        }
        products(pool, x, &matrices, y, Into::Sum);
    }

    /// Adds what it makes of `input` to `x`, as `addend` says; `added` is for its own use.
    fn add(&self, pool: &ThreadPool, input: &Activations, x: &mut [f32], added: &mut Vec<f32>, addend: Option<Addend<'_>>) {
        let Some(addend) = addend else { return self.apply(pool, input, x, Into::Sum) };
        added.resize(x.len(), 0.0);
        self.apply(pool, input, added, Into::Place);
        add(pool, x, added, x.len() / input.rows().max(1), addend);
    }

    fn reads(&self) -> Reads {
        Reads::of(&self.matrices.each_ref())
    }

    fn bytes(&self) -> usize {
        self.matrices.iter().map(Matrix::bytes).sum()
    }

    fn operations(&self, tokens: usize) -> usize {
        2 * tokens * self.matrices.iter().map(|m| m.outputs() * m.inputs()).sum::<usize>()
    }
}

/// The runs that rows belong to, whose numbers ascend and are counted over all tokens of `runs`: each with these tokens alone.
fn runs_of<'a>(runs: &[Run<'a>], rows: &[usize]) -> Vec<Run<'a>> {
    let (mut all, mut first) = (Vec::new(), 0);
    for run in runs {
        let of_run = rows.partition_point(|row| *row < first)..rows.partition_point(|row| *row < first + run.tokens);
        for side_by_side in rows[of_run].chunk_by(|a, b| a + 1 == *b) {
            all.push(Run { blocks: run.blocks, start: run.start + side_by_side[0] - first, tokens: side_by_side.len() });
        }
        first += run.tokens;
    }
    all
}

/// Leaves of `x`, rows of `width` numbers, those whose numbers are in `rows`, ascending.
fn move_to_front(x: &mut Vec<f32>, width: usize, rows: &[usize]) {
    for (to, row) in rows.iter().enumerate() {
        x.copy_within(row * width..(row + 1) * width, to * width);
    }
    x.truncate(rows.len() * width);
}

/// Rows of the residual stream as a product reads them, normalised where there is a norm.
fn normed(pool: &ThreadPool, x: &[f32], hidden: usize, norm: Option<&[f32]>, eps: f32, reads: Reads, input: &mut Activations) {
    match norm {
        Some(weight) => rms_norm(pool, x, weight, eps, reads, input),
        None => input.set(pool, x, hidden, reads),
    }
}

/// How something is added to the residual stream; `None` where it is added as it comes.
fn addend(norm: Option<&[f32]>, eps: f32, factor: f64) -> Option<Addend<'_>> {
    match norm {
        Some(weight) => Some(Addend::Normed(weight, eps)),
        None => (factor != 1.0).then_some(Addend::Scaled(factor as f32)),
    }
}

fn matrix(weights: &Weights, name: &str, format: WeightFormat, packer: &Packer<'_>) -> Result<Matrix, ModelError> {
    if let Some(matrix) = weights.in_place(name, format).and_then(|there| packed(&there, format, packer)) {
        return Ok(matrix);
    }
    match weights.matrix(name, format, &Device::Cpu)? {
        Weight::Quantised(q) => Ok(Matrix::Quantised(quantised(name, &q, packer)?)),
        Weight::Dense(t) => {
            let rounded = if format == WeightFormat::Q8_0 { rounded(&t, packer)? } else { None };
            rounded.map_or_else(|| dense(&t, packer), |rounded| Ok(Matrix::Quantised(rounded)))
        }
    }
}

/// Packs numbers where they lie in their file; `None` where they lie askew, or are not multiplied so.
fn packed(there: &InPlace<'_>, format: WeightFormat, packer: &Packer<'_>) -> Option<Matrix> {
    let [outputs, inputs] = there.shape;
    fn numbers<T: AnyBitPattern>(bytes: &[u8]) -> Option<&[T]> {
        bytemuck::try_cast_slice(bytes).ok()
    }
    if format == WeightFormat::Q8_0
        && let StoredAs::Dense(dtype) = there.stored
    {
        let rounded = match dtype {
            DType::BF16 => QuantisedMatrix::rounded(packer, numbers(&there.bytes)?, bf16::to_f32, outputs, inputs),
            DType::F16 => QuantisedMatrix::rounded(packer, numbers(&there.bytes)?, f16::to_f32, outputs, inputs),
            DType::F32 => QuantisedMatrix::rounded(packer, numbers(&there.bytes)?, |x: f32| x, outputs, inputs),
            _ => None,
        };
        return rounded.map(Matrix::Quantised);
    }
    Some(match there.stored {
        StoredAs::Dense(DType::BF16) => Matrix::Bf16(Bf16Matrix::new(packer, numbers(&there.bytes)?, outputs, inputs)),
        StoredAs::Dense(DType::F16) => Matrix::Dense(DenseMatrix::from_f16(packer, numbers(&there.bytes)?, outputs, inputs)),
        StoredAs::Dense(DType::F32) => Matrix::Dense(DenseMatrix::from_f32(packer, numbers(&there.bytes)?, outputs, inputs)),
        StoredAs::Dense(_) => return None,
        StoredAs::Blocks(dtype) => {
            Matrix::Quantised(QuantisedMatrix::from_blocks(packer, block_format(dtype)?, &there.bytes, outputs, inputs)?)
        }
    })
}

fn quantised(name: &str, q: &QTensor, packer: &Packer<'_>) -> Result<QuantisedMatrix, ModelError> {
    let (outputs, inputs) = q.shape().dims2()?;
    let packed = match block_format(q.dtype()) {
        Some(format) => QuantisedMatrix::from_blocks(packer, format, &q.data()?, outputs, inputs),
        None => None,
    };
    packed.ok_or_else(|| {
        let message = format!("tensor {name} is {:?}, which is not multiplied on a CPU: load the model as f32, bf16 or f16", q.dtype());
        ModelError::Device(message)
    })
}

/// Numbers rounded to Q8_0; `None` where rows are not whole groups.
fn rounded(t: &Tensor, packer: &Packer<'_>) -> Result<Option<QuantisedMatrix>, ModelError> {
    let (outputs, inputs) = t.dims2()?;
    values::read(t, |w: &[f32]| QuantisedMatrix::rounded(packer, w, |x| x, outputs, inputs))
}

fn dense(t: &Tensor, packer: &Packer<'_>) -> Result<Matrix, ModelError> {
    let (outputs, inputs) = t.dims2()?;
    match t.dtype() {
        DType::BF16 => values::read(t, |w: &[bf16]| Matrix::Bf16(Bf16Matrix::new(packer, w, outputs, inputs))),
        DType::F16 => values::read(t, |w: &[f16]| Matrix::Dense(DenseMatrix::from_f16(packer, w, outputs, inputs))),
        _ => values::read(&t.to_dtype(DType::F32)?, |w: &[f32]| Matrix::Dense(DenseMatrix::from_f32(packer, w, outputs, inputs))),
    }
}

fn vector(weights: &Weights, name: &str) -> Result<Vec<f32>, ModelError> {
    values::read(&weights.vector(name, &Device::Cpu)?, <[f32]>::to_vec)
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use candle_core::quantized::{GgmlDType, QStorage};

    use super::*;

    #[test]
    fn our_reading_of_every_block_format_is_candles() {
        let (rows, columns) = (3, 512);
        let pool = ThreadPool::new(1, &[]).unwrap();
        for dtype in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q5_0, GgmlDType::Q5_1, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K] {
            let format = block_format(dtype).unwrap();
            let mut bytes: Vec<u8> = (0..rows * columns / format.block() * format.bytes()).map(|i| ((i * 7919) >> 3) as u8).collect();
            // The scales: half-precision numbers that are not odd.
            let halves: &[usize] = match dtype {
                GgmlDType::Q6K => &[208],
                GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K => &[0, 2],
                _ => &[0],
            };
            for (b, block) in bytes.chunks_exact_mut(format.bytes()).enumerate() {
                for &at in halves {
                    block[at..at + 2].copy_from_slice(&f16::from_f32((b % 17 + at) as f32 * 0.01 - 0.05).to_le_bytes());
                }
            }
            let storage = QStorage::from_data(Cow::Borrowed(&bytes), &Device::Cpu, dtype).unwrap();
            let expected = QTensor::new(storage, (rows, columns)).unwrap().dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
            let ours = Matrix::Quantised(QuantisedMatrix::from_blocks(&Packer::new(&pool), format, &bytes, rows, columns).unwrap());
            let mut row = vec![0.0; columns];
            for (r, expected) in expected.iter().enumerate() {
                ours.row(r, &mut row);
                for (i, (got, want)) in row.iter().zip(expected).enumerate() {
                    assert!((got - want).abs() <= 1e-6 * want.abs().max(1.0), "{dtype:?} [{r}, {i}]: {got}, not {want}");
                }
            }
        }
    }
}
