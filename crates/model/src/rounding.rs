//! Numbers as a quantised format has them.

use candle_core::quantized::GgmlDType;
use candle_core::quantized::k_quants::{BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, GgmlType};

/// Rounds `numbers`, whole blocks of 32, to what remains of them in this format. Formats without blocks of 32 change nothing.
pub fn round_to_blocks(dtype: GgmlDType, numbers: &mut [f32]) {
    match dtype {
        GgmlDType::Q4_0 => round::<BlockQ4_0>(numbers),
        GgmlDType::Q4_1 => round::<BlockQ4_1>(numbers),
        GgmlDType::Q5_0 => round::<BlockQ5_0>(numbers),
        GgmlDType::Q5_1 => round::<BlockQ5_1>(numbers),
        GgmlDType::Q8_0 => round::<BlockQ8_0>(numbers),
        _ => {}
    }
}

fn round<B: GgmlType>(numbers: &mut [f32]) {
    let mut blocks = vec![B::zeros(); numbers.len() / B::BLCK_SIZE];
    B::from_float(numbers, &mut blocks);
    B::to_float(&blocks, numbers);
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn numbers_are_those_of_a_quantised_tensor() {
        let numbers: Vec<f32> = (0..256).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect();
        for dtype in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q5_0, GgmlDType::Q5_1, GgmlDType::Q8_0] {
            let tensor = Tensor::from_slice(&numbers, (4, 64), &Device::Cpu).unwrap();
            let quantised = QTensor::quantize(&tensor, dtype).unwrap().dequantize(&Device::Cpu).unwrap();
            let mut rounded = numbers.clone();
            round_to_blocks(dtype, &mut rounded);
            assert_eq!(quantised.flatten_all().unwrap().to_vec1::<f32>().unwrap(), rounded, "{dtype:?}");
            assert_ne!(rounded, numbers);
        }
        let mut same = numbers.clone();
        round_to_blocks(GgmlDType::F32, &mut same);
        assert_eq!(same, numbers);
    }
}
