//! The forward pass on the CPU: our kernels on plain memory, no tensor and no allocation in a step.

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use overfill_kernels::{
    Activations, Bf16Matrix, DenseMatrix, Into, Matrix, QuantisedMatrix, Reads, Run, ThreadPool, paged_attention, products, rms_norm,
    rotate, swiglu,
};
use overfill_kv::BlockId;
use overfill_types::pair::WeightFormat;

use crate::cache::KvCache;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gguf::block_format;
use crate::pass::{OnLayer, Pass};
use crate::profile::Part;
use crate::rope::Frequencies;
use crate::values;
use crate::weight::Weight;
use crate::weights::Weights;
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
    input_norm: Vec<f32>,
    /// Queries, keys, values.
    qkv: Linear<3>,
    output: Linear<1>,
    mlp_norm: Vec<f32>,
    gate_up: Linear<2>,
    down: Linear<1>,
}

/// Linear maps of the same input, whose results lie side by side.
struct Linear<const N: usize> {
    matrices: [Matrix; N],
    /// Of all of them; empty where none has one.
    bias: Vec<f32>,
}

impl CpuLlama {
    pub(crate) fn load(weights: &Weights, format: WeightFormat, pool: &ThreadPool) -> Result<Self, ModelError> {
        let config = weights.config();
        let embedding = matrix(weights, "model.embed_tokens.weight", format, pool)?;
        let head = if config.tied_embeddings || !weights.has("lm_head.weight") {
            None
        } else {
            Some(matrix(weights, "lm_head.weight", format, pool)?)
        };
        let layers = (0..config.kv.layers).map(|i| Layer::load(weights, i, format, pool)).collect::<Result<_, _>>()?;
        Ok(Self { embedding, layers, norm: vector(weights, "model.norm.weight")?, head })
    }

    fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Reads all chunks; leaves the logits of the rows that are wanted in the workspace.
    pub(crate) fn forward(
        &self,
        config: &LlamaConfig,
        frequencies: &Frequencies,
        Pass { chunks, rows }: Pass<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        on_layer: OnLayer<'_>,
    ) -> Result<(), ModelError> {
        let Workspace { pool, profile, x, input, qkv, attended, gate_up, cos, sin, logits, attention } = workspace;
        let pool = &*pool;
        let (hidden, head_dim, eps) = (config.hidden_size, config.kv.head_dim, config.rms_norm_eps as f32);
        let (q, kv) = (config.heads * head_dim, config.kv.row());
        let stride = q + 2 * kv;
        let runs: Vec<Run<'_>> =
            chunks.iter().map(|c| Run { blocks: BlockId::numbers(c.blocks), start: c.start, tokens: c.tokens.len() }).collect();
        let tokens: usize = runs.iter().map(|r| r.tokens).sum();
        // Each token attends to all before it and to itself.
        let pairs: usize = runs.iter().map(|r| r.tokens * r.start + r.tokens * (r.tokens + 1) / 2).sum();
        let context: usize = runs.iter().map(|r| r.start + r.tokens).sum();

        let started = profile.start();
        frequencies.at(chunks, cos, sin);
        x.resize(tokens * hidden, 0.0);
        let ids = chunks.iter().flat_map(|c| c.tokens);
        x.chunks_exact_mut(hidden).zip(ids).for_each(|(row, id)| self.embedding.row(*id as usize, row));
        qkv.resize(tokens * stride, 0.0);
        attended.resize(tokens * q, 0.0);
        gate_up.resize(tokens * 2 * config.intermediate_size, 0.0);
        profile.stop(Part::Embedding, started, 0, 0);

        for (i, layer) in self.layers.iter().enumerate() {
            let started = profile.start();
            rms_norm(pool, x, &layer.input_norm, eps, layer.qkv.reads(), input);
            profile.stop(Part::Norm, started, 0, 0);

            let started = profile.start();
            layer.qkv.apply(pool, input, qkv, Into::Place);
            profile.stop(Part::Qkv, started, layer.qkv.bytes(), layer.qkv.operations(tokens));

            let started = profile.start();
            rotate(pool, qkv, stride, config.heads + config.kv.kv_heads, head_dim, cos, sin);
            cache.host_mut(i)?.write(pool, &runs, &qkv[q..], &qkv[q + kv..], stride);
            profile.stop(Part::Append, started, 0, 0);

            let started = profile.start();
            on_layer(i, cache, pool)?;
            profile.stop(Part::OnLayer, started, 0, 0);

            let started = profile.start();
            paged_attention(pool, cache.host(i)?, qkv, stride, config.heads, &runs, attended, attention);
            profile.stop(Part::Attention, started, context * cache.bytes_per_token() / config.kv.layers, 4 * q * pairs);

            let started = profile.start();
            input.set(pool, attended, q, layer.output.reads());
            layer.output.apply(pool, input, x, Into::Sum);
            profile.stop(Part::Output, started, layer.output.bytes(), layer.output.operations(tokens));

            let started = profile.start();
            rms_norm(pool, x, &layer.mlp_norm, eps, layer.gate_up.reads(), input);
            profile.stop(Part::Norm, started, 0, 0);

            let started = profile.start();
            layer.gate_up.apply(pool, input, gate_up, Into::Place);
            profile.stop(Part::GateUp, started, layer.gate_up.bytes(), layer.gate_up.operations(tokens));

            let started = profile.start();
            swiglu(pool, gate_up, config.intermediate_size, layer.down.reads(), input);
            profile.stop(Part::Gate, started, 0, 0);

            let started = profile.start();
            layer.down.apply(pool, input, x, Into::Sum);
            profile.stop(Part::Down, started, layer.down.bytes(), layer.down.operations(tokens));
        }

        // The rows that logits are wanted of move to the front.
        let wanted = rows.len();
        for (to, row) in rows.iter().enumerate() {
            x.copy_within(row * hidden..(row + 1) * hidden, to * hidden);
        }
        logits.resize(wanted * config.vocab_size, 0.0);
        if wanted > 0 {
            let started = profile.start();
            rms_norm(pool, &x[..wanted * hidden], &self.norm, eps, Reads::of(&[self.head()]), input);
            profile.stop(Part::Norm, started, 0, 0);
            let started = profile.start();
            products(pool, input, &[self.head()], logits, Into::Place);
            profile.stop(Part::Head, started, self.head().bytes(), 2 * wanted * hidden * config.vocab_size);
        }
        Ok(())
    }
}

impl Layer {
    fn load(weights: &Weights, layer: usize, format: WeightFormat, pool: &ThreadPool) -> Result<Self, ModelError> {
        let name = |name: &str| format!("model.layers.{layer}.{name}");
        let attention = |which: &str| name(&format!("self_attn.{which}_proj"));
        let mlp = |which: &str| name(&format!("mlp.{which}_proj"));
        Ok(Self {
            input_norm: vector(weights, &name("input_layernorm.weight"))?,
            qkv: Linear::load(weights, ["q", "k", "v"].map(attention), format, pool)?,
            output: Linear::load(weights, [attention("o")], format, pool)?,
            mlp_norm: vector(weights, &name("post_attention_layernorm.weight"))?,
            gate_up: Linear::load(weights, ["gate", "up"].map(mlp), format, pool)?,
            down: Linear::load(weights, [mlp("down")], format, pool)?,
        })
    }
}

impl<const N: usize> Linear<N> {
    /// Loads `{name}.weight` of each, and `{name}.bias` where the file has one.
    fn load(weights: &Weights, names: [String; N], format: WeightFormat, pool: &ThreadPool) -> Result<Self, ModelError> {
        let mut matrices = Vec::with_capacity(N);
        let mut bias = Vec::new();
        for name in &names {
            let matrix = matrix(weights, &format!("{name}.weight"), format, pool)?;
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

fn matrix(weights: &Weights, name: &str, format: WeightFormat, pool: &ThreadPool) -> Result<Matrix, ModelError> {
    match weights.matrix(name, format, &Device::Cpu)? {
        Weight::Quantised(q) => Ok(Matrix::Quantised(quantised(name, &q, pool)?)),
        Weight::Dense(t) => dense(&t, pool),
    }
}

fn quantised(name: &str, q: &QTensor, pool: &ThreadPool) -> Result<QuantisedMatrix, ModelError> {
    let (outputs, inputs) = q.shape().dims2()?;
    let packed = match block_format(q.dtype()) {
        Some(format) => QuantisedMatrix::from_blocks(pool, format, &q.data()?, outputs, inputs),
        None => None,
    };
    packed.ok_or_else(|| {
        let message = format!("tensor {name} is {:?}, which is not multiplied on a CPU: load the model as f32, bf16 or f16", q.dtype());
        ModelError::Device(message)
    })
}

fn dense(t: &Tensor, pool: &ThreadPool) -> Result<Matrix, ModelError> {
    let (outputs, inputs) = t.dims2()?;
    match t.dtype() {
        DType::BF16 => values::read(t, |w: &[bf16]| Matrix::Bf16(Bf16Matrix::new(pool, w, outputs, inputs))),
        DType::F16 => values::read(t, |w: &[f16]| Matrix::Dense(DenseMatrix::from_f16(pool, w, outputs, inputs))),
        _ => values::read(&t.to_dtype(DType::F32)?, |w: &[f32]| Matrix::Dense(DenseMatrix::from_f32(pool, w, outputs, inputs))),
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
            let ours = Matrix::Quantised(QuantisedMatrix::from_blocks(&pool, format, &bytes, rows, columns).unwrap());
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
