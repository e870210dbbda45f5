//! AVX2 with FMA and F16C: eight lanes.

use std::arch::x86_64::*;

use crate::simd::{LINE, Simd};

/// Made by [`Avx2::detect`] alone: a value is proof that the CPU has the features.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof, where this CPU can give it.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }
}

// SAFETY of every block below: `self` proves AVX2, FMA and F16C; what a pointer must bear, the trait's contract says,
// and all loads and stores are the unaligned ones.
impl Simd for Avx2 {
    const LANES: usize = 8;
    type V = __m256;
    type I = __m256i;

    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // SAFETY: a prefetch of any address does nothing worse than nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u32) -> [__m256; 2] {
        // SAFETY: see above; a bfloat16 is the upper half of an f32.
        unsafe {
            let pairs = _mm256_loadu_si256(p.cast());
            [_mm256_slli_epi32::<16>(pairs), _mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff))].map(|x| _mm256_castsi256_ps(x))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: __m256) {
        // SAFETY: see above.
        unsafe {
            let wide = _mm256_cvtps_epi32(v);
            let pairs = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide));
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(pairs, pairs));
        }
    }
    #[inline(always)]
    unsafe fn sum_i8(self, p: *const i8) -> i32 {
        // SAFETY: see above.
        unsafe { sum_i8(p) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn exp2_integral(self, a: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127)))) }
    }
    #[inline(always)]
    unsafe fn dot_u4<const R: usize, const P: usize>(
        self,
        codes: [*const u8; P],
        x: *const i8,
        start: Option<*const i32>,
    ) -> [[__m256i; P]; R] {
        // SAFETY: see above. A pair of products is at most 2 x 15 x 127, eight of them fit 16 bits.
        unsafe {
            let low = _mm256_set1_epi8(15);
            let mut sums = [[_mm256_setzero_si256(); P]; R];
            for line in 0..4 {
                let (mut first, mut second) = ([low; P], [low; P]);
                for p in 0..P {
                    let both = _mm256_loadu_si256(codes[p].add(line * LINE).cast());
                    first[p] = _mm256_and_si256(both, low);
                    second[p] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = x.add(r * 32 + line * 4).cast::<i32>();
                    let (low, high) = (_mm256_set1_epi32(x.read_unaligned()), _mm256_set1_epi32(x.add(4).read_unaligned()));
                    for p in 0..P {
                        sums[p] = _mm256_add_epi16(sums[p], _mm256_maddubs_epi16(first[p], low));
                        sums[p] = _mm256_add_epi16(sums[p], _mm256_maddubs_epi16(second[p], high));
                    }
                }
            }
            let ones = _mm256_set1_epi16(1);
            for (r, sums) in sums.iter_mut().enumerate() {
                let start = if let Some(start) = start { _mm256_set1_epi32(*start.add(r)) } else { _mm256_setzero_si256() };
                for sum in sums {
                    *sum = _mm256_add_epi32(_mm256_madd_epi16(*sum, ones), start);
                }
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn dot_i8<const R: usize, const P: usize, const LINES: usize>(
        self,
        codes: [*const u8; P],
        x: *const i8,
        _: *const i32,
    ) -> [[__m256i; P]; R] {
        // SAFETY: see above. The magnitude of the code less 128 times the value with its sign: a pair of products is at
        // most 2 x 128 x 127, which fits 16 bits, and pairs are widened before they are summed.
        unsafe {
            let (ones, middle) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128));
            let mut sums = [[_mm256_setzero_si256(); P]; R];
            for line in 0..LINES {
                let (mut lines, mut magnitudes) = ([middle; P], [middle; P]);
                for p in 0..P {
                    lines[p] = _mm256_xor_si256(_mm256_loadu_si256(codes[p].add(line * LINE).cast()), middle);
                    magnitudes[p] = _mm256_abs_epi8(lines[p]);
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let quad = _mm256_set1_epi32(x.add(r * 32 + line * 4).cast::<i32>().read_unaligned());
                    for p in 0..P {
                        let pairs = _mm256_maddubs_epi16(magnitudes[p], _mm256_sign_epi8(quad, lines[p]));
                        sums[p] = _mm256_add_epi32(sums[p], _mm256_madd_epi16(pairs, ones));
                    }
                }
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn dot_weights<const R: usize, const P: usize, const LINES: usize>(
        self,
        codes: [*const i8; P],
        x: *const i8,
    ) -> [[__m256i; P]; R] {
        // SAFETY: see above. A pair of products is at most 2 x 127 x 127, which fits 16 bits.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut sums = [[_mm256_setzero_si256(); P]; R];
            for line in 0..LINES {
                for (r, sums) in sums.iter_mut().enumerate() {
                    let quad = _mm256_set1_epi32(x.add(r * 32 + line * 4).cast::<i32>().read_unaligned());
                    for p in 0..P {
                        let pairs = _mm256_maddubs_epi16(quad, _mm256_loadu_si256(codes[p].add(line * LINE).cast()));
                        sums[p] = _mm256_add_epi32(sums[p], _mm256_madd_epi16(pairs, ones));
                    }
                }
            }
            sums
        }
    }
    #[inline(always)]
    fn greatest(self, a: __m256) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn to_f32(self, a: __m256i) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(a) }
    }
}

/// The sum of 16 integers: plus 128 they have no sign, and the bytes of each half are summed at once.
///
/// # Safety
/// 16 values can be read at `p`. All of x86-64 has the instructions.
#[inline(always)]
pub(crate) unsafe fn sum_i8(p: *const i8) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        let bytes = _mm_xor_si128(_mm_loadu_si128(p.cast()), _mm_set1_epi8(-128));
        let sums = _mm_sad_epu8(bytes, _mm_setzero_si128());
        _mm_cvtsi128_si32(sums) + _mm_extract_epi16::<4>(sums) - 16 * 128
    }
}
