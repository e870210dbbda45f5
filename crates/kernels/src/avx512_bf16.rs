//! AVX-512 BF16: two multiply-adds of bfloat16 an instruction.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use crate::avx512::Avx512;

/// Made by [`Avx512Bf16::detect`] alone: a value is proof that the CPU has the features, and that `VDPBF16PS` is two multiply-adds,
/// each rounded once, that of the upper halves first.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    /// The proof, where this CPU can give it.
    pub(crate) fn detect() -> Option<Self> {
        static HERE: OnceLock<bool> = OnceLock::new();
        let unit = Self(Avx512::detect()?);
        HERE.get_or_init(|| is_x86_feature_detected!("avx512bf16") && unit.is_two_links()).then_some(unit)
    }

    /// Whether the instruction is faster than two of f32: on AMD's CPUs. A Sapphire Rapids does 43 billion multiply-adds a second with it
    /// and 94 with f32's own.
    pub(crate) fn is_fast(self) -> bool {
        // Asked once: a hypervisor answers CPUID, which takes microseconds.
        static FAST: OnceLock<bool> = OnceLock::new();
        *FAST.get_or_init(|| {
            let vendor = __cpuid(0);
            [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
        })
    }

    pub(crate) fn avx512(self) -> Avx512 {
        self.0
    }

    /// Runs `run`, compiled for the unit where it is inlined.
    #[inline(always)]
    pub(crate) fn run<R>(self, run: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
        fn with<R>(run: impl FnOnce() -> R) -> R {
            run()
        }
        // SAFETY: `self` proves the features.
        unsafe { with(run) }
    }

    #[inline(always)]
    pub(crate) fn zero(self) -> __m512 {
        // SAFETY: `self` proves the features, here and below.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    pub(crate) fn zero_pairs(self) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    pub(crate) fn splat(self, pair: u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(pair as i32) }
    }
    #[inline(always)]
    pub(crate) fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    /// Of two lines of 16 pairs: the lower halves of both, and the upper halves of both, each with the first line's in the upper half.
    ///
    /// # Safety
    /// Two lines can be read at `p`.
    #[inline(always)]
    pub(crate) unsafe fn load_links(self, p: *const u32) -> [__m512i; 2] {
        // SAFETY: see above.
        unsafe {
            let (first, second) = (_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(16).cast()));
            let upper: __mmask32 = 0xaaaa_aaaa;
            [
                _mm512_mask_blend_epi16(upper, second, _mm512_slli_epi32::<16>(first)),
                _mm512_mask_blend_epi16(upper, _mm512_srli_epi32::<16>(second), first),
            ]
        }
    }
    /// `sum` and the products of 16 pairs: of the upper halves, then of the lower ones.
    #[inline(always)]
    pub(crate) fn two_links(self, sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: see above; both types are 512 bits, of any value.
        unsafe { _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b)) }
    }

    /// Manuals say that the instruction is what this type promises; a CPU that does it otherwise is not trusted.
    fn is_two_links(self) -> bool {
        // Sums of numbers whose sizes are far apart: each order and each way of rounding has bits of its own.
        let pair = |i: u32| (0x3f81_3e43 + i * 0x0113_0029) ^ (i % 2 * 0x8000);
        let (a, b): ([u32; 16], [u32; 16]) = (std::array::from_fn(|i| pair(i as u32)), std::array::from_fn(|i| pair(15 - i as u32)));
        let sum: [f32; 16] = std::array::from_fn(|i| (i as f32 - 7.3) * 1.7);
        let (low, high) = (|x: u32| f32::from_bits(x << 16), |x: u32| f32::from_bits(x & 0xffff_0000));
        let mut got = [0.0f32; 16];
        self.run(
            #[inline(always)]
            || {
                // SAFETY: `detect` saw AVX-512 BF16 before it asked; arrays of 16.
                unsafe {
                    let [a, b] = [a, b].map(|x| _mm512_loadu_si512(x.as_ptr().cast()));
                    _mm512_storeu_ps(got.as_mut_ptr(), self.two_links(_mm512_loadu_ps(sum.as_ptr()), a, b));
                }
            },
        );
        (0..16).all(|i| {
            let want = low(a[i]).mul_add(low(b[i]), high(a[i]).mul_add(high(b[i]), sum[i]));
            got[i].to_bits() == want.to_bits()
        })
    }
}
