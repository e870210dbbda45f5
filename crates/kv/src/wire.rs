//! Rows of keys or values as bytes on the wire.
//!
//! All formats are little endian. `int8` is the scales first, `[tokens, kv_heads]` 32-bit floats, then the codes,
//! `[tokens, kv_heads, head_dim]`; a value is its code times its head's scale.

use bytes::Bytes;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use overfill_types::{KvGeometry, WireFormat};

/// Bytes of one row, `[kv_heads, head_dim]`.
pub fn row_bytes(format: WireFormat, geometry: &KvGeometry) -> usize {
    match format {
        WireFormat::F32 => geometry.row() * 4,
        WireFormat::F16 | WireFormat::Bf16 => geometry.row() * 2,
        WireFormat::Int8 => geometry.row() + geometry.kv_heads * 4,
    }
}

/// Rows `[tokens, kv_heads, head_dim]` as bytes.
pub fn encode(format: WireFormat, geometry: &KvGeometry, rows: &[f32]) -> Bytes {
    match format {
        WireFormat::F32 => little_endian(rows, |x| x.to_le_bytes()),
        WireFormat::F16 => {
            let mut halves = vec![f16::ZERO; rows.len()];
            halves.convert_from_f32_slice(rows);
            little_endian(&halves, |x| x.to_le_bytes())
        }
        WireFormat::Bf16 => {
            let mut halves = vec![bf16::ZERO; rows.len()];
            halves.convert_from_f32_slice(rows);
            little_endian(&halves, |x| x.to_le_bytes())
        }
        WireFormat::Int8 => {
            let heads = rows.chunks_exact(geometry.head_dim);
            let mut bytes = Vec::with_capacity(heads.len() * (4 + geometry.head_dim));
            let scales = || heads.clone().map(|head| head.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0);
            bytes.extend(scales().flat_map(f32::to_le_bytes));
            for (head, scale) in heads.clone().zip(scales()) {
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                bytes.extend(head.iter().map(|x| (x * inverse).round_ties_even() as i8 as u8));
            }
            bytes.into()
        }
    }
}

/// Bytes as rows, put into `rows`; `false`, and nothing useful there, where they are not whole rows of this format.
pub fn decode(format: WireFormat, geometry: &KvGeometry, bytes: &[u8], rows: &mut Vec<f32>) -> bool {
    rows.clear();
    if !bytes.len().is_multiple_of(row_bytes(format, geometry)) {
        return false;
    }
    match format {
        WireFormat::F32 => rows.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        WireFormat::F16 => {
            let halves: Vec<f16> = bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
            rows.resize(halves.len(), 0.0);
            halves.convert_to_f32_slice(rows);
        }
        WireFormat::Bf16 => rows.extend(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        WireFormat::Int8 => {
            let heads = bytes.len() / row_bytes(format, geometry) * geometry.kv_heads;
            let (scales, codes) = bytes.split_at(heads * 4);
            for (scale, codes) in scales.chunks_exact(4).zip(codes.chunks_exact(geometry.head_dim)) {
                let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
                rows.extend(codes.iter().map(|code| f32::from(*code as i8) * scale));
            }
        }
    }
    true
}

/// Numbers as bytes, in one copy where the machine has this order already.
fn little_endian<T: bytemuck::NoUninit, const N: usize>(numbers: &[T], bytes: impl Fn(T) -> [u8; N]) -> Bytes {
    if cfg!(target_endian = "little") {
        return Bytes::copy_from_slice(bytemuck::cast_slice(numbers));
    }
    numbers.iter().flat_map(|x| bytes(*x)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: KvGeometry = KvGeometry { layers: 1, kv_heads: 3, head_dim: 10 };

    #[test]
    fn what_arrives_is_what_the_format_holds() {
        let rows: Vec<f32> = (0..7 * 30).map(|i| (i * 7919 % 101) as f32 * 0.37 - 18.0).collect();
        for (format, error) in
            [(WireFormat::F32, 0.0), (WireFormat::F16, 1.0 / 2048.0), (WireFormat::Bf16, 1.0 / 256.0), (WireFormat::Int8, 0.51 / 127.0)]
        {
            let bytes = encode(format, &GEOMETRY, &rows);
            assert_eq!(bytes.len(), 7 * row_bytes(format, &GEOMETRY));
            let mut back = Vec::new();
            assert!(decode(format, &GEOMETRY, &bytes, &mut back));
            for (head, (got, sent)) in back.chunks(10).zip(rows.chunks(10)).enumerate() {
                let greatest = sent.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (got, sent) in got.iter().zip(sent) {
                    assert!((got - sent).abs() <= error * greatest, "{format} head {head}: {got}, not {sent}");
                }
            }
            // What arrived travels on unchanged.
            let mut again = Vec::new();
            assert!(decode(format, &GEOMETRY, &encode(format, &GEOMETRY, &back), &mut again));
            assert!(again.iter().zip(&back).all(|(a, b)| (a - b).abs() <= b.abs() * 1e-6), "{format}");
            assert!(!decode(format, &GEOMETRY, &bytes[1..], &mut back));
        }
    }

    #[test]
    fn rows_are_encoded_one_by_one() {
        let rows: Vec<f32> = (0..4 * 30).map(|i| (i * 31 % 17) as f32 - 8.0).collect();
        for format in [WireFormat::F16, WireFormat::Bf16, WireFormat::Int8] {
            let (mut all, mut last) = (Vec::new(), Vec::new());
            assert!(decode(format, &GEOMETRY, &encode(format, &GEOMETRY, &rows), &mut all));
            assert!(decode(format, &GEOMETRY, &encode(format, &GEOMETRY, &rows[90..]), &mut last));
            assert_eq!(all[90..], last);
        }
    }
}
