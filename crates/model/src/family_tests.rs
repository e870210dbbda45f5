//! Each family's models compute what transformers computes (`tests/fixtures/families.json`, which `tests/reference/families.py` makes):
//! from a folder, from a GGUF file as llama.cpp's converter lays it out, and in the form for GPUs.

#[path = "../../../tests/reference/families.rs"]
mod families;

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value as Told};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use overfill_kernels::ThreadPool;
use overfill_kv::BlockId;
use overfill_types::KvFormat;
use overfill_types::pair::WeightFormat;
use serde_json::Value;

use crate::cache::KvCache;
use crate::gpu::GpuLlama;
use crate::llama::Llama;
use crate::pass::Chunk;
use crate::weights::Weights;
use crate::workspace::Workspace;

/// A GGUF file in `at`, by the rules of llama.cpp's converter, with `more` in its header; `None` where it could not say what the
/// configuration says.
fn gguf(name: &str, config: &Value, more: &[(&str, Told)], at: &Path) -> Option<PathBuf> {
    // A window of Qwen's, layers without a rotary embedding other than each fourth, and YaRN's further keys have no place there.
    if ["qwen2-windows", "qwen3-windows", "smollm3-windows", "llama-yarn-mscale", "gemma2-scalar"].contains(&name) {
        return None;
    }
    let kind = config["model_type"].as_str().unwrap();
    let architecture = match kind {
        "mistral" => "llama",
        "gemma3_text" => "gemma3",
        other => other,
    };
    let size = |key: &str| config[key].as_u64().map(|n| n as usize);
    let hidden = size("hidden_size").unwrap();
    let head_dim = size("head_dim").unwrap_or(hidden / size("num_attention_heads").unwrap());
    let permuted = ["llama", "smollm3", "granite"].contains(&architecture);
    let sandwich = ["gemma2", "gemma3", "olmo2"].contains(&architecture);
    let mut stored: Vec<(String, Tensor)> = families::tensors(config)
        .into_iter()
        .map(|(name, (shape, numbers))| {
            let tensor = Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap();
            let table = [
                ("model.layers", "blk"),
                ("model.embed_tokens", "token_embd"),
                ("model.norm", "output_norm"),
                ("lm_head", "output"),
                ("input_layernorm", "attn_norm"),
                ("post_attention_layernorm", if sandwich { "post_attention_norm" } else { "ffn_norm" }),
                ("pre_feedforward_layernorm", "ffn_norm"),
                ("post_feedforward_layernorm", "post_ffw_norm"),
                ("self_attn.qkv_proj", "attn_qkv"),
                ("self_attn.q_proj", "attn_q"),
                ("self_attn.k_proj", "attn_k"),
                ("self_attn.v_proj", "attn_v"),
                ("self_attn.o_proj", "attn_output"),
                ("self_attn.q_norm", "attn_q_norm"),
                ("self_attn.k_norm", "attn_k_norm"),
                ("mlp.gate_up_proj", "ffn_up"),
                ("mlp.gate_proj", "ffn_gate"),
                ("mlp.up_proj", "ffn_up"),
                ("mlp.down_proj", "ffn_down"),
            ];
            let tensor = match &name {
                name if permuted && name.contains("q_proj") => interleaved(&tensor, size("num_attention_heads").unwrap()),
                name if permuted && name.contains("k_proj") => interleaved(&tensor, size("num_key_value_heads").unwrap()),
                name if kind.starts_with("gemma") && name.ends_with("norm.weight") => (tensor + 1.0).unwrap(),
                _ => tensor,
            };
            (table.iter().fold(name, |name, (theirs, here)| name.replace(theirs, here)), tensor)
        })
        .collect();
    let number = |n: usize| Told::U32(n as u32);
    let float = |x: f64| Told::F32(x as f32);
    let rope = match &config["rope_parameters"] {
        Value::Null => &config["rope_scaling"],
        Value::Object(nested) if nested.contains_key("full_attention") => &nested["full_attention"],
        parameters => parameters,
    };
    let real = |key: &str| rope[key].as_f64().or(config[key].as_f64());
    let mut told = vec![
        ("embedding_length", number(hidden)),
        ("feed_forward_length", number(size("intermediate_size").unwrap())),
        ("block_count", number(size("num_hidden_layers").unwrap())),
        ("attention.head_count", number(size("num_attention_heads").unwrap())),
        ("attention.head_count_kv", number(size("num_key_value_heads").unwrap())),
        ("attention.key_length", number(head_dim)),
        ("attention.value_length", number(head_dim)),
        ("attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"].as_f64().unwrap())),
        ("context_length", number(size("max_position_embeddings").unwrap())),
        ("rope.dimension_count", number((head_dim as f64 * real("partial_rotary_factor").unwrap_or(1.0)) as usize)),
        ("rope.freq_base", float(real("rope_theta").unwrap_or(if kind == "smollm3" { 2e6 } else { 1e4 }))),
    ];
    match rope["rope_type"].as_str() {
        Some("linear") => {
            told.extend([("rope.scaling.type", Told::String("linear".into())), ("rope.scaling.factor", float(real("factor").unwrap()))])
        }
        Some("yarn") => {
            told.extend([("rope.scaling.type", Told::String("yarn".into())), ("rope.scaling.factor", float(real("factor").unwrap()))]);
            told.push((
                "rope.scaling.original_context_length",
                number(rope["original_max_position_embeddings"].as_u64().unwrap() as usize),
            ));
            told.extend(real("attention_factor").map(|factor| ("rope.scaling.yarn_attn_factor", float(factor))));
        }
        Some("longrope") => {
            let original = config["original_max_position_embeddings"].as_u64().unwrap();
            let scale = size("max_position_embeddings").unwrap() as f64 / original as f64;
            told.push(("rope.scaling.original_context_length", number(original as usize)));
            told.push(("rope.scaling.attn_factor", float((1.0 + scale.ln() / (original as f64).ln()).sqrt())));
            for which in ["short", "long"] {
                let factors: Vec<f32> = serde_json::from_value(rope[format!("{which}_factor")].clone()).unwrap();
                stored.push((format!("rope_factors_{which}.weight"), Tensor::new(factors, &Device::Cpu).unwrap()));
            }
        }
        _ => {}
    }
    for (key, theirs) in [
        ("attention.sliding_window", "sliding_window"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("attention.scale", "attention_multiplier"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("rope.freq_base_swa", "rope_local_base_freq"),
    ] {
        let value = if theirs == "sliding_window" { size(theirs).map(number) } else { config[theirs].as_f64().map(float) };
        told.extend(value.map(|value| (key, value)));
    }
    match architecture {
        "granite" => {
            told.push(("logit_scale", float(config["logits_scaling"].as_f64().unwrap_or(1.0))));
            told.push(("attention.scale", float(config["attention_multiplier"].as_f64().unwrap_or(1.0))));
        }
        "gemma3" => {
            told.extend(config["sliding_window_pattern"].as_u64().map(|n| ("attention.sliding_window_pattern", Told::U32(n as u32))));
            if let Some(kinds) = config["layer_types"].as_array() {
                let slides = kinds.iter().map(|kind| Told::Bool(kind == "sliding_attention")).collect();
                told.push(("attention.sliding_window_pattern", Told::Array(slides)));
                let local = &config["rope_parameters"]["sliding_attention"]["rope_theta"];
                told.push(("rope.freq_base_swa", float(local.as_f64().unwrap())));
            }
        }
        _ => {}
    }
    let mut metadata: Vec<(String, Told)> = told.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value)).collect();
    metadata.extend(more.iter().map(|(key, value)| (format!("{architecture}.{key}"), value.clone())));
    metadata.push(("general.architecture".into(), Told::String(architecture.into())));
    let metadata: Vec<(&str, &Told)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let stored: Vec<(String, QTensor)> = stored.into_iter().map(|(n, t)| (n, QTensor::quantize(&t, GgmlDType::F32).unwrap())).collect();
    let stored: Vec<(&str, &QTensor)> = stored.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let path = at.join("model.gguf");
    gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &metadata, &stored).unwrap();
    Some(path)
}

/// Rows of each head in the order 0, half, 1, half + 1, …
fn interleaved(tensor: &Tensor, heads: usize) -> Tensor {
    let rows = tensor.dim(0).unwrap();
    let half = rows / heads / 2;
    let order: Vec<u32> = (0..rows).map(|row| (row - row % (2 * half) + row % 2 * half + row % (2 * half) / 2) as u32).collect();
    tensor.index_select(&Tensor::new(order, &Device::Cpu).unwrap(), 0).unwrap()
}

/// Logits after `rows` of the tokens, which are read in pieces of these lengths.
fn logits(model: &Llama, mut cache: KvCache, tokens: &[u32], rows: &[usize], pieces: &[usize]) -> Vec<f32> {
    let mut workspace = Workspace::new(ThreadPool::new(2, &[]).unwrap());
    let blocks = [BlockId(2), BlockId(0), BlockId(1)];
    let (mut start, mut all) = (0, Vec::new());
    for length in pieces {
        let tokens = &tokens[start..start + length];
        let chunk = Chunk { tokens, start, blocks: &blocks, logits: true };
        let wanted: Vec<usize> = rows.iter().filter(|row| (start..start + length).contains(row)).map(|row| row - start).collect();
        all.extend_from_slice(
            model.forward_rows(&[chunk], &wanted, &mut cache, &mut workspace, &mut |_, _, _| Ok(())).unwrap().read().unwrap(),
        );
        start += length;
    }
    all
}

#[test]
fn every_family_computes_what_transformers_computes() {
    let fixture = families::Fixture::open();
    let (tokens, rows) = (fixture.tokens(), fixture.rows());
    let pool = ThreadPool::new(1, &[]).unwrap();
    let (mut files, mut split) = (0, 0);
    for (name, config, expected) in fixture.cases() {
        let at = tempfile::tempdir().unwrap();
        families::folder(config, at.path());
        let load = |path: &Path| Llama::load(path, WeightFormat::F32, &Device::Cpu, &pool).unwrap_or_else(|e| panic!("{name}: {e}"));
        let model = load(at.path());
        let cache = || KvCache::new(model.config().kv, KvFormat::F32, 3, 16, &Device::Cpu).unwrap();
        let far = |got: &[f32]| {
            assert_eq!(got.len(), expected.len());
            got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let whole = logits(&model, cache(), &tokens, &rows, &[tokens.len()]);
        assert!(far(&whole) < 1e-4, "{name}: {}", far(&whole));
        assert!(logits(&model, cache(), &tokens, &rows, &vec![1; tokens.len()]) == whole, "{name}: other bits token by token");
        assert!(logits(&model, cache(), &tokens, &rows, &[5, 1, 30, 4]) == whole, "{name}: other bits in pieces");

        let weights = Weights::open(at.path()).unwrap();
        let form = |parts: usize| GpuLlama::load(&weights, WeightFormat::F32, &vec![Device::Cpu; parts]);
        let run = |gpu: GpuLlama, parts: usize| {
            let cache = KvCache::over_tensors(model.config().kv, KvFormat::F32, 3, 16, parts);
            far(&logits(&Llama::of_gpu(&weights, gpu), cache, &tokens, &rows, &[5, 1, 30, 4]))
        };
        let difference = run(form(1).unwrap(), 1);
        assert!(difference < 1e-3, "{name} in the form for GPUs: {difference}");
        match form(2) {
            Ok(gpu) => {
                let difference = run(gpu, 2);
                assert!(difference < 1e-3, "{name} split over two devices: {difference}");
                split += 1;
            }
            Err(error) => assert!(error.to_string().contains("cannot be split"), "{name}: {error}"),
        }

        if let Some(file) = gguf(name, config, &[], at.path()) {
            let from_file = load(&file);
            let got = logits(&from_file, cache(), &tokens, &rows, &[tokens.len()]);
            assert!(far(&got) < 1e-4, "{name} from GGUF: {}", far(&got));
            let (a, b) = (from_file.config(), model.config());
            assert_eq!((&a.layers, a.max_context, a.rope.turned), (&b.layers, b.max_context, b.rope.turned), "{name}");
            files += 1;
        }
    }
    assert!(files > 15 && split > 5, "{files} from GGUF, {split} split");
}

#[test]
fn what_a_header_says_that_is_not_computed_is_refused_by_its_name() {
    let fixture = families::Fixture::open();
    let (name, config, _) = fixture.cases().find(|(name, ..)| *name == "llama").unwrap();
    let open = |key: &str, value: Told| {
        let at = tempfile::tempdir().unwrap();
        Weights::open(&gguf(name, config, &[(key, value)], at.path()).unwrap()).map(|_| ())
    };
    for (key, value) in [
        ("expert_count", Told::U32(8)),
        ("attention.causal", Told::Bool(false)),
        ("attention.clamp_kqv", Told::F32(8.0)),
        ("attention.max_alibi_bias", Told::F32(8.0)),
        ("attention.scale", Told::F32(0.3)),
        ("attention.value_length", Told::U32(4)),
        ("attn_logit_softcapping", Told::F32(50.0)),
        ("final_logit_softcapping", Told::F32(30.0)),
        ("embedding_scale", Told::F32(12.0)),
        ("residual_scale", Told::F32(0.2)),
        ("logit_scale", Told::F32(8.0)),
        ("use_parallel_residual", Told::Bool(true)),
        ("rope.dimension_sections", Told::Array(vec![Told::I32(1), Told::I32(3)])),
        ("rope.scaling.yarn_log_multiplier", Told::F32(0.1)),
        ("attention.sliding_window_pattern", Told::Array(vec![Told::Bool(true)])),
    ] {
        let told = open(key, value).unwrap_err().to_string();
        assert!(told.contains(&format!("llama.{key}")), "{key}: {told}");
    }
    for (key, value) in [
        ("expert_count", Told::U32(0)),
        ("attention.causal", Told::Bool(true)),
        ("logit_scale", Told::F32(1.0)),
        ("attention.scale", Told::F32(0.0)),
        ("vocab_size", Told::U32(64)),
        ("attention.sliding_window", Told::U32(9)),
    ] {
        open(key, value).unwrap();
    }
}
