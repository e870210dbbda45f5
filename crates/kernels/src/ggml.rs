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
        match self {
            Self::Q4_0 => 8,
            Self::Q4_1 | Self::Q4K => 0,
            _ => 128,
        }
    }

    /// Lines of 64 bytes that hold 16 outputs' codes of a group.
    pub(crate) fn lines(self) -> usize {
        if self.four_bits() { 4 } else { self.group() / 4 }
    }

    /// Group `index` of a row: its block's bytes, and its place in the block.
    fn block_of(self, row: &[u8], index: usize) -> (&[u8], usize) {
        let per_block = self.block() / self.group();
        (&row[index / per_block * self.bytes()..][..self.bytes()], index % per_block)
    }

    /// Scale and minimum of group `index` of a row.
    pub(crate) fn factors(self, row: &[u8], index: usize) -> (f32, f32) {
        let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        let (b, part) = self.block_of(row, index);
        match self {
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 => (half(b), 0.0),
            Self::Q4_1 | Self::Q5_1 => (half(b), half(&b[2..])),
            Self::Q4K => {
                let scales = &b[4..16];
                let (scale, min) = if part < 4 {
                    (scales[part] & 63, scales[part + 4] & 63)
                } else {
                    ((scales[part + 4] & 15) | (scales[part - 4] >> 6 << 4), (scales[part + 4] >> 4) | (scales[part] >> 6 << 4))
                };
                (half(b) * f32::from(scale), -(half(&b[2..]) * f32::from(min)))
            }
            Self::Q6K => (half(&b[208..]) * f32::from(b[192 + part] as i8), 0.0),
        }
    }

    /// Codes of group `index` of a row, the first [`BlockFormat::group`] of the array.
    pub(crate) fn codes(self, row: &[u8], index: usize) -> [u8; 32] {
        let (b, part) = self.block_of(row, index);
        // Low halves are the first 16 weights, high halves the other 16.
        let nibbles = |bytes: &[u8]| std::array::from_fn::<u8, 32, _>(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 });
        let fifths = |bits: &[u8], bytes: &[u8]| {
            let bits = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
            let mut codes = nibbles(bytes);
            codes.iter_mut().enumerate().for_each(|(i, code)| *code |= ((bits >> i & 1) << 4) as u8);
            codes
        };
        match self {
            Self::Q4_0 => nibbles(&b[2..]),
            Self::Q4_1 => nibbles(&b[4..]),
            Self::Q5_0 => fifths(&b[2..], &b[6..]).map(|c| c + 128 - 16),
            Self::Q5_1 => fifths(&b[4..], &b[8..]).map(|c| c + 128),
            Self::Q8_0 => std::array::from_fn(|i| b[2 + i] ^ 128),
            Self::Q4K => std::array::from_fn(|i| (b[16 + part / 2 * 32 + i] >> (part % 2 * 4)) & 15),
            Self::Q6K => {
                // Halves of 128; in each, four runs of 32 share the bytes of `high`, two bits each.
                let (run, first) = (part % 8 / 2, part % 2 * 16);
                let low = &b[part / 8 * 64 + run % 2 * 32 + first..];
                let high = &b[128 + part / 8 * 32 + first..];
                let mut codes = [0; 32];
                for (i, code) in codes.iter_mut().take(16).enumerate() {
                    *code = ((low[i] >> (run / 2 * 4) & 15) | (high[i] >> (run * 2) & 3) << 4) + 128 - 32;
                }
                codes
            }
        }
    }
}

/// Rounds a group to a block of [`BlockFormat::Q8_0`]: the greatest has the code 127 or -127.
pub(crate) fn round_q8_0(group: [f32; 32], block: &mut [u8]) {
    let greatest = group.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = greatest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (code, x) in block[2..].iter_mut().zip(group) {
        *code = ((x * inverse).round() as i8).cast_unsigned();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const FORMATS: [BlockFormat; 7] =
        [BlockFormat::Q4_0, BlockFormat::Q4_1, BlockFormat::Q5_0, BlockFormat::Q5_1, BlockFormat::Q8_0, BlockFormat::Q4K, BlockFormat::Q6K];

    /// Random blocks whose half-precision fields are small numbers.
    pub(crate) fn blocks(format: BlockFormat, count: usize) -> Vec<u8> {
        let mut state = 88_172_645_463_325_252u64;
        let mut bytes: Vec<u8> = (0..count * format.bytes())
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 24) as u8
            })
            .collect();
        let halves: &[usize] = match format {
            BlockFormat::Q6K => &[208],
            BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K => &[0, 2],
            _ => &[0],
        };
        for (b, block) in bytes.chunks_exact_mut(format.bytes()).enumerate() {
            for &at in halves {
                let value = f16::from_f32(((b * 37 + at) % 19) as f32 * 0.01 - 0.07);
                block[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
        }
        bytes
    }

    #[test]
    fn codes_fit_their_bits() {
        for format in FORMATS {
            let bytes = blocks(format, 4);
            for group in 0..4 * format.block() / format.group() {
                let codes = format.codes(&bytes, group);
                assert!(!format.four_bits() || codes.iter().all(|c| *c < 16), "{format:?}");
            }
        }
    }
}
