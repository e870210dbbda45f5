//! Export: a decode model as other engines load it, a Hugging Face folder or a GGUF file, quantised if asked for.
//!
//! **Invariant:** an export computes what its source does, but for the rounding of its number format. Quantised rows are runs
//! of blocks of 32 numbers; a width that is no multiple of that is padded with zeros, which changes no result (`pad`).

mod pad;
mod rounding;

use std::path::Path;
use std::str::FromStr;

use overfill_model::{GgmlDType, GgufWriter, LlamaConfig, making};
use overfill_text::gguf::GgufVocabulary;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::checkpoint::{Checkpoint, Format, LayerWeights, Writer};
use crate::error::CompressError;
use crate::export::pad::Padding;
use crate::matrix::Matrix;

/// What the matrices of a GGUF file are stored as. All quantised ones have blocks of 32 numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Stored(GgmlDType);

impl TryFrom<String> for Stored {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Stored> for String {
    fn from(stored: Stored) -> Self {
        stored.name()
    }
}

impl FromStr for Stored {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self(match text {
            "f32" => GgmlDType::F32,
            "f16" => GgmlDType::F16,
            "q8_0" => GgmlDType::Q8_0,
            "q5_1" => GgmlDType::Q5_1,
            "q5_0" => GgmlDType::Q5_0,
            "q4_1" => GgmlDType::Q4_1,
            "q4_0" => GgmlDType::Q4_0,
            other => return Err(format!("'{other}' is no format of a GGUF file: use f32, f16, q8_0, q5_1, q5_0, q4_1 or q4_0")),
        }))
    }
}

impl Stored {
    /// Eight bits and a scale for each block.
    pub const Q8_0: Self = Self(GgmlDType::Q8_0);

    fn name(self) -> String {
        format!("{:?}", self.0).to_lowercase()
    }

    /// Whether rows are blocks.
    pub fn is_quantised(self) -> bool {
        self.blocks().is_some()
    }

    /// Of which kind its blocks are, if rows are blocks.
    fn blocks(self) -> Option<GgmlDType> {
        Some(self.0).filter(|dtype| !matches!(dtype, GgmlDType::F32 | GgmlDType::F16))
    }
}

/// What the parts of a GGUF file are stored as; vectors are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GgufFormats {
    /// Matrices of the layers.
    pub layers: Stored,
    /// The embedding, which also is the head where they are tied.
    pub embedding: Stored,
    /// The output head.
    pub head: Stored,
}

impl GgufFormats {
    /// What the tensor of this name and number of dimensions is stored as; `None` for vectors.
    fn of(&self, name: &str, dimensions: usize) -> Option<Stored> {
        match name {
            _ if dimensions < 2 => None,
            "model.embed_tokens.weight" => Some(self.embedding),
            "lm_head.weight" => Some(self.head),
            _ => Some(self.layers),
        }
    }
}

/// Writes the checkpoint at `model` as a GGUF file that must not exist. It appears whole or not at all.
///
/// # Errors
/// [`CompressError::Refused`] where `out` exists or the tokenizer is none that GGUF can tell of; [`CompressError::Model`] where
/// the checkpoint is not whole; [`CompressError::File`].
pub fn gguf(model: &Path, formats: GgufFormats, out: &Path, mut progress: impl FnMut(usize, usize)) -> Result<(), CompressError> {
    if out.exists() {
        return Err(CompressError::Refused(format!("{} exists already: name another file, or remove it", out.display())));
    }
    let padded = [formats.layers, formats.embedding, formats.head].iter().any(|f| f.is_quantised());
    let writer = built(model, formats, padded, &mut progress)?;

    // Beside the target, so that the last step is a rename within one file system.
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |source| CompressError::File { path: out.to_owned(), source };
    let making = making::folder(parent, ".export-").map_err(failed)?;
    let file = making.path().join("model.gguf");
    writer.write(&file)?;
    std::fs::rename(&file, out).map_err(failed)?;
    Ok(())
}

/// The file of a checkpoint, its widths padded or as they are.
fn built(model: &Path, formats: GgufFormats, padded: bool, progress: &mut dyn FnMut(usize, usize)) -> Result<GgufWriter, CompressError> {
    let source = Checkpoint::open(model)?;
    let padding = Padding::of(source.config(), if padded { pad::BLOCK } else { 1 });
    let config = padding.config(source.config());
    let (hidden, wider) = (source.config().hidden_size, config.hidden_size);
    if config.family.is_gemma() && hidden != wider {
        return Err(CompressError::Refused(format!(
            "rows of {hidden} numbers are no whole blocks of a quantised format, and {} models, whose embeddings are multiplied by the root of \
             the hidden size, cannot be padded: use f16 or f32",
            config.family
        )));
    }
    let tokenizer = source.tokenizer()?;
    let json =
        serde_json::from_slice(&tokenizer.tokenizer).map_err(|e| CompressError::Refused(format!("tokenizer.json is no JSON: {e}")))?;
    let mut vocabulary = GgufVocabulary::of(&json, &tokenizer.config)?;
    vocabulary.eos = vocabulary.eos.or(config.eos_token_ids.first().copied());
    let name = model.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());

    let mut writer = GgufWriter::new(&name, &config, &vocabulary)?;
    let step = json!({
        "format": "gguf", "layers": formats.layers.name(), "embedding": formats.embedding.name(), "head": formats.head.name(),
        "hidden_size": [source.config().hidden_size, config.hidden_size],
        "intermediate_size": [source.config().intermediate_size, config.intermediate_size],
    });
    writer.provenance(&with_step(provenance(model)?, step));
    put(&mut writer, "model.embed_tokens.weight", &padding.reads(&source.embedding()?), formats.embedding)?;
    if !source.tied() {
        put(&mut writer, "lm_head.weight", &padding.reads(&source.head()?), formats.head)?;
    }
    let norm = padding.norm(&source.norm()?);
    writer.tensor("model.norm.weight", &[norm.len()], &norm, GgmlDType::F32)?;
    for i in 0..config.kv.layers {
        progress(i, config.kv.layers);
        put_layer(&mut writer, &config, i, &padding.layer(&source.layer(i)?), formats.layers)?;
    }
    Ok(writer)
}

fn put(writer: &mut GgufWriter, name: &str, matrix: &Matrix, stored: Stored) -> Result<(), CompressError> {
    // Only what the attention's output reads, all heads' values, may be no multiple of a block.
    let stored = if matrix.columns().is_multiple_of(pad::BLOCK) || !stored.is_quantised() { stored.0 } else { GgmlDType::F16 };
    Ok(writer.tensor(name, &[matrix.rows(), matrix.columns()], matrix.numbers(), stored)?)
}

fn put_layer(writer: &mut GgufWriter, config: &LlamaConfig, i: usize, layer: &LayerWeights, stored: Stored) -> Result<(), CompressError> {
    let name = |module: &str, kind: &str| format!("model.layers.{i}.{module}.{kind}");
    let [q, k, v] = &layer.qkv;
    if config.family.is_fused() {
        put(writer, &name("self_attn.qkv_proj", "weight"), &Matrix::stacked(&[q, k, v]), stored)?;
        put(writer, &name("mlp.gate_up_proj", "weight"), &Matrix::stacked(&[&layer.gate, &layer.up]), stored)?;
    } else {
        for (module, matrix) in [("q", q), ("k", k), ("v", v)] {
            put(writer, &name(&format!("self_attn.{module}_proj"), "weight"), matrix, stored)?;
        }
        put(writer, &name("mlp.gate_proj", "weight"), &layer.gate, stored)?;
        put(writer, &name("mlp.up_proj", "weight"), &layer.up, stored)?;
    }
    put(writer, &name("self_attn.o_proj", "weight"), &layer.output, stored)?;
    put(writer, &name("mlp.down_proj", "weight"), &layer.down, stored)?;
    for (module, bias) in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].iter().zip(&layer.qkv_bias) {
        if !bias.is_empty() {
            writer.tensor(&name(module, "bias"), &[bias.len()], bias, GgmlDType::F32)?;
        }
    }
    for (module, norm) in layer.norms(config.family) {
        writer.tensor(&name(module, "weight"), &[norm.len()], norm, GgmlDType::F32)?;
    }
    Ok(())
}

/// Writes the checkpoint at `model` as a Hugging Face folder that must not exist. It appears whole or not at all.
///
/// # Errors
/// As [`gguf`].
pub fn hugging_face(model: &Path, format: Format, out: &Path, mut progress: impl FnMut(usize, usize)) -> Result<(), CompressError> {
    let source = Checkpoint::open(model)?;
    let mut config = source.config().clone();
    config.tied_embeddings = source.tied();
    let mut writer = Writer::create(out, format, &config)?;
    writer.embedding(&source.embedding()?)?;
    for i in 0..config.kv.layers {
        progress(i, config.kv.layers);
        writer.layer(i, &source.layer(i)?)?;
    }
    let head = if source.tied() { None } else { Some(source.head()?) };
    writer.head(&source.norm()?, head.as_ref())?;
    let step = json!({ "format": "hugging face", "numbers": format!("{format:?}").to_lowercase() });
    writer.close(&source)?.appear(&with_step(provenance(model)?, step))
}

/// How a checkpoint was made, as the steps before have written it down; empty where nobody has.
fn provenance(model: &Path) -> Result<Map<String, Value>, CompressError> {
    Ok(overfill_model::pair_make::provenance(model)?.unwrap_or_default())
}

/// An export's provenance: what it did, and that of what it was made of.
fn with_step(of: Map<String, Value>, step: Value) -> Map<String, Value> {
    let mut all = Map::from_iter([("export".to_owned(), step)]);
    all.extend(of);
    all
}

#[cfg(test)]
mod tests {
    use overfill_kv::BlockId;
    use overfill_model::gguf::GgufFile;
    use overfill_model::{Chunk, Device, KvCache, Llama, ThreadPool, Weights, Workspace};
    use overfill_types::KvFormat;
    use overfill_types::pair::WeightFormat;

    use super::*;
    use crate::fixture;

    fn logits(path: &Path) -> Vec<f32> {
        let mut workspace = Workspace::new(ThreadPool::new(1, &[]).unwrap());
        let model = Llama::load(path, WeightFormat::F32, &Device::Cpu, workspace.pool()).unwrap();
        let mut cache = KvCache::new(model.config().kv, KvFormat::F32, 2, 16, &Device::Cpu).unwrap();
        let vocabulary = model.config().vocab_size as u32;
        let tokens: Vec<u32> = (0..30).map(|i| i * 29 % vocabulary).collect();
        let chunk = Chunk { tokens: &tokens, start: 0, blocks: &[BlockId(0), BlockId(1)], logits: true };
        model.forward_each(&[chunk], &mut cache, &mut workspace).unwrap().read().unwrap().to_vec()
    }

    fn difference(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn an_export_computes_the_same_padded_or_not() {
        let all = |stored: &str| {
            let stored = stored.parse().unwrap();
            GgufFormats { layers: stored, embedding: stored, head: stored }
        };
        for name in ["full", "narrow", "tied", "wide", "qwen2"] {
            let (from, to) = (fixture::model(name), tempfile::tempdir().unwrap());
            let kept: Vec<usize> = (0..500).collect();
            let told = json!({ "method": { "name": "told", "kept": kept } });
            std::fs::write(from.path().join("provenance.json"), told.to_string()).unwrap();
            let expected = logits(from.path());
            let spread = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            for padded in [false, true] {
                let file = to.path().join(format!("{padded}.gguf"));
                built(from.path(), all("f32"), padded, &mut |_, _| ()).unwrap().write(&file).unwrap();
                let got = difference(&logits(&file), &expected);
                assert!(got < 1e-5 * spread.max(1.0), "{name}, padded {padded}: {got} of {spread}");
            }
            let file = to.path().join("q8_0.gguf");
            gguf(from.path(), all("q8_0"), &file, |_, _| ()).unwrap();
            let squares = |of: &mut dyn Iterator<Item = f32>| of.map(|x| x * x).sum::<f32>();
            let error = squares(&mut logits(&file).iter().zip(&expected).map(|(a, b)| a - b)) / squares(&mut expected.iter().copied());
            assert!(error > 0.0 && error.sqrt() < 0.1, "{name} in eight bits: {} of the logits", error.sqrt());
            assert!(gguf(from.path(), all("q8_0"), &file, |_, _| ()).is_err(), "nothing is written over");
            let said = overfill_model::pair_make::provenance(&file).unwrap().unwrap();
            assert_eq!((said["method"]["name"].as_str(), said["export"]["layers"].as_str()), (Some("told"), Some("q8_0")));
            // Kept neurons are told by their number, and loaders find what they ask for.
            assert_eq!(said["method"]["kept"]["values"], json!(500));
            let read = GgufFile::open(&file).unwrap();
            let number = |key: &str| read.metadata(key).and_then(|value| value.to_u32().ok());
            assert_eq!((number("general.file_type"), number("general.quantization_version")), (Some(7), Some(2)));

            let folder = to.path().join("folder");
            hugging_face(&to.path().join("true.gguf"), Format::F32, &folder, |_, _| ()).unwrap();
            let got = difference(&logits(&folder), &expected);
            assert!(got < 1e-5 * spread.max(1.0), "{name} there and back: {got} of {spread}");
        }
    }

    #[test]
    fn every_family_is_exported_as_it_computes_or_refused_by_what_cannot_be_said() {
        let fixture = fixture::families::Fixture::open();
        let f32 = "f32".parse().unwrap();
        let formats = GgufFormats { layers: f32, embedding: f32, head: f32 };
        for (name, config, _) in fixture.cases() {
            let (from, to) = (fixture::family(config), tempfile::tempdir().unwrap());
            let (file, folder, back) = (to.path().join("a.gguf"), to.path().join("folder"), to.path().join("back"));
            let refused = match name {
                "llama-biases" | "granite-biases" | "qwen3-biases" => Some("has a bias"),
                "qwen2-windows" | "qwen3-windows" => Some("have windows"),
                "smollm3-windows" => Some("no rotary embedding"),
                "gemma2-scalar" => Some("query_pre_attn_scalar"),
                _ => None,
            };
            if let Some(word) = refused {
                let told = gguf(from.path(), formats, &file, |_, _| ()).unwrap_err().to_string();
                assert!(told.contains(word), "{name}: {told}");
            }
            if refused == Some("has a bias") {
                continue;
            }
            let expected = logits(from.path());
            let close = |path: &Path| {
                let far = difference(&logits(path), &expected);
                assert!(far < 1e-5 * expected.iter().fold(1.0f32, |m, x| m.max(x.abs())), "{name}, {}: {far}", path.display());
            };
            hugging_face(from.path(), Format::F32, &folder, |_, _| ()).unwrap();
            close(&folder);
            if refused.is_none() {
                gguf(from.path(), formats, &file, |_, _| ()).unwrap();
                close(&file);
                built(from.path(), formats, true, &mut |_, _| ()).unwrap().write(&to.path().join("padded.gguf")).unwrap();
                close(&to.path().join("padded.gguf"));
                hugging_face(&file, Format::F32, &back, |_, _| ()).unwrap();
                close(&back);
            }
        }
    }

    #[test]
    fn scaled_weights_and_those_of_pytorch_become_plain_ones() {
        let name = "model.layers.0.mlp.up_proj.weight";
        for of in ["fp8-row", "fp8-blocks", "plain"] {
            let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/torch").join(of);
            for file in std::fs::read_dir(fixture).unwrap() {
                let file = file.unwrap();
                std::fs::copy(file.path(), from.path().join(file.file_name())).unwrap();
            }
            std::fs::write(from.path().join("tokenizer.json"), json!({ "model": { "vocab": {}, "merges": [] } }).to_string()).unwrap();
            let folder = to.path().join("folder");
            hugging_face(from.path(), Format::F32, &folder, |_, _| ()).unwrap();
            let said = std::fs::read_to_string(folder.join("config.json")).unwrap();
            assert!(!said.contains("quantization_config"), "{of}: its scales are applied: {said}");
            let numbers = |path: &Path| Weights::open(path).unwrap().numbers(name).unwrap();
            assert_eq!(numbers(&folder), numbers(from.path()), "{of}");
            assert!(folder.join("model.safetensors").exists());
        }
    }
}
