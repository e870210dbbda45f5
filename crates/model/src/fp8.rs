//! Weights of eight bits (E4M3) with scales, as Hugging Face folders have them: each weight times its scale is the weight that is
//! computed with. Engines for such files round activations to eight bits as well; here they stay as they are, so answers are those
//! of the scaled weights, nearer to the unquantised model's.

use candle_core::DType;
use safetensors::Dtype;
use serde_json::Value;

use crate::stored::Stored;

/// How `config.json` says that the weights are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scheme {
    /// Rows and columns that share a scale; without, a matrix has one, or one a row.
    blocks: Option<[usize; 2]>,
}

/// What the numbers of a scaled matrix become where the file's own format is asked for: half of what the factors' product needs,
/// and as the unquantised models are.
pub(crate) const HELD: DType = DType::BF16;

/// Scales of activations and of the KV cache, which are not rounded here.
const NOT_OF_WEIGHTS: [&str; 6] = [".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale", ".k_scale", ".v_scale"];

impl Scheme {
    /// What `config.json` says of it; nothing where the weights are not quantised.
    ///
    /// # Errors
    /// A sentence that names the method that is not supported.
    pub(crate) fn of(config: &Value) -> Result<Option<Self>, String> {
        let said = match (&config["quantization_config"], &config["compression_config"]) {
            (Value::Null, Value::Null) => return Ok(None),
            (Value::Null, said) | (said, _) => said,
        };
        let method = said["quant_method"].as_str().unwrap_or("some method that it does not name");
        let blocks = match method {
            "fp8" | "fbgemm_fp8" => blocks(&said["weight_block_size"]),
            "compressed-tensors" => compressed(said),
            _ => Err(String::new()),
        };
        match blocks {
            Ok(blocks) => Ok(Some(Self { blocks })),
            Err(what) => Err(format!(
                "quantization_config says that the weights are quantised by {method}{what}: not supported, eight-bit floats (fp8, \
                 fbgemm_fp8, float-quantized compressed-tensors) are; take the model's bf16, f16 or f32 weights, or a GGUF file"
            )),
        }
    }

    /// Whether a tensor is a scale that belongs to another, or to nothing that is computed here.
    pub(crate) fn is_scale(tensors: &Stored, name: &str) -> bool {
        let of_weights =
            name.strip_suffix("_scale_inv").or_else(|| name.strip_suffix("_scale")).filter(|weight| weight.ends_with(".weight"));
        NOT_OF_WEIGHTS.iter().any(|end| name.ends_with(end))
            || of_weights.and_then(|weight| tensors.get(weight)).is_some_and(|(dtype, _)| dtype == Dtype::F8_E4M3)
    }

    /// Refuses a matrix of eight-bit floats whose scales are not there or not of its shape.
    ///
    /// # Errors
    /// A sentence that names the tensor.
    pub(crate) fn check(self, tensors: &Stored, name: &str) -> Result<(), String> {
        self.scale(tensors, name).map(drop)
    }

    /// The name of a matrix's scales, and how many rows and columns share one.
    fn scale(self, tensors: &Stored, name: &str) -> Result<(String, [usize; 2]), String> {
        let Some((_, shape)) = tensors.get(name) else { return Err(format!("tensor {name} is missing")) };
        let [rows, columns] = *shape.as_slice() else {
            return Err(format!("tensor {name} holds eight-bit floats and has shape {shape:?}: matrices alone may"));
        };
        let names = [format!("{name}_scale"), format!("{name}_scale_inv")];
        let (scale, dtype, scales) = match names.map(|scale| tensors.get(&scale).map(|(dtype, shape)| (scale, dtype, shape))) {
            [Some(scale), None] | [None, Some(scale)] => scale,
            [None, None] => return Err(format!("tensor {name} holds eight-bit floats, and its scale {name}_scale is missing")),
            [Some(_), Some(_)] => return Err(format!("tensor {name} has both {name}_scale and {name}_scale_inv")),
        };
        if !matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return Err(format!("tensor {scale} holds {dtype:?}: f32, bf16 and f16 are read"));
        }
        let shared = match (self.blocks, scales.as_slice()) {
            (_, [] | [1] | [1, 1]) => [rows, columns],
            (None, &[each] | &[each, 1]) if each == rows => [1, columns],
            (Some([high, wide]), &[down, across]) if (down, across) == (rows.div_ceil(high), columns.div_ceil(wide)) => [high, wide],
            _ => {
                let wanted = match self.blocks {
                    None => format!("one number, or one for each of its {rows} rows"),
                    Some([high, wide]) => format!("{:?}, for blocks of {high} x {wide}", [rows.div_ceil(high), columns.div_ceil(wide)]),
                };
                return Err(format!("tensor {scale} has shape {scales:?}: {name} of shape {shape:?} needs {wanted}"));
            }
        };
        Ok((scale, shared))
    }

    /// A matrix's numbers, scaled.
    ///
    /// # Errors
    /// As [`Scheme::check`].
    pub(crate) fn numbers(self, tensors: &Stored, name: &str) -> Result<Vec<f32>, String> {
        let (scale, [high, wide]) = self.scale(tensors, name)?;
        let scales = floats(tensors, &scale)?;
        let (Some((_, shape)), Some(bytes)) = (tensors.get(name), tensors.bytes(name)) else {
            return Err(format!("tensor {name} is missing"));
        };
        let columns = shape[1];
        let table = table();
        let across = columns.div_ceil(wide.max(1));
        let mut numbers = Vec::with_capacity(bytes.len());
        for (row, bytes) in bytes.chunks_exact(columns.max(1)).enumerate() {
            for (block, bytes) in bytes.chunks(wide.max(1)).enumerate() {
                let scale = scales[row / high * across + block];
                numbers.extend(bytes.iter().map(|byte| table[usize::from(*byte)] * scale));
            }
        }
        Ok(numbers)
    }
}

fn blocks(size: &Value) -> Result<Option<[usize; 2]>, String> {
    if size.is_null() {
        return Ok(None);
    }
    let side = |i: usize| size[i].as_u64().and_then(|side| usize::try_from(side).ok()).filter(|side| *side > 0);
    match (size.as_array().map(Vec::len), side(0), side(1)) {
        (Some(2), Some(high), Some(wide)) => Ok(Some([high, wide])),
        _ => Err(format!(" in blocks of {size}")),
    }
}

/// What compressed-tensors says: groups of layers, each with its format.
fn compressed(said: &Value) -> Result<Option<[usize; 2]>, String> {
    let format = &said["format"];
    if !matches!(format.as_str(), None | Some("float-quantized" | "naive-quantized")) {
        return Err(format!(" in the format {format}"));
    }
    for key in ["sparsity_config", "transform_config"] {
        let nothing = said[key].as_object().is_none_or(serde_json::Map::is_empty) || said[key]["format"] == "dense";
        if !nothing {
            return Err(format!(" with a {key}"));
        }
    }
    let mut all = None;
    for group in said["config_groups"].as_object().into_iter().flat_map(serde_json::Map::values) {
        let weights = &group["weights"];
        if weights["type"] != "float" || weights["num_bits"] != 8 || weights["symmetric"] == false {
            return Err(format!(" as {} of {} bits", weights["type"], weights["num_bits"]));
        }
        let blocks = match weights["strategy"].as_str() {
            Some("tensor" | "channel") => None,
            Some("block") => blocks(&weights["block_structure"])?,
            _ => return Err(format!(" with a scale for each {}", weights["strategy"])),
        };
        if all.is_some_and(|all| all != blocks) {
            return Err(" in groups of several kinds of blocks".into());
        }
        all = Some(blocks);
    }
    all.ok_or_else(|| " without config_groups".to_owned())
}

/// A tensor's numbers as 32-bit floats.
fn floats(tensors: &Stored, name: &str) -> Result<Vec<f32>, String> {
    let (Some((dtype, _)), Some(bytes)) = (tensors.get(name), tensors.bytes(name)) else {
        return Err(format!("tensor {name} is missing"));
    };
    Ok(match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        other => return Err(format!("tensor {name} holds {other:?}: f32, bf16 and f16 are read")),
    })
}

/// What each byte means: a sign, four bits of exponent (bias 7), three of mantissa; no infinity, and the largest is no number.
fn table() -> [f32; 256] {
    std::array::from_fn(|byte| {
        let (exponent, mantissa) = ((byte >> 3 & 15) as i32, (byte & 7) as f32);
        let size = match (exponent, byte & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa * 2_f32.powi(-9),
            _ => (8.0 + mantissa) * 2_f32.powi(exponent - 10),
        };
        if byte & 0x80 == 0 { size } else { -size }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn bytes_mean_what_the_format_says() {
        let table = table();
        for (byte, number) in [(0x00, 0.0), (0x01, 2_f32.powi(-9)), (0x08, 2_f32.powi(-6)), (0x38, 1.0), (0x7e, 448.0), (0xc4, -3.0)] {
            assert_eq!(table[byte], number, "{byte:#x}");
        }
        assert!(table[0x7f].is_nan() && table[0xff].is_nan());
        assert_eq!(table.iter().filter(|number| number.is_nan()).count(), 2);
    }

    #[test]
    fn schemes_are_known_by_name() {
        let said = |config: Value| Scheme::of(&json!({ "quantization_config": config }));
        let group = |weights: Value| {
            let groups = json!({ "group_0": { "weights": weights } });
            json!({ "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups })
        };
        let whole = Ok(Some(Scheme { blocks: None }));
        let blocks = Ok(Some(Scheme { blocks: Some([128, 128]) }));
        assert_eq!(Scheme::of(&json!({})), Ok(None));
        assert_eq!(said(json!({ "quant_method": "fp8", "activation_scheme": "static" })), whole);
        assert_eq!(said(json!({ "quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0 })), whole);
        assert_eq!(said(json!({ "quant_method": "fp8", "weight_block_size": [128, 128] })), blocks);
        assert_eq!(said(group(json!({ "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true }))), whole);
        let block = json!({ "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128] });
        assert_eq!(said(group(block)), blocks);
        for (config, word) in [
            (json!({ "quant_method": "gptq", "bits": 4 }), "gptq"),
            (json!({ "quant_method": "awq" }), "awq"),
            (json!({ "quant_method": "bitsandbytes", "load_in_8bit": true }), "bitsandbytes"),
            (json!({}), "does not name"),
            (json!({ "quant_method": "fp8", "weight_block_size": [0, 128] }), "[0,128]"),
            (json!({ "quant_method": "compressed-tensors", "format": "pack-quantized" }), "pack-quantized"),
            (json!({ "quant_method": "compressed-tensors", "format": "float-quantized" }), "config_groups"),
            (group(json!({ "num_bits": 8, "type": "int", "strategy": "channel" })), "int"),
            (group(json!({ "num_bits": 4, "type": "float", "strategy": "group" })), "4 bits"),
            (group(json!({ "num_bits": 8, "type": "float", "strategy": "group", "group_size": 64 })), "group"),
        ] {
            assert!(said(config.clone()).unwrap_err().contains(word), "{config}");
        }
    }
}
