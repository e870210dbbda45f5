//! AVX-512 with VNNI: sixteen lanes.

use std::arch::x86_64::*;

use crate::simd::{LINE, Simd};

/// Made by [`Avx512::detect`] alone: a value is proof that the CPU has the features.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The proof, where this CPU can give it.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self(()))
    }

    /// Runs `run`, compiled for these features where it is inlined.
    #[inline(always)]
    pub(crate) fn run<R>(self, run: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn with<R>(run: impl FnOnce() -> R) -> R {
            run()
        }
        // SAFETY: `self` proves the features.
        unsafe { with(run) }
    }
}

// SAFETY of every block below: `self` proves the features that `detect` asks for; what a pointer must bear, the trait's
// contract says, and all loads and stores are the unaligned ones.
impl Simd for Avx512 {
    const LANES: usize = 16;
    type V = __m512;
    type I = __m512i;

    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // SAFETY: a prefetch of any address does nothing worse than nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u32) -> [__m512; 2] {
        // SAFETY: see above; a bfloat16 is the upper half of an f32.
        unsafe {
            let pairs = _mm512_loadu_si512(p.cast());
            [_mm512_slli_epi32::<16>(pairs), _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff))].map(|x| _mm512_castsi512_ps(x))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: __m512) {
        // SAFETY: see above.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
    }
    #[inline(always)]
    unsafe fn sum_i8(self, p: *const i8) -> i32 {
        // SAFETY: see above.
        unsafe { crate::avx2::sum_i8(p) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn exp2_integral(self, a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127)))) }
    }
    #[inline(always)]
    unsafe fn dot_u4<const R: usize, const P: usize>(
        self,
        codes: [*const u8; P],
        x: *const i8,
        start: Option<*const i32>,
    ) -> [[__m512i; P]; R] {
        // SAFETY: see above.
        unsafe {
            let low = _mm512_set1_epi8(15);
            let mut sums = [[_mm512_setzero_si512(); P]; R];
            if let Some(start) = start {
                for (r, sums) in sums.iter_mut().enumerate() {
                    *sums = [_mm512_set1_epi32(*start.add(r)); P];
                }
            }
            for line in 0..4 {
                let (mut first, mut second) = ([low; P], [low; P]);
                for p in 0..P {
                    let both = _mm512_loadu_si512(codes[p].add(line * LINE).cast());
                    first[p] = _mm512_and_si512(both, low);
                    second[p] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = x.add(r * 32 + line * 4).cast::<i32>();
                    let (low, high) = (_mm512_set1_epi32(x.read_unaligned()), _mm512_set1_epi32(x.add(4).read_unaligned()));
                    for p in 0..P {
                        sums[p] = _mm512_dpbusd_epi32(sums[p], first[p], low);
                        sums[p] = _mm512_dpbusd_epi32(sums[p], second[p], high);
                    }
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
        by_128: *const i32,
    ) -> [[__m512i; P]; R] {
        // SAFETY: see above. The codes themselves are multiplied: 128 times the values' sum is too much.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); P]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                *sums = [_mm512_set1_epi32(*by_128.add(r)); P];
            }
            for line in 0..LINES {
                let mut lines = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    lines[p] = _mm512_loadu_si512(codes[p].add(line * LINE).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let quad = _mm512_set1_epi32(x.add(r * 32 + line * 4).cast::<i32>().read_unaligned());
                    for p in 0..P {
                        sums[p] = _mm512_dpbusd_epi32(sums[p], lines[p], quad);
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
    ) -> [[__m512i; P]; R] {
        // SAFETY: see above.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); P]; R];
            for line in 0..LINES {
                let mut lines = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    lines[p] = _mm512_loadu_si512(codes[p].add(line * LINE).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let quad = _mm512_set1_epi32(x.add(r * 32 + line * 4).cast::<i32>().read_unaligned());
                    for p in 0..P {
                        sums[p] = _mm512_dpbusd_epi32(sums[p], quad, lines[p]);
                    }
                }
            }
            sums
        }
    }
    #[inline(always)]
    fn greatest(self, a: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    fn to_f32(self, a: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
}
