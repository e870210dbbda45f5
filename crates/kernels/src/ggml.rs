//! The quantised block formats of GGUF files: a group of weights as small integers, one scale and one minimum.

use half::f16;

/// Block formats that are multiplied as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are ggml's
pub enum BlockFormat {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q6K,
}

/// `N` consecutive weights of a row: `scale * code + min`.
pub(crate) struct Group {
    /// The first [`BlockFormat::group`] count.
    pub(crate) codes: [i8; 32],
    pub(crate) scale: f32,
    pub(crate) min: f32,
}

impl BlockFormat {
    /// Weights in a block: a row's length is a multiple of it.
    pub fn block(self) -> usize {
        match self {
            Self::Q4K | Self::Q6K => 256,
            _ => 32,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Weights that share a scale.
    pub(crate) fn group(self) -> usize {
        if self == Self::Q6K { 16 } else { 32 }
    }

    /// Whether codes are from 0 to 15.
    pub(crate) fn four_bits(self) -> bool {
        matches!(self, Self::Q4_0 | Self::Q4_1 | Self::Q4K)
    }

    /// Whether groups have a minimum beside the scale.
    pub(crate) fn has_min(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1 | Self::Q4K)
    }

    /// What is subtracted from each code before the scale: the weight is `scale * (code - zero) + min`.
    pub(crate) fn zero(self) -> i32 {
        if self == Self::Q4_0 { 8 } else { 0 }
    }

    /// Group `index` of a row.
    pub(crate) fn group_of(self, row: &[u8], index: usize) -> Group {
        let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        let per_block = self.block() / self.group();
        let b = &row[index / per_block * self.bytes()..][..self.bytes()];
        let part = index % per_block;
        // Low halves are the first 16 weights, high halves the other 16.
        let nibbles = |bytes: &[u8]| std::array::from_fn::<i8, 32, _>(|i| (if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 }) as i8);
        let fifths = |bits: &[u8], bytes: &[u8]| {
            let bits = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
            let mut codes = nibbles(bytes);
            codes.iter_mut().enumerate().for_each(|(i, code)| *code |= ((bits >> i & 1) << 4) as i8);
            codes
        };
        match self {
            Self::Q4_0 => Group { codes: nibbles(&b[2..]), scale: half(b), min: 0.0 },
            Self::Q4_1 => Group { codes: nibbles(&b[4..]), scale: half(b), min: half(&b[2..]) },
            Self::Q5_0 => Group { codes: fifths(&b[2..], &b[6..]).map(|c| c - 16), scale: half(b), min: 0.0 },
            Self::Q5_1 => Group { codes: fifths(&b[4..], &b[8..]), scale: half(b), min: half(&b[2..]) },
            Self::Q8_0 => Group { codes: std::array::from_fn(|i| b[2 + i] as i8), scale: half(b), min: 0.0 },
            Self::Q4K => {
                let (scales, codes) = (&b[4..16], &b[16..]);
                let (scale, min) = if part < 4 {
                    (scales[part] & 63, scales[part + 4] & 63)
                } else {
                    ((scales[part + 4] & 15) | (scales[part - 4] >> 6 << 4), (scales[part + 4] >> 4) | (scales[part] >> 6 << 4))
                };
                Group {
                    codes: std::array::from_fn(|i| (codes[part / 2 * 32 + i] >> (part % 2 * 4) & 15) as i8),
                    scale: half(b) * f32::from(scale),
                    min: -(half(&b[2..]) * f32::from(min)),
                }
            }
            Self::Q6K => {
                // Halves of 128; in each, four runs of 32 share the bytes of `high`, two bits each.
                let (run, first) = (part % 8 / 2, part % 2 * 16);
                let low = &b[part / 8 * 64 + run % 2 * 32 + first..];
                let high = &b[128 + part / 8 * 32 + first..];
                let mut codes = [0; 32];
                for (i, code) in codes.iter_mut().take(16).enumerate() {
                    *code = ((low[i] >> (run / 2 * 4) & 15) | (high[i] >> (run * 2) & 3) << 4) as i8 - 32;
                }
                Group { codes, scale: half(&b[208..]) * f32::from(b[192 + part] as i8), min: 0.0 }
            }
        }
    }
}
