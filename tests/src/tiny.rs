//! Tiny random pairs: two Llamas of different width with a byte-level tokenizer, made anew for each test.
//!
//! Weights are large enough that the most likely token is well ahead of the next, and depends on the whole prompt.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use overfill_model::{KvSpec, MakePair, Pair};
use overfill_text::gguf::GgufVocabulary;
use overfill_types::pair::PAIR_FILE;
use overfill_types::pair::WeightFormat;
use overfill_types::{GenerationConfig, KvFormat, KvFormats, PairManifest, WireFormat};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use tempfile::TempDir;

/// Tokens of the tiny vocabulary: the bytes, and a few special ones.
pub const VOCABULARY: usize = 260;
/// The token that ends an answer.
pub const EOS: u32 = 257;

/// Shape of one tiny model.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub mlp: usize,
    /// Layers.
    pub layers: usize,
    /// KV heads; there are twice as many query heads, of 8 values each.
    pub kv_heads: usize,
}

/// The full model of every tiny pair.
pub const FULL: Shape = Shape { hidden: 48, mlp: 104, layers: 4, kv_heads: 2 };

/// A pair in a temporary folder.
pub struct TinyPair {
    /// Where the pair lies.
    pub dir: PathBuf,
    _folder: TempDir,
}

/// Decode model and transform of a tiny pair.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A narrower decode model on the cache as it is.
    Identity,
    /// A decode model with fewer layers.
    Prune(&'static str),
    /// A decode model with fewer layers and KV heads.
    Projection,
}

/// Makes a pair; the same `seed` gives the same weights, and the full model is the same for each kind.
pub fn pair(kind: Kind, seed: u64) -> TinyPair {
    pair_named("tiny", kind, seed)
}

/// As [`pair`], under this name.
pub fn pair_named(name: &str, kind: Kind, seed: u64) -> TinyPair {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let decode = match kind {
        Kind::Identity => Shape { hidden: 40, mlp: 72, ..FULL },
        Kind::Prune(_) => Shape { hidden: 40, mlp: 72, layers: 3, ..FULL },
        Kind::Projection => Shape { hidden: 40, mlp: 72, layers: 3, kv_heads: 1 },
    };
    checkpoint(&at("full"), FULL, seed);
    checkpoint(&at("decode"), decode, seed + 1);
    let kv = match kind {
        Kind::Identity => KvSpec::Identity,
        Kind::Prune(strategy) => KvSpec::Prune(strategy.parse().unwrap()),
        Kind::Projection => {
            let mut random = StdRng::seed_from_u64(seed + 2);
            let (from, to) = (FULL.kv_heads * 8, decode.kv_heads * 8);
            let tensors = (0..decode.layers).flat_map(|i| {
                [
                    (format!("embedding_proj.{i}.weight"), vec![to, from], noise(&mut random, to * from, 0.4)),
                    (format!("embedding_proj.{i}.bias"), vec![to], noise(&mut random, to, 0.2)),
                ]
            });
            save(&at("projection.safetensors"), tensors.collect());
            KvSpec::Projection(at("projection.safetensors"))
        }
    };
    // Each kind has other number formats, so that all are tried.
    let formats = match kind {
        Kind::Identity => KvFormats::default(),
        Kind::Prune("first") => KvFormats { cache: KvFormat::F16, wire: WireFormat::Bf16 },
        Kind::Prune(_) => KvFormats { cache: KvFormat::F16, wire: WireFormat::F16 },
        Kind::Projection => KvFormats { cache: KvFormat::F16, wire: WireFormat::Int8 },
    };
    let making = MakePair {
        name: name.into(),
        full: at("full"),
        full_weights: WeightFormat::F32,
        decode: at("decode"),
        decode_weights: WeightFormat::F32,
        kv,
        kv_formats: formats,
        generation: GenerationConfig::default(),
        provenance: serde_json::Map::new(),
    };
    let dir = at("pair");
    making.make(&dir).unwrap();
    TinyPair { dir, _folder: folder }
}

/// As [`pair`], with a chat template that tells the model of tools, of calls and of their results.
pub fn pair_with_tools(kind: Kind, seed: u64) -> TinyPair {
    let pair = pair(kind, seed);
    let template = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|a|>{{ m.role }}:{{ m.content }}\
        {% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}\
        {% if add_generation_prompt %}<|b|>{% endif %}";
    let config = json!({ "chat_template": template, "bos_token": "<|start|>", "eos_token": "<|end|>" });
    std::fs::write(pair.dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    pair
}

impl TinyPair {
    /// The pair, opened.
    pub fn open(&self) -> Pair {
        Pair::open(&self.dir).unwrap()
    }

    /// The same, saying how tokens are chosen where a request does not.
    pub fn choosing(self, generation: GenerationConfig) -> Self {
        let manifest = PairManifest { generation, ..self.open().manifest };
        std::fs::write(self.dir.join(PAIR_FILE), serde_json::to_string(&manifest).unwrap()).unwrap();
        self
    }
}

/// A prompt of `tokens` random bytes.
pub fn prompt(tokens: usize, seed: u64) -> Vec<u32> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..tokens).map(|_| random.random_range(0..256)).collect()
}

fn checkpoint(dir: &Path, shape: Shape, seed: u64) {
    let Shape { hidden, mlp, layers, kv_heads } = shape;
    let heads = 2 * kv_heads;
    std::fs::create_dir_all(dir).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": EOS, "tie_word_embeddings": false,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();

    let mut random = StdRng::seed_from_u64(seed);
    let mut tensors = Vec::new();
    let mut matrix = |name: &str, rows: usize, columns: usize| {
        let values = noise(&mut random, rows * columns, 1.6 / (columns as f32).sqrt());
        tensors.push((name.to_owned(), vec![rows, columns], values));
    };
    matrix("model.embed_tokens.weight", VOCABULARY, hidden);
    matrix("lm_head.weight", VOCABULARY, hidden);
    for layer in 0..layers {
        let mut part = |name: &str, rows, columns| matrix(&format!("model.layers.{layer}.{name}.weight"), rows, columns);
        part("self_attn.q_proj", heads * 8, hidden);
        part("self_attn.k_proj", kv_heads * 8, hidden);
        part("self_attn.v_proj", kv_heads * 8, hidden);
        part("self_attn.o_proj", hidden, heads * 8);
        part("mlp.gate_proj", mlp, hidden);
        part("mlp.up_proj", mlp, hidden);
        part("mlp.down_proj", hidden, mlp);
    }
    let norms = (0..layers).flat_map(|l| ["input_layernorm", "post_attention_layernorm"].map(|n| format!("model.layers.{l}.{n}.weight")));
    for name in norms.chain(["model.norm.weight".to_owned()]) {
        tensors.push((name, vec![hidden], vec![1.0; hidden]));
    }
    save(&dir.join("model.safetensors"), tensors);

    let vocabulary = vocabulary();
    std::fs::write(dir.join("tokenizer.json"), vocabulary.tokenizer().unwrap().to_string(false).unwrap()).unwrap();
    let template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}<|start|>{{ m.content }}{% endfor %}";
    let config = json!({ "chat_template": template, "bos_token": "<|start|>", "eos_token": "<|end|>" });
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

fn vocabulary() -> GgufVocabulary {
    // The printable stand-ins for bytes that byte-level BPE uses.
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0u32..;
    let mut tokens: Vec<String> = (0..=255u8)
        .map(|b| if printable(b) { char::from(b) } else { char::from_u32(256 + others.next().unwrap()).unwrap() })
        .map(String::from)
        .collect();
    tokens.extend(["<|start|>", "<|end|>", "<|a|>", "<|b|>"].map(str::to_owned));
    let mut token_types = vec![1; 256];
    token_types.extend([3; 4]);
    GgufVocabulary { model: "gpt2".into(), pre: Some("gpt-2".into()), tokens, token_types, eos: Some(EOS), ..Default::default() }
}

fn noise(random: &mut StdRng, count: usize, scale: f32) -> Vec<f32> {
    (0..count).map(|_| random.random_range(-1.7..1.7) * scale).collect()
}

fn save(path: &Path, tensors: Vec<(String, Vec<usize>, Vec<f32>)>) {
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> =
        tensors.into_iter().map(|(n, s, v)| (n, s, v.iter().flat_map(|x| x.to_le_bytes()).collect())).collect();
    let views: HashMap<&str, TensorView<'_>> =
        bytes.iter().map(|(n, s, b)| (n.as_str(), TensorView::new(Dtype::F32, s.clone(), b).unwrap())).collect();
    safetensors::serialize_to_file(views, None, path).unwrap();
}
