//! The forward pass against candle-transformers' own Llama on the same weights, and the same weights from a GGUF file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama as theirs;
use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama};
use overfill_types::pair::WeightFormat;

const PROMPT: [u32; 12] = [5, 90, 17, 3, 3, 60, 44, 8, 71, 2, 9, 33];

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logits/llama_plain")
}

fn ours(model: &Llama) -> Vec<f32> {
    let mut cache = KvCache::new(model.config().kv, 1, 16, &Device::Cpu).unwrap();
    let chunk = Chunk { tokens: &PROMPT, start: 0, blocks: &[BlockId(0)], logits: true };
    model.forward(&[chunk], &mut cache, &mut |_, _| Ok(())).unwrap().remove(0)
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn candle_transformers_llama() {
    let folder = fixture();
    let config: theirs::LlamaConfig = serde_json::from_str(&std::fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    let config = config.into_config(false);
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let model = theirs::Llama::load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), &config).unwrap();
    let mut cache = theirs::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    let input = Tensor::new(&PROMPT[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let expected: Vec<f32> = model.forward(&input, 0, &mut cache).unwrap().squeeze(0).unwrap().to_vec1().unwrap();
    let got = ours(&Llama::load(&folder, WeightFormat::F32, &Device::Cpu).unwrap());
    assert!(difference(&got, &expected) < 1e-4, "{}", difference(&got, &expected));
}

/// Rows of each head as GGUF's llama has them: values of the two halves in turn.
fn interleave(tensor: &Tensor, heads: usize) -> Tensor {
    let (rows, columns) = tensor.dims2().unwrap();
    let halves = tensor.reshape((heads, 2, rows / heads / 2, columns)).unwrap();
    halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, columns)).unwrap()
}

/// The fixture as a GGUF file whose matrices are of type `dtype`.
fn gguf(path: &Path, dtype: GgmlDType) {
    let tensors: HashMap<String, Tensor> = candle_core::safetensors::load(fixture().join("model.safetensors"), &Device::Cpu).unwrap();
    let renamed: Vec<(String, QTensor)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let mut to = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd").replace("lm_head", "output");
            for (from, short) in [
                ("model.norm", "output_norm"),
                ("input_layernorm", "attn_norm"),
                ("post_attention_layernorm", "ffn_norm"),
                ("self_attn.q_proj", "attn_q"),
                ("self_attn.k_proj", "attn_k"),
                ("self_attn.v_proj", "attn_v"),
                ("self_attn.o_proj", "attn_output"),
                ("mlp.gate_proj", "ffn_gate"),
                ("mlp.up_proj", "ffn_up"),
                ("mlp.down_proj", "ffn_down"),
            ] {
                to = to.replace(from, short);
            }
            let tensor = match () {
                () if to.contains("attn_q") => interleave(tensor, 4),
                () if to.contains("attn_k") => interleave(tensor, 2),
                () => tensor.clone(),
            };
            let block = tensor.dims().last().unwrap().is_multiple_of(dtype.block_size());
            let kind = if tensor.rank() == 1 || !block { GgmlDType::F32 } else { dtype };
            (to, QTensor::quantize(&tensor, kind).unwrap())
        })
        .collect();
    let number = |n: u32| Value::U32(n);
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.embedding_length", number(32)),
        ("llama.feed_forward_length", number(56)),
        ("llama.block_count", number(3)),
        ("llama.attention.head_count", number(4)),
        ("llama.attention.head_count_kv", number(2)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(10000.0)),
        ("llama.context_length", number(512)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (*k, v)).collect();
    let tensors: Vec<(&str, &QTensor)> = renamed.iter().map(|(n, t)| (n.as_str(), t)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn a_gguf_file_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let expected = ours(&Llama::load(&fixture(), WeightFormat::F32, &Device::Cpu).unwrap());
    let exact = folder.path().join("f32.gguf");
    gguf(&exact, GgmlDType::F32);
    assert_eq!(ours(&Llama::load(&exact, WeightFormat::Native, &Device::Cpu).unwrap()), expected);
    for (dtype, bound) in [(GgmlDType::Q8_0, 0.2), (GgmlDType::Q5_0, 1.5), (GgmlDType::Q4_1, 2.5), (GgmlDType::Q4_0, 3.0)] {
        let path = folder.path().join("quantised.gguf");
        gguf(&path, dtype);
        let native = ours(&Llama::load(&path, WeightFormat::Native, &Device::Cpu).unwrap());
        let dequantised = ours(&Llama::load(&path, WeightFormat::F32, &Device::Cpu).unwrap());
        // Activations are rounded to 8 bits beside quantised weights, and to nothing beside dequantised ones.
        assert!(difference(&native, &dequantised) < 0.2, "{dtype:?}: {}", difference(&native, &dequantised));
        assert!(difference(&native, &expected) < bound, "{dtype:?}: {}", difference(&native, &expected));
        assert_ne!(native, dequantised, "{dtype:?} is multiplied as it is");
    }
    std::fs::write(folder.path().join("broken.gguf"), &std::fs::read(&exact).unwrap()[..5000]).unwrap();
    assert!(Llama::load(&folder.path().join("broken.gguf"), WeightFormat::Native, &Device::Cpu).is_err());
}
